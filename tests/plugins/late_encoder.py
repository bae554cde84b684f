"""A user's encoder that is fitted, and knows its width only then."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Late:
    """One feature for each letter that the train split has."""

    version = 1
    letters: np.ndarray | None = None

    @property
    def dim(self) -> int:
        if self.letters is None:
            raise RuntimeError("fit me first")
        return len(self.letters)

    def partial(self, values: Sequence[str]) -> set[str]:
        return set("".join(values))

    def merge(self, parts: list[set[str]]) -> set[str]:
        return set().union(*parts)

    def finish(self, total: set[str]) -> None:
        self.letters = np.array(sorted(map(ord, total)))

    def encode(self, values: Sequence[str]) -> np.ndarray:
        assert self.letters is not None
        return np.array([[value.count(chr(letter)) for letter in self.letters] for value in values], np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert self.letters is not None
        return {"letters": self.letters}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        self.letters = tensors["letters"]
