"""An encoder of a user's own, slow on purpose so that a test can kill it at work."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np


class SlowLength:
    """Lengths of text and of its first word; sleeps before each chunk, if told so as long as a file is there."""

    version = 1
    dim = 2

    def __init__(self, delay_s: float, while_there: str | None = None) -> None:
        self.delay_s, self.while_there = delay_s, while_there

    def encode(self, values: Sequence[str]) -> np.ndarray:
        if self.while_there is None or os.path.exists(self.while_there):
            time.sleep(self.delay_s)
        return np.array([[len(v), len(v.split()[0])] for v in values], dtype=np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        pass
