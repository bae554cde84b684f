"""The labels of one task: values, and masks that say which of them count.

Axes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmkt_ray.kinds.task_kind import TaskKind


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of N rows as NumPy arrays, or as tensors. What the values are is the business of their kind."""

    kind: TaskKind
    values: Any  # (N, ..); they mean nothing in rows that are not known
    labelled: Any  # (N,) bool: the row has a label
    known: Any  # (N,) bool: the row has a label that can be learnt from; false for a class that the train split lacks

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, rows: Any) -> Labels:
        """Those of a slice, of indices or of a mask."""
        return self.map(lambda column: column[rows])

    def map(self, change: Callable[[Any], Any]) -> Labels:
        """The same change of the values and of both masks."""
        return replace(self, values=change(self.values), labelled=change(self.labelled), known=change(self.known))

    def keep(self, kept: Any) -> Labels:
        """The same rows, without the labels of those that are not in the mask (N,)."""
        return replace(self, labelled=self.labelled & kept, known=self.known & kept)

    def tensors(self, device: Any = None) -> Labels:
        """As tensors on a device."""
        import torch

        return self.map(lambda column: torch.from_numpy(np.ascontiguousarray(column)).to(device, non_blocking=True))

    def same_as(self, other: Labels) -> bool:
        """Whether both have equal labels in the same rows."""
        masks = np.array_equal(self.labelled, other.labelled) and np.array_equal(self.known, other.known)
        return masks and np.array_equal(self.values[self.known], other.values[other.known])


def concat_labels(parts: Iterable[Labels]) -> Labels:
    """The labels of several parts of one task, one after the other; at least one part."""
    parts = list(parts)
    columns = ([getattr(part, name) for part in parts] for name in ("values", "labelled", "known"))
    return Labels(parts[0].kind, *map(np.concatenate, columns))
