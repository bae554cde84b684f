"""What a model's card must be before anything is built from it: a model folder is data, and may come from anyone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmkt_ray.config import SCHEMES, FusionConfig
from mmkt_ray.errors import DataError
from mmkt_ray.kinds.tasks import task_kind

Fraction = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[int, Field(ge=1)]


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
    schemes: list[Literal[SCHEMES]] = Field(max_length=16)  # type: ignore[valid-type]
    num_experts: int = Field(ge=1, le=64)
    hidden_dim: Size
    dropout: Fraction
    feature_dropout: Fraction
    modality_dropout: Fraction
    missing: Literal["mask", "drop", "mean", "zero", "token", "generate"]

    @model_validator(mode="after")
    def _names_agree(self) -> _Spec:
        if not self.tasks.keys() == self.kinds.keys() == self.inputs.keys():
            raise ValueError("tasks, kinds and inputs name different tasks")
        if unknown := {m for names in self.inputs.values() for m in names} - self.modalities.keys():
            raise ValueError(f"inputs name modalities that are not there: {sorted(unknown)}")
        return self


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
        for m, spec in self.experts.items():
            same = {t: (fused.tasks.get(t), fused.kinds.get(t)) for t in spec.tasks}
            if spec.modalities.keys() != {m} or same != {t: (spec.tasks[t], spec.kinds[t]) for t in spec.tasks}:
                raise ValueError(f"the expert of {m} reads or predicts something else")
        for task, by_pattern in self.routes.items():
            if len(fused.inputs.get(task, [""] * 99)) > 16:
                raise ValueError(f"routes of {task}: no such task, or it reads more than 16 modalities")
            for m in by_pattern.values():
                if m not in self.experts or task not in self.experts[m].tasks:
                    raise ValueError(f"routes of {task}: no expert of {m} for it")
        return self


class _Features(BaseModel):
    """What the card says of one modality's features and of their encoder."""

    dim: Size
    fingerprint: str | None = None
    folders: list[Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]] = Field(default=[], max_length=2)


class _Card(BaseModel):
    """The keys that are used; others may be there."""

    spec: dict[str, Any]
    class_names: dict[str, list[str]]
    encoders: dict[str, _Features]
    config: dict[str, Any]
    checksums: dict[str, str]
    temperatures: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    margins: dict[str, dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = {}


def check_card(uri: str, card: Mapping[str, Any]) -> None:
    """Raises: DataError for a card that names anything but plain values that agree with each other."""
    try:
        found = _Card.model_validate(card)
        shape = _Ensemble if "members" in found.spec else _Experts if "experts" in found.spec else _Spec
        spec = shape.model_validate(found.spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(uri, f"{where}: {first['msg']}") from None
    for one in _parts(spec):
        for task, number in one.tasks.items():
            names = found.class_names.get(task, [])
            if not len(names) == len(set(names)) == number:
                raise _damaged(uri, f"class_names.{task} must be {number} different names")
        for m, given in one.modalities.items():
            if m not in found.encoders or found.encoders[m].dim != given.dim:
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
