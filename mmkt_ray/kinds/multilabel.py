"""Tasks where a row has any number of classes. Axes: see task_kind.py; K is C, the number of classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.cells import label_names
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Multilabel(ClassKind):
    """Any number of classes per row, each a decision of its own.
    Values are (N, C) int8, 1 where the row has the class."""

    name: ClassVar[str] = "multilabel"
    metrics: ClassVar[tuple[str, ...]] = (
        *SHARED, "samples_precision", "samples_recall", "samples_f1", "micro_average_precision",
    )  # fmt: skip
    further: ClassVar[tuple[str, ...]] = ("micro_f1", "samples_f1", "macro_average_precision", "auroc", "log_loss")
    seed_metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "samples_f1", "macro_average_precision")
    row_metric: ClassVar[str] = "f1_samples"
    called: ClassVar[Mapping[str, str]] = {"accuracy": "subset accuracy (all classes right)"}
    notes: ClassVar[str] = "Accuracy of {tasks} is subset accuracy: a sample is right if all of its classes are."

    # --- labels

    @property
    def arrow_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.list_(pa.string())

    def from_cell(self, cell: Any, separator: str) -> Any:
        names = label_names(cell, separator)
        "".join(names or ()).encode()
        return names

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        from mmkt_ray.kinds.label_columns import labels_column

        return labels_column(raw, class_names, separator)

    def reading(self, task: str, separator: str) -> str:
        return f"{task} split at {separator}"

    def encode(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
        """Classes that are not in `class_names` are left out."""
        labelled = ~column.is_null().to_numpy()
        return Labels(self, self.encode_predictions(column, class_names), labelled, labelled)

    def encode_predictions(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        import pyarrow.compute as pc

        codes = np.zeros((len(column), len(class_names)), dtype=np.int8)
        rows, found = pc.list_parent_indices(column).to_numpy(), index_in(pc.list_flatten(column), class_names)
        codes[rows[found >= 0], found[found >= 0]] = 1
        return codes

    def members(self, column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
        import pyarrow as pa
        import pyarrow.compute as pc

        cells = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return pc.list_parent_indices(cells), pc.list_flatten(cells)

    def rename(self, cell: Any, names: Mapping[str, str]) -> Any:
        return cell if cell is None else sorted({names.get(name, name) for name in cell})

    def value(self, cell: Any) -> Any:
        return tuple(sorted(cell))

    def tell(self, cell: Any, separator: str = ", ") -> str:
        return separator.join(sorted(cell)) or "none"

    def decode(self, predictions: np.ndarray, class_names: Sequence[str]) -> list[Any]:
        names = np.array(class_names, dtype=object)
        return [names[row == 1].tolist() for row in predictions]

    def check_classes(self, task: str, class_names: Sequence[str]) -> None:
        """Warns of what lists with a 0 or 1 for each class become."""
        if {name.lower() for name in class_names} in ({"0", "1"}, {"false", "true"}):
            log.warning(
                "task '%s' has the two classes %s: if its lists hold a 0 or 1 for each class, write the names of "
                "those that "
                "a row has instead", task, " and ".join(class_names),
            )  # fmt: skip

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
        return np.asarray(self.count(labels, width)[1])

    def balanced_weights(self, counts: np.ndarray) -> np.ndarray:
        """What a positive weighs against a negative, rows without / rows with the class;
        1 where that is undefined."""
        return divide_where(np.all(counts > 0, axis=0), counts[0], counts[1], 1.0)

    def log_prior(self, counts: np.ndarray) -> np.ndarray:
        """Log odds of each class; no rows count as one."""
        some = np.maximum(counts, 1)
        return np.asarray(np.log(some[1] / some[0]))

    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        super().check_learnable(task, counts, class_names)
        if not (counts > 0).all(axis=0).any():
            raise DataError(
                f"all {counts[:, 0].sum()} labelled train rows of task '{task}' have the same classes, "
                f"{NOTHING_TO_LEARN}"
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
        return np.asarray(powers / (powers + np.clip(1 - outputs, 1e-12, 1.0) ** (1 / temperature)))

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
        return np.asarray(labels.known & (labels.values == predictions).all(axis=-1))

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

    def outcome(self, labels: Labels, predictions: np.ndarray, width: int) -> ClassOutcome:
        from mmkt_ray.kinds.outcomes import ClassOutcome

        return ClassOutcome.of_sets(labels.values, predictions)

    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        from mmkt_ray.kinds.outcomes import ClassOutcome, cells

        label, guesses, counts = labels.values, list(predictions), np.ones(len(labels), int)
        if not by_row:
            (label, *guesses), counts = cells([label, *guesses], width)
        return [ClassOutcome.of_sets(label, guess) for guess in guesses], counts

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
        return np.asarray(labels.values * labels.known[:, None])

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
        return np.asarray(np.log(share / (1 - share)))

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
        return np.asarray(positive.argmax(axis=0)[positive.any(axis=0)])

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
