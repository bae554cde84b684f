"""The kinds of task that there are: one of several classes, one of two, or any number of classes per row.

A new kind is one class here and one entry of `TASK_KINDS`. Axes: see base.py; for classes K is C, their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.errors import ConfigError, DataError, unknown_name
from mmkt_ray.kinds.arrow import Converted, is_list
from mmkt_ray.kinds.base import Outcomes, TaskKind
from mmkt_ray.kinds.cells import class_name, label_names
from mmkt_ray.kinds.label_columns import label_column, labels_column
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.spelling import index_in, sort_classes

if TYPE_CHECKING:
    from torch import Tensor

    from mmkt_ray.kinds.linear_target import LinearTarget
    from mmkt_ray.kinds.outcomes import Outcome

_AVERAGES = tuple(f"{over}_{name}" for over in ("macro", "micro", "weighted") for name in ("precision", "recall", "f1"))
_SHARED = ("accuracy", *_AVERAGES, "auroc", "log_loss", "macro_average_precision")
_NOTHING_TO_LEARN = "so there is nothing to learn: check the source's label column and the splits, or leave it out of model.tasks"


@dataclass(frozen=True)
class ClassKind(TaskKind):
    """What tasks of classes have in common. Outputs are probabilities."""

    reported: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    share: ClassVar[str | None] = "accuracy"
    ranked: ClassVar[tuple[str, ...]] = (
        "auroc", "average_precision", "macro_average_precision", "micro_average_precision",
    )  # fmt: skip

    def width(self, class_names: Sequence[str]) -> int:
        return len(class_names)

    def class_names(self, counts: Mapping[str, int]) -> list[str]:
        return sort_classes(counts)

    def outside(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        rows, names = self.members(column)
        absent = (index_in(pa.chunked_array([names]), class_names) < 0) & names.is_valid().to_numpy(zero_copy_only=False)
        found = np.zeros(len(column), dtype=bool)
        found[rows.to_numpy()[absent]] = True
        return found

    def unlabelled(self, num_rows: int, like: Labels) -> Labels:
        nowhere = np.zeros(num_rows, dtype=bool)
        return Labels(self, np.zeros((num_rows, *like.values.shape[1:]), like.values.dtype), nowhere, nowhere)

    def labels(self, values: Sequence[Any] | np.ndarray, known: np.ndarray | None = None) -> Labels:
        values = np.asarray(values)
        known = np.ones(len(values), dtype=bool) if known is None else known
        return Labels(self, values, known, known)

    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        if counts.sum() == 0:
            raise DataError(
                f"task '{task}' has no labelled row with features in the train split: check the sources' columns and splits, "
                f"or leave it out of model.tasks"
            )

    def outcome(self, labels: Labels, predictions: np.ndarray, width: int) -> Outcome:
        """What predictions come to row by row; all are labelled."""
        raise NotImplementedError

    def metric_scores(self, metric: str, labels: Labels, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        from mmkt_ray.kinds.metric_scores import class_metric_scores

        outcome = self.outcome(labels, self.predict(outputs), outputs.shape[1])
        return class_metric_scores(metric, labels, outputs, outcome, counts)

    def tally_size(self, width: int) -> int:
        return 4 + 3 * (width + 1)

    def tally_scores(self, tally: np.ndarray) -> dict[str, float]:
        from mmkt_ray.kinds.outcomes import macro_f1_from_counts

        total, num_losses, num_right, num_labelled = tally[:4]
        if num_labelled == 0:
            return {}
        found = {"loss": float(total / max(1.0, num_losses)), "accuracy": float(num_right / num_labelled)}
        macro_f1 = float(macro_f1_from_counts(*tally[4:].reshape(3, 1, -1))[0])
        return found if np.isnan(macro_f1) else found | {"macro_f1": macro_f1}  # no row has or is given a class

    def baseline(self, labels: Labels, width: int) -> np.ndarray:
        """Each class's share of the rows."""
        return (self.rows_with(labels, width) / labels.known.sum()).astype(np.float32)

    def rows_with(self, labels: Labels, width: int) -> np.ndarray:
        """Known rows that have each class, (C,)."""
        return self.count(labels, width)


@dataclass(frozen=True)
class Multiclass(ClassKind):
    """One of several classes. Values are codes (N,) int64, indices into the class names."""

    name: ClassVar[str] = "multiclass"
    arrow_type: ClassVar[pa.DataType] = pa.string()
    exclusive: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (*_SHARED, "balanced_accuracy")
    further: ClassVar[tuple[str, ...]] = ("balanced_accuracy", "auroc", "log_loss")
    row_metric: ClassVar[str] = "accuracy"

    # --- labels

    def from_cell(self, cell: Any, separator: str) -> Any:
        name = class_name(cell)
        if name is not None:
            name.encode()
        return name

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        if is_list(raw.type):
            raise TypeError("it holds lists where one value is expected; set the task's kind to multilabel")
        return label_column(raw, class_names, class_name)

    def encode(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
        codes, labelled = index_in(column, class_names), ~column.is_null().to_numpy()
        return Labels(self, np.maximum(codes, 0), labelled, codes >= 0)

    def encode_predictions(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        return index_in(column, class_names)

    def members(self, column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
        names = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return pa.array(np.arange(len(names))), names

    def value(self, cell: Any) -> Any:
        return cell

    def tell(self, cell: Any, separator: str = ", ") -> str:
        return str(cell)

    def decode(self, predictions: np.ndarray, class_names: Sequence[str]) -> list[Any]:
        return np.array(class_names, dtype=object)[predictions].tolist()

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
        return np.divide(counts.sum(), seen.sum() * counts, out=np.zeros(len(counts)), where=seen)

    def log_prior(self, counts: np.ndarray) -> np.ndarray:
        """Log frequency of each class; a class without rows counts as one row."""
        some = np.maximum(counts, 1)
        return np.log(some / some.sum())

    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        super().check_learnable(task, counts, class_names)
        if (counts > 0).sum() == 1:
            only = class_names[int(counts.argmax())]
            raise DataError(f"all {counts.sum()} labelled train rows of task '{task}' are of class '{only}', {_NOTHING_TO_LEARN}")

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
        return powers / powers.sum(axis=1, keepdims=True)

    def chance_loss(self, width: int) -> float:
        return math.log(max(2, width))

    def right_probability(self, logits: Tensor, labels: Labels) -> Tensor:
        return self.outputs(logits).gather(1, labels.values[:, None])[:, 0]

    # --- predictions and their scores

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """(N,) the most probable class, the first one of a tie."""
        return outputs.argmax(axis=-1)

    def is_right(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        return labels.known & (labels.values == predictions)

    def row_scores(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """Right or wrong."""
        return self.is_right(labels, predictions).astype(float)

    def score_pair(self, label: Any, prediction: Any) -> float:
        return float(label == prediction)

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        from mmkt_ray.kinds.class_metrics import classification_metrics

        return {"kind": self.as_json(), **classification_metrics(labels, outputs, class_names)}

    def outcome(self, labels: Labels, predictions: np.ndarray, width: int) -> Outcome:
        from mmkt_ray.kinds.outcomes import Outcome

        return Outcome.of_codes(self._codes(labels, width), predictions, width)

    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        from mmkt_ray.kinds.outcomes import Outcome, cells

        label, guesses, counts = self._codes(labels, width), list(predictions), np.ones(len(labels), int)
        if not by_row:
            (label, *guesses), counts = cells([label, *guesses], 1)
            label, guesses = label[:, 0], [guess[:, 0] for guess in guesses]
        return [Outcome.of_codes(label, guess, width) for guess in guesses], counts

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
        return (labels.values[:, None] == np.arange(width)) & labels.known[:, None]

    def label_probability(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        return outputs[np.arange(len(labels)), labels.values].astype(np.float64)

    def forecasts(self, labels: Labels, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return outputs.max(axis=1).astype(np.float64), outputs.argmax(axis=1) == labels.values

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        from scipy.special import softmax

        return softmax(logits, axis=1)

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
        return np.log(counts / counts.sum())

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
        return rows[counts[labels.values[rows]] >= num_folds]

    def fold_strata(self, labels: Labels, num_folds: int) -> tuple[np.ndarray, bool]:
        return labels.values, bool(np.bincount(labels.values)[labels.values].min() >= num_folds)

    def evidence(self, outputs: np.ndarray) -> np.ndarray:
        return np.log(outputs)

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
    metrics: ClassVar[tuple[str, ...]] = (*_SHARED, "balanced_accuracy", "precision", "recall", "f1", "average_precision")
    further: ClassVar[tuple[str, ...]] = (
        "balanced_accuracy", "precision", "recall", "f1", "average_precision", "auroc", "log_loss",
    )  # fmt: skip

    def check_classes(self, task: str, class_names: Sequence[str]) -> None:
        if len(class_names) > 2:
            raise DataError(
                f"task '{task}' is binary, but the train split has {len(class_names)} classes: {', '.join(class_names[:20])}; "
                f"set tasks.{task}.kind: multiclass, or map another column"
            )

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        from mmkt_ray.kinds.class_metrics import positive_scores

        found = super().scores(labels, outputs, class_names)
        if found["num_rows"] and len(class_names) == 2:
            found |= positive_scores(found["per_class"], labels, outputs, class_names[1])
        return found


@dataclass(frozen=True)
class Multilabel(ClassKind):
    """Any number of classes per row, each a decision of its own. Values are (N, C) int8, 1 where the row has the class."""

    name: ClassVar[str] = "multilabel"
    arrow_type: ClassVar[pa.DataType] = pa.list_(pa.string())
    metrics: ClassVar[tuple[str, ...]] = (
        *_SHARED, "samples_precision", "samples_recall", "samples_f1", "micro_average_precision",
    )  # fmt: skip
    further: ClassVar[tuple[str, ...]] = ("micro_f1", "samples_f1", "macro_average_precision", "auroc", "log_loss")
    seed_metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "samples_f1", "macro_average_precision")
    row_metric: ClassVar[str] = "f1_samples"
    notes: ClassVar[str] = "Accuracy of {tasks} is subset accuracy: a sample is right if all of its classes are."

    # --- labels

    def from_cell(self, cell: Any, separator: str) -> Any:
        names = label_names(cell, separator)
        "".join(names or ()).encode()
        return names

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        return labels_column(raw, class_names, separator)

    def reading(self, task: str, separator: str) -> str:
        return f"{task} split at {separator}"

    def encode(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
        """Classes that are not in `class_names` are left out."""
        labelled = ~column.is_null().to_numpy()
        return Labels(self, self.encode_predictions(column, class_names), labelled, labelled)

    def encode_predictions(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        codes = np.zeros((len(column), len(class_names)), dtype=np.int8)
        rows, found = pc.list_parent_indices(column).to_numpy(), index_in(pc.list_flatten(column), class_names)
        codes[rows[found >= 0], found[found >= 0]] = 1
        return codes

    def members(self, column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
        cells = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return pc.list_parent_indices(cells), pc.list_flatten(cells)

    def value(self, cell: Any) -> Any:
        return tuple(sorted(cell))

    def tell(self, cell: Any, separator: str = ", ") -> str:
        return separator.join(sorted(cell)) or "none"

    def decode(self, predictions: np.ndarray, class_names: Sequence[str]) -> list[Any]:
        names = np.array(class_names, dtype=object)
        return [names[row == 1].tolist() for row in predictions]

    # --- model and loss

    def outputs(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs.logit(eps=1e-7)

    def decisions(self, z: Tensor) -> Tensor:
        return z

    def mean_decision(self, z: Tensor, mask: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        from mmkt_ray.kinds.losses import log_mean

        return log_mean(logsigmoid(z), mask) - log_mean(logsigmoid(-z), mask)

    def count(self, labels: Labels, width: int) -> np.ndarray:
        """Rows without and with each class (2, C)."""
        known = labels.values[labels.known]
        return np.stack([(known == 0).sum(axis=0), (known == 1).sum(axis=0)])

    def rows_with(self, labels: Labels, width: int) -> np.ndarray:
        return self.count(labels, width)[1]

    def balanced_weights(self, counts: np.ndarray) -> np.ndarray:
        """What a positive weighs against a negative, rows without / rows with the class; 1 where that is undefined."""
        return np.divide(counts[0], counts[1], out=np.ones(counts.shape[1]), where=(counts > 0).all(axis=0))

    def log_prior(self, counts: np.ndarray) -> np.ndarray:
        """Log odds of each class; no rows count as one."""
        some = np.maximum(counts, 1)
        return np.log(some[1] / some[0])

    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        super().check_learnable(task, counts, class_names)
        if not (counts > 0).all(axis=0).any():
            raise DataError(
                f"all {counts[:, 0].sum()} labelled train rows of task '{task}' have the same classes, {_NOTHING_TO_LEARN}"
            )

    def row_weights(self, labels: Labels, weights: Tensor) -> Tensor:
        import torch

        return torch.where(labels.known, 1.0, 0.0)

    def row_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
        from mmkt_ray.kinds.losses import set_losses

        return set_losses(logits, labels, weights, smoothing)

    def stacked_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: Tensor) -> Tensor:
        from mmkt_ray.kinds.losses import set_losses

        return set_losses(logits, labels, weights, smoothing[:, None, None])

    def distillation(self, logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        from mmkt_ray.kinds.losses import set_distillation

        return set_distillation(logits, target, temperature)

    def soften(self, outputs: np.ndarray, temperature: float) -> np.ndarray:
        powers = np.clip(outputs, 1e-12, 1.0) ** (1 / temperature)
        return powers / (powers + np.clip(1 - outputs, 1e-12, 1.0) ** (1 / temperature))

    def chance_loss(self, width: int) -> float:
        return math.log(2)

    def right_probability(self, logits: Tensor, labels: Labels) -> Tensor:
        """The mean over classes."""
        proba = self.outputs(logits)
        return proba.where(labels.values == 1, 1 - proba).mean(dim=1)

    # --- predictions and their scores

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """(N, C) int8, 1 from a probability of one half on."""
        return (outputs >= 0.5).astype(np.int8)

    def is_right(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """Every class of the row is."""
        return labels.known & (labels.values == predictions).all(axis=-1)

    def row_scores(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """The F1 of the row's classes, 1 where there are none."""
        real, found = labels.values == 1, predictions == 1
        total = real.sum(axis=1) + found.sum(axis=1)
        return np.where(total > 0, 2 * (real & found).sum(axis=1) / np.maximum(total, 1), 1.0)

    def score_pair(self, label: Any, prediction: Any) -> float:
        return 2 * len({*label} & {*prediction}) / (len(label) + len(prediction)) if label or prediction else 1.0

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        from mmkt_ray.kinds.class_metrics import check_outputs
        from mmkt_ray.kinds.multilabel_metrics import multilabel_metrics

        check_outputs(labels, outputs, class_names)
        return {"kind": self.as_json(), **multilabel_metrics(labels, outputs, class_names)}

    def seed_scores(self, labels: Labels, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        from mmkt_ray.kinds.multilabel_metrics import pooled_f1, resampled_average_precision

        parts = [(self.outcome(labels, self.predict(own), own.shape[1]), own) for own in outputs]
        by_seed = [(*pooled_f1(o, counts), resampled_average_precision(labels.values, p, counts)) for o, p in parts]
        return np.array(by_seed).swapaxes(0, 1)

    def outcome(self, labels: Labels, predictions: np.ndarray, width: int) -> Outcome:
        from mmkt_ray.kinds.outcomes import Outcome

        return Outcome.of_sets(labels.values, predictions)

    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        from mmkt_ray.kinds.outcomes import Outcome, cells

        label, guesses, counts = labels.values, list(predictions), np.ones(len(labels), int)
        if not by_row:
            (label, *guesses), counts = cells([label, *guesses], width)
        return [Outcome.of_sets(label, guess) for guess in guesses], counts

    def quick_scores(self, labels: Labels, outputs: np.ndarray) -> dict[str, float]:
        from mmkt_ray.kinds.outcomes import macro_f1_from_counts

        sets, pred = labels.values, self.predict(outputs)
        totals = [x.sum(axis=0, keepdims=True) for x in (sets * pred, sets, pred)]
        right = self.is_right(labels, pred)
        return {"accuracy": float(right.mean()), "macro_f1": float(macro_f1_from_counts(*totals)[0])}

    def tally(self, logits: Tensor, labels: Labels) -> Tensor:
        from mmkt_ray.kinds.losses import tally_sets

        return tally_sets(logits, labels)

    # --- probabilities

    def indicators(self, labels: Labels, width: int) -> np.ndarray:
        return labels.values * labels.known[:, None]

    def label_probability(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        """(N, C) of every class's own forecast."""
        outputs = outputs.astype(np.float64)
        return np.where(labels.values == 1, outputs, 1 - outputs)

    def forecasts(self, labels: Labels, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return outputs.ravel().astype(np.float64), labels.values.ravel() == 1

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        return np.asarray(expit(logits))

    def cross_entropy(self, logits: np.ndarray, target: np.ndarray) -> float:
        from scipy.special import log_expit

        return float(-(target * log_expit(logits) + (1 - target) * log_expit(-logits)).mean())

    def each_loss(self, logits: np.ndarray, labels: Labels) -> np.ndarray:
        """The mean over classes."""
        from torch import from_numpy
        from torch.nn.functional import binary_cross_entropy_with_logits

        z = from_numpy(np.ascontiguousarray(logits, dtype=np.float64))
        each = binary_cross_entropy_with_logits(z, from_numpy(labels.values).double(), reduction="none")
        return np.asarray(each.mean(dim=1).numpy())

    def two_best(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Yes and no of the class that the model is least sure of."""
        second = np.abs(outputs - 0.5).argmin(axis=1)
        unsure = outputs[np.arange(len(outputs)), second]
        top = np.stack([np.maximum(unsure, 1 - unsure), np.minimum(unsure, 1 - unsure)], axis=1)
        return top, second, np.ones(len(outputs), dtype=bool)

    # --- baselines, and which rows to draw

    def constant(self, labels: Labels, width: int) -> np.ndarray:
        """(C,) the classes that more than half of the rows have."""
        known = labels.values[labels.known]
        return (known.mean(axis=0) > 0.5).astype(known.dtype) if len(known) else np.zeros(width, known.dtype)

    def log_frequencies(self, labels: Labels, width: int) -> np.ndarray:
        """Log odds."""
        known = labels.values[labels.known]
        share = (known.sum(axis=0) + 0.5) / (len(known) + 1)
        return np.log(share / (1 - share))

    def linear_target(self, labels: Labels, width: int, balanced: bool) -> LinearTarget:
        from mmkt_ray.kinds.linear_target import LinearTarget

        weights = self.balanced_weights(self.count(labels, width)) if balanced else np.ones(width)
        return LinearTarget.of_sets(labels.values, weights)

    def strata(self, labels: Labels) -> Iterator[np.ndarray]:
        """By each row's rarest class, and by having none."""
        positive = (labels.values == 1) & labels.known[:, None]
        support = np.where(positive, positive.sum(axis=0), np.iinfo(np.int64).max)
        codes = np.where(positive.any(axis=1), support.argmin(axis=1), labels.values.shape[1])
        for code in np.unique(codes[labels.known]):
            yield np.flatnonzero(labels.known & (codes == code))

    def one_of_each(self, labels: Labels) -> np.ndarray:
        positive = (labels.values == 1) & labels.known[:, None]
        return positive.argmax(axis=0)[positive.any(axis=0)]

    def draw_weights(self, labels: Labels) -> np.ndarray:
        """The mean over a row's classes of 1 / rows of the class; no class at all counts as one."""
        positive = (labels.values == 1) & labels.known[:, None]
        classes = np.column_stack([positive, labels.known & ~positive.any(axis=1)])
        weights = (classes / np.maximum(classes.sum(axis=0), 1)).sum(axis=1) / np.maximum(classes.sum(axis=1), 1)
        return np.where(labels.known, weights, 0.0)

    # --- label issues

    def judged_rows(self, labels: Labels, num_folds: int) -> np.ndarray:
        return np.flatnonzero(labels.known)

    def fold_strata(self, labels: Labels, num_folds: int) -> tuple[np.ndarray, bool]:
        return np.zeros(len(labels)), False

    def evidence(self, outputs: np.ndarray) -> np.ndarray:
        from scipy.special import logit

        return np.asarray(logit(outputs))

    def from_evidence(self, evidence: np.ndarray) -> np.ndarray:
        return self.probabilities(evidence)

    def label_issues(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        from cleanlab.multilabel_classification.filter import find_label_issues

        given = [np.flatnonzero(row).tolist() for row in labels.values]
        return np.asarray(find_label_issues(given, outputs, filter_by="both", n_jobs=1), dtype=bool)

    def label_quality(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        """The mean over the classes, worst first."""
        from cleanlab.multilabel_classification.rank import get_label_quality_scores

        return np.asarray(get_label_quality_scores([np.flatnonzero(row).tolist() for row in labels.values], outputs))

    def distributions(self, outputs: np.ndarray) -> np.ndarray:
        """Yes and no of each class."""
        return np.stack([outputs, 1 - outputs], axis=-1)


TASK_KINDS: dict[str, type[TaskKind]] = {
    "multiclass": Multiclass,
    "binary": Binary,
    "multilabel": Multilabel,
}


def task_kind(given: Any) -> TaskKind:
    """The kind of a name, or of what `as_json` gave; a kind as it is. Raises: ConfigError if there is none."""
    if isinstance(given, TaskKind):
        return given
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in TASK_KINDS:
        raise unknown_name("kind of task", str(name), TASK_KINDS)
    try:
        return TASK_KINDS[name](**options)
    except TypeError as error:
        raise ConfigError(f"kind of task '{name}': {error}") from None
