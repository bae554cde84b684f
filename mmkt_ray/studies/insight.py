"""What `insight.json` holds: what each modality of a run knows (contribution.py, disagreement.py)."""

from __future__ import annotations

from typing import Any, ClassVar

from mmkt_ray.record import OpenRecord, Record
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.provenance import Study
from mmkt_ray.scoring.results import Answer


class Shares(Record, frozen=True):
    """Shapley values of one metric, and the scores that they are of; None where undefined."""

    full: float | None  # with all modalities
    empty: float | None  # with none
    values: dict[str, Interval | None]  # modality -> its share of the difference
    subsets: dict[str, float | None]  # `image+text` -> score with these alone


class Shapley(OpenRecord, frozen=True):
    """What each modality gives to a model for a task."""

    spread: ClassVar[str] = "shares"

    model: str
    num_rows: int
    shares: dict[str, Shares]  # by metric


class FusedOnDiffering(Record, frozen=True):
    """How often the fused model is right where the others disagree."""

    model: str
    right_when_differ: float | None


class Prediction(Record, frozen=True):
    """One model's prediction of a row."""

    pred: Any  # as the kind shows it
    proba: float  # the highest


class DifferingRow(Record, frozen=True):
    """A row that models disagree on."""

    sample_id: str
    label: Any
    predictions: dict[str, Prediction]  # by modality
    fused: Any  # the fused model's


class Disagreement(Record, frozen=True):
    """Where the best models of one modality each contradict one another, and who is right then;
    None: no row is so."""

    models: dict[str, str]  # by modality
    num_rows: int  # that all of them predicted
    differ_frac: Interval
    right_when_differ: dict[str, float | None]  # by modality
    none_right_frac: float | None
    fused: FusedOnDiffering | None
    examples: list[DifferingRow]  # whose probabilities lie farthest apart


class TaskInsight(Record, frozen=True):
    """What the modalities know of one task."""

    answers: list[Answer]  # those of `compare`
    disagreement: Disagreement | None
    shapley: Shapley | None


class Insight(Study, frozen=True):
    """`<run>/insight.json`."""

    split: str
    confidence: float
    notes: list[str]
    tasks: dict[str, TaskInsight]
