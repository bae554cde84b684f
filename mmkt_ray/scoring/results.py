"""What `report/results.json` holds: all models of a run side by side (evaluation/compare.py)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmkt_ray.record import IfAny, Record
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.metrics import Intervals


class Described(Record):
    """A model, beside its scores."""

    kind: str  # trained | baseline
    name: str  # in its folder
    automatic: bool = False  # trained without being asked for, to compare with
    modalities: list[str]
    fusion: str | None
    sharing: Any  # as the config has it; None for a baseline
    num_params: int | None
    training_s: float | None
    num_train_rows: IfAny[int] = None
    store: str | None  # its fingerprint
    folder: str  # in the run
    folder_to_ship: str | None = None  # None: the majority class, and boosting


class Shared(Record):
    """Scores of two models on the rows that both predicted."""

    ours: float
    theirs: float


class Versus(Intervals):
    """Paired differences to another model over the rows that both predicted, and P that there is none."""

    model: str
    num_rows: int
    shared_accuracy: Shared
    p: float
    p_holm: float | None = None


class ModelScores(Intervals):
    """One model's line in the table of a task."""

    model: str
    reads: list[str]  # modalities
    rows_id: str = ""  # the same for models that were scored on the same samples
    num_rows: int
    num_unseen: int | None
    unseen: dict[str, int] | None = None  # class that train lacks -> rows
    balanced_accuracy: float | Interval | None  # the interval of a kind that reports it
    val_accuracy: float | None  # the main metric on held-out rows
    versus: Versus | None  # the best single modality
    verdict: str

    def __getitem__(self, metric: str) -> Interval | None:
        own = self.balanced_accuracy
        return own if metric == "balanced_accuracy" and isinstance(own, dict) else self.intervals[metric]


class BothScores(Record):
    """Means over the rows that both models of an answer predicted."""

    fused: float
    rest: float


class Answer(Record):
    """What adding modalities changes; see evaluation/answers.py.
    Value, low and high are those of the paired difference."""

    kind: str  # adds | depends | hurts | suffices | unclear
    modalities: list[str]  # in question
    fused: str
    rest: str
    rest_modalities: list[str]
    metric: str
    value: float
    low: float
    high: float
    p: float
    p_holm: float
    num_rows: int
    scores: BothScores
    best_fused: str | None = None  # the model that the question was about
    num_fused: int = 1  # fused models tried
    source: str  # trained | baseline
    differs: dict[str, list[Any]]  # training setting -> the fused model's and the rest's
    sentence: str = ""


class Headline(Record):
    """Whether fusing helps one task, in words."""

    task: str
    tone: str  # good | bad | plain
    title: str
    text: str


class TaskResults(Record):
    """All models of one task."""

    kind: str | dict[str, Any]
    num_classes: int
    selected_on: str  # val | cv | test
    best: str | None
    best_trained: str | None
    best_fused: str | None
    best_single: str | None
    rows: list[ModelScores]
    answers: list[Answer] = Field(default_factory=list)
    headline: Headline | None = None

    def row(self, model: str | None) -> ModelScores | None:
        """That of a model; None if it was not scored."""
        return next((row for row in self.rows if row.model == model), None)


class AdaptedEncoder(Record):
    """An encoder that was trained further."""

    modality: str
    how: str
    trained_on: str
    seconds: float | None  # None: not known


class Adapted(Record):
    """Whether adapting encoders paid."""

    task: str
    model: str
    frozen: str  # the same model with frozen encoders
    encoders: list[AdaptedEncoder]
    num_rows: int
    accuracy: Interval  # paired difference
    shared_accuracy: Shared
    p: float
    p_holm: float | None = None  # corrected for their number (Holm)
    sentence: str = ""


class Considered(Record):
    """A model that may be shipped."""

    model: str
    score: float
    error: float  # standard error by which it may be behind the best
    paired: bool = False
    within: bool
    modalities: list[str]
    num_params: int
    on: str  # val | cv | test


class Recommended(Record):
    """The model to ship, and why."""

    model: str
    folder: str
    tasks: list[str]
    why: list[str]
    considered: list[Considered]  # the chosen one first
    per_task: dict[str, str | None]


class ResultsFile(Record):
    """`<run>/report/results.json`."""

    run: str
    split: str
    confidence: float
    models: dict[str, Described]
    tasks: dict[str, TaskResults]
    adapted: list[Adapted] = Field(default_factory=list)
    recommended: Recommended | None
    main: str | None  # the trained model that is recommended, or else chosen over all tasks
    notes: list[str]
