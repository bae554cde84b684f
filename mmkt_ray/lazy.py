"""Modules that are imported at their first use: what only describes an encoder must not wait for torch.

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")
"""

from __future__ import annotations

import importlib
from typing import Any


class _Lazy:
    """Stands for a module; its attributes are kept, so that only the first look at each is slow."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


def lazy(name: str) -> Any:
    """The module of this dotted name, imported as soon as something in it is used."""
    return _Lazy(name)
