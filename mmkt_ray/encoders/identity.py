"""Vectors that were made elsewhere, as features.

Axes: B vectors in a batch, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from mmkt_ray.encoders.encoder import EncoderSection, ListedEncoder
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy("numpy")


class Lengths(NamedTuple):
    """Of a set of vectors, in order."""

    first: int
    counts: Counter[int]  # length -> vectors


class IdentityEncoder(ListedEncoder):
    """Vectors as they are; those of another length than the first of the train split are refused."""

    kinds: ClassVar[tuple[str, ...]] = ("vector",)

    class Section(EncoderSection):
        """Vectors as they are."""

        name: Literal["identity"] = "identity"

    def __init__(self, section: Section) -> None:
        super().__init__(section)
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """D."""
        if self._dim is None:
            raise DataError("this identity encoder is not fitted: fit it on the train split, or load its state, first")
        return self._dim

    def partial(self, values: Sequence[np.ndarray]) -> Lengths:
        """Lengths in one chunk of vectors (D,)."""
        return Lengths(len(values[0]), Counter(map(len, values)))

    def merge(self, parts: list[Lengths]) -> Lengths:
        """Lengths in all parts, which are in order."""
        return Lengths(parts[0].first, sum((part.counts for part in parts), Counter()))

    def finish(self, total: Lengths) -> None:
        """The first vector's length is that of all. Raises: DataError if it is so of fewer than half of them."""
        length, num = total.counts.most_common(1)[0]
        if 2 * total.counts[total.first] < total.counts.total():
            raise DataError(
                f"the first vector of the train split has {total.first} numbers, {num:,} of {total.counts.total():,} "
                f"have {length}: vectors of one modality must be of one length; are these of several models?"
            )
        self._dim = total.first

    def refused(self, values: Sequence[np.ndarray]) -> dict[int, str]:
        """Vectors of another length."""
        return {
            i: f"a vector of {len(value)} numbers, where the first of the train split has {self.dim}"
            for i, value in enumerate(values)
            if len(value) != self.dim
        }

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """(B, D) float32."""
        return (
            np.stack([np.asarray(value, np.float32) for value in values])
            if values
            else np.empty((0, self.dim), np.float32)
        )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The length alone."""
        return {}, {"length": self.dim}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Become what `state` was taken of. Raises: ValueError, KeyError if that was no state."""
        if not isinstance(rest["length"], int) or rest["length"] < 1:
            raise ValueError(f"length is {rest['length']!r}")
        self._dim = rest["length"]
