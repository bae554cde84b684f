"""What an encoder and a reducer are.

Axes: B values in a batch, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import scipy.sparse as sp

Features: TypeAlias = np.ndarray | sp.csr_matrix  # (B, D) float32


@runtime_checkable
class Encoder(Protocol):
    """Raw values -> features. Built as `Class(config_section)`; a user's class as `Class(**options)`.

    Two optional methods: `prepare(value)`, run where a value is decoded, e.g. to resize an image (H, W, 3) uint8 before it
    travels (encode then gets what prepare returned); `to(device, encode_batch_size)` for encoders that can use a GPU.
    """

    version: int  # raised by whoever changes what encode returns

    @property
    def dim(self) -> int:
        """D, known once fitted."""
        ...

    def encode(self, values: Sequence[Any]) -> Features:
        """Present values only: images as RGB uint8 (H, W, 3), audio as samples.cleaning.Clip, either also as `prepare` returns
        it; texts as str. (B, D) float32."""
        ...

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Fitted state: tensors and JSON-able rest. Empty for a stateless encoder."""
        ...

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Take a fitted state back."""
        ...


def check_array(name: str, value: np.ndarray, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of a fitted state as it is. shape: None where any length is right.

    Raises: ValueError for another type or shape, NaN or infinity.
    """
    if value.dtype != dtype or len(value.shape) != len(shape):
        raise ValueError(f"{name} is {value.dtype} with {value.ndim} axes, not {np.dtype(dtype)} with {len(shape)}")
    if any(wanted is not None and wanted != got for wanted, got in zip(shape, value.shape, strict=True)):
        raise ValueError(f"{name} has shape {value.shape}, not {tuple('any' if n is None else n for n in shape)}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return value


@runtime_checkable
class Mergeable(Protocol):
    """A fit from statistics that merge associatively, so that it can run over shards in any order and as a tree."""

    def partial(self, values: Any) -> Any:
        """Statistics of one chunk (an encoder's: raw values as `encode` takes; a reducer's: features (B, D))."""
        ...

    def merge(self, parts: list[Any]) -> Any:
        """Statistics of the chunks together; merge([merge([a, b]), c]) equals merge([a, b, c])."""
        ...

    def finish(self, total: Any) -> None:
        """Become fitted."""
        ...
