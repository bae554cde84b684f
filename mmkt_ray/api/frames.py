"""What stands in a DataFrame, an Arrow table or a list of dicts -> cells as the readers of shards give them.

An image may be a path, the bytes of a file, a PIL image or an array; whatever it is, it becomes the bytes of a file,
so that one decoder sees them all. None, NaN, pandas.NA and an empty path are an absent modality.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd
import pyarrow as pa

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.samples.files import FileReader

if TYPE_CHECKING:
    from mmkt_ray.samples.columns import Reading

TableLike: TypeAlias = pd.DataFrame | pa.Table | Sequence[Mapping[str, Any]]


def column_names(rows: TableLike) -> list[str]:
    """The names of the columns; of a list of dicts all keys. Raises: DataError for anything else, and for a name that
    is there twice."""
    if isinstance(rows, pd.DataFrame):
        names = list(rows.columns)
    elif isinstance(rows, pa.Table):
        names = rows.column_names
    elif isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        return list(dict.fromkeys(name for row in rows for name in row))
    else:
        raise DataError(
            f"rows must be a pandas DataFrame, a pyarrow Table or a list of dicts, got {_described(rows)}; "
            "put a single row in a list: [{'text': ..}]"
        )
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise DataError(f"the columns {twice} are there twice: rename or drop one")
    return names


def column_values(rows: TableLike, name: str) -> list[Any]:
    """The cells of a column; None where there is no value."""
    if isinstance(rows, pd.DataFrame):
        values: Iterable[Any] = rows[name].tolist()
    elif isinstance(rows, pa.Table):
        values = rows.column(name).to_pylist()
    else:
        values = (row.get(name) for row in rows)
    return [None if _is_absent(value) else value for value in values]


def _is_absent(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def raw_cell(kind: ModalityKind, value: Any, files: FileReader | None) -> Any:
    """A cell as a reader of shards gives it, a ValueError where it cannot be read.
    files: None where paths are not read."""
    if value is None:
        return None
    try:
        return _file_bytes(kind, value, files) if kind.is_file else kind.from_object(value)
    except ValueError as error:
        return error


def _file_bytes(kind: ModalityKind, value: Any, files: FileReader | None) -> bytes | None:
    """The bytes of an image's or a sound's file. Raises: ValueError that says what was got."""
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():  # as Hugging Face's data sets have it
        value = value.get("bytes") or value.get("path")
        if value is None:
            return None
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if path in ("", "nan"):  # as a CSV that pandas wrote has it
            return None
        if files is None:
            raise ValueError("paths are not read here: give the file's bytes")
        return files.read(path)
    found: bytes = kind.from_object(value)
    return found


def _described(value: Any) -> str:
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def file_reader(reading: Reading, root: str | None) -> FileReader:
    """Reads paths in cells: relative ones from `root`, out of which none may lead;
    without it from the current folder."""
    if root is not None:
        return FileReader(reading, os.path.abspath(root))
    free = type(reading)(reading.plan.with_source(reading.shard.source, allow_outside=True), reading.shard)
    return FileReader(free, os.getcwd())
