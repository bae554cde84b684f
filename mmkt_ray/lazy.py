"""Modules that are imported at their first use: what only describes an encoder must not wait for torch.
And imports that the collector of cycles does not interrupt.

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def uncollected(freeze: bool = False) -> Iterator[None]:
    """The collector of cycles does not walk the million objects of imports meanwhile, again and again: 1.5 s.

    freeze: nor later, nor as the process ends, 1 s; for a process that is ours alone.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
        if freeze and len(sys.modules) > num_modules:  # not again at each command that one process gives
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
