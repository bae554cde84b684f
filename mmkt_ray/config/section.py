"""What every part of the config is: a frozen, typed section that refuses keys it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

SPLITS = ("train", "val", "test")


class Section(BaseModel):
    """Base of every part of the config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def name_in(value: Any) -> str:
    """The `name` of a choice, given as a section or as what should be a mapping; as text, whatever it is."""
    return str(value.get("name", "") if isinstance(value, Mapping) else getattr(value, "name", value))


def named(value: Any) -> Any:
    """A choice given as its bare name, as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value
