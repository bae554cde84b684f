"""What a result file holds: a typed record that reads and writes itself as JSON. A misspelt key is a type error.

A field that was given is written, also where it is None; one that was not given, and so has its default, is left out.
So older files, which lack a field, stay as they are.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Self, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from mmkt_ray import storage
from mmkt_ray.errors import DataError, OtherVersionError

T = TypeVar("T")
# a key that is left out where it is None
IfAny: TypeAlias = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
MAX_FAULTS = 5  # that a message tells


class Record(BaseModel):
    """Base of all records. It refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return self.model_dump(exclude_unset=True)

    def replaced(self, **changed: Any) -> Self:
        """The record with other values of some fields. Raises: ValidationError if there are no such fields."""
        return self.model_validate({**self.to_dict(), **changed})

    @classmethod
    def from_dict(cls, value: Any, where: str, again: str = "remove it and run the same command again") -> Self:
        """The record in a JSON value; where: the file that it was read from; again: what to do if it is none.

        Raises: DataError for unknown and missing keys.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            faults = "; ".join(_in_words(dict(fault)) for fault in error.errors(include_input=False)[:MAX_FAULTS])
            raise DataError(
                f"'{where}' is damaged: it does not hold what this version of mmkt writes there: {faults}; {again}"
            ) from None

    @classmethod
    def read(cls, uri: str) -> Self:
        """Raises: FileNotFoundError; DataError if the file is damaged or holds something else."""
        return cls.from_dict(storage.read_json(uri), uri)

    @classmethod
    def read_or_none(cls, uri: str) -> Self | None:
        """The same; None if there is no such file."""
        try:
            return cls.read(uri)
        except FileNotFoundError:
            return None

    def write(self, uri: str) -> None:
        """Write readable JSON, atomically."""
        storage.write_json(uri, self.to_dict())


class SealedRecord(Record):
    """A record that cannot be changed, of a file with the version of its schema and a checksum of its content."""

    model_config = ConfigDict(frozen=True, strict=True)

    schema_version: ClassVar[int]
    again: ClassVar[str]  # what to do about a damaged file, or one of another version; {folder}: where it lies

    @classmethod
    def read(cls, uri: str) -> Self:
        """Raises: FileNotFoundError; OtherVersionError; DataError if the file is damaged or was changed by hand."""
        again = cls.again.format(folder=uri.rpartition("/")[0])
        content = read_sealed(uri, cls.schema_version, again)
        del content["schema_version"]
        return cls.from_dict(content, uri, again)

    def write(self, uri: str) -> None:
        """Write readable JSON with version and checksum, atomically."""
        write_sealed(uri, {"schema_version": self.schema_version, **self.to_dict()})


class OpenRecord(Record):
    """A record with keys whose names depend on the kind of task: in the file, those of the field `spread` stand
    beside the others."""

    spread: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = {key: v for key, v in value.items() if key in cls.model_fields}
        if not isinstance(own.get(cls.spread, {}), dict):
            raise ValueError(f"{cls.spread} must be a mapping")
        own[cls.spread] = {**own.get(cls.spread, {}), **{key: v for key, v in value.items() if key not in own}}
        return own

    @model_serializer(mode="wrap")
    def _scatter(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return {**found.pop(self.spread), **found}


class About(Record, frozen=True):
    """What a result file is about, each where it applies; see scoring/provenance.py."""

    models: dict[str, str | None] = Field(default_factory=dict)  # folder in the run -> fingerprint
    stores: list[str] = Field(default_factory=list)  # fingerprints of features
    # variant, "" without variants -> digest of what decides its training
    recipes: dict[str, str] = Field(default_factory=dict)


def _in_words(fault: dict[str, Any]) -> str:
    """One of pydantic's errors in words."""
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{where}'"
    if fault["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {fault['msg']}"


def write_sealed(uri: str, value: dict[str, Any]) -> None:
    """A mapping as JSON, with the checksum of its content as the key `checksum`."""
    content = json.loads(json.dumps(value))  # as it will be read: keys are text
    content.pop("checksum", None)
    storage.write_json(uri, content | {"checksum": _seal(content)})


def read_sealed(uri: str, version: int, again: str) -> dict[str, Any]:
    """What `write_sealed` was given. version: the `schema_version` it must have; again: what to do else.

    Raises: FileNotFoundError; OtherVersionError; DataError if it is damaged or was changed by hand.
    """
    value = storage.read_json(uri)
    if not isinstance(value, dict):
        raise DataError(f"'{uri}' is damaged: it holds no mapping; {again}")
    if (found := value.get("schema_version")) != version:
        raise OtherVersionError(f"'{uri}' has schema version {found!r:.20}, this is {version}: {again}")
    if value.pop("checksum", None) != _seal(value):
        raise DataError(f"'{uri}' is damaged or was changed by hand: its content is not that of its checksum; {again}")
    return value


def _seal(content: dict[str, Any]) -> str:
    return storage.checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
