"""A chunk of samples on its way through Ray, and the stages at both ends of the pipeline: reading and writing.

A chunk travels as one Ray row, {unit, index, last, table, rejects, seconds}, with its samples as an Arrow IPC buffer: so its
rows, and the forward passes over them, are the same in every run, whatever Ray schedules, retries or resumes. That makes a
part's file name a function of its input, and writing it twice harmless. Imports neither torch nor scikit-learn: the
processes that read and write start quickly and stay small.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.samples.plan import ReadingPlan
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.schema import REJECT_SCHEMA, Shard, count_stages, reject_table

Row = dict[str, list[Any]]  # a batch of one Ray row


def part_name(unit: str, index: int, last: bool) -> str:
    """File name of a chunk's part; the end of a shard is marked, so that a listing tells which shards are complete."""
    return f"{unit}-{index:06d}{'-end' if last else ''}.parquet"


def pack(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> pa.Table:
    """The table of an Arrow IPC stream."""
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()


def make_row(unit: str, index: int, last: bool, table: pa.Table, rejects: pa.Table, seconds: dict[str, float]) -> Row:
    """A chunk as it travels. seconds: by stage, so far."""
    return {
        "unit": [unit],
        "index": [index],
        "last": [last],
        "table": [pack(table)],
        "rejects": [pack(rejects)],
        "seconds": [json.dumps(seconds)],
    }


def read_shard(batch: Row, plan: ReadingPlan, done: dict[str, set[int]]) -> Iterator[Row]:
    """Stage 1: stream one shard into chunks, leaving out those that are stored already."""
    shard = Shard(int(batch["source"][0]), *(str(batch[name][0]) for name in ("uri", "name", "identity")))
    start = time.perf_counter()
    for chunk in read_chunks(plan, shard):
        if chunk.index not in done.get(shard.unit, ()):
            seconds = {"read": time.perf_counter() - start}
            yield make_row(shard.unit, chunk.index, chunk.last, chunk.table, reject_table(chunk.rejects), seconds)
        start = time.perf_counter()


def write_part(batch: Row, store_uri: str) -> Row:
    """Last stage: the part and its rejects, each written atomically under a name that its input decides."""
    start = time.perf_counter()
    name = part_name(str(batch["unit"][0]), int(batch["index"][0]), bool(batch["last"][0]))
    table, rejects = unpack(batch["table"][0]), unpack(batch["rejects"][0]).cast(REJECT_SCHEMA)
    if len(rejects):
        storage.write_table(storage.join(store_uri, "rejects", name), rejects)
    checksum = storage.write_table(storage.join(store_uri, "data", name), table)
    seconds = json.loads(batch["seconds"][0]) | {"write": time.perf_counter() - start}
    told: Row = {"name": [name], "checksum": [checksum], "num_rows": [len(table)]}
    return told | {"lost": [json.dumps(count_stages(rejects))], "seconds": [json.dumps(seconds)]}
