"""Predictions in the form that somebody wants: CSV, JSON lines or Parquet, a column for each class,
the input's own columns.

Axes: N rows, C classes of one task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.inference.rows import read_parts, write_parts
from mmkt_ray.kinds.cells import escape_id, key_text
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.manifests import raw_rows
from mmkt_ray.samples.readers import known_columns
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards

SEPARATOR = "|"  # of several values in one cell of CSV
# key in a Parquet file's metadata: {task: class names in the order of the probabilities}, JSON
CLASSES = "mmkt.classes"

Classes = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Output:
    """What is wanted of predictions."""

    format: Literal["parquet", "csv", "jsonl"] = "parquet"
    join: bool = False  # the input's columns before the predictions
    top_k: int | None = None  # the K most probable classes with their probabilities, in columns; null: see `shaped`
    wide: bool = False  # a column for each class

    @property
    def is_plain(self) -> bool:
        """Whether it is the file that is written anyway."""
        return self == Output()


def classes_metadata(classes: Classes) -> dict[str, str]:
    """The class names as metadata of a Parquet file; `read_classes` reads them."""
    return {CLASSES: json.dumps({t: list(names) for t, names in classes.items()}, ensure_ascii=False)}


def write_output(path: str, config: Config, classes: Classes, output: Output) -> str:
    """Write predictions once more, beside `path`, as `output` says; returns where.
    config: by which the input was read.

    Raises: ConfigError for --join of a layout whose rows have no columns.
    """
    out = path.removesuffix(".parquet") + (".parquet" if output.format == "parquet" else f".{output.format}")
    fs, place = storage.resolve(path)
    names = pq.read_schema(place, filesystem=fs).names
    parts: Iterator[pa.Table] = (shaped(part, classes, output) for part in read_parts(path, names))
    if output.join:
        parts = joined(parts, config)
    if output.format == "parquet":
        write_parts(out, parts, classes_metadata(classes))
        return out
    with storage.atomic(out) as (fs, temporary), fs.open_output_stream(temporary) as stream:
        for number, part in enumerate(parts):
            if output.format == "csv":
                options = pa_csv.WriteOptions(include_header=number == 0)
                pa_csv.write_csv(pa.table({n: _flat(part.column(n)) for n in part.column_names}), stream, options)
            else:
                lines = (json.dumps(row, ensure_ascii=False, default=str) for row in part.to_pylist())
                stream.write("".join(f"{line}\n" for line in lines).encode())
    return out


def shaped(part: pa.Table, classes: Classes, output: Output) -> pa.Table:
    """Predictions with the columns `<task>_proba` as wanted.

    wide: `<task>_proba_<class>`, C columns. top_k: `<task>_top1`, `<task>_top1_proba`, .. in their place; CSV, whose
    cells hold no lists, has top 1 where nothing is said. Else JSON lines have a mapping of class to probability,
    and Parquet the list.
    """
    columns: dict[str, Any] = {}
    top_k = 1 if output.format == "csv" and output.top_k is None and not output.wide else output.top_k
    for name in part.column_names:
        task = name.removesuffix("_proba")
        column = part.column(name)
        if name == task or task not in classes:
            columns[name] = column
            continue
        names = classes[task]
        values, known = _values(column, len(names)), column.is_valid().to_numpy()
        if output.wide:
            columns |= {f"{name}_{c}": pa.array(values[:, i], mask=~known) for i, c in enumerate(names)}
        if top_k is not None:
            columns |= _best(task, values, known, names, top_k)
        if not output.wide and top_k is None:
            columns[name] = column if output.format == "parquet" else _mappings(values, known, names)
    return pa.table(columns)


def _values(column: pa.ChunkedArray, num_classes: int) -> np.ndarray:
    """Lists of C float32 -> (N, C), 0 where null."""
    values = np.zeros((len(column), num_classes), dtype=np.float32)
    values[column.is_valid().to_numpy()] = (
        column.drop_null().combine_chunks().flatten().to_numpy().reshape(-1, num_classes)
    )
    return values


def _best(task: str, values: np.ndarray, known: np.ndarray, names: Sequence[str], top_k: int) -> dict[str, pa.Array]:
    order = np.argsort(-values, axis=1, kind="stable")[:, : min(top_k, len(names))]
    columns: dict[str, pa.Array] = {}
    for rank in range(order.shape[1]):
        chosen = np.array(names, dtype=object)[order[:, rank]]
        columns[f"{task}_top{rank + 1}"] = pa.array(chosen, pa.string(), mask=~known)
        proba = np.take_along_axis(values, order[:, rank : rank + 1], axis=1)[:, 0]
        columns[f"{task}_top{rank + 1}_proba"] = pa.array(proba, mask=~known)
    return columns


def _mappings(values: np.ndarray, known: np.ndarray, names: Sequence[str]) -> pa.Array:
    """Each row as {class: probability}."""
    type_ = pa.struct([(name, pa.float32()) for name in names])
    return pa.StructArray.from_arrays([pa.array(v) for v in values.T], fields=list(type_), mask=pa.array(~known))


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """A column as CSV can hold it: several values as one text."""
    if not pa.types.is_nested(column.type) and not pa.types.is_binary(column.type):
        return column

    def cell_text(value: Any) -> str | None:
        if value is None or isinstance(value, list):
            return None if value is None else SEPARATOR.join(map(str, value))
        return json.dumps(value, default=str, ensure_ascii=False)

    return pa.array(map(cell_text, column.to_pylist()), pa.string())


# --- the input's columns --------------------


def joined(parts: Iterator[pa.Table], config: Config) -> Iterator[pa.Table]:
    """Predictions with the input's columns before them, by sample id; the rows of one shard are in memory at a time.

    A column that is called as one of the predictions is `input_<name>`; bytes are left out.
    """
    rows, names = _input_rows(config)
    held: dict[str, dict[str, Any]] = {}
    for part in parts:
        found = []
        for sample_id in part.column("sample_id").to_pylist():
            while sample_id not in held and (more := next(rows, None)) is not None:
                held = more
            found.append(held.get(sample_id, {}))
        columns = {
            n if n not in part.column_names else f"input_{n}": _column([row.get(n) for row in found]) for n in names
        }
        yield pa.table(columns | {n: part.column(n) for n in part.column_names})


def _input_rows(config: Config) -> tuple[Iterator[dict[str, dict[str, Any]]], list[str]]:
    """For each shard {sample id: its row}, and the columns of all shards. Raises: ConfigError."""
    readings, names = [], dict[str, None]()
    plan = ReadingPlan.of(config)
    for shard in list_shards(plan):
        known = known_columns(plan, shard)
        if known is None:
            raise ConfigError(
                f"--join: '{shard.name}' is no table: only CSV, JSON lines and Parquet have columns to join"
            )
        own = [name for name in known if name.partition(".")[0] not in known - {name}]  # not what is within another
        names |= dict.fromkeys(own)
        columns = {f"column {i}": name for i, name in enumerate(own)}
        whole = plan.with_source(shard.source, columns=columns, absent="error")
        readings.append((Reading(whole, shard), plan.sources[shard.source]))

    def shards() -> Iterator[dict[str, dict[str, Any]]]:
        for reading, source in readings:
            id_column = next(iter(source.theirs("sample_id")), None) if "sample_id" in source.columns else None
            found = {}
            for placed in raw_rows(reading):
                if isinstance(placed, tuple):
                    place, row = placed
                    known = key_text(row.get(id_column)) if id_column else None
                    found[escape_id(known) if known else place] = row
            yield found

    return shards(), list(names)


def _column(values: list[Any]) -> pa.Array:
    """Values of any type as one column: as text where their types differ; bytes as null."""
    values = [None if isinstance(value, bytes | ValueError) else value for value in values]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())
