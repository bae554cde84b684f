"""Tasks whose classes are grades in a stated order. Axes: see task_kind.py; K is C, the number of grades.

The loss is that of Cao et al. 2020 (https://arxiv.org/abs/1901.07884): for each grade but the last the binary
cross-entropy of "above it". There a single score and C - 1 biases keep the probabilities of "above" in order; here
they are sums of the probabilities of grades, which keeps them in order too, and leaves every grade weights of its
own. Far misses so cost more than near ones. The linear baseline is logistic regression, which knows no order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.cells import canonical, class_name, label_text
from mmkt_ray.kinds.classes import SHARED
from mmkt_ray.kinds.divide import divide_where
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.task_kind import Outcomes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from mmkt_ray.kinds.arrow import Converted


@dataclass(frozen=True)
class GradeOutcome:
    """Grades and predicted grades (N,) as numbers from 0, beside what they come to as classes."""

    labels: np.ndarray
    predictions: np.ndarray
    classes: Outcomes

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (R,) of how often each row is drawn, (R, N)."""
        return self.classes.scores(counts) | {"quadratic_kappa": self.kappa(counts), "mae": self.distance(counts)}

    def kappa(self, counts: np.ndarray) -> np.ndarray:
        """scikit-learn's `cohen_kappa_score` with quadratic weights; NaN where it is undefined."""
        y, p, total = self.labels.astype(float), self.predictions.astype(float), counts.sum(axis=1)
        missed = counts @ (y - p) ** 2 / total
        by_chance = (counts @ y**2 + counts @ p**2) / total - 2 * (counts @ y) * (counts @ p) / total**2
        return divide_where(by_chance > 1e-12, by_chance - missed, by_chance)

    def distance(self, counts: np.ndarray) -> np.ndarray:
        """How many grades a prediction is off, the mean."""
        return np.asarray(counts @ np.abs(self.labels - self.predictions) / counts.sum(axis=1))


@dataclass(frozen=True)
class Ordinal(Multiclass):
    """One of several grades, whose order is known. Values are codes (N,) int64, indices into `order`."""

    order: tuple[str, ...] = ()  # lowest first

    name: ClassVar[str] = "ordinal"
    metrics: ClassVar[tuple[str, ...]] = (*SHARED, "balanced_accuracy", "quadratic_kappa")
    reported: ClassVar[tuple[str, ...]] = ("accuracy", "quadratic_kappa", "mae", "macro_f1")
    called: ClassVar[Mapping[str, str]] = {"mae": "Grades off", "quadratic_kappa": "Quadratic kappa"}
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {"quadratic_kappa": (-1.0, 1.0), "mae": (0.0, math.inf)}
    cannot: ClassVar[Mapping[str, str]] = {
        "label_smoothing": "whose loss asks what is above each grade, and has no share to spread over all",
    }

    def __post_init__(self) -> None:
        """Raises: ConfigError unless there are two different grades at least."""
        given: Any = self.order
        names = tuple(label_text(name) or "" for name in given) if isinstance(given, list | tuple) else ()
        if len(names) < 2 or "" in names or len({canonical(name) for name in names}) < len(names):
            raise ConfigError(
                f"order of an ordinal task must list its grades, lowest first, each once; got {given!r:.80}"
            )
        object.__setattr__(self, "order", names)

    def as_json(self) -> Any:
        """See TaskKind."""
        return {"name": self.name, "order": list(self.order)}

    def reading(self, task: str, separator: str) -> str:
        return f"{task} {self.as_json()}"

    # --- labels

    def from_cell(self, cell: Any, separator: str) -> Any:
        return self.grade(class_name(cell))

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        from mmkt_ray.kinds.label_columns import label_column

        return label_column(raw, class_names, lambda value: self.grade(class_name(value)))

    def grade(self, name: str | None) -> str | None:
        """A grade as `order` writes it. Raises: ValueError for another."""
        if name is None:
            return None
        known = {canonical(grade): grade for grade in self.order}
        if canonical(name) not in known:
            known_names = ", ".join(self.order)
            raise ValueError(
                f"is none of the grades {known_names}: '{name:.60}'; add it to the task's order, or correct it"
            )
        return known[canonical(name)]

    def class_names(self, counts: Mapping[str, int]) -> list[str]:
        """All grades, also those that train lacks."""
        return list(self.order)

    # --- loss

    def row_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
        import torch

        each = grade_losses(logits, labels.values) * weights[labels.values]
        return torch.where(labels.known, each, 0.0)

    def stacked_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: Tensor) -> Tensor:
        return self.row_losses(logits, labels, weights, 0.0)

    def chance_loss(self, width: int) -> float:
        return math.log(2)

    # --- scores

    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        classes, counts = super().outcomes(labels, predictions, width, by_row=True)
        codes = self._codes(labels, width)
        return [GradeOutcome(codes, p, own) for p, own in zip(predictions, classes, strict=True)], counts

    def metric_scores(self, metric: str, labels: Labels, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if metric != "quadratic_kappa":
            return super().metric_scores(metric, labels, outputs, counts)
        (outcome,), _ = self.outcomes(labels, [self.predict(outputs)], outputs.shape[1])
        return outcome.scores(counts)[metric]

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        found = super().scores(labels, outputs, class_names)
        rows = labels[labels.labelled]
        if not len(rows):
            return found | {"quadratic_kappa": None, "mae": None}
        (outcome,), counts = self.outcomes(rows, [self.predict(outputs[labels.labelled])], outputs.shape[1])
        own = outcome.scores(counts[None])
        return found | {m: float(own[m][0]) if np.isfinite(own[m][0]) else None for m in ("quadratic_kappa", "mae")}


def grade_losses(logits: Tensor, grades: Tensor) -> Tensor:
    """Mean over the grades but the last of the binary cross-entropy of being above it.
    logits: (.., B, C); grades: (B,)."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    above = logits.flip(-1).logcumsumexp(dim=-1).flip(-1)[..., 1:]
    up_to = logits.logcumsumexp(dim=-1)[..., :-1]
    target = (grades[:, None] > torch.arange(logits.shape[-1] - 1, device=logits.device)).to(logits.dtype)
    z = above - up_to
    return binary_cross_entropy_with_logits(z, target.expand_as(z), reduction="none").mean(dim=-1)
