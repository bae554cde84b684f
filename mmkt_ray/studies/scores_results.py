"""What `transferability.json` holds: scores of features before anything is trained (scores.py); and as text."""

from __future__ import annotations

from mmkt_ray.record import Record
from mmkt_ray.scoring.provenance import Study


class TrainedScore(Record, frozen=True):
    """What a model that was trained on a set of features reached."""

    model: str
    accuracy: float  # main metric of the task


class FeatureSet(Record, frozen=True):
    """Features of one or several modalities, and what they are worth for a task."""

    store: str  # folder name
    modalities: list[str]
    encoders: dict[str, str]  # by modality
    num_rows: int  # train rows that have them all and a label
    dim: int
    logme: float
    h_score: float
    trained: TrainedScore | None


class RankCorrelation(Record, frozen=True):
    """Between a score and what was reached after training."""

    num: int  # sets of features
    spearman: float
    weighted_kendall: float


class TaskTransferability(Record, frozen=True):
    """All sets of features for one task."""

    sets: list[FeatureSet]
    predicted: dict[str, RankCorrelation | None]  # by score; None for fewer than three sets, or without an order


class Cka(Record, frozen=True):
    """How alike two modalities' features are; None where undefined."""

    store: str
    modalities: list[str]
    num_rows: int
    value: float | None


class Leep(Record, frozen=True):
    """How well a model's predictions of one task tell the labels of another."""

    model: str
    source: str  # task
    target: str  # task
    num_rows: int
    value: float


class Skipped(Record, frozen=True):
    """Features without scores."""

    store: str
    modalities: list[str]
    reason: str


class Transferability(Study, frozen=True):
    """`<run>/transferability.json`."""

    tasks: dict[str, TaskTransferability]
    cka: list[Cka]
    leep: list[Leep]
    skipped: list[Skipped]
    seconds: float


def scores_table(found: Transferability) -> str:
    """The scores as text, best LogME first."""
    lines = []
    for task, scored in found.tasks.items():
        lines += [f"{task}:", f"  {'features':40}  {'LogME':>8}  {'H-score':>8}  {'rows':>8}  trained"]
        for row in sorted(scored.sets, key=lambda r: -r.logme):
            name = " + ".join(f"{m} ({row.encoders[m]})" for m in row.modalities)
            trained = f"{100 * row.trained.accuracy:.1f} % {row.trained.model}" if row.trained else "–"
            lines.append(f"  {name:40}  {row.logme:8.3f}  {row.h_score:8.3f}  {row.num_rows:8}  {trained}")
    lines += [f"CKA of {' and '.join(c.modalities)}: {c.value:.3f}" for c in found.cka if c.value is not None]
    return "\n".join([*lines, *(f"no scores for {' + '.join(s.modalities)}: {s.reason}" for s in found.skipped)])
