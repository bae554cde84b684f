"""The interface of a task kind: everything in which one kind of task differs from another.

Nothing heavy is imported here before it is used: a config is made of kinds.

Axes: N rows, B rows of a batch, K numbers that a model gives for a row (the width), M modalities, P models in a
stack, R resamples, S seeds. Outputs are what a model's logits become before anyone reads them, such as probabilities.
Predictions have the form of label values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from mmkt_ray.kinds.labels import Labels

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from mmkt_ray.kinds.arrow import Converted


class Outcomes(Protocol):
    """What predictions come to, cell by cell; see `TaskKind.outcomes`."""

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric of `reported` -> (R,) of how often each cell is drawn, (R, cells)."""


@dataclass(frozen=True)
class TaskKind(ABC):
    """One kind of task. Fields are its parameters; they are kept with stores and models, see `as_json`."""

    name: ClassVar[str]
    exclusive: ClassVar[bool] = False  # a row has one of several classes, so rows can be made up and paired by class
    metrics: ClassVar[tuple[str, ...]]  # what an objective may ask for
    reported: ClassVar[tuple[str, ...]]  # metrics with an interval in every comparison, the main one first
    share: ClassVar[str | None] = None  # the one of `reported` that is the share of rows that are right
    further: ClassVar[tuple[str, ...]] = ()  # metrics with an interval where labelled files are scored
    seed_metrics: ClassVar[tuple[str, ...]] = ()  # metrics beside `reported` where models of several seeds are compared
    ranked: ClassVar[tuple[str, ...]] = ()  # metrics whose resamples take long, because rows are sorted by output
    row_metric: ClassVar[str]  # name of the mean of `row_scores`
    val_metric: ClassVar[str]  # the one of `reported` whose mean over tasks the log of epochs shows
    called: ClassVar[Mapping[str, str]] = {}  # metric -> what a report calls it, where that is not its name
    # what readers of a report should know of the metrics; {tasks} stands for the tasks' names
    notes: ClassVar[str] = ""
    # metric -> lowest and highest value, where these aren't 0 and 1
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    # metrics in the labels' own units, lower is better; others are in percent
    in_units: ClassVar[tuple[str, ...]] = ()
    right: ClassVar[str] = "{score} of {rows} right"  # what a model gets, in a sentence
    # labels are classes and outputs their probabilities, which can be calibrated and judged
    classes: ClassVar[bool] = True
    # setting of `training` that has no meaning here -> why, as part of a sentence
    cannot: ClassVar[Mapping[str, str]] = {}

    def as_json(self) -> Any:
        """The name; with parameters a mapping of `name` and these. `task_kind` reads both."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name, **own} if own else self.name

    @property
    def main(self) -> str:
        """The metric by which models are compared and chosen."""
        return self.reported[0]

    # --- labels -----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def arrow_type(self) -> pa.DataType:
        """Type of a column of labels, and of one of predictions."""

    def reading(self, task: str, separator: str) -> str:
        """What decides how cells of a task are read: stores of another reading are made anew."""
        return task

    @abstractmethod
    def from_cell(self, cell: Any, separator: str) -> Any:
        """A raw cell, text decoded, as one of `arrow_type`; null for no label. Raises: ValueError that says why."""

    @abstractmethod
    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        """A raw column as one of `arrow_type`. class_names: what whole numbers in it stand for,
        where the file says so.
        Raises: TypeError for a column that can't be one of labels."""

    @abstractmethod
    def labels(self, values: Sequence[Any] | np.ndarray, known: np.ndarray | None = None) -> Labels:
        """Labels of encoded values (N, ..), all of which count; known: (N,) bool, null: all."""

    @abstractmethod
    def encode(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
        """A column of `arrow_type` as labels."""

    @abstractmethod
    def encode_predictions(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        """A column of predictions as `predict` gives them. One outside of `class_names` equals no label."""

    @abstractmethod
    def outside(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        """(N,) bool: the label has something that is not in `class_names`."""

    @abstractmethod
    def members(self, column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
        """Row number and class name of every class of every row, for counting; name null where a row has no label."""

    def normalise(self, column: pa.Array) -> tuple[pa.Array, list[int]]:
        """A column of `arrow_type` with labels in one form, and the rows that were changed."""
        return column, []

    def rename(self, cell: Any, names: Mapping[str, str]) -> Any:
        """A cell of `arrow_type` with some classes called otherwise."""
        return cell

    @abstractmethod
    def class_names(self, counts: Mapping[str, int]) -> list[str]:
        """The classes, in order, of class -> rows of the train split."""

    def fitted(self, task: str, columns: Iterable[pa.ChunkedArray]) -> TaskKind:
        """The kind with what it has to know of the train labels (columns of `arrow_type`). Raises: DataError."""
        return self

    def check_classes(self, task: str, class_names: Sequence[str]) -> None:  # noqa: B027  (most kinds have nothing to check)
        """Raises: DataError if the kind can't have these classes."""

    @abstractmethod
    def value(self, cell: Any) -> Any:
        """A label or prediction as it comes from a file, so that equal ones are equal and can be keys."""

    @abstractmethod
    def tell(self, cell: Any, separator: str = ", ") -> str:
        """A label or prediction as it comes from a file, in words."""

    @abstractmethod
    def decode(self, predictions: np.ndarray, class_names: Sequence[str]) -> list[Any]:
        """Predictions (N, ..) as cells of `arrow_type`."""

    @abstractmethod
    def unlabelled(self, num_rows: int, like: Labels) -> Labels:
        """Rows without a label, of the same width."""

    def filled(self, num_rows: int, code: int, like: Labels) -> Labels:
        """Rows of one class; kinds that are `exclusive` have it."""
        raise NotImplementedError(f"{self.name} has no rows of one class")

    # --- model ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def width(self, class_names: Sequence[str]) -> int:
        """K."""

    @abstractmethod
    def outputs(self, logits: Tensor) -> Tensor:
        """Logits (.., K) as outputs (.., K)."""

    def outputs_of(self, logits: np.ndarray) -> np.ndarray:
        """The same of arrays."""
        import torch

        return np.asarray(self.outputs(torch.from_numpy(logits)).numpy())

    @abstractmethod
    def logits(self, outputs: Tensor) -> Tensor:
        """Logits that give these outputs: the inverse, for means of several models."""

    @abstractmethod
    def decisions(self, z: Tensor) -> Tensor:
        """Logits of each modality (B, M, K) as what may be added up over modalities."""

    @abstractmethod
    def mean_decision(self, z: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K) of the mean output of the modalities that are there, zeros if none is. mask: (B, M) bool."""

    # --- loss -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def count(self, labels: Labels, width: int) -> np.ndarray:
        """Statistics of the known labels, which weights and priors are made of; the last axis is (K,)."""

    @abstractmethod
    def balanced_weights(self, counts: np.ndarray) -> np.ndarray:
        """Weights (K,) that make up for unequal frequencies. counts: see `count`."""

    @abstractmethod
    def log_prior(self, counts: np.ndarray) -> np.ndarray:
        """Logits (K,) of the frequencies."""

    @abstractmethod
    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        """Raises: DataError if there is nothing to learn from labels with these statistics."""

    @abstractmethod
    def row_weights(self, labels: Labels, weights: Tensor) -> Tensor:
        """(B,) what each row counts in the mean loss, 0 where it is not known. weights: (K,)."""

    @abstractmethod
    def row_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
        """(B,) losses times the label's weight; 0 where it is not known. smoothing: share spread over all classes."""

    @abstractmethod
    def stacked_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: Tensor) -> Tensor:
        """(P, B) the same of logits (P, B, K), with a smoothing of each model (P,)."""

    @abstractmethod
    def distillation(self, logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        """(B,) how far a student's outputs are from a teacher's softened ones (B, K)."""

    @abstractmethod
    def soften(self, outputs: np.ndarray, temperature: float) -> np.ndarray:
        """Outputs (N, K) of logits / T from those of the logits."""

    @abstractmethod
    def chance_loss(self, width: int) -> float:
        """The loss of who knows nothing."""

    @abstractmethod
    def right_probability(self, logits: Tensor, labels: Labels) -> Tensor:
        """(B,) how much of the right answer a model gives, 0..1; any number where the label is not known."""

    # --- predictions and their scores -------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (N, K) as predictions (N, ..)."""

    @abstractmethod
    def is_right(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """(N,) bool: the prediction is the label; never for an unknown one."""

    @abstractmethod
    def row_scores(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """(N,) score of each labelled row, higher is better: what paired tests compare."""

    def main_by_row(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """(N,) what the main metric is the mean of, for its paired test; `row_scores` if it is no mean."""
        return self.row_scores(labels, predictions)

    @abstractmethod
    def score_pair(self, label: Any, prediction: Any) -> float:
        """`row_scores` of one row, of `value`s from a file."""

    def among(self, scores: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
        """Scores (N,) of `score_pair` so that their mean is `row_metric` of these rows. labels: `value`s (N,)."""
        return scores

    @abstractmethod
    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        """All metrics over the labelled rows, for JSON. Raises: ValueError for outputs of another shape, or NaN."""

    @abstractmethod
    def metric_scores(self, metric: str, labels: Labels, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """A metric (R,) of `metrics`, higher is better, NaN if undefined. counts: (R, N) how often rows are drawn."""

    def seed_scores(self, labels: Labels, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """`seed_metrics` of models of several seeds, (metrics, S, R). outputs: (S, N, K)."""
        return np.stack([[self.metric_scores(m, labels, own, counts) for own in outputs] for m in self.seed_metrics])

    @abstractmethod
    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        """What each of the predictions comes to, by cells of equal rows, and how many rows each cell has. by_row:
        each row is its own cell, in order. Labels are all labelled."""

    @abstractmethod
    def quick_scores(self, labels: Labels, outputs: np.ndarray) -> dict[str, float]:
        """`reported` metrics of labelled rows, NaN where undefined, as fast as can be, for picking ensembles."""

    @abstractmethod
    def tally_size(self, width: int) -> int:
        """How many numbers `tally` gives."""

    @abstractmethod
    def tally(self, logits: Tensor, labels: Labels) -> Tensor:
        """What adds up over batches and ranks, (.., size) float64. logits: (B, K) or (P, B, K)."""

    @abstractmethod
    def tally_scores(self, tally: np.ndarray) -> dict[str, float]:
        """`loss` and the defined ones of `reported`, of a sum of tallies; empty where no row is labelled."""

    def further_columns(self, outputs: np.ndarray, margin: np.ndarray | None) -> dict[str, pa.Array]:
        """Columns of a file of predictions beside <task>_pred, by how they end: outputs (N, K), null where NaN.
        margin: (N,) see inference/conformal.py."""
        import pyarrow as pa

        known = np.isfinite(outputs).all(axis=1)
        flat = pa.array(outputs.ravel())
        return {"proba": pa.FixedSizeListArray.from_arrays(flat, outputs.shape[1], mask=pa.array(~known))}

    def read_outputs(self, rows: pa.Table, task: str) -> np.ndarray:
        """Outputs (N, K) of such a file; all rows have a prediction."""
        flat = rows.column(f"{task}_proba").combine_chunks()
        return np.asarray(flat.flatten().to_numpy().reshape(len(flat), flat.type.list_size))

    def error_sizes(self, labels: Labels, outputs: np.ndarray) -> np.ndarray | None:
        """(N,) how far outputs are from known labels, on the scale on which `further_columns` takes margins; null for
        a kind whose predictions have no interval."""
        return None

    # --- probabilities: of kinds whose labels are `classes`, no others are asked ------------------------------------

    def _has_no_classes(self) -> NotImplementedError:
        return NotImplementedError(f"{self.name} labels are no classes")

    def indicators(self, labels: Labels, width: int) -> np.ndarray:
        """(N, K) 0/1: the classes of each row, all zero where unknown."""
        raise self._has_no_classes()

    def label_probability(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        """(N, ..) float64, what was given to each known label; of every forecast of a row where it has several."""
        raise self._has_no_classes()

    def forecasts(self, labels: Labels, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Confidence and whether it came true, of all forecasts for known labels."""
        raise self._has_no_classes()

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Outputs (N, K) in float64, for fitting a temperature."""
        raise self._has_no_classes()

    def cross_entropy(self, logits: np.ndarray, target: np.ndarray) -> float:
        """Mean loss of logits (N, K) against shares (N, K)."""
        raise self._has_no_classes()

    @abstractmethod
    def each_loss(self, logits: np.ndarray, labels: Labels) -> np.ndarray:
        """(N,) loss of each row; all are known."""

    def two_best(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The two best answers: their outputs (N, 2), larger first (N, 1 of a single class), the second's class (N,),
        and whether there is one (N,) bool."""
        raise self._has_no_classes()

    # --- baselines --------------------------------------------------------------------------------------------------

    @abstractmethod
    def baseline(self, labels: Labels, width: int) -> np.ndarray:
        """(K,) float32 outputs that fit the known labels best if nothing is known of a row."""

    @abstractmethod
    def constant(self, labels: Labels, width: int) -> np.ndarray:
        """The prediction for a row of which nothing is known, in the form of one label."""

    @abstractmethod
    def log_frequencies(self, labels: Labels, width: int) -> np.ndarray:
        """Logits (K,) of the frequencies of known labels, each class half a row more than it has."""

    @abstractmethod
    def linear_target(self, labels: Labels, width: int, balanced: bool) -> Any:
        """What the solver of linear models learns; see `LinearTarget`. All labels are known."""

    # --- which rows to draw -----------------------------------------------------------------------------------------

    @abstractmethod
    def strata(self, labels: Labels) -> Iterator[np.ndarray]:
        """Positions of the labelled rows of each stratum, of which equal shares are kept."""

    @abstractmethod
    def one_of_each(self, labels: Labels) -> np.ndarray:
        """Positions that must stay for every class to be there, beside one of each stratum."""

    @abstractmethod
    def draw_weights(self, labels: Labels) -> np.ndarray:
        """(N,) how often each row is drawn for all classes to come up equally often; 0 where not known."""

    # --- label issues, of `classes` too -----------------------------------------------------------------------------

    def judged_rows(self, labels: Labels, num_folds: int) -> np.ndarray:
        """Rows whose labels can be judged by models of the other folds."""
        raise self._has_no_classes()

    def fold_strata(self, labels: Labels, num_folds: int) -> tuple[np.ndarray, bool]:
        """(N,) what folds may be stratified by, and whether every stratum has enough rows."""
        raise self._has_no_classes()

    def evidence(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs strictly within 0..1 on a scale on which independent evidence adds up."""
        raise self._has_no_classes()

    def from_evidence(self, evidence: np.ndarray) -> np.ndarray:
        """The inverse."""
        raise self._has_no_classes()

    def label_issues(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        """(N,) bool: labels that confident learning holds for wrong. All are known, of two classes at least."""
        raise self._has_no_classes()

    def label_quality(self, labels: Labels, outputs: np.ndarray) -> np.ndarray:
        """(N,) 0..1: how well out-of-sample outputs agree with the labels. All are known."""
        raise self._has_no_classes()

    def distributions(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (.., K) as distributions (.., one for each decision, its answers)."""
        raise self._has_no_classes()
