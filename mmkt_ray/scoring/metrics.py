"""What the files of scores hold: `metrics.json` of a model, of the baselines of a store, and of scored files."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from mmkt_ray.record import IfAny, OpenRecord, Record
from mmkt_ray.scoring.intervals import Interval

DEFAULT_RESAMPLES = 1000  # of files that do not say


class Values(OpenRecord):
    """A record with metrics by name, None where undefined."""

    spread: ClassVar[str] = "values"

    values: dict[str, int | float | None]

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]

    def value(self, metric: str) -> float:
        """Of a metric that is defined."""
        found = self.values[metric]
        assert found is not None, metric
        return found


class Intervals(OpenRecord):
    """A record with the interval of each metric that the kind reports, None where undefined."""

    spread: ClassVar[str] = "intervals"

    intervals: dict[str, Interval | None]

    def __getitem__(self, metric: str) -> Interval | None:
        return self.intervals[metric]

    def interval(self, metric: str) -> Interval:
        """Of a metric that is defined."""
        found = self[metric]
        assert found is not None, metric
        return found


# --- one task ------------------------------------------------------------------------------------------------------


class Bin(Record):
    """Forecasts of about the same confidence; see `reliability`."""

    low: float
    high: float
    num: int
    confidence: float
    accuracy: float


class Probabilities(Record):
    """Whether probabilities mean what they say; see `probability_scores`."""

    log_loss: float | None
    calibration_error: float | None
    reliability: list[Bin]


class Calibration(Record):
    """The temperature of a task, and what it changed."""

    temperature: float
    num_val_rows: int
    note: str | None  # why nothing, or little, was fitted
    before: IfAny[Probabilities] = None
    after: IfAny[Probabilities] = None


class ClassScores(Values):
    """Precision, recall, F1 and perhaps more of one class."""

    support: int  # rows with it


class Metrics(Values):
    """What `TaskKind.scores` says; which of it there is depends on the kind."""

    kind: str | dict[str, Any]  # see `TaskKind.as_json`
    num_rows: int
    num_unseen: int = 0
    positive: str = ""
    per_class: dict[str, ClassScores] = Field(default_factory=dict)
    confusion: list[list[int]] | None = None
    most_confused: list[tuple[str, str, int]] = Field(default_factory=list)
    reliability: list[Bin] = Field(default_factory=list)
    points: list[tuple[float, float]] = Field(default_factory=list)  # label and prediction of some rows

    def probabilities(self) -> Probabilities:
        """Those of its scores that judge probabilities."""
        found = self.values
        return Probabilities(
            log_loss=found.get("log_loss"),
            calibration_error=found.get("calibration_error"),
            reliability=self.reliability,
        )


class PointScores(Values):
    """The metrics that a kind reports, without intervals."""

    num_rows: int


class HeldOutScores(PointScores):
    """Of the rows by which models are chosen."""

    on: str = "val"  # val | cv (out-of-fold predictions)
    split_val: PointScores | None = None  # of cv: the same on the rows of the val split


class SubsetScores(Intervals):
    """What a model knows from some of its modalities."""

    modalities: list[str]
    num_modalities: int
    num_rows: int
    metrics: Metrics | None = None
    all: PointScores  # of all modalities on the same rows


class Coverage(Record):
    """How many labels the intervals of predicted numbers hold."""

    confidence: float
    covered: float
    median_width: float
    num_rows: int


class TaskScores(Metrics):
    """All scores of one task."""

    unseen: dict[str, int] = Field(default_factory=dict)  # class that train lacks -> rows
    class_names: list[str]
    intervals: dict[str, Interval | None]
    subsets: dict[str, SubsetScores] = Field(default_factory=dict)  # `image+text` -> scores from these alone
    patterns: dict[str, PointScores] = Field(default_factory=dict)  # by the modalities that a row has
    val: HeldOutScores | None = None  # of held-out rows
    calibration: Calibration | None = None
    coverage: Coverage | None = None


# --- the files -----------------------------------------------------------------------------------------------------


class ScoredSplit(Record):
    """What was scored, and how intervals were drawn."""

    split: str
    store: str | None = None  # its fingerprint
    num_rows: int
    confidence: float
    bootstrap_samples: int = DEFAULT_RESAMPLES


class ScoredModel(Record):
    """What a model is, whether trained or a baseline."""

    name: str
    modalities: list[str]
    num_params: int | None = None
    num_train_rows: int | None = None
    training_s: float | None = None
    l2: dict[str, float] | None = None  # task -> penalty
    folder_to_ship: str | None = None  # in the run


class BaselineMetrics(ScoredModel):
    """One baseline."""

    tasks: dict[str, TaskScores] = Field(default_factory=dict)  # empty until it is scored


class BaselinesFile(ScoredSplit):
    """`<run>/baselines/<store>/metrics.json`."""

    models: dict[str, BaselineMetrics]

    def of(self, name: str) -> ModelMetrics:
        """One of them as a model's metrics."""
        scored = {key: getattr(self, key) for key in ScoredSplit.model_fields if key in self.model_fields_set}
        return ModelMetrics.model_validate(scored | self.models[name].to_dict())


class ModelMetrics(ScoredSplit, ScoredModel):
    """`<model>/metrics.json`."""

    fingerprint: str | None = None  # of the model
    tasks: dict[str, TaskScores]
    seconds: float = 0.0


class PatternScores(Metrics):
    """Of the rows that have just these modalities."""

    intervals: dict[str, Interval | None]


class FilesScores(PatternScores):
    """All scores of one task over labelled files."""

    num_unreadable: int  # labelled rows without a modality that the task reads
    unseen: dict[str, int] = Field(default_factory=dict)  # class that the model does not know -> rows
    class_names: list[str]
    patterns: dict[str, PatternScores]  # by the modalities that a row has


class FilesMetrics(Record):
    """`<out>/metrics.json` of `mmkt evaluate MODEL DATA`."""

    model: str
    inputs: list[str]
    predictions: str  # path
    num_rows: int
    confidence: float
    bootstrap_samples: int
    tasks: dict[str, FilesScores]
