"""Tasks where a row has one class: one of several, or one of two.
Axes: see task_kind.py; K is C, the number of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.cells import class_name
from mmkt_ray.kinds.classes import NOTHING_TO_LEARN, SHARED, ClassKind
from mmkt_ray.kinds.divide import divide_where
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.spelling import index_in
from mmkt_ray.kinds.task_kind import Outcomes

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from mmkt_ray.kinds.arrow import Converted
    from mmkt_ray.kinds.linear_target import LinearTarget
    from mmkt_ray.kinds.outcomes import ClassOutcome


@dataclass(frozen=True)
class Multiclass(ClassKind):
    """One of several classes. Values are codes (N,) int64, indices into the class names."""

    name: ClassVar[str] = "multiclass"
    exclusive: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*SHARED, "balanced_accuracy")
    further: ClassVar[tuple[str, ...]] = ("balanced_accuracy", "auroc", "log_loss")
    row_metric: ClassVar[str] = "accuracy"

    # --- labels

    @property
    def arrow_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.string()

    def from_cell(self, cell: Any, separator: str) -> Any:
        name = class_name(cell)
        if name is not None:
            name.encode()
        return name

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        from mmkt_ray.kinds.arrow import is_list
        from mmkt_ray.kinds.label_columns import label_column

        if is_list(raw.type):
            raise TypeError("it holds lists where one value is expected; set the task's kind to multilabel")
        return label_column(raw, class_names, class_name)

    def encode(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
        codes, labelled = index_in(column, class_names), ~column.is_null().to_numpy()
        return Labels(self, np.maximum(codes, 0), labelled, codes >= 0)

    def encode_predictions(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        return index_in(column, class_names)

    def members(self, column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
        import pyarrow as pa

        names = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return pa.array(np.arange(len(names))), names

    def rename(self, cell: Any, names: Mapping[str, str]) -> Any:
        return names.get(cell, cell)

    def value(self, cell: Any) -> Any:
        return cell

    def tell(self, cell: Any, separator: str = ", ") -> str:
        return str(cell)

    def decode(self, predictions: np.ndarray, class_names: Sequence[str]) -> list[Any]:
        cells: list[Any] = np.array(class_names, dtype=object)[predictions].tolist()
        return cells

    def filled(self, num_rows: int, code: int, like: Labels) -> Labels:
        return self.labels(np.full(num_rows, code, like.values.dtype))

    # --- model and loss

    def outputs(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs.clamp(min=1e-12).log()

    def decisions(self, z: Tensor) -> Tensor:
        return z.log_softmax(dim=-1)

    def mean_decision(self, z: Tensor, mask: Tensor) -> Tensor:
        from mmkt_ray.kinds.losses import log_mean

        return log_mean(self.decisions(z), mask)

    def count(self, labels: Labels, width: int) -> np.ndarray:
        """Rows of each class (C,)."""
        return np.bincount(labels.values[labels.known], minlength=width)

    def balanced_weights(self, counts: np.ndarray) -> np.ndarray:
        """As scikit-learn's "balanced": rows / (classes * rows of the class); 0 for a class without rows."""
        seen = counts > 0
        return divide_where(seen, counts.sum(), seen.sum() * counts, 0.0)

    def log_prior(self, counts: np.ndarray) -> np.ndarray:
        """Log frequency of each class; a class without rows counts as one row."""
        some = np.maximum(counts, 1)
        return np.asarray(np.log(some / some.sum()))

    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        super().check_learnable(task, counts, class_names)
        if (counts > 0).sum() == 1:
            only = class_names[int(counts.argmax())]
            raise DataError(
                f"all {counts.sum()} labelled train rows of task '{task}' are of class '{only}', {NOTHING_TO_LEARN}"
            )

    def row_weights(self, labels: Labels, weights: Tensor) -> Tensor:
        import torch

        return torch.where(labels.known, weights[labels.values], 0.0)

    def row_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
        from mmkt_ray.kinds.losses import code_losses

        return code_losses(logits, labels, weights, smoothing)

    def stacked_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: Tensor) -> Tensor:
        from mmkt_ray.kinds.losses import stacked_code_losses

        return stacked_code_losses(logits, labels, weights, smoothing)

    def distillation(self, logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        from mmkt_ray.kinds.losses import code_distillation

        return code_distillation(logits, target, temperature)

    def soften(self, outputs: np.ndarray, temperature: float) -> np.ndarray:
        powers = np.clip(outputs, 1e-12, 1.0) ** (1 / temperature)
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def chance_loss(self, width: int) -> float:
        return math.log(max(2, width))

    def right_probability(self, logits: Tensor, labels: Labels) -> Tensor:
        return self.outputs(logits).gather(1, labels.values[:, None])[:, 0]

    # --- predictions and their scores

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """(N,) the most probable class, the first one of a tie."""
        return np.asarray(outputs.argmax(axis=-1))

    def is_right(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        return np.asarray(labels.known & (labels.values == predictions))

    def row_scores(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """Right or wrong."""
        return self.is_right(labels, predictions).astype(float)

    def score_pair(self, label: Any, prediction: Any) -> float:
        return float(label == prediction)

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        from mmkt_ray.kinds.class_metrics import classification_metrics

        return {"kind": self.as_json(), **classification_metrics(labels, outputs, class_names)}

    def outcome(self, labels: Labels, predictions: np.ndarray, width: int) -> ClassOutcome:
        from mmkt_ray.kinds.outcomes import ClassOutcome

        return ClassOutcome.of_codes(self._codes(labels, width), predictions, width)

    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        from mmkt_ray.kinds.outcomes import ClassOutcome, cells

        label, guesses, counts = self._codes(labels, width), list(predictions), np.ones(len(labels), int)
        if not by_row:
            (label, *guesses), counts = cells([label, *guesses], 1)
            label, guesses = label[:, 0], [guess[:, 0] for guess in guesses]
        return [ClassOutcome.of_codes(label, guess, width) for guess in guesses], counts

    def _codes(self, labels: Labels, width: int) -> np.ndarray:
        """(N,) with one more class for all that train lacks."""
        return np.where(labels.known, labels.values, width)

    def quick_scores(self, labels: Labels, outputs: np.ndarray) -> dict[str, float]:
        from mmkt_ray.kinds.outcomes import macro_f1_from_counts

        codes, pred = self._codes(labels, outputs.shape[1]), self.predict(outputs)
        each = (codes[codes == pred], codes, pred)
        totals = [np.bincount(x, minlength=outputs.shape[1] + 1)[None] for x in each]
        return {"accuracy": float((codes == pred).mean()), "macro_f1": float(macro_f1_from_counts(*totals)[0])}

    def tally(self, logits: Tensor, labels: Labels) -> Tensor:
        from mmkt_ray.kinds.losses import tally_codes

        return tally_codes(logits, labels)

    # --- probabilities

    def indicators(self, labels: Labels, width: int) -> np.ndarray:
        return np.asarray((labels.values[:, None] == np.arange(width)) & labels.known[:, None])

    def label_probability(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        return np.asarray(outputs[np.arange(len(labels)), labels.values].astype(np.float64))

    def forecasts(self, labels: Labels, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return outputs.max(axis=1).astype(np.float64), outputs.argmax(axis=1) == labels.values

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        from scipy.special import softmax

        return np.asarray(softmax(logits, axis=1))

    def cross_entropy(self, logits: np.ndarray, target: np.ndarray) -> float:
        from scipy.special import log_softmax

        return float(-(target * log_softmax(logits, axis=1)).sum(axis=1).mean())

    def each_loss(self, logits: np.ndarray, labels: Labels) -> np.ndarray:
        from torch import from_numpy
        from torch.nn.functional import cross_entropy

        z = from_numpy(np.ascontiguousarray(logits, dtype=np.float64))
        return np.asarray(cross_entropy(z, from_numpy(labels.values).long(), reduction="none").numpy())

    def two_best(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.argsort(-outputs, axis=1, kind="stable")[:, :2]
        several = order.shape[1] > 1
        second = order[:, 1] if several else np.zeros(len(outputs), int)
        return np.take_along_axis(outputs, order, axis=1), second, np.full(len(outputs), several)

    # --- baselines, and which rows to draw

    def constant(self, labels: Labels, width: int) -> np.ndarray:
        """The most frequent class, ()."""
        return np.array(self.count(labels, width).argmax())

    def log_frequencies(self, labels: Labels, width: int) -> np.ndarray:
        counts = self.count(labels, width) + 0.5
        return np.asarray(np.log(counts / counts.sum()))

    def linear_target(self, labels: Labels, width: int, balanced: bool) -> LinearTarget:
        from mmkt_ray.kinds.linear_target import LinearTarget

        weights = self.balanced_weights(self.count(labels, width)) if balanced else np.ones(width)
        return LinearTarget.of_codes(labels.values, weights)

    def strata(self, labels: Labels) -> Iterator[np.ndarray]:
        """By class."""
        for code in np.unique(labels.values[labels.known]):
            yield np.flatnonzero(labels.known & (labels.values == code))

    def one_of_each(self, labels: Labels) -> np.ndarray:
        return np.zeros(0, int)  # strata are classes

    def draw_weights(self, labels: Labels) -> np.ndarray:
        """1 / rows of the class."""
        counts = np.bincount(labels.values[labels.known], minlength=int(labels.values.max(initial=0)) + 1)
        return np.where(labels.known, 1 / np.maximum(counts[labels.values], 1), 0.0)

    # --- label issues

    def judged_rows(self, labels: Labels, num_folds: int) -> np.ndarray:
        """Those of classes with a row for every fold, as nothing can be learnt of others."""
        rows = np.flatnonzero(labels.known)
        counts = np.bincount(labels.values[rows])
        return np.asarray(rows[counts[labels.values[rows]] >= num_folds])

    def fold_strata(self, labels: Labels, num_folds: int) -> tuple[np.ndarray, bool]:
        return labels.values, bool(np.bincount(labels.values)[labels.values].min() >= num_folds)

    def evidence(self, outputs: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(outputs))

    def from_evidence(self, evidence: np.ndarray) -> np.ndarray:
        return self.probabilities(evidence)

    def label_issues(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        from cleanlab.filter import find_label_issues

        classes, codes = np.unique(labels.values, return_inverse=True)
        return np.asarray(find_label_issues(codes, outputs[:, classes], filter_by="both", n_jobs=1), dtype=bool)

    def label_quality(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        """The probability of the given label."""
        from cleanlab.rank import get_label_quality_scores

        return np.asarray(get_label_quality_scores(labels.values, outputs))

    def distributions(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[..., None, :]


@dataclass(frozen=True)
class Binary(Multiclass):
    """One of two classes, of which the later in sorted order is the positive one; it has scores of its own."""

    name: ClassVar[str] = "binary"
    metrics: ClassVar[tuple[str, ...]] = (
        *SHARED,
        "balanced_accuracy",
        "precision",
        "recall",
        "f1",
        "average_precision",
    )
    further: ClassVar[tuple[str, ...]] = (
        "balanced_accuracy", "precision", "recall", "f1", "average_precision", "auroc", "log_loss",
    )  # fmt: skip

    def check_classes(self, task: str, class_names: Sequence[str]) -> None:
        if len(class_names) > 2:
            raise DataError(
                f"task '{task}' is binary, but the train split has {len(class_names)} classes: "
                f"{', '.join(class_names[:20])}; set tasks.{task}.kind: multiclass, or map another column"
            )

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        from mmkt_ray.kinds.class_metrics import positive_scores

        found = super().scores(labels, outputs, class_names)
        if found["num_rows"] and len(class_names) == 2:
            found |= positive_scores(found["per_class"], labels, outputs, class_names[1])
        return found
