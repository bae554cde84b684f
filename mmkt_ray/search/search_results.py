"""What a search leaves behind: `search/result.json` (the winner, and on what evidence) and `search/report.json` (for
plots)."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

from pydantic import Field

from mmkt_ray.inference.training_record import Ensembled
from mmkt_ray.record import IfAny, OpenRecord, Record
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.metrics import Intervals
from mmkt_ray.scoring.provenance import Study

CurvePoint: TypeAlias = tuple[float, float, int]  # seconds, best score so far, candidates by then
SlicePoint: TypeAlias = tuple[str | float, float, int]  # value, score, epochs


class JudgedInterval(Interval):
    """A paired difference, above 0 where the first model is better."""

    verdict: str  # better | tie | worse


class RoleScores(Intervals, frozen=True):
    """A finalist's test scores on one task: accuracy, macro_f1 and the objective's metric; a log loss is negated."""

    num_rows: int


class PairedGains(OpenRecord, frozen=True):
    """By how much one finalist is ahead of another on one task:
    the same metrics, on the test rows that both can read."""

    spread: ClassVar[str] = "metrics"

    num_rows: int
    metrics: dict[str, JudgedInterval | None]  # None: undefined


class Finalist(Record, frozen=True):
    """A candidate that was trained again with several seeds."""

    modalities: list[str]
    tasks: list[str] = Field(default_factory=list)
    fusion: dict[str, Any]  # the config's section, without defaults
    sharing: Any  # as the config has it
    val: float  # the objective, the mean over seeds
    val_by_seed: list[float]
    folders: list[str]  # of the models, one for each seed
    test: dict[str, RoleScores]  # by task


class Finals(Study, frozen=True):
    """Finalists by role: `candidate 1`, .., `best single modality`, `best concat`."""

    winner: str | None  # the role that is best on val; None: there is no finalist
    finalists: dict[str, Finalist]
    versus: dict[str, dict[str, PairedGains]]  # role -> task -> the winner minus this finalist, of tasks that both have
    confidence: float
    ensemble_test: IfAny[dict[str, RoleScores]] = None  # by task
    ensemble_versus_winner: IfAny[dict[str, PairedGains]] = None  # by task


class NumTried(OpenRecord, frozen=True):
    """How many candidates were tried."""

    spread: ClassVar[str] = "by_status"

    candidates: int
    references: int  # apart from these, to compare with
    fused: int  # of both, those that read several modalities and have a score
    by_status: dict[str, int]  # the candidates


class ChosenBy(Record, frozen=True):
    """The objective."""

    task: str | None  # None: all tasks
    metric: str
    over: str  # mean | worst
    split: str


class SearchResult(Finals, frozen=True):
    """`<run>/search/result.json`."""

    notes: list[str]  # what must be read first: how a search ended that its budget cut short
    tried: NumTried
    seconds: float
    objective: ChosenBy
    overrides: dict[str, dict[str, Any]]  # role -> what the finalist has chosen, by dotted key
    compared_with: dict[str, str]  # `best single modality`, `best concat` -> role
    ensemble: Ensembled | None


class HeatMap(Record, frozen=True):
    """The candidates by two keys of the config."""

    rows: str  # key
    columns: str
    row_names: list[str]
    column_names: list[str]
    score: list[list[float | None]]  # the best of each cell; None: no candidate
    candidates: list[list[int]]


class SearchSummary(Record, frozen=True):
    """`<run>/search/report.json`."""

    heat_maps: list[HeatMap]
    curve: list[CurvePoint]
    importance: dict[str, float] | None  # key -> share of the variance of scores
    slices: dict[str, list[SlicePoint]]  # by key
