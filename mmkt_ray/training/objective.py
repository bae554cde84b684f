"""What is minimised for each task: the mean loss of its labelled rows, weighted by class where asked.

Axes: B rows of a batch, C classes of one task. Labels are (B,) codes, of multilabel tasks (B, C) of 0 and 1; below 0 there
is no label.

Sources: label smoothing, Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567); logit adjustment, Menon et al. 2021
(https://arxiv.org/abs/2007.07314).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkt_ray.errors import DataError
from mmkt_ray.features.store import MISSING
from mmkt_ray.training.batches import Batch, has_target
from mmkt_ray.training.transfer import distillation_loss


def count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows of each class (C,); of multilabel tasks rows without and with it (2, C). Rows without a label, or of an unseen
    class, are not counted."""
    if labels.ndim == 1:
        return np.bincount(labels[labels >= 0], minlength=num_classes)
    return np.stack([(labels == 0).sum(axis=0), (labels == 1).sum(axis=0)])


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Class weights (C,) as scikit-learn's "balanced": rows / (classes * rows of the class); 0 for a class without rows.

    Multilabel: what a positive weighs against a negative, rows without / rows with the class; 1 where that is undefined.
    """
    if counts.ndim == 2:
        return np.divide(counts[0], counts[1], out=np.ones(counts.shape[1]), where=(counts > 0).all(axis=0))
    seen = counts > 0
    return np.divide(counts.sum(), seen.sum() * counts, out=np.zeros(len(counts)), where=seen)


def log_prior(counts: np.ndarray) -> np.ndarray:
    """Log frequency of each class (C,), of multilabel tasks its log odds; a class without rows counts as one row."""
    some = np.maximum(counts, 1)
    return np.log(some[1] / some[0]) if counts.ndim == 2 else np.log(some / some.sum())


def check_task(task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises: DataError if there is nothing to learn: no labelled train row, or all of one class. counts: see above."""
    if counts.sum() == 0:
        raise DataError(
            f"task '{task}' has no labelled row with features in the train split: check the sources' columns and splits, "
            f"or leave it out of model.tasks"
        )
    if counts.ndim == 2 and not (counts > 0).all(axis=0).any():
        raise DataError(
            f"all {counts[:, 0].sum()} labelled train rows of task '{task}' have the same classes, so there is nothing to "
            f"learn: check the source's label column and the splits, or leave it out of model.tasks"
        )
    if counts.ndim == 1 and (counts > 0).sum() == 1:
        only = class_names[int(counts.argmax())]
        raise DataError(
            f"all {counts.sum()} labelled train rows of task '{task}' are of class '{only}', so there is nothing to learn: "
            f"check the source's label column and the splits, or leave it out of model.tasks"
        )


class Objective:
    """Each task's mean loss over its labelled rows: cross-entropy, or of multilabel tasks binary cross-entropy, the mean
    over classes. A task without labels in the step has the loss 0."""

    def __init__(
        self,
        counts: Mapping[str, np.ndarray],
        *,
        class_weights: Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        logit_adjustment: float = 0.0,
        loss_weights: Mapping[str, float] | None = None,
        distill_weight: float = 0.5,
        temperature: float = 2.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    ) -> None:
        """counts: task -> `count_classes` of the train rows; loss_weights: task -> factor of its loss, 1 if not named;
        distill_weight, temperature: of the teachers' share, where a batch has targets."""
        ones = {t: np.ones(c.shape[-1]) for t, c in counts.items()}
        weights = {t: balanced_weights(c) for t, c in counts.items()} if class_weights == "balanced" else ones
        shifts = {t: logit_adjustment * log_prior(c) for t, c in counts.items()}
        self.weights = {t: torch.from_numpy(w).float().to(device) for t, w in weights.items()}  # task -> (C,)
        self.shifts = {t: torch.from_numpy(s).float().to(device) for t, s in shifts.items()}  # task -> (C,)
        self.label_smoothing = label_smoothing
        self.distill_weight, self.temperature = distill_weight, temperature
        self.loss_weights = {t: (loss_weights or {}).get(t, 1.0) for t in counts}

    def total_weights(self, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each task's sum is divided by to be a mean: task -> (), the labelled rows, weighted by class if asked."""
        totals = {}
        for t, y in labels.items():
            weights = self.weights[t][y.clamp(min=0)] if y.ndim == 1 else 1.0
            totals[t] = torch.where(has_target(y), weights, 0.0).sum()
        return totals

    def losses(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        totals: Mapping[str, Tensor] | None = None,
        share: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each task: task -> ().

        Args:
            logits: task -> (B, C).
            labels: task -> (B,) int64 or (B, C) int8; below 0 contributes nothing.
            totals: `total_weights` of all rows of which these are a part; null: of these rows. The losses of the parts
                of a step then sum to the loss of the step, however it is split over ranks.
            share: (B,) how much of each row counts; null: all of it.
        """
        totals = self.total_weights(labels) if totals is None else totals
        smallest = torch.finfo(torch.float32).tiny
        found = {}
        for t in sorted(logits):
            rows = self._row_losses(t, logits[t], labels[t])
            rows = rows if share is None else rows * share
            found[t] = self.loss_weights[t] * rows.sum(dim=-1) / totals[t].clamp(min=smallest)
        return found

    def _row_losses(self, task: str, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) losses, times the class's weight; 0 without a label."""
        logits, weights, smoothing = logits + self.shifts[task], self.weights[task], self.label_smoothing
        if labels.ndim == 1:
            target = labels.clamp(min=MISSING)  # one code for all that has no target
            return F.cross_entropy(
                logits, target, weights, ignore_index=MISSING, reduction="none", label_smoothing=smoothing
            )
        target = labels.clamp(min=0) * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="none")
        return torch.where(has_target(labels), each.mean(dim=-1), 0.0)

    def of_batch(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """This rank's part of the step's loss of each task: task -> (). A mixed row counts with both its labels."""
        totals = self.total_weights(batch.step_labels)
        if batch.mixed is None:
            losses = self.losses(logits, batch.labels, totals)
        else:
            own = self.losses(logits, batch.labels, totals, 1 - batch.mixed.share)
            other = self.losses(logits, batch.mixed.labels, totals, batch.mixed.share)
            losses = {t: own[t] + other[t] for t in own}
        for t, target in batch.targets.items():
            total, _ = distillation_loss(logits[t], target, self.temperature, batch.labels[t].ndim == 2)
            distilled = self.loss_weights[t] * total / batch.num_targets[t].clamp(min=1)
            losses[t] = (1 - self.distill_weight) * losses[t] + self.distill_weight * distilled
        return losses
