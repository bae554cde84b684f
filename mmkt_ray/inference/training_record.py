"""What a model's card says of how the model came about."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Discriminator, Tag

from mmkt_ray.record import IfAny, OpenRecord, Record

Setting: TypeAlias = int | float


class ValScores(OpenRecord, frozen=True, strict=True):
    """Scores on held-out rows; see `validate`."""

    spread: ClassVar[str] = "metrics"

    on: IfAny[str] = None  # val | cv; None: val
    score: float  # what models are chosen by
    loss: float
    metrics: dict[str, dict[str, float]]  # metric -> task -> value, where it is defined


class Epoch(Record, frozen=True, strict=True):
    """One pass over the train rows."""

    epoch: int  # from 1
    train_loss: float
    val: ValScores | None
    seconds: float

    def score(self, metric: str, task: str) -> float | None:
        """A task's metric on val, if it is known."""
        return self.val.metrics.get(metric, {}).get(task) if self.val else None


class Tried(Record, frozen=True, strict=True):
    """A candidate of `training: auto`."""

    settings: dict[str, Setting]  # dotted key -> value
    loss: float  # held-out, relative to the class frequencies'
    chosen: bool


class ChosenSettings(Record, frozen=True, strict=True):
    """What `training: auto` chose, and why."""

    settings: dict[str, Setting]  # dotted key -> value, for `Config.with_overrides`
    candidates: list[Tried]
    on: str  # cv | val
    num_rows: int  # held-out rows that the candidates were judged on


class Penalty(Record, frozen=True, strict=True):
    """One step of the path of a linear model."""

    task: str
    l2: float
    log_loss: float
    accuracy: float


class LinearPath(Record, frozen=True, strict=True):
    """How a linear model came to its penalties."""

    l2: dict[str, float]  # task -> penalty
    path: list[Penalty]
    on: str  # cv | val
    num_rows: dict[str, int]  # task -> rows that it was learnt from


class Training(Record, frozen=True, strict=True):
    """Of a trained model; of one with experts that of the fused part, but for sums over all parts."""

    fingerprint: str
    best_epoch: int
    val: ValScores | None
    seconds: float  # the parts' sum
    num_params: int  # the parts' sum
    num_params_by_part: dict[str, int]
    num_workers: int
    device: str
    history: list[Epoch]
    auto: IfAny[ChosenSettings] = None
    linear: IfAny[LinearPath] = None
    wide: IfAny[dict[str, float]] = None  # task -> share of the network beside a linear model
    experts_for: IfAny[dict[str, dict[str, str]]] = None  # see `ExpertSpec.routes`


class Outcome(Training, frozen=True, strict=True):
    """The same, and whether it was there."""

    status: str  # trained | up to date


class EnsembleMember(Record, frozen=True, strict=True):
    """A candidate of a search in an ensemble."""

    candidate: str
    picks: int


class Ensembled(Record, frozen=True, strict=True):
    """Of an ensemble."""

    val: float  # its score
    best_member_val: float
    library: int  # candidates that it was picked from
    members: list[EnsembleMember]


def _which(value: Any) -> str:
    """The tag of a record, or of one in JSON."""
    if isinstance(value, dict):
        return "ensemble" if "members" in value else "model"
    return "ensemble" if isinstance(value, Ensembled) else "model"


AnyTraining: TypeAlias = Annotated[
    Annotated[Training, Tag("model")] | Annotated[Ensembled, Tag("ensemble")],
    Discriminator(_which),
]
