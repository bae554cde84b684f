"""What kinds of task have in common whose labels are classes.
Axes: see task_kind.py; K is C, the number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from unicodedata import normalize

import numpy as np

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.spelling import index_in, sort_classes
from mmkt_ray.kinds.task_kind import TaskKind

if TYPE_CHECKING:
    import pyarrow as pa

    from mmkt_ray.kinds.outcomes import ClassOutcome

_AVERAGES = tuple(f"{over}_{name}" for over in ("macro", "micro", "weighted") for name in ("precision", "recall", "f1"))
SHARED = ("accuracy", *_AVERAGES, "auroc", "log_loss", "macro_average_precision")
NOTHING_TO_LEARN = (
    "so there is nothing to learn: check the source's label column and the splits, or leave it out of model.tasks"
)


@dataclass(frozen=True)
class ClassKind(TaskKind):
    """What tasks of classes have in common. Outputs are probabilities."""

    reported: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    share: ClassVar[str | None] = "accuracy"
    val_metric: ClassVar[str] = "macro_f1"
    ranked: ClassVar[tuple[str, ...]] = (
        "auroc", "average_precision", "macro_average_precision", "micro_average_precision",
    )  # fmt: skip

    def width(self, class_names: Sequence[str]) -> int:
        return len(class_names)

    def class_names(self, counts: Mapping[str, int]) -> list[str]:
        return sort_classes(counts)

    def outside(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        import pyarrow as pa

        rows, names = self.members(column)
        absent = (index_in(pa.chunked_array([names]), class_names) < 0) & names.is_valid().to_numpy(
            zero_copy_only=False
        )
        found = np.zeros(len(column), dtype=bool)
        found[rows.to_numpy()[absent]] = True
        return found

    def normalise(self, column: pa.Array) -> tuple[pa.Array, list[int]]:
        """Names in Unicode's composed form (NFC), as texts are."""
        import pyarrow as pa

        names = self.members(column)[1].unique().to_pylist()
        composed = {name: normal for name in names if name and (normal := normalize("NFC", name)) != name}
        if not composed:
            return column, []
        before = column.to_pylist()
        after = [self.rename(cell, composed) for cell in before]
        changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        return pa.array(after, column.type), changed

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
                f"task '{task}' has no labelled row with features in the train split: check the sources' columns and "
                "splits, or leave it out of model.tasks"
            )

    def main_by_row(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """Right or wrong."""
        return self.is_right(labels, predictions).astype(float)

    def outcome(self, labels: Labels, predictions: np.ndarray, width: int) -> ClassOutcome:
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
        return np.asarray((self.rows_with(labels, width) / labels.known.sum()).astype(np.float32))

    def rows_with(self, labels: Labels, width: int) -> np.ndarray:
        """Known rows that have each class, (C,)."""
        return self.count(labels, width)
