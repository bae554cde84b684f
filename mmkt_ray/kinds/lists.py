"""Cells that are lists of several images, sounds or texts, of which a row's features are pooled,
or one value is made.

Axes: N rows, I items of all rows together.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.kinds.arrow import Converted, is_list
from mmkt_ray.kinds.cells import is_nan, read_list

JOINED = "\n"  # what stands between texts that are joined


def items_in(cell: Any) -> list[Any]:
    """The items of a cell that are there: of a list, of one written as text, of several columns,
    or the cell alone."""
    if isinstance(cell, str):
        try:
            found = read_list(cell.strip()) if cell.strip().startswith("[") else None
        except ValueError:  # a remark in brackets
            found = None
        cell = [cell] if found is None else found
    elif isinstance(cell, dict):
        cell = list(cell.values())
    elif not isinstance(cell, list | tuple):
        cell = [cell]
    return [item for item in cell if item is not None and item != "" and not is_nan(item)]


def one_of(items: list[Any], pool: str) -> Any:
    """What a row holds: its first item, its texts joined, or all items; None where there is none."""
    if not items:
        return None
    return items[0] if pool == "first" else JOINED.join(items) if pool == "join" else items


def lists_from_arrow(raw: pa.Array, pool: str, convert: Callable[[pa.Array], Converted]) -> Converted:
    """A column (N,) of lists, of columns side by side, or of single items.
    convert: items (I,) -> as the kind holds one."""
    if pa.types.is_struct(raw.type) and raw.type.get_field_index("bytes") < 0:
        columns = raw.flatten()
        flat = pa.concat_arrays(columns).take(
            pa.array(np.arange(len(raw) * len(columns)).reshape(-1, len(raw)).T.ravel())
        )
        row = np.repeat(np.arange(len(raw)), len(columns))
    elif is_list(raw.type):
        flat, row = raw.flatten(), _rows_of(raw)
    else:
        flat, row = raw, np.arange(len(raw))
    items, wrong = convert(flat)
    errors: dict[int, str] = {}
    for i, reason in sorted(wrong.items()):
        errors.setdefault(int(row[i]), reason)
    there = items.is_valid().to_numpy(zero_copy_only=False) & ~np.isin(row, list(errors))
    return _gathered(items.filter(pa.array(there)), row[there], len(raw), pool), errors


def map_items(column: pa.Array, change: Callable[[pa.Array], tuple[pa.Array, dict[int, list[str]]]]) -> Any:
    """A column (N,) of lists with its items changed, those that became null left out;
    and row -> what was changed in it."""
    row = _rows_of(column)
    items, changed = change(column.flatten())
    by_row: dict[int, list[str]] = {}
    for i, changes in changed.items():
        by_row.setdefault(int(row[i]), []).extend(changes)
    there = items.is_valid().to_numpy(zero_copy_only=False)
    kept = _gathered(items.filter(pa.array(there)), row[there], len(column), "")
    return kept.cast(column.type), {i: list(dict.fromkeys(changes)) for i, changes in by_row.items()}


def _rows_of(column: pa.Array) -> np.ndarray:
    """The row (I,) of each item of lists."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(column)), lengths.astype(np.int64))


def _gathered(items: pa.Array, row: np.ndarray, num_rows: int, pool: str) -> pa.Array:
    """Present items (I,) by row: (N,) of `one_of`, null where a row has none."""
    counts = np.bincount(row, minlength=num_rows)
    ends = np.append(0, np.cumsum(counts))
    if pool == "first":
        return items.take(pa.array(ends[:-1], mask=counts == 0))
    lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), items, mask=pa.array(counts == 0))
    if pool != "join":
        return lists
    return pc.binary_join(lists.cast(pa.list_(pa.string())), JOINED).cast(items.type)


def pool_features(features: Any, counts: np.ndarray, pool: str) -> Any:
    """Features of items (I, D), dense or sparse -> of rows (N, D). counts: (N,) items of each row, at least one."""
    import scipy.sparse as sp

    ends = np.append(0, np.cumsum(counts))
    if pool == "mean":
        shares = sp.csr_matrix(
            (np.repeat(1 / counts, counts), np.arange(ends[-1]), ends), shape=(len(counts), ends[-1])
        )
        return (shares @ features).astype(np.float32)
    if not sp.issparse(features):
        return np.maximum.reduceat(features, ends[:-1], axis=0)
    return sp.vstack([features[a:b].max(axis=0) for a, b in pairwise(ends)], format="csr")
