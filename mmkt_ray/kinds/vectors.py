"""Vectors that were made elsewhere: cells of any usual form as lists of float32.

Axes: N rows, D numbers of a vector, which may differ between rows here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.kinds.arrow import Converted, is_list
from mmkt_ray.kinds.cells import is_nan

LARGEST = float(np.finfo(np.float32).max)


def vector_of(cell: Any) -> list[float] | None:
    """A list, an array, a JSON list as text, or a mapping of columns with a number each;
    None where all of these are null.

    Raises: ValueError that says what was got.
    """
    if isinstance(cell, dict):
        absent = [name for name, value in cell.items() if _is_absent(value)]
        if len(absent) == len(cell):
            return None
        if absent:
            raise ValueError(f"column '{absent[0]}' is null and others are not")
        cell = [_number(value, f"column '{name}'") for name, value in cell.items()]
    elif _is_absent(cell):
        return None
    elif isinstance(cell, str | bytes):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise ValueError(f"must be a list of numbers, as JSON writes it, got {cell!r:.40}") from None
    if isinstance(cell, np.ndarray) and cell.dtype.kind in "fiu":
        vector = cell.astype(np.float64)
    elif isinstance(cell, list | tuple) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in cell):
        vector = np.array([float(min(max(n, -1e300), 1e300)) if isinstance(n, int) else n for n in cell], np.float64)
    else:
        raise ValueError(f"must be a list of numbers, got {cell!r:.40}")
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"must be a list of numbers, got shape {vector.shape}")
    if why := _fault(vector):
        raise ValueError(why)
    return list(vector.tolist())


def _is_absent(value: Any) -> bool:
    return value is None or is_nan(value) or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # CSV has text alone
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{what} must be a number, got {value!r:.40}") from None


def _fault(vector: np.ndarray) -> str:
    """Why a vector is none; "" for a good one."""
    wrong = np.flatnonzero(~(np.abs(vector) <= LARGEST))
    if not len(wrong):
        return ""
    value = vector[wrong[0]]
    what = "too large for float32" if np.isfinite(value) else "no finite number"
    return f"number {wrong[0] + 1} of {len(vector)} is {value}, {what}"


def vectors_from_arrow(raw: pa.Array) -> Converted | None:
    """A column of lists of numbers, or numeric columns side by side (N,), as lists of float32;
    None for other columns."""
    if pa.types.is_struct(raw.type):
        return _side_by_side(raw) if all(_is_numeric(f.type) for f in raw.type) else None
    if not is_list(raw.type) or not _is_numeric(raw.type.value_type):
        return None
    lengths = pc.fill_null(pc.list_value_length(raw), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = raw.flatten()
    nulls = flat.is_null().to_numpy(zero_copy_only=False)
    values = pc.fill_null(flat, 0).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return _checked(values, lengths, raw.is_null().to_numpy(zero_copy_only=False), nulls)


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _side_by_side(raw: pa.StructArray) -> Converted:
    columns = [column.cast(pa.float64()) for column in raw.flatten()]
    nulls = np.stack([column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False) for column in columns], axis=1)
    values = np.stack([pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False) for column in columns], axis=1)
    absent = np.asarray(nulls.all(axis=1))
    lengths = np.where(absent, 0, len(columns))
    names = [f.name for f in raw.type]
    column, errors = _checked(values[~absent].ravel(), lengths, absent, nulls[~absent].ravel())
    partly = np.flatnonzero(nulls.any(axis=1) & ~absent)
    return column, errors | {int(i): f"column '{names[nulls[i].argmax()]}' is null and others are not" for i in partly}


def _checked(values: np.ndarray, lengths: np.ndarray, absent: np.ndarray, nulls: np.ndarray) -> Converted:
    """values: of all present rows, one after another; nulls: which of them are none."""
    ends = np.append(0, np.cumsum(lengths))
    errors = {int(i): "must be a list of numbers, got an empty one" for i in np.flatnonzero((lengths == 0) & ~absent)}
    wrong = np.flatnonzero(~(np.abs(values) <= LARGEST) | nulls)
    for row in np.unique(np.searchsorted(ends, wrong, side="right") - 1).tolist():
        own = slice(ends[row], ends[row + 1])
        place = int(nulls[own].argmax()) + 1
        errors[row] = f"number {place} of {lengths[row]} is null" if nulls[own].any() else _fault(values[own])
    mask = absent.copy()
    mask[list(errors)] = True
    with np.errstate(over="ignore"):
        narrow = pa.array(values.astype(np.float32))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), narrow, mask=pa.array(mask)), errors


def vectors_in(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The vectors (D,) float32 of a column (N,) of lists; None where null."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values, starts = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b] if ok else None for a, b, ok in zip(starts[:-1], starts[1:], there, strict=True)]
