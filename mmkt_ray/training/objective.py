"""What is minimised: the sum over tasks of cross-entropy on the labelled rows, weighted by class where asked.

Axes: B rows of a batch, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkt_ray.errors import DataError
from mmkt_ray.features.store import MISSING


def count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows of each class (C,); rows without a label, or of an unseen class, are not counted."""
    return np.bincount(labels[labels >= 0], minlength=num_classes)


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Class weights (C,) as scikit-learn's "balanced": rows / (classes * rows of the class); 0 for a class without rows."""
    seen = counts > 0
    return np.divide(counts.sum(), seen.sum() * counts, out=np.zeros(len(counts)), where=seen)


def check_task(task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises: DataError if there is nothing to learn: no labelled train row, or all of one class."""
    if counts.sum() == 0:
        raise DataError(
            f"task '{task}' has no labelled row with features in the train split: check the sources' columns and splits, "
            f"or leave it out of model.tasks"
        )
    if (counts > 0).sum() == 1:
        only = class_names[int(counts.argmax())]
        raise DataError(
            f"all {counts.sum()} labelled train rows of task '{task}' are of class '{only}', so there is nothing to learn: "
            f"check the source's label column and the splits, or leave it out of model.tasks"
        )


class Objective:
    """Sum over tasks of the mean cross-entropy of the labelled rows; a task without labels in the step adds 0."""

    def __init__(
        self,
        counts: dict[str, np.ndarray],
        *,
        class_weights: Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    ) -> None:
        """counts: task -> train rows of each class (C,)."""
        weights = {
            t: balanced_weights(c) if class_weights == "balanced" else np.ones(len(c)) for t, c in counts.items()
        }
        self.weights = {t: torch.from_numpy(w).float().to(device) for t, w in weights.items()}  # task -> (C,)
        self.label_smoothing = label_smoothing

    def total_weights(self, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each task's sum is divided by to be a mean: task -> (), the summed weights of the labelled rows."""
        return {t: torch.where(y >= 0, self.weights[t][y.clamp(min=0)], 0.0).sum() for t, y in labels.items()}

    def __call__(
        self, logits: dict[str, Tensor], labels: dict[str, Tensor], totals: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The loss ().

        Args:
            logits: task -> (B, C).
            labels: task -> (B,) int64; below 0 contributes nothing.
            totals: `total_weights` of all rows of which these are a part; null: of these rows. The losses of the parts
                of a step then sum to the loss of the step, however it is split over ranks.
        """
        totals = self.total_weights(labels) if totals is None else totals
        smallest = torch.finfo(torch.float32).tiny
        losses = []
        for t in sorted(logits):
            target = labels[t].clamp(min=MISSING)  # one code for all that has no target
            loss = F.cross_entropy(
                logits[t],
                target,
                self.weights[t],
                ignore_index=MISSING,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
            losses.append(loss / totals[t].clamp(min=smallest))
        return torch.stack(losses).sum()
