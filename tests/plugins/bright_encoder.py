"""A user's encoder of images that is fitted from statistics."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Bright:
    """Brightness of an image less that of the train split."""

    version = 1
    dim = 1
    mean = 0.0

    def prepare(self, value: np.ndarray) -> np.ndarray:
        return value.mean(axis=(0, 1), dtype=np.float32)

    def partial(self, values: Sequence[np.ndarray]) -> tuple[float, int]:
        return float(sum(value.mean() for value in values)), len(values)

    def merge(self, parts: list[tuple[float, int]]) -> tuple[float, int]:
        return sum(total for total, _ in parts), sum(num for _, num in parts)

    def finish(self, total: tuple[float, int]) -> None:
        self.mean = total[0] / total[1]

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([[value.mean() - self.mean] for value in values], np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {"mean": self.mean}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        self.mean = rest["mean"]
