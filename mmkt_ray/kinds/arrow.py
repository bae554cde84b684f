"""Arrow columns, whatever they hold: what their type is, their values as Python's, and the bytes that values take.

Axes: N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Converted = tuple[pa.Array, dict[int, str]]  # the column, and why some of its rows, null in it, could not be converted


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists of any length or of a fixed one."""
    return any(is_kind(kind) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes."""
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def is_string(kind: pa.DataType) -> bool:
    """Whether values are text."""
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def values_of(column: pa.Array) -> list[Any]:
    """The values as Python's; for one that cannot be one (a date beyond year 9999, a string of other bytes) a
    ValueError."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):
        return [_value_of(scalar) for scalar in column]


def _value_of(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return ValueError(f"not readable: {error}")


def check_value(value: Any) -> None:
    """Raises: ValueError if the value is one, as `values_of` returns it."""
    if isinstance(value, ValueError):
        raise value


def bytes_of_values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Bytes of each value (N,) int64, 0 for null; they depend on the values alone,
    not on how the column is stored."""
    kind = column.type
    if is_binary(kind) or is_string(kind):
        return np.asarray(pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64))
    if pa.types.is_struct(kind):
        inner = [bytes_of_values(pc.struct_field(column, i)) for i in range(kind.num_fields)]
        return sum(inner, np.zeros(len(column), np.int64))
    if is_list(kind) and (is_binary(kind.value_type) or is_string(kind.value_type)):
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        ends = np.append(0, np.cumsum(bytes_of_values(column.flatten()) + 8))
        last = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64))
        return np.diff(ends[np.append(0, last)])
    if is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        return np.asarray(lengths * _width(kind.value_type))
    return np.asarray(column.is_valid()).astype(np.int64) * _width(kind)


def _width(kind: pa.DataType) -> int:
    """Bytes of one value; of one without a fixed width a guess."""
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return 16


def bytes_of_cell(value: Any) -> int:
    """Bytes of one value as Python's, about: how much memory a row takes."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(bytes_of_cell, value.values()))
    if isinstance(value, list | tuple):
        return 8 * len(value) + sum(len(item) for item in value if isinstance(item, bytes | str))
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    return 0 if value is None else 8
