"""A kind of modality and an encoder that the project does not have: each a class and an entry.

A process that unpickles a config which uses them imports this module, which makes the entries there too.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from mmkt_ray.encoders.catalog import ENCODERS
from mmkt_ray.encoders.encoder import EncoderSection, ListedEncoder
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.kinds.modality_kind import ModalityKind


class Pulse(ModalityKind):
    """A list of numbers: neither a file nor text, and with an option of its own."""

    name: Literal["pulse"] = "pulse"
    shortest: int = 1
    holds: ClassVar[str] = "a list of numbers"

    @property
    def arrow_type(self) -> pa.DataType:
        return pa.list_(pa.float64())

    def from_cell(self, cell: Any, encoding: str) -> list[float]:
        if not isinstance(cell, list) or len(cell) < self.shortest:
            raise ValueError(f"must be a list of at least {self.shortest} numbers, got {cell!r:.40}")
        return [float(number) for number in cell]


class Spread(ListedEncoder):
    """Mean and spread of the numbers."""

    kinds: ClassVar[tuple[str, ...]] = ("pulse",)
    dim = 2

    class Section(EncoderSection):
        name: Literal["spread"] = "spread"
        scale: float = 1.0

    def encode(self, values: Sequence[list[float]]) -> np.ndarray:
        return np.array([[np.mean(v), np.std(v)] for v in values], np.float32) * np.float32(self.config.scale)


MODALITY_KINDS["pulse"] = Pulse
ENCODERS["spread"] = Spread
