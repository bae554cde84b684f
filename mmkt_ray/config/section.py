"""What every part of the config is: a frozen, typed section that refuses keys it does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

SPLITS = ("train", "val", "test")
ItemT = TypeVar("ItemT")


class Section(BaseModel):
    """Base of every part of the config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def name_in(value: Any) -> str:
    """The `name` of a choice, given as a section or as what should be a mapping; as text, whatever it is."""
    return str(value.get("name", "") if isinstance(value, Mapping) else getattr(value, "name", value))


def named(value: Any) -> Any:
    """A choice given as its bare name, as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value


def checked_name(name: str) -> str:
    """A name of a modality, task or variant: it becomes part of columns, files and folders. Raises: ValueError."""
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
