"""A chunk of samples on its way through Ray, and the stages at both ends of the pipeline: reading and writing.

A chunk travels as one Ray row, {unit, index, last, table, rejects, seconds}, with its samples as an Arrow IPC buffer,
and the values prepared for encoders as one array per modality. So its rows, and the forward passes over them, are the
same in every run, whatever Ray schedules, retries or resumes. That makes a part's file name a function of its input,
and writing it twice harmless. Stages take and give rows as Arrow tables, which Ray copies once, into its object
store: they are read in place there. Imports neither torch nor scikit-learn: the processes that read and write start
quickly and stay small.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import REJECT_SCHEMA, Shard, count_stages, reject_table

ChunkRow: TypeAlias = "pa.Table"  # of one row
TABLES = ("table", "rejects")
ARRAY = "array "  # beginning of the names of columns with prepared values


def part_name(unit: str, index: int, last: bool) -> str:
    """File name of a chunk's part; the end of a shard is marked,
    so that a listing tells which shards are complete."""
    return f"{unit}-{index:06d}{'-end' if last else ''}.parquet"


def pack(table: pa.Table) -> pa.Buffer:
    """A table as an Arrow IPC stream."""
    size = pa.MockOutputStream()
    _write_stream(table, size)
    buffer = pa.allocate_buffer(size.size())  # at once: one that grows is copied again and again
    _write_stream(table, pa.FixedSizeBufferWriter(buffer))
    return buffer


def _write_stream(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def cell_buffers(column: pa.ChunkedArray) -> list[pa.Buffer | None]:
    """The cells (N,) of a column of bytes, None where null, in place: Arrow's own scalars are copies."""
    cells: list[pa.Buffer | None] = []
    for chunk in column.cast(pa.large_binary()).chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        valid = chunk.is_valid().to_pylist()
        data = pa.py_buffer(b"") if data is None else data
        cells += [data.slice(a, b - a) if there else None for there, (a, b) in zip(valid, pairwise(ends), strict=True)]
    return cells


class OpenedRow(NamedTuple):
    """What a row holds."""

    unit: str
    number: int  # in its shard
    last: bool
    samples: pa.Table
    rejects: pa.Table
    seconds: dict[str, float]  # by stage, so far
    prepared: dict[str, pa.Buffer]  # modality -> an array whose shape and type its column tells


def make_row(
    unit: str,
    index: int,
    last: bool,
    table: pa.Table,
    rejects: pa.Table,
    seconds: dict[str, float],
    prepared: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> ChunkRow:
    """A chunk as a row of Ray, see `OpenedRow`."""
    cells = {"table": pack(table), "rejects": pack(rejects)}
    cells |= {ARRAY + name: pa.py_buffer(np.ascontiguousarray(array)) for name, array in prepared.items()}
    known = {"unit": [unit], "index": [index], "last": [last], "seconds": [json.dumps(seconds)]}
    return pa.table(known | {name: _one_cell(buffer) for name, buffer in cells.items()})


def _one_cell(buffer: pa.Buffer) -> pa.LargeBinaryArray:
    """A column of one row that holds a buffer, without a copy."""
    offsets = pa.py_buffer(np.array([0, buffer.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])


def open_row(row: ChunkRow) -> OpenedRow:
    """The chunk in a row, in place."""
    unit, index, last, seconds = (row.column(name)[0].as_py() for name in ("unit", "index", "last", "seconds"))
    cells = {n: cell_buffers(row.column(n))[0] for n in row.column_names if n in TABLES or n.startswith(ARRAY)}
    samples, rejects = (pa.ipc.open_stream(cells.pop(name)).read_all() for name in TABLES)
    prepared = {name.removeprefix(ARRAY): buffer for name, buffer in cells.items()}
    return OpenedRow(unit, index, last, samples, rejects, json.loads(seconds), prepared)


def read_shard(batch: dict[str, Any], plan: ReadingPlan, done: dict[str, set[int]]) -> Iterator[ChunkRow]:
    """Stage 1: stream one shard into chunks, leaving out those that are stored already."""
    shard = Shard(int(batch["source"][0]), *(str(batch[name][0]) for name in ("uri", "name", "identity")))
    start = time.perf_counter()
    for chunk in read_chunks(plan, shard):
        if chunk.index not in done.get(shard.unit, ()):
            seconds = {"read": time.perf_counter() - start}
            yield make_row(shard.unit, chunk.index, chunk.last, chunk.table, reject_table(chunk.rejects), seconds)
        start = time.perf_counter()


def write_part(row: ChunkRow, store_uri: str) -> dict[str, list[Any]]:
    """Last stage: the part and its rejects, each written atomically under a name that its input decides."""
    start = time.perf_counter()
    chunk = open_row(row)
    name, rejects = part_name(chunk.unit, chunk.number, chunk.last), chunk.rejects.cast(REJECT_SCHEMA)
    if len(rejects):
        storage.write_table(storage.join(store_uri, "rejects", name), rejects)
    checksum = storage.write_table(storage.join(store_uri, "data", name), chunk.samples)
    seconds = chunk.seconds | {"write": time.perf_counter() - start}
    found: dict[str, list[Any]] = {"name": [name], "checksum": [checksum], "num_rows": [len(chunk.samples)]}
    return found | {"lost": [json.dumps(count_stages(rejects))], "seconds": [json.dumps(seconds)]}
