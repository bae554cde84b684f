"""What every part of the config is: a frozen, typed section that refuses keys it does not know;
and choices among such.

This module is below `config`, so that the section of an encoder or of a kind can stand beside its class.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, core_schema

from mmkt_ray.errors import unknown_name

SPLITS = ("train", "val", "test")
MAX_NAME = 100  # characters: file systems take 255 bytes, and a name is part of longer ones
ItemT = TypeVar("ItemT")


class Section(BaseModel):
    """Base of every part of the config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _check_numbers(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        section = handler(raw)
        given = raw if isinstance(raw, Mapping) else {}
        found = [
            at for name in section.model_fields_set for at in _no_numbers(given.get(name), getattr(section, name), name)
        ]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return section


def _no_numbers(raw: Any, read: Any, *place: str | int) -> Iterator[InitErrorDetails]:
    """Where a yes or no was read as a number, and where a whole number is larger than JSON and Ray's counters
    take."""
    if isinstance(read, int | float) and isinstance(raw, bool) and not isinstance(read, bool):
        yield _fault(place, raw, "must be a number, which yes and no are not")
    elif isinstance(read, int) and abs(read) > 2**53:
        yield _fault(place, raw, "must have at most 53 bits")
    elif isinstance(raw, Mapping) and isinstance(read, Mapping):
        for key in raw.keys() & read.keys():
            yield from _no_numbers(raw[key], read[key], *place, key)
    elif isinstance(raw, list | tuple) and isinstance(read, list | tuple):
        for number, (one, other) in enumerate(zip(raw, read, strict=False)):
            yield from _no_numbers(one, other, *place, number)


def _fault(place: tuple[str | int, ...], raw: Any, why: str) -> InitErrorDetails:
    return InitErrorDetails(type="value_error", loc=place, input=raw, ctx={"error": ValueError(why)})


class Choice(Section):
    """Base of the sections of one choice; each has a `name` of its own: `name: Literal["cnn"] = "cnn"`."""

    name: str


class OneOf:
    """Marks a field as a choice: `Annotated[EncoderSection, OneOf("encoder", ENCODERS)]`.

    entries: name -> class with a `Section`, or that is one. They are looked up whenever a value is checked, so that a
    new entry is known at once. elsewhere: the section of a name `module:Class`, of the user's own code.
    """

    def __init__(self, what: str, entries: Mapping[str, Any], elsewhere: type[Choice] | None = None) -> None:
        self.what, self.entries, self.elsewhere = what, entries, elsewhere

    def section_of(self, name: str) -> type[Choice]:
        """Raises: ConfigError for an unknown name."""
        if name in self.entries:
            entry = self.entries[name]
            return getattr(entry, "Section", entry)
        if self.elsewhere is not None and ":" in name:
            return self.elsewhere
        raise unknown_name(self.what, name, [*self.entries, *(["your.module:Class"] if self.elsewhere else [])])

    def sections(self) -> Iterator[tuple[str, type[Choice]]]:
        """(name, section) of every entry with keys beside its name,
        and of the user's own code under an empty name."""
        found = ((name, self.section_of(name)) for name in self.entries)
        yield from ((name, section) for name, section in found if len(section.model_fields) > 1)
        if self.elsewhere is not None:
            yield "", self.elsewhere

    def check(self, value: Any) -> Choice:
        """The section that a bare name, a mapping or a section stands for. Raises: ValueError, ValidationError."""
        name = name_in(value)
        section = self.section_of(name)
        try:
            return section.model_validate(as_mapping(value))
        except ValidationError as error:  # the name belongs to the place that messages tell
            raise ValidationError.from_exception_data(
                error.title, [_at(name, dict(e)) for e in error.errors()]
            ) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.check,
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )


def without_later(section: Section, dumped: dict[str, Any], later: frozenset[str]) -> dict[str, Any]:
    """A section as dumped, without those of the options `later` that have their default: fingerprints of what was
    made before there were such options stay."""
    fields = type(section).model_fields
    return {key: v for key, v in dumped.items() if key not in later or getattr(section, key) != fields[key].default}


def _at(name: str, error: dict[str, Any]) -> InitErrorDetails:
    details = {
        "type": error["type"],
        "loc": (name, *error["loc"]),
        "input": error["input"],
        "ctx": error.get("ctx", {}),
    }
    return InitErrorDetails(**details)  # type: ignore[typeddict-item]


def _dumped(value: Any, info: core_schema.SerializationInfo) -> Any:
    """As the section itself writes it."""
    return value.model_dump(mode=info.mode)


def name_in(value: Any) -> str:
    """The `name` of a choice, given as a section or as what should be a mapping; as text, whatever it is."""
    return str(value.get("name", "") if isinstance(value, Mapping) else getattr(value, "name", value))


def as_mapping(value: Any) -> Any:
    """A choice given as its bare name, as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value


def checked_name(name: str) -> str:
    """A name of a modality, task or variant: it becomes part of columns, files and folders. Raises: ValueError."""
    if len(name) > MAX_NAME:
        raise ValueError(f"a name has at most {MAX_NAME} characters")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError("a name consists of letters, digits, '_', '.' and '-', and begins with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(checked_name)]


def without_repeats(values: tuple[ItemT, ...] | None) -> tuple[ItemT, ...] | None:
    """Raises: ValueError that says what is there twice."""
    if repeated := sorted({str(value) for value in values or () if (values or ()).count(value) > 1}):
        raise ValueError(f"is there more than once: {', '.join(repeated)}")
    return values


Once = AfterValidator(without_repeats)  # for a list whose items are told apart by their value


def fingerprint(value: Any, length: int = 16) -> str:
    """Hex digest of any JSON-able value or config section; equal content gives equal digests on every machine."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
