"""A feature table as batches of tensors: which rows, in which order, on which rank.

Axes: N rows of a table, B rows of a batch on one rank, R ranks, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkt_ray.encoders.encoder import Features
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import model_inputs
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models import FeatureBatch

STATISTICS_ROWS = 8192  # in memory at a time


@dataclass(frozen=True)
class Worker:
    """This process among those that train one model."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)


class Mixed(NamedTuple):
    """What each row of a batch was mixed with."""

    labels: dict[str, Labels]  # task -> of B rows, the partners'
    share: Tensor  # (B,) how much of the row is its partner, 0 to 1


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step. The labels of the whole step come along,
    so that no rank has to ask the others."""

    features: dict[str, FeatureBatch]  # modality -> (B, D)
    present: dict[str, Tensor]  # modality -> (B,) bool
    labels: dict[str, Labels]  # task -> of B rows, as tensors
    step_present: dict[str, Tensor]  # modality -> (R * B,) bool, of all ranks
    step_labels: dict[str, Labels]  # task -> of R * B rows, of all ranks
    mixed: Mixed | None = None
    # of teachers: task -> probabilities (B, C), NaN in rows that none can read;
    # and task -> () rows of the step with some
    targets: dict[str, Tensor] = field(default_factory=dict)
    num_targets: dict[str, Tensor] = field(default_factory=dict)

    def restrict(self, modality: str, there: Tensor) -> Batch:
        """The same rows, without the labels of those that lack a modality, and without teachers' targets.

        there: (B,) bool, rows in which the modality is seen."""
        own, step = self.present[modality] & there, self.step_present[modality]
        mixed = self.mixed and self.mixed._replace(labels=_hide(self.mixed.labels, own))
        labels, step_labels = _hide(self.labels, own), _hide(self.step_labels, step)
        return replace(self, labels=labels, step_labels=step_labels, mixed=mixed, targets={}, num_targets={})


def _hide(labels: dict[str, Labels], kept: Tensor) -> dict[str, Labels]:
    return {t: y.keep(kept) for t, y in labels.items()}


def narrow(table: FeatureTable, modalities: Sequence[str], tasks: Sequence[str]) -> FeatureTable:
    """The table with some of its columns. Raises: ConfigError if it lacks one."""
    for what, names, known in (("modality", modalities, table.features), ("task", tasks, table.labels)):
        for name in names:
            if name not in known:
                raise ConfigError(f"the features have no {what} '{name}': {nearest(name, known)}")
    return replace(
        table,
        features={m: table.features[m] for m in modalities},
        present={m: table.present[m] for m in modalities},
        labels={t: table.labels[t] for t in tasks},
        class_names={t: table.class_names[t] for t in tasks},
    )


def usable_rows(table: FeatureTable, split: str) -> np.ndarray:
    """Indices of the split's rows that have some modality and some label; nothing can be learnt from the
    others, and they cannot be scored."""
    readable = np.any([present for present in table.present.values()], axis=0)
    with_label = np.any([labels.labelled for labels in table.labels.values()], axis=0)
    return np.flatnonzero((table.split == split) & readable & with_label)


def complete_rows(table: FeatureTable, rows: np.ndarray) -> np.ndarray:
    """Those of the rows that have every modality. Raises: DataError if there are rows, but no complete one."""
    complete = rows[np.all([present[rows] for present in table.present.values()], axis=0)]
    if len(rows) and not len(complete):
        raise DataError(
            f"none of the {len(rows)} labelled train rows has all of {', '.join(table.present)}, and model.missing: "
            "drop trains on complete rows only: choose another model.missing, such as mask"
        )
    return complete


def feature_statistics(features: Features, present: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) over the present rows; of sparse features 0 and the root mean square of the
    non-zero values, both (). Population statistics, in float64; ones and zeros where there is no row."""
    rows = np.flatnonzero(present)
    blocks = [rows[i : i + STATISTICS_ROWS] for i in range(0, len(rows), STATISTICS_ROWS)]
    if sp.issparse(features):
        values = (features[block].data for block in blocks)
        sums = [(len(v), float(np.square(v, dtype=np.float64).sum())) for v in values]
        num_values, total = (sum(column) for column in zip(*sums, strict=True)) if sums else (0, 0.0)
        return torch.tensor(0.0), torch.tensor(math.sqrt(total / num_values) if num_values else 1.0)
    if not blocks:
        return torch.zeros(features.shape[1]), torch.ones(features.shape[1])
    mean = sum(features[block].sum(axis=0, dtype=np.float64) for block in blocks) / len(rows)
    variance = sum(np.square(features[block] - mean).sum(axis=0) for block in blocks) / len(rows)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


class EpochBatches:
    """The rows of a table in a new order each epoch, dealt out to the ranks in batches of equal size.

    All steps of an epoch have the same size: 300 rows in batches of at most 256 are two steps of 150. Fewer than R *
    steps rows, those at the start of the order, come twice, so that every batch is full and every rank has equally
    many. The order depends on seed and epoch alone, so a checkpoint does not need it.

    With `weights`, an epoch is as many rows drawn with replacement, with probabilities in proportion to the weights.
    """

    def __init__(
        self,
        table: FeatureTable,
        rows: np.ndarray,
        batch_size_per_worker: int,
        seed: int,
        worker: Worker,
        weights: np.ndarray | None = None,
        targets: dict[str, np.ndarray] | None = None,
    ) -> None:
        """targets: task -> (N, C) teachers' probabilities for the table's first N rows;
        NaN in rows that none reads."""
        self.table, self.rows, self.seed, self.worker = table, rows, seed, worker
        self.targets = targets or {}
        self.probabilities = None if weights is None else weights / weights.sum()
        self.num_steps = math.ceil(len(rows) / (batch_size_per_worker * worker.world_size))
        self.batch_size = math.ceil(len(rows) / (max(1, self.num_steps) * worker.world_size))

    def order(self, epoch: int) -> np.ndarray:
        """Row indices (steps, R, B) of an epoch: what every rank reads at every step."""
        shape = (self.num_steps, self.worker.world_size, self.batch_size)
        rng = np.random.default_rng([self.seed, epoch])
        if self.probabilities is not None:
            return rng.choice(self.rows, size=shape, p=self.probabilities)
        return np.resize(rng.permutation(self.rows), shape)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This rank's batches of an epoch."""
        for step in self.order(epoch):
            batch = self.read(step[self.worker.rank], step.ravel())
            yield self._with_targets(batch, step) if self.targets else batch

    def read(self, rows: np.ndarray, step_rows: np.ndarray | None = None) -> Batch:
        """A batch of these rows. step_rows: of the whole step, all ranks together; None: the same."""
        return read_batch(self.table, rows, rows if step_rows is None else step_rows, self.worker.device)

    def _with_targets(self, batch: Batch, step: np.ndarray) -> Batch:
        """step: (R, B) row indices."""
        device, num_rows = self.worker.device, len(next(iter(self.targets.values())))
        known = {t: ~np.isnan(y[:, 0]) for t, y in self.targets.items()}
        mine, ours = step[self.worker.rank], step.ravel()[step.ravel() < num_rows]
        targets = {t: np.where((mine < num_rows)[:, None], y[mine % num_rows], np.nan) for t, y in self.targets.items()}
        return replace(
            batch,
            targets={t: torch.from_numpy(y).float().to(device) for t, y in targets.items()},
            num_targets={t: torch.tensor(known[t][ours].sum(), device=device) for t in targets},
        )


def read_batch(table: FeatureTable, rows: np.ndarray, step_rows: np.ndarray, device: torch.device) -> Batch:
    """A batch of `rows` within a step of `step_rows`."""
    features, present = model_inputs(table, rows, table.features, device)
    labels = {t: y[rows].tensors(device) for t, y in table.labels.items()}
    if len(rows) == len(step_rows):  # one rank
        return Batch(features, present, labels, present, labels)
    step_present = {m: torch.from_numpy(p[step_rows]).to(device, non_blocking=True) for m, p in table.present.items()}
    step_labels = {t: y[step_rows].tensors(device) for t, y in table.labels.items()}
    return Batch(features, present, labels, step_present, step_labels)
