"""Augmentation of features in training: word dropout, noise, mixup.

Axes: B rows of a batch, D features of one modality, Z non-zero values of a batch.

Random numbers come from torch's global generator, which the loop seeds for every epoch and rank.

Sources: word dropout, Iyyer et al. 2015 (https://aclanthology.org/P15-1162); noise, Bishop 1995
(https://doi.org/10.1162/neco.1995.7.1.108); mixup, Zhang et al. 2018 (https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmkt_ray.config import AugmentConfig
from mmkt_ray.errors import ConfigError
from mmkt_ray.models import FeatureBatch, SparseBatch
from mmkt_ray.training.batches import Batch, Mixed


def check_augment(augment: AugmentConfig, sparse: Mapping[str, bool]) -> None:
    """Raises: ConfigError if an augmentation has no features to act on.
    sparse: modality -> are its features sparse?"""
    for name, wanted, kind in (("word_dropout", augment.word_dropout, True), ("noise", augment.noise, False)):
        if wanted and kind not in sparse.values():
            raise ConfigError(
                f"training.augment.{name} acts on {'sparse' if kind else 'dense'} features only, and those of "
                f"{', '.join(sorted(sparse))} are {'dense' if kind else 'sparse'}: set it to 0"
            )


def augment_batch(batch: Batch, augment: AugmentConfig, stds: Mapping[str, Tensor]) -> Batch:
    """The augmented batch. stds: modality -> (D,) standard deviation of its dense features."""
    features = dict(batch.features)
    for m, x in sorted(features.items()):
        if isinstance(x, SparseBatch):
            features[m] = drop_terms(x, augment.word_dropout) if augment.word_dropout else x
        elif augment.noise:
            features[m] = x + augment.noise * stds[m] * torch.randn_like(x)
    batch = replace(batch, features=features)
    return mix_rows(batch, augment.mixup) if augment.mixup else batch


def drop_terms(x: SparseBatch, rate: float) -> SparseBatch:
    """Set each value to 0 with probability `rate`, then scale each row to its Euclidean length before.

    A row that would lose all its values keeps them all.
    """
    kept = torch.where(torch.rand_like(x.values) >= rate, x.values, 0.0)
    before, after = row_lengths(x), row_lengths(x._replace(values=kept))
    rows = row_numbers(x)
    values = torch.where(after[rows] > 0, kept * (before / after.clamp(min=1e-12))[rows], x.values)
    return x._replace(values=values)


def row_numbers(x: SparseBatch) -> Tensor:
    """(Z,) the row of each value."""
    counts = x.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(x.values))


def row_lengths(x: SparseBatch) -> Tensor:
    """(B,) Euclidean norms."""
    return torch.segment_reduce(x.values.square(), "sum", offsets=x.offsets, initial=0.0).sqrt()


def mix_rows(batch: Batch, alpha: float) -> Batch:
    """Each row as (1 - s) x + s y of itself and a random partner of the batch, s from Beta(alpha, alpha);
    labels likewise.

    A row keeps its own presence pattern. It stays unmixed if its partner lacks one of its modalities, or is the row
    itself. The losses of its label and of its partner's have weights 1 - s and s; an absent label adds nothing.
    Teachers' targets are mixed like features.
    """
    device = next(iter(batch.present.values())).device
    num_rows = len(next(iter(batch.present.values())))
    partner = torch.randperm(num_rows, device=device)
    share = torch.distributions.Beta(alpha, alpha).sample((num_rows,)).to(device)
    for there in batch.present.values():
        share = torch.where(there & ~there[partner], 0.0, share)
    features = {m: mix_features(x, partner, share) for m, x in batch.features.items()}
    unmixed = share[:, None] == 0  # keeps its target even where the partner's is NaN
    targets = {t: torch.where(unmixed, y, torch.lerp(y, y[partner], share[:, None])) for t, y in batch.targets.items()}
    mixed = Mixed({t: y[partner] for t, y in batch.labels.items()}, share)
    return replace(batch, features=features, mixed=mixed, targets=targets)


def mix_features(x: FeatureBatch, partner: Tensor, share: Tensor) -> FeatureBatch:
    """(1 - share) x + share x[partner], row by row. x: (B, D); partner, share: (B,)."""
    if not isinstance(x, SparseBatch):
        return torch.lerp(x, x[partner], share[:, None])
    other = take_rows(x, partner)
    rows, other_rows = row_numbers(x), row_numbers(other)
    order = torch.argsort(torch.cat([rows, other_rows]), stable=True)
    values = torch.cat([x.values * (1 - share)[rows], other.values * share[other_rows]])[order]
    return SparseBatch(torch.cat([x.indices, other.indices])[order], x.offsets + other.offsets, values)


def take_rows(x: SparseBatch, rows: Tensor) -> SparseBatch:
    """Some rows, in the order given."""
    counts = x.offsets.diff()[rows]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(x.offsets[rows] - offsets[:-1], counts)
    places = torch.arange(len(shift), device=shift.device) + shift
    return SparseBatch(x.indices[places], offsets, x.values[places])
