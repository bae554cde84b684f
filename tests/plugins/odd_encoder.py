"""A user's encoder that gives no features for some texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Odd:
    """Length of a text and a one; for texts that begin with `bad` what the option `gives` says."""

    version = 1
    dim = 2

    def __init__(self, gives: str) -> None:
        self.gives = gives

    def encode(self, values: Sequence[str]) -> Any:
        numbers = {"nan": np.nan, "inf": np.inf, "huge": 1e30}
        rows = [[len(v), 1.0] for v in values]
        for row, value in zip(rows, values, strict=True):
            if value.startswith("bad"):
                row[1:] = {"wide": [1.0, 2.0], "text": ["x"]}.get(self.gives, [numbers.get(self.gives, 0.0)])
        return rows

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        pass
