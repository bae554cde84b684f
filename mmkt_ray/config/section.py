"""What every part of the config is: a frozen, typed section that refuses keys it does not know."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

SPLITS = ("train", "val", "test")


class Section(BaseModel):
    """Base of every part of the config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def named(value: Any) -> Any:
    """A choice given as its bare name, as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value
