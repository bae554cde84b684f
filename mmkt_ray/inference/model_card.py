"""What a model's card holds, and must be before anything is built from it:
a model folder is data, and may come from anyone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmkt_ray import storage
from mmkt_ray.config import SCHEME_NAMES, FusionConfig
from mmkt_ray.errors import DataError, OtherVersionError
from mmkt_ray.features.manifest import ModalityFeatures
from mmkt_ray.inference.training_record import AnyTraining, Training
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.record import IfAny, Record, SealedRecord

ALL_ROWS = ""  # the pattern of present modalities that stands for any, in `margins`
CARD = "config.json"  # in the model's folder
Fraction = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Input(_Strict):
    """models.InputSpec."""

    dim: Size
    sparse: bool
    hidden_dim: Size


class _Spec(_Strict):
    """models.ModelSpec. What decides how many layers are built is bounded as in a config."""

    modalities: dict[str, _Input] = Field(min_length=1)
    tasks: dict[str, Size] = Field(min_length=1)
    kinds: dict[str, Annotated[Any, BeforeValidator(task_kind)]]
    inputs: dict[str, Annotated[list[str], Field(min_length=1)]]
    fusion: FusionConfig
    schemes: list[Literal[SCHEME_NAMES]] = Field(max_length=16)  # type: ignore[valid-type]
    mmoe_experts: int = Field(ge=1, le=64)
    hidden_dim: Size
    dropout: Fraction
    feature_dropout: Fraction
    modality_dropout: Fraction
    missing: Literal["mask", "drop", "mean", "zero", "token", "generate"]
    wide: _Spec | None

    @model_validator(mode="after")
    def _names_agree(self) -> _Spec:
        if not self.tasks.keys() == self.kinds.keys() == self.inputs.keys():
            raise ValueError("tasks, kinds and inputs name different tasks")
        if unknown := {m for names in self.inputs.values() for m in names} - self.modalities.keys():
            raise ValueError(f"inputs name modalities that are not there: {sorted(unknown)}")
        wide = self.wide
        if wide and (wide.wide or wide.schemes or wide.fusion.name != "concat" or _about(wide) != _about(self)):
            raise ValueError("the linear model beside the network is none, or reads or predicts something else")
        return self


def _about(spec: _Spec) -> list[Any]:
    """What a model predicts, and from what."""
    features = {m: (given.dim, given.sparse) for m, given in spec.modalities.items()}
    return [spec.tasks, spec.kinds, {t: sorted(names) for t, names in spec.inputs.items()}, features]


class _Ensemble(_Strict):
    """models.EnsembleSpec."""

    members: list[_Spec] = Field(min_length=1, max_length=1000)
    picks: list[Size]

    @model_validator(mode="after")
    def _lists_agree(self) -> _Ensemble:
        first = self.members[0]
        if len(self.picks) != len(self.members):
            raise ValueError(f"{len(self.members)} members, {len(self.picks)} picks")
        if any((spec.tasks, spec.kinds) != (first.tasks, first.kinds) for spec in self.members):
            raise ValueError("the members have different tasks")
        return self


class _Experts(_Strict):
    """models.ExpertSpec."""

    fused: _Spec
    experts: dict[str, _Spec]
    routes: dict[str, dict[str, str]]

    @model_validator(mode="after")
    def _experts_fit(self) -> _Experts:
        fused = self.fused
        for name, spec in self.experts.items():
            same = {t: (fused.tasks.get(t), fused.kinds.get(t)) for t in spec.tasks}
            reads = "+".join(sorted(spec.modalities)) == name and spec.modalities.keys() <= fused.modalities.keys()
            if not reads or same != {t: (spec.tasks[t], spec.kinds[t]) for t in spec.tasks}:
                raise ValueError(f"the expert of {name} reads or predicts something else")
        for task, by_pattern in self.routes.items():
            if len(fused.inputs.get(task, [""] * 99)) > 16:
                raise ValueError(f"routes of {task}: no such task, or it reads more than 16 modalities")
            for name in by_pattern.values():
                if name not in self.experts or task not in self.experts[name].tasks:
                    raise ValueError(f"routes of {task}: no expert of {name} for it")
        return self


class Versions(Record, frozen=True, strict=True):
    """What made a model."""

    mmkt_ray: str
    torch: str
    python: str


class Card(SealedRecord):
    """What a model folder's `config.json` holds: with the weights, all that is needed to use the model."""

    schema_version: ClassVar[int] = 5  # 5: spec.mmoe_experts
    again: ClassVar[str] = "remove the folder and train again"

    checksums: dict[str, str]  # of the other files
    spec: dict[str, Any]  # of the model, as its `to_dict` gave it; `check_card` checks it
    class_names: dict[str, list[str]]
    store: str | None  # the fingerprint of the features that it learnt from
    encoders: dict[str, ModalityFeatures]
    config: dict[str, Any]  # as the run had it
    versions: Versions
    fingerprint: IfAny[str] = None  # of all that decides the weights
    training: IfAny[AnyTraining] = None
    temperatures: IfAny[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = None  # by task
    margins: IfAny[dict[str, dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]] = None

    @property
    def fit(self) -> Training | None:
        """How it was trained; None of ensembles."""
        return self.training if isinstance(self.training, Training) else None


def write_card(uri: str, card: Card) -> None:
    """Write the card of a model folder."""
    card.write(storage.join(uri, CARD))


def read_card(uri: str) -> Card | None:
    """The card of a published model; None if there is none, or one of another schema version, which is trained again.

    Raises: DataError if it is damaged.
    """
    try:
        return Card.read(storage.join(uri, CARD))
    except (FileNotFoundError, OtherVersionError):
        return None


def read_training(uri: str) -> Training:
    """How the model that lies there was trained. Raises: DataError if there is none."""
    card = read_card(uri)
    if card is None or card.fit is None:
        raise DataError(f"there is no trained model in '{uri}': remove the folder and train again")
    return card.fit


def check_card(uri: str, card: Card) -> None:
    """Raises: DataError for a card that describes no model, or whose parts do not agree with each other."""
    shape = _Ensemble if "members" in card.spec else _Experts if "experts" in card.spec else _Spec
    try:
        spec = shape.model_validate(card.spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(uri, f"spec.{where}: {first['msg']}") from None
    for task, margins in (card.margins or {}).items():
        if ALL_ROWS not in margins:
            raise _damaged(uri, f"margins.{task} lack those of all rows")
    for one in _parts(spec):
        for task, number in one.tasks.items():
            names = card.class_names.get(task, [])
            if not len(names) == len(set(names)) == number:
                raise _damaged(uri, f"class_names.{task} must be {number} different names")
        for m, given in one.modalities.items():
            if m not in card.encoders or card.encoders[m].dim != given.dim:
                raise _damaged(uri, f"encoders.{m} does not give {given.dim} features")


def _parts(spec: Any) -> Iterator[_Spec]:
    if isinstance(spec, _Spec):
        yield spec
    elif isinstance(spec, _Ensemble):
        yield from spec.members
    else:
        yield from (spec.fused, *spec.experts.values())


def _damaged(uri: str, why: str) -> DataError:
    return DataError(f"'{uri}/config.json' is damaged ({why}): remove the folder and train again")
