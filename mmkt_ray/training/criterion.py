"""The loss of each task: the mean over its labelled rows, weighted by class where asked.

The task's kind defines the loss of a row. Axes: B rows of a batch, K outputs of one task.

Source: logit adjustment, Menon et al. 2021 (https://arxiv.org/abs/2007.07314).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.training.batches import Batch
from mmkt_ray.training.methods.transfer import distillation_loss


@dataclass(frozen=True)
class Distillation:
    """How teachers' targets enter the loss, where a batch has them."""

    weight: float = 0.5  # of the distillation loss; the labels' loss has 1 - weight
    temperature: float = 2.0


@dataclass(frozen=True)
class Criterion:
    """Each task's mean loss over its labelled rows. A task without labels in the step has the loss 0."""

    weights: Mapping[str, Tensor]  # task -> (K,) weight of a row of the class
    shifts: Mapping[str, Tensor]  # task -> (K,) logit adjustment
    loss_weights: Mapping[str, float]  # task -> factor of its loss
    label_smoothing: float | Tensor = 0.0  # (P,) of a stack's members, whose logits are (P, B, K)
    distillation: Distillation = Distillation()

    @classmethod
    def of(
        cls,
        counts: Mapping[str, np.ndarray],
        kinds: Mapping[str, TaskKind],
        *,
        class_weights: Literal["balanced"] | None = None,
        label_smoothing: float | Tensor = 0.0,
        logit_adjustment: float = 0.0,
        loss_weights: Mapping[str, float] | None = None,
        distillation: Distillation = Distillation(),
    ) -> Criterion:
        """counts: task -> `TaskKind.count` of the train rows; kinds: of the tasks; loss_weights: task -> factor of
        its loss, 1 if not named."""
        ones = {t: np.ones(c.shape[-1]) for t, c in counts.items()}
        weights = {t: kinds[t].balanced_weights(c) for t, c in counts.items()} if class_weights == "balanced" else ones
        shifts = {t: logit_adjustment * kinds[t].log_prior(c) for t, c in counts.items()}
        return cls(
            {t: torch.from_numpy(w).float() for t, w in weights.items()},
            {t: torch.from_numpy(s).float() for t, s in shifts.items()},
            {t: (loss_weights or {}).get(t, 1.0) for t in counts},
            label_smoothing,
            distillation,
        )

    def to(self, device: torch.device) -> Criterion:
        """The same, for batches on a device."""
        weights = {t: values.to(device) for t, values in self.weights.items()}
        return replace(self, weights=weights, shifts={t: values.to(device) for t, values in self.shifts.items()})

    def total_weights(self, labels: Mapping[str, Labels]) -> dict[str, Tensor]:
        """The normaliser of each task's loss: task -> (), its labelled rows, weighted by class if asked."""
        return {t: weights.sum() for t, weights in self.row_weights(labels).items()}

    def row_weights(self, labels: Mapping[str, Labels]) -> dict[str, Tensor]:
        """Each row's part of the normaliser: task -> (B,)."""
        return {t: y.kind.row_weights(y, self.weights[t]) for t, y in labels.items()}

    def losses(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Labels],
        totals: Mapping[str, Tensor] | None = None,
        share: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each task: task -> ().

        Args:
            logits: task -> (B, K).
            labels: task -> of B rows, as tensors; what is not known contributes nothing.
            totals: normaliser of the whole step, see `total_weights`; default: of these rows. So the losses of a
                step's parts sum to its loss, however it is split over ranks.
            share: (B,) factor of each row's loss; default: 1.
        """
        totals = self.total_weights(labels) if totals is None else totals
        smallest = torch.finfo(torch.float32).tiny
        found = {}
        for t in sorted(logits):
            rows = self._row_losses(t, logits[t], labels[t])
            rows = rows if share is None else rows * share
            found[t] = self.loss_weights[t] * rows.sum(dim=-1) / totals[t].clamp(min=smallest)
        return found

    def _row_losses(self, task: str, logits: Tensor, labels: Labels) -> Tensor:
        """(B,) losses, (P, B) of a stack, times the class's weight; 0 without a label."""
        logits, weights = logits + self.shifts[task], self.weights[task]
        if isinstance(self.label_smoothing, Tensor):
            return labels.kind.stacked_losses(logits, labels, weights, self.label_smoothing)
        return labels.kind.row_losses(logits, labels, weights, self.label_smoothing)

    def of_batch(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """This rank's part of each task's loss in the step: task -> (). A mixed row counts with both labels."""
        totals = self.total_weights(batch.step_labels)
        if batch.mixed is None:
            losses = self.losses(logits, batch.labels, totals)
        else:
            own = self.losses(logits, batch.labels, totals, 1 - batch.mixed.share)
            other = self.losses(logits, batch.mixed.labels, totals, batch.mixed.share)
            losses = {t: own[t] + other[t] for t in own}
        for t, target in batch.targets.items():
            total, _ = distillation_loss(logits[t], target, self.distillation.temperature, batch.labels[t].kind)
            distilled = self.loss_weights[t] * total / batch.num_targets[t].clamp(min=1)
            losses[t] = (1 - self.distillation.weight) * losses[t] + self.distillation.weight * distilled
        return losses
