"""What the parts of gpu_check.py measure and compare with."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")
TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2}  # relative, of features; convolutions in fp32 are TF32 on a GPU


class LeftOut(Exception):
    """A part, or a piece of one, that this machine has no means for."""


@dataclass(frozen=True)
class Check:
    """What is asked for."""

    device: torch.device
    seconds: float  # of each part, about
    small: bool
    data: Path | None

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        torch.get_device_module(self.device).synchronize()


def rate(check: Check, call: Callable[[], Any], num: int, seconds: float) -> float:
    """Calls of `num` values each, in values per second, after three that do not count."""
    for _ in range(3):
        call()
    check.wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or not calls:
        for _ in range(4):  # queued together
            call()
        check.wait()
        calls += 4
    return num * calls / (time.perf_counter() - start)


def agreement(got: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """Relative difference of two arrays. Raises: AssertionError above `tolerance`, or if one is not finite."""
    difference = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    if not difference <= tolerance:
        raise AssertionError(f"differs from the CPU's float32 by {difference:.3g}, {tolerance:g} is allowed")
    return difference


def package(name: str) -> Any:
    """The module. Raises: LeftOut."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LeftOut(f"no {(error.name or name).split('.')[0]}") from None


def reported(measure: Callable[..., dict[str, Any]], check: Check, *arguments: Any) -> dict[str, Any]:
    """What was measured, or why it was not."""
    try:
        return measure(check, *arguments)
    except LeftOut as why:
        return {"left_out": str(why)}
    except Exception as error:  # whatever it is, the others go on
        return {"failed": f"{type(error).__name__}: {error}"}
