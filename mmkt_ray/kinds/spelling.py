"""One class in several spellings, `1.0` and `1`: which are the same, and where classes stand among known ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmkt_ray.kinds.cells import canonical

if TYPE_CHECKING:
    import pyarrow as pa


def spelled_as(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names as they are spelled in `known`, where they are there in any spelling."""
    exact, same = set(known), {canonical(name): name for name in reversed(known)}
    return [name if name in exact else same.get(canonical(name), name) for name in names]


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in order: by value if all are whole numbers, else by name."""
    names = list(names)
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def index_in(names: pa.ChunkedArray, class_names: Sequence[str]) -> np.ndarray:
    """(N,) int64 codes of class names in any spelling, -1 for those that are not in `class_names`, and for null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known, names = pa.array(class_names, pa.string()), names.cast(pa.string())
    found = pc.index_in(names, known)
    if found.null_count > names.null_count:  # a class of another store may be there in another spelling
        distinct = names.unique()
        spelled = pa.array(spelled_as(distinct.drop_null().to_pylist(), class_names), pa.string())
        found = pc.index_in(spelled.take(pc.index_in(names, distinct.drop_null())), known)
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)
