"""Tasks whose labels are numbers. Axes: see task_kind.py; K is 1.

A model's logit z is the number on the scale that `transform` makes of the train labels (numbers.py); its output is
the number itself. What the card needs to undo the transform is a parameter of the kind, `scale`, which the store's
manifest and the model's spec keep.

Row scores are 1 - squared error / variance of the train labels, so that no row's score needs others. `among` puts the
variance of the scored rows in its place: then their mean is R2, and paired tests of rows ask what differences of R2
ask.

Sources: R2 and its kin as in scikit-learn; Huber loss, Huber 1964 (https://doi.org/10.1214/aoms/1177703732); pinball
loss, Koenker & Bassett 1978 (https://doi.org/10.2307/1913643); intervals, split conformal prediction, Lei et al. 2018
(https://arxiv.org/abs/1604.04173).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mmkt_ray.errors import ConfigError, DataError, unknown_name
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.number_metrics import IN_UNITS, NumberOutcome, number_scores
from mmkt_ray.kinds.numbers import TRANSFORMS, Scale, number_column, number_in, taken_by
from mmkt_ray.kinds.task_kind import Outcomes, TaskKind

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from mmkt_ray.kinds.arrow import Converted
    from mmkt_ray.kinds.linear_target import NumberTarget

LOSSES = ("squared", "absolute", "huber", "pinball")
NAME = "value"  # of the one number that a model gives, where others have classes
NUM_STRATA = 10


@dataclass(frozen=True)
class Regression(TaskKind):
    """One number per row. Values are the numbers (N,) float64 as they are; predictions too."""

    transform: str = "standardize"
    loss: str = "squared"  # on the transformed scale
    quantile: float = 0.5  # that the pinball loss aims at
    scale: Scale | None = None  # fitted

    name: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("r2", "spearman")  # RMSE orders models as R2 does
    reported: ClassVar[tuple[str, ...]] = ("r2", "spearman", "rmse", "mae")
    row_metric: ClassVar[str] = "r2"
    val_metric: ClassVar[str] = "r2"
    called: ClassVar[Mapping[str, str]] = {"r2": "R2", "rmse": "RMSE", "mae": "MAE", "spearman": "Spearman"}
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "r2": (-math.inf, 1.0), "spearman": (-1.0, 1.0), "rmse": (0.0, math.inf), "mae": (0.0, math.inf),
    }  # fmt: skip
    in_units: ClassVar[tuple[str, ...]] = IN_UNITS
    right: ClassVar[str] = "{score} of the variance of {rows} explained (R2)"
    notes: ClassVar[str] = (
        "R2 of {tasks} is the share of the variance explained, in %; below 0 the mean of the labels is better."
    )
    classes: ClassVar[bool] = False
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("class_weights", "resample", "generate", "logit_adjustment", "label_smoothing"),
        "whose labels are numbers and have no classes",
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError for an unknown option."""
        for what, given, known in (("transform", self.transform, TRANSFORMS), ("loss", self.loss, LOSSES)):
            if given not in known:
                raise unknown_name(f"{what} of a regression task", str(given), known)
        if isinstance(self.quantile, bool) or not isinstance(self.quantile, int | float) or not 0 < self.quantile < 1:
            raise ConfigError(f"quantile of a regression task must be above 0 and below 1, got {self.quantile!r}")
        kept: Any = self.scale
        object.__setattr__(self, "scale", kept if kept is None or isinstance(kept, Scale) else Scale.of(kept))

    def as_json(self) -> Any:
        """See TaskKind; without `scale` where none is fitted."""
        section = {"name": self.name, "transform": self.transform, "loss": self.loss, "quantile": self.quantile}
        return section | ({"scale": self.scale.as_json()} if self.scale else {})

    # --- labels

    @property
    def arrow_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.float64()

    def reading(self, task: str, separator: str) -> str:
        """The transform is fitted when a store is published, so another one is another store."""
        return f"{task} {replace(self, scale=None).as_json()}"

    def from_cell(self, cell: Any, separator: str) -> Any:
        return number_in(cell)

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        return number_column(raw, class_names)

    def labels(self, values: Sequence[Any] | np.ndarray, known: np.ndarray | None = None) -> Labels:
        values = np.asarray(values, np.float64)
        known = np.ones(len(values), dtype=bool) if known is None else known
        return Labels(self, values, known, known)

    def encode(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
        """A label that the transform can't take is none to learn from."""
        values = self.encode_predictions(column, class_names)
        labelled = np.isfinite(values)
        values = np.where(labelled, values, 0.0)
        return Labels(self, values, labelled, labelled & taken_by(self.transform, values))

    def encode_predictions(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        import pyarrow.compute as pc

        return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), np.float64)

    def outside(self, column: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
        return np.zeros(len(column), dtype=bool)

    def members(self, column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
        import pyarrow as pa

        there = column.is_valid().to_pylist()
        return pa.array(np.arange(len(column))), pa.array([NAME if t else None for t in there], pa.string())

    def class_names(self, counts: Mapping[str, int]) -> list[str]:
        """The one number that a model gives."""
        return [NAME]

    def fitted(self, task: str, columns: Iterable[pa.ChunkedArray]) -> Regression:
        parts = [values[np.isfinite(values)] for c in columns for values in [self.encode_predictions(c, ())]]
        labels = np.concatenate([np.zeros(0), *parts])
        return replace(self, scale=Scale.fit(task, self.transform, labels)) if len(labels) else self

    def value(self, cell: Any) -> Any:
        return float(cell)

    def tell(self, cell: Any, separator: str = ", ") -> str:
        return f"{cell:.6g}"

    def decode(self, predictions: np.ndarray, class_names: Sequence[str]) -> list[Any]:
        cells: list[Any] = np.asarray(predictions, np.float64).tolist()
        return cells

    def unlabelled(self, num_rows: int, like: Labels) -> Labels:
        nowhere = np.zeros(num_rows, dtype=bool)
        return Labels(self, np.zeros(num_rows), nowhere, nowhere)

    # --- model

    @property
    def fit_scale(self) -> Scale:
        """What `fitted` found."""
        assert self.scale is not None, "a model's kind is fitted"
        return self.scale

    def width(self, class_names: Sequence[str]) -> int:
        return 1

    def outputs(self, logits: Tensor) -> Tensor:
        return self.fit_scale.inverse(logits).to(logits.dtype)

    def logits(self, outputs: Tensor) -> Tensor:
        return self.fit_scale.forward(outputs).to(outputs.dtype)

    def decisions(self, z: Tensor) -> Tensor:
        return z

    def mean_decision(self, z: Tensor, mask: Tensor) -> Tensor:
        """The mean of z, which is the number that a model learns."""
        there = mask[..., None].to(z.dtype)
        return (z * there).sum(dim=-2) / there.sum(dim=-2).clamp(min=1)

    # --- loss

    def count(self, labels: Labels, width: int) -> np.ndarray:
        """Known rows, lowest and highest label (3, 1)."""
        known = labels.values[labels.known]
        ends = [known.min(), known.max()] if len(known) else [0.0, 0.0]
        return np.array([[float(len(known))], *([end] for end in ends)])

    def balanced_weights(self, counts: np.ndarray) -> np.ndarray:
        return np.ones(counts.shape[-1])

    def log_prior(self, counts: np.ndarray) -> np.ndarray:
        return np.zeros(counts.shape[-1])

    def check_learnable(self, task: str, counts: np.ndarray, class_names: Sequence[str]) -> None:
        from mmkt_ray.kinds.classes import NOTHING_TO_LEARN

        if counts[0].sum() == 0:
            raise DataError(
                f"task '{task}' has no labelled row with features in the train split: check the sources' columns and "
                "splits, or leave it out of model.tasks"
            )
        if counts[1, 0] == counts[2, 0]:
            num_rows, value = counts[:2, 0]
            raise DataError(
                f"all {num_rows:.0f} labelled train rows of task '{task}' are {value:g}, {NOTHING_TO_LEARN}"
            )

    def row_weights(self, labels: Labels, weights: Tensor) -> Tensor:
        import torch

        return torch.where(labels.known, 1.0, 0.0)

    def row_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
        import torch

        return torch.where(labels.known, self.z_losses(logits[..., 0], self.fit_scale.forward(labels.values)), 0.0)

    def stacked_losses(self, logits: Tensor, labels: Labels, weights: Tensor, smoothing: Tensor) -> Tensor:
        return self.row_losses(logits, labels, weights, 0.0)

    def z_losses(self, z: Tensor, target: Tensor) -> Tensor:
        """Losses of transformed numbers, of any shape. Those of the Huber loss turn from squares to lines at 1."""
        error = target.to(z.dtype) - z
        if self.loss == "squared":
            return error.square()
        if self.loss == "absolute":
            return error.abs()
        if self.loss == "huber":
            import torch

            return torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
        return (self.quantile * error).maximum((self.quantile - 1) * error)

    def distillation(self, logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        return self.z_losses(logits[:, 0], self.fit_scale.forward(target[:, 0]))

    def soften(self, outputs: np.ndarray, temperature: float) -> np.ndarray:
        """As they are: numbers are not sure of themselves."""
        return outputs

    def chance_loss(self, width: int) -> float:
        spread = self.fit_scale.spread
        known = {"squared": spread**2, "absolute": 0.8 * spread, "huber": spread**2 / 2}
        return known.get(self.loss, 0.4 * spread) or 1.0

    def right_probability(self, logits: Tensor, labels: Labels) -> Tensor:
        """The density of the right number relative to that of the predicted one, of a normal distribution of the
        labels' spread."""
        error = (self.fit_scale.forward(labels.values) - logits[:, 0]) / (self.fit_scale.spread or 1.0)
        return (-error.square() / 2).exp()

    # --- predictions and their scores

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """(N,) float64."""
        return outputs[..., 0].astype(np.float64)

    def is_right(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """To the last digit: nothing counts by it."""
        return np.asarray(labels.known & (labels.values == predictions))

    def row_scores(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """See the top of this file."""
        return np.asarray(1 - (labels.values - predictions) ** 2 / self._variance)

    @property
    def _variance(self) -> float:
        return (self.scale.variance if self.scale else 0.0) or 1.0

    def main_by_row(self, labels: Labels, predictions: np.ndarray) -> np.ndarray:
        """1 - squared error / variance of these labels: the mean is R2."""
        variance = float(labels.values[labels.labelled].var()) if labels.labelled.any() else 0.0
        return np.asarray(1 - (labels.values - predictions) ** 2 / (variance or self._variance))

    def score_pair(self, label: Any, prediction: Any) -> float:
        return float(1 - (label - prediction) ** 2 / self._variance)

    def among(self, scores: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
        """The share is of the variance of these labels, no longer of the train labels."""
        variance = float(np.var(np.asarray(labels, np.float64))) if len(scores) else 0.0
        return np.asarray(1 - (1 - scores) * self._variance / (variance or self._variance))

    def scores(self, labels: Labels, outputs: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
        if outputs.shape != (len(labels), 1) or np.isnan(outputs).any():
            raise ValueError(f"predicted numbers must be ({len(labels)}, 1) without NaN, got {outputs.shape}")
        rows = labels.labelled
        return {"kind": self.as_json(), **number_scores(labels.values[rows], self.predict(outputs)[rows])}

    def metric_scores(self, metric: str, labels: Labels, outputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return NumberOutcome(labels.values, self.predict(outputs)).score(metric, counts)

    def outcomes(
        self, labels: Labels, predictions: Sequence[np.ndarray], width: int, *, by_row: bool = False
    ) -> tuple[list[Outcomes], np.ndarray]:
        return [NumberOutcome(labels.values, p) for p in predictions], np.ones(len(labels), int)

    def quick_scores(self, labels: Labels, outputs: np.ndarray) -> dict[str, float]:
        drawn = NumberOutcome(labels.values, self.predict(outputs)).scores(np.ones((1, len(labels))))
        return {metric: float(values[0]) for metric, values in drawn.items()}

    def tally_size(self, width: int) -> int:
        return 7

    def tally(self, logits: Tensor, labels: Labels) -> Tensor:
        """Summed loss, rows with a loss, labelled rows; of these the sums of y, y y, squared and absolute errors, y
        being the label less the train mean, over the train deviation."""
        import torch

        unit = self._variance**0.5
        logits, labels = logits[..., labels.labelled, :], labels[labels.labelled]
        loss = self.row_losses(logits, labels, logits, 0.0).double().sum(dim=-1)
        error = (self.fit_scale.inverse(logits[..., 0]) - labels.values) / unit
        y = ((labels.values - self.fit_scale.mean) / unit).expand_as(error)
        num_known, num_rows = (torch.full_like(loss, float(n)) for n in (int(labels.known.sum()), len(labels)))
        sums = [x.sum(dim=-1) for x in (y, y.square(), error.square(), error.abs())]
        return torch.stack([loss, num_known, num_rows, *sums], dim=-1)

    def tally_scores(self, tally: np.ndarray) -> dict[str, float]:
        """All of `reported` but Spearman, which takes the ranks of all rows."""
        loss, num_known, num_rows, y, yy, squared, absolute = tally.tolist()
        if num_rows == 0:
            return {}
        unit, variance = self._variance**0.5, yy / num_rows - (y / num_rows) ** 2
        found = {"loss": loss / max(1.0, num_known)}
        found |= {"r2": 1 - squared / num_rows / variance} if variance > 1e-12 else {}
        return found | {"rmse": unit * (squared / num_rows) ** 0.5, "mae": unit * absolute / num_rows}

    def further_columns(self, outputs: np.ndarray, margin: np.ndarray | None) -> dict[str, pa.Array]:
        """`low` and `high`, where margins are known: how far z may be off to either side."""
        import pyarrow as pa
        import torch

        if margin is None:
            return {}
        scale, known = self.fit_scale, np.isfinite(outputs[:, 0]) & np.isfinite(margin)
        z = scale.forward(torch.from_numpy(np.where(known, outputs[:, 0], self.fit_scale.mean)))
        step = torch.from_numpy(np.where(known, margin, 0.0))
        ends = {"low": scale.inverse(z - step), "high": scale.inverse(z + step)}
        return {end: pa.array(values.numpy(), pa.float64(), mask=~known) for end, values in ends.items()}

    def read_outputs(self, rows: pa.Table, task: str) -> np.ndarray:
        return self.encode_predictions(rows.column(f"{task}_pred"), ())[:, None]

    def error_sizes(self, labels: Labels, outputs: np.ndarray) -> np.ndarray | None:
        """Distances on the transformed scale."""
        import torch

        y, said = (self.fit_scale.forward(torch.from_numpy(v)) for v in (labels.values, self.predict(outputs)))
        return np.asarray((y - said).abs().numpy(), np.float64)

    def each_loss(self, logits: np.ndarray, labels: Labels) -> np.ndarray:
        from torch import from_numpy

        target = self.fit_scale.forward(from_numpy(np.asarray(labels.values, np.float64)))
        return np.asarray(self.z_losses(from_numpy(np.array(logits[:, 0], np.float64)), target).numpy())

    # --- baselines, and which rows to draw

    def baseline(self, labels: Labels, width: int) -> np.ndarray:
        """The mean."""
        return np.array([labels.values[labels.known].mean()], np.float32)

    def constant(self, labels: Labels, width: int) -> np.ndarray:
        """The mean, ()."""
        known = labels.values[labels.known]
        return np.array(known.mean() if len(known) else 0.0)

    def log_frequencies(self, labels: Labels, width: int) -> np.ndarray:
        """The constant z (1,) of the least loss, or of one near it."""
        z = self._z(labels.values[labels.known])
        if self.loss in ("squared", "huber"):
            return np.array([z.mean()])
        return np.asarray(np.quantile(z, [0.5 if self.loss == "absolute" else self.quantile]))

    def _z(self, values: np.ndarray) -> np.ndarray:
        from torch import from_numpy

        return np.asarray(self.fit_scale.forward(from_numpy(np.asarray(values, np.float64))).numpy())

    def linear_target(self, labels: Labels, width: int, balanced: bool) -> NumberTarget:
        """Ridge regression on the transformed scale, whatever the loss."""
        from mmkt_ray.kinds.linear_target import NumberTarget

        return NumberTarget(self._z(labels.values)[:, None])

    def strata(self, labels: Labels) -> Iterator[np.ndarray]:
        """By tenths."""
        rows = np.flatnonzero(labels.known)
        by_size = rows[np.argsort(labels.values[rows], kind="stable")]
        for part in np.array_split(by_size, NUM_STRATA):
            if len(part):
                yield np.sort(part)

    def one_of_each(self, labels: Labels) -> np.ndarray:
        return np.zeros(0, int)

    def draw_weights(self, labels: Labels) -> np.ndarray:
        """Alike."""
        return np.asarray(labels.known.astype(float))
