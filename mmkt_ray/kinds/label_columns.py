"""Arrow columns of labels as they come, as columns of class names.

Axes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from mmkt_ray.kinds.arrow import Converted, check_value, is_list, is_string, values_of
from mmkt_ray.kinds.cells import is_nan, label_names, label_text


def label_column(raw: pa.Array, class_names: list[str] | None, text_of: Callable[[Any], str | None]) -> Converted:
    """Each distinct value becomes a string once, by `text_of`. class_names: of a ClassLabel."""
    if is_list(raw.type):
        raise TypeError("it holds lists where one value is expected")
    if pa.types.is_struct(raw.type):
        inner = ", ".join(field.name for field in raw.type)
        raise TypeError(f"it holds several values, {inner}: name the one that is meant, with a dot before it")
    # strings as bytes: Arrow reads them unchecked, and an undecodable one must cost its rows only
    encoded = (raw.cast(pa.large_binary()) if is_string(raw.type) else raw).dictionary_encode()
    texts: list[str | None] = []
    wrong: dict[int, str] = {}
    for code, value in enumerate(plain_values(encoded.dictionary)):
        try:
            check_value(value)
            texts.append(text_of(value if class_names is None else name_of_code(value, class_names)))
        except ValueError as error:
            texts.append(None)
            wrong[code] = str(error)
    errors = {i: wrong[c] for i, c in enumerate(encoded.indices.to_pylist()) if c in wrong} if wrong else {}
    return pa.array(texts, pa.string()).take(encoded.indices), errors


def plain_values(column: pa.Array) -> list[Any]:
    """The values as Python's; narrow floats with the digits that they have: 0.1, not 0.10000000149."""
    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        return [None if value is None else float(str(value)) for value in column.to_numpy(zero_copy_only=False)]
    return values_of(column)


def labels_column(raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
    """Sorted lists of class names. class_names: of a list of ClassLabel, whose integers they replace."""
    kind = raw.type
    if is_list(kind):
        raw = raw.cast(pa.large_list(pa.large_binary())) if is_string(kind.value_type) else raw
    elif is_string(kind):
        raw = raw.cast(pa.large_binary())  # unchecked, as in _label_column
    values: list[list[str] | None] = []
    errors: dict[int, str] = {}
    for i, value in enumerate(values_of(raw)):
        try:
            check_value(value)
            values.append(label_names(with_class_names(value, class_names), separator))
        except ValueError as error:
            values.append(None)
            errors[i] = str(error)
    return pa.array(values, pa.list_(pa.string())), errors


def with_class_names(value: Any, class_names: list[str] | None) -> Any:
    """A value with names in place of a ClassLabel's numbers, also in a list.
    Raises: ValueError for a number without a name."""
    if class_names is None:
        return value
    return (
        [name_of_code(code, class_names) for code in value]
        if isinstance(value, list)
        else name_of_code(value, class_names)
    )


def name_of_code(value: Any, class_names: list[str]) -> str | None:
    """The name of a ClassLabel's number, also of one that pandas made float; any below zero means no label."""
    if value is None or is_nan(value) or (isinstance(value, int | float) and value < 0):
        return None
    if not isinstance(value, int | float):
        return label_text(value)  # a name already
    if not value < len(class_names) or value != int(value):
        raise ValueError(f"label {value} has no name: the file's schema names {len(class_names)} classes")
    return class_names[int(value)]
