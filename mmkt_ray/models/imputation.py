"""Missing modalities: what stands in for features that a row does not have, the same in training and prediction.

    mask      nothing: the fusion reads what is there
    drop      as mask; training keeps complete rows only (`ModelSpec.missing == "drop"` tells it so)
    mean      the train mean, which is the zero vector after standardisation
    zero      raw zeros, after standardisation -mean / std
    token     a learned vector per modality, as the prompts of Lee et al. 2023 (https://arxiv.org/abs/2303.03369)
    generate  a linear prediction from the row's present modalities (`Generators`), the mean where none can tell

All but the first two count as present to the fusion, in rows that have at least one modality; a row with nothing
stays nothing. The features stand in before the towers. Sparse features have no mean row, which would be dense: there
mean and zero are both the empty row. A sparse token is one more column that is 1 in absent rows, so that each linear
map which reads the modality learns a vector of its own for them.

Axes: B batch, N train rows, M modalities, D features of one modality.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkt_ray.errors import DataError
from mmkt_ray.models.containers import ModuleDict
from mmkt_ray.models.sharing import module_name
from mmkt_ray.models.sparse import SparseBatch, sparse_matmul
from mmkt_ray.models.towers import FeatureBatch, Width

FILLS = ("mean", "zero", "token", "generate")  # the strategies after which an absent modality counts as present
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the ridge, times the mean squared norm of a row
MAX_FIT_ROWS = {"dense": 20_000, "sparse": 3_000}  # a linear map learns little from more; sparse: see `ridge`
MAX_CHOICE_ROWS = 2_000  # of these, for choosing the penalty


def hide_modalities(
    present: dict[str, Tensor], chance: float | Tensor, reads: Collection[tuple[str, ...]]
) -> dict[str, Tensor]:
    """Modality dropout: each present modality of a row is hidden with this chance,
    but every task keeps one of its own.

    Args:
        present: modality -> (B,) bool.
        chance: a number, or one for each member of a stack (P,); presence is then (P, B).
        reads: the modalities that each task reads. Where all would go, the one that stays is drawn evenly.

    ModDrop: Neverova et al. 2016 (https://arxiv.org/abs/1501.00102).
    """
    modalities = sorted(present)
    there = torch.stack([present[m] for m in modalities], dim=1)  # (B, M)
    draw = torch.where(there, torch.rand(there.shape, device=there.device), -1.0)
    kept = draw >= (chance[..., None, None] if isinstance(chance, Tensor) else chance)
    for names in sorted(set(reads)):
        read = torch.tensor([m in names for m in modalities], device=there.device)
        own = torch.where(read, draw, -1.0)
        kept = kept | (there & read & (own == own.amax(dim=-1, keepdim=True)))
    return dict(zip(modalities, kept.unbind(dim=-1), strict=True))


def fill_presence(present: dict[str, Tensor]) -> dict[str, Tensor]:
    """Presence after a fill: every modality, in the rows that have at least one."""
    anything = torch.stack(list(present.values()), dim=-1).any(dim=-1)
    return dict.fromkeys(present, anything)


class LinearMap(nn.Module):
    """x W + b with fixed numbers, zeros until they are set. (B, D) to (B, E)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: Width, out_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(width.dim, out_dim))
        self.register_buffer("bias", torch.zeros(out_dim))

    def forward(self, x: FeatureBatch) -> Tensor:
        product = sparse_matmul(x, self.weight) if isinstance(x, SparseBatch) else x @ self.weight
        return product + self.bias

    if TYPE_CHECKING:
        __call__ = forward


class Generators(nn.Module):
    """Predicts a modality's standardised features from each other one's by ridge regression;
    the mean of those present.

    One map per (source, target), not one per subset of sources: the maps then grow with the square of M, not with
    2^M, and each learns from all rows that have both. Sources of a target are the modalities that all its tasks read,
    so nothing reaches a task from what it may not read. Fitted before training (`fit`), fixed from then on.
    """

    def __init__(self, widths: Mapping[str, Width], sources: Mapping[str, list[str]]) -> None:
        """widths: of the standardised features by modality; sources:
        target -> modalities that it is predicted from."""
        super().__init__()
        self.sources = {target: sorted(names) for target, names in sorted(sources.items()) if names}
        self.maps: ModuleDict[LinearMap] = ModuleDict()
        for target, names in self.sources.items():
            for source in names:
                self.maps[module_name(target, source)] = LinearMap(widths[source], widths[target].dim)

    def forward(self, features: Mapping[str, FeatureBatch], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """features: standardised, (B, D_m). Returns target -> (B, D_target),
        zeros (the mean) where no source is there."""
        generated = {}
        for target, names in self.sources.items():
            there = torch.stack([present[s] for s in names], dim=-1)  # (B, sources)
            guesses = torch.stack([self.maps[module_name(target, s)](features[s]) for s in names], dim=-2)
            total = torch.where(there[..., None], guesses, 0.0).sum(dim=-2)
            generated[target] = total / there.sum(dim=-1, keepdim=True).clamp(min=1)
        return generated

    if TYPE_CHECKING:
        __call__ = forward

    def fit(self, features: Mapping[str, Any], present: Mapping[str, np.ndarray]) -> None:
        """Set all maps from standardised train rows.

        Args:
            features: modality -> (N, D), a NumPy array or a SciPy CSR matrix.
            present: modality -> (N,) bool.

        Raises: DataError if no two rows have a target together with any of its sources.
        """
        for target, names in self.sources.items():
            both = {s: np.flatnonzero(present[s] & present[target]) for s in names}
            if all(len(rows) < 2 for rows in both.values()):
                raise DataError(
                    f"model.missing: generate learns to predict '{target}' from train rows that have it together "
                    f"with one of {names}, and there are none: choose model.missing: mask or token"
                )
            for source, rows in both.items():
                if len(rows) >= 2:
                    rows = evenly(rows, MAX_FIT_ROWS["dense" if isinstance(features[source], np.ndarray) else "sparse"])
                    weight, bias = fit_ridge(features[source][rows], features[target][rows])
                    linear = self.maps[module_name(target, source)]
                    linear.weight.copy_(torch.from_numpy(weight))
                    linear.bias.copy_(torch.from_numpy(bias))


def fit_ridge(x: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression with the penalty that predicts every fifth row best. (N, D), (N, E) -> (D, E), (E,)."""
    if len(y) < 25:  # too few to choose by
        return ridge(x, y, PENALTIES[-1] * mean_squared_norm(x))
    some = evenly(np.arange(len(y)), MAX_CHOICE_ROWS)
    held_out, rest = some[::5], np.delete(some, slice(None, None, 5))
    penalties = [factor * mean_squared_norm(x) for factor in PENALTIES]
    errors = []
    for penalty in penalties:
        weight, bias = ridge(x[rest], y[rest], penalty)
        errors.append(float(np.square(x[held_out] @ weight + bias - y[held_out]).mean()))
    return ridge(x, y, penalties[int(np.argmin(errors))])


def ridge(x: Any, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """argmin over W, b of |y - x W - b|^2 + penalty |W|^2: (N, D), (N, E) -> (D, E), (E,) float32.

    In closed form, by the smaller of the two Gram matrices; of sparse x always by the one over rows, (N, N), centred
    afterwards, so that nothing of width D is made but the result.
    """
    (rows, columns), dense = x.shape, isinstance(x, np.ndarray)
    x_mean, y_mean = np.asarray(x.mean(axis=0), dtype=np.float64).ravel(), y.mean(axis=0, dtype=np.float64)
    y = y - y_mean
    shift = np.zeros(columns) if dense else x_mean  # what is still to be taken from each row
    if dense:
        x = x - x_mean.astype(x.dtype)
    if dense and columns <= rows:
        weight = np.linalg.solve(x.T @ x + penalty * np.eye(columns), x.T @ y)
    else:
        products = x @ x.T
        along = x @ shift
        gram = (products if dense else products.toarray()) - along[:, None] - along + shift @ shift
        duals = np.linalg.solve(gram + penalty * np.eye(rows), y)
        weight = x.T @ duals - np.outer(shift, duals.sum(axis=0))
    return weight.astype(np.float32), (y_mean - x_mean @ weight).astype(np.float32)


def mean_squared_norm(x: Any) -> float:
    """Of the rows of a dense or sparse matrix (N, D); 1 for a matrix of zeros."""
    values = x if isinstance(x, np.ndarray) else x.data
    return float(np.square(values, dtype=np.float64).sum()) / x.shape[0] or 1.0


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly spaced."""
    return rows[:: -(-len(rows) // most)]
