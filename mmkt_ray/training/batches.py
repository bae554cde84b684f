"""A feature table as batches of tensors: which rows, in which order, on which rank.

Axes: N rows of a table, B rows of a batch on one rank, R ranks, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkt_ray.encoders.base import Features as TableFeatures
from mmkt_ray.errors import ConfigError, nearest
from mmkt_ray.evaluation.inference import model_inputs
from mmkt_ray.features.store import MISSING, FeatureTable
from mmkt_ray.models import Features


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step. The labels of the whole step come along, so that no rank has to ask the others."""

    features: dict[str, Features]  # modality -> (B, D)
    present: dict[str, Tensor]  # modality -> (B,) bool
    labels: dict[str, Tensor]  # task -> (B,) int64, MISSING or UNSEEN where there is none
    step_labels: dict[str, Tensor]  # task -> (R * B,) int64, of all ranks


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
    """Indices of the split's rows that have some modality and some label; the others have nothing to teach or to test."""
    readable = np.any([present for present in table.present.values()], axis=0)
    labelled = np.any([labels != MISSING for labels in table.labels.values()], axis=0)
    return np.flatnonzero((table.split == split) & readable & labelled)


def feature_statistics(features: TableFeatures, present: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) over the present rows; of sparse features 0 and the root mean square of the
    non-zero values, both (). Population statistics, in float64; ones and zeros where there is no row."""
    kept = features[present]
    if sp.issparse(kept):
        mean_square = float(np.square(kept.data, dtype=np.float64).mean()) if kept.nnz else 1.0
        return torch.tensor(0.0), torch.tensor(math.sqrt(mean_square))
    if len(kept) == 0:
        return torch.zeros(kept.shape[1]), torch.ones(kept.shape[1])
    mean, std = kept.mean(axis=0, dtype=np.float64), kept.std(axis=0, dtype=np.float64)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


class EpochBatches:
    """The rows of a table in a new order each epoch, dealt out to the ranks in batches of equal size.

    The steps of an epoch are evened out rather than ending in a rest: 300 rows in batches of at most 256 are two steps of
    150. Fewer than R * steps rows at the start of the order come twice, so that every batch is full and every rank has
    equally many. The order depends on seed and epoch only: nothing to keep for a resume.
    """

    def __init__(
        self, table: FeatureTable, rows: np.ndarray, batch_size_per_worker: int, seed: int, world: World
    ) -> None:
        self.table, self.rows, self.seed, self.world = table, rows, seed, world
        self.num_steps = math.ceil(len(rows) / (batch_size_per_worker * world.size))
        self.batch_size = math.ceil(len(rows) / (max(1, self.num_steps) * world.size))

    def order(self, epoch: int) -> np.ndarray:
        """Row indices (steps, R, B) of an epoch: what every rank reads at every step."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        shape = (self.num_steps, self.world.size, self.batch_size)
        return np.resize(shuffled, shape)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This rank's batches of an epoch."""
        for step in self.order(epoch):
            yield read_batch(self.table, step[self.world.rank], step.ravel(), self.world.device)


def read_batch(table: FeatureTable, rows: np.ndarray, step_rows: np.ndarray, device: torch.device) -> Batch:
    """A batch of `rows` within a step of `step_rows`."""
    features, present = model_inputs(table, rows, table.features, device)
    return Batch(features, present, _read_labels(table, rows, device), _read_labels(table, step_rows, device))


def _read_labels(table: FeatureTable, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    return {t: torch.from_numpy(y[rows]).to(device, non_blocking=True) for t, y in table.labels.items()}
