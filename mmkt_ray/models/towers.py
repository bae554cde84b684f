"""What stands below the fusion: input stages, linear layers on dense or sparse parts, towers, levels of towers.

Axes: B batch, D width of the features that come in, H hidden width.

Sources: LayerNorm (https://arxiv.org/abs/1607.06450), dropout (https://jmlr.org/papers/v15/srivastava14a.html).
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mmkt_ray.models.sharing import SCHEMES, Pair, module_name
from mmkt_ray.models.sparse import SparseBatch, SparseLinear

Features: TypeAlias = Tensor | SparseBatch


class Width(NamedTuple):
    """What a signal between two modules looks like: (B, dim) floats, dense or sparse."""

    dim: int
    sparse: bool = False


def make_linear(width: Width, out_dim: int, bias: bool = True) -> nn.Linear | SparseLinear:
    """The linear map from signals of `width` to (B, out_dim)."""
    return (SparseLinear if width.sparse else nn.Linear)(width.dim, out_dim, bias=bias)


class ConcatLinear(nn.Module):
    """A linear layer on the concatenation of named parts, [x1; ..; xn] W + b, as the sum of each part's own product.

    So parts may be dense or sparse, and a part that is absent in a row adds nothing to that row.
    """

    def __init__(self, widths: dict[str, Width], out_dim: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for name, width in sorted(widths.items()):
            self.parts[module_name(name)] = make_linear(width, out_dim, bias=False)
        with torch.no_grad():
            for part in self.parts.values():
                part.weight /= math.sqrt(len(widths))  # the concatenation's fan-in, not the part's
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, parts: dict[str, Features], present: dict[str, Tensor]) -> Tensor:
        """parts: name -> (B, D_name); present: name -> (B,) bool, all rows where a name is missing. Returns (B, H)."""
        total = self.bias
        for name in sorted(parts):
            y = self.parts[module_name(name)](parts[name])
            total = total + (torch.where(present[name][:, None], y, 0.0) if name in present else y)
        return total


class InputStage(nn.Module):
    """Brings one modality's features to unit scale by statistics of the train rows, then drops some while training.

    Dense: (x - mean) / std per feature, zeros in absent rows. Sparse: divided by one number, the root mean square of
    the non-zero train values, so that zeros stay zeros and one learning rate suits both kinds.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: Width, feature_dropout: float) -> None:
        super().__init__()
        shape = () if width.sparse else (width.dim,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.dropout = nn.Dropout(feature_dropout)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """mean, std: (D,) for dense features, () for sparse ones, whose mean is not used."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))

    def forward(self, x: Features, present: Tensor) -> Features:
        if isinstance(x, SparseBatch):
            return x._replace(values=self.dropout(x.values / self.std))
        return self.dropout(torch.where(present[:, None], (x - self.mean) / self.std, 0.0))


class Tower(nn.Sequential):
    """One level's work on one signal: linear, layer norm, ReLU, dropout. (B, D) -> (B, H)."""

    def __init__(self, width: Width, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = make_linear(width, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)


Path = tuple[object, ...]  # (modality, key at level 1, key at level 2, ..): pairs with equal paths carry equal signals


class Level(nn.Module):
    """All towers of one level: one per key of the scheme, each applied once to every distinct signal that reaches it.

    Where the signals that meet in one tower differ in width or kind, each modality gets a linear adapter to `hidden_dim`
    in front of that tower. It is shared by exactly the tasks that share the tower, so it leaks nothing between others.
    """

    def __init__(
        self,
        scheme: str,
        paths: dict[Pair, Path],
        widths: dict[Path, Width],
        out_dims: dict[str, int],
        adapter_dim: int,
        dropout: float,
    ) -> None:
        """paths, widths: the signals that come in; out_dims: modality -> width of the towers it goes through."""
        super().__init__()
        keys = {pair: SCHEMES[scheme](*pair) for pair in sorted(paths)}
        self.paths: dict[Pair, Path] = {pair: (*paths[pair], key) for pair, key in keys.items()}
        self.widths: dict[Path, Width] = {}
        self.steps: list[tuple[Path, str, str, Path]] = []  # signal in, adapter ("" for none), tower, signal out
        self.adapters, self.towers = nn.ModuleDict(), nn.ModuleDict()
        for key in sorted(set(keys.values())):
            sources = {self.paths[pair]: paths[pair] for pair in keys if keys[pair] == key}  # signal out -> signal in
            kinds = {widths[source] for source in sources.values()}
            width = kinds.pop() if len(kinds) == 1 else None  # None: they differ and need adapters
            modality = next(pair[1] for pair in keys if keys[pair] == key)
            tower, out_dim = module_name(*key), out_dims[modality]
            self.towers[tower] = Tower(width or Width(adapter_dim), out_dim, dropout)
            for target, source in sources.items():
                adapter = "" if width else module_name(*key, str(source[0]))
                if adapter and adapter not in self.adapters:
                    self.adapters[adapter] = make_linear(widths[source], adapter_dim)
                self.steps.append((source, adapter, tower, target))
                self.widths[target] = Width(out_dim)

    def forward(self, signals: dict[Path, Features]) -> dict[Path, Features]:
        """signals: path -> (B, D). Returns this level's paths -> (B, H)."""
        outputs: dict[Path, Features] = {}
        for source, adapter, tower, target in self.steps:
            x = signals[source]
            outputs[target] = self.towers[tower](self.adapters[adapter](x) if adapter else x)
        return outputs
