"""Reading shards as chunks of samples: streamed, of bounded size, and the same on every run.

Called by features/extract.py in Ray tasks; what it yields goes through the encoders there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.kinds.cells import escape_id
from mmkt_ray.samples.archives import read_folders, read_webdataset
from mmkt_ray.samples.columns import Block, Reading, Row, clean, rows_to_blocks
from mmkt_ray.samples.damage import with_estimates
from mmkt_ray.samples.isolated import died_before, read_isolated
from mmkt_ray.samples.manifests import manifest_columns, read_manifest
from mmkt_ray.samples.parquet import parquet_columns, read_parquet
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Reject, Shard, sample_schema
from mmkt_ray.samples.shards import list_shards

LOOK_ROWS = 64  # of an archive, to see whether it has a column
_ROW_READERS: dict[str, Callable[[Reading], Iterator[Row | Reject]]] = {
    "webdataset": read_webdataset,
    "folders": read_folders,
    "manifest": read_manifest,
}


@dataclass(frozen=True)
class Chunk:
    """One unit of work: consecutive samples of a shard, and the rejected rows between them."""

    index: int  # position in the shard
    last: bool  # no chunk of the shard follows
    table: pa.Table  # columns of `sample_schema`
    rejects: list[Reject]


def read_chunks(plan: ReadingPlan, shard: Shard) -> Iterator[Chunk]:
    """The chunks of a shard, at least one (empty if the shard is), the last one marked.

    A chunk has at most `chunk_rows` rows and `chunk_bytes` raw bytes; a single larger sample
    is a chunk of its own. About two chunks are in memory at a time. A row that cannot be read is rejected; if
    the file is damaged, the rows before the damage are kept and one reject stands for the rest (see damage.py).
    In a task that is tried again because its process died, a child process reads the shard (see isolated.py).

    Raises: DataError if the shard lacks a column that the config names.
    """
    reading = Reading(plan, shard)
    is_deadly = died_before()
    blocks = read_isolated(reading) if is_deadly else read_blocks(reading)
    cleaned = _cleaned(reading, with_estimates(reading, blocks, is_deadly))
    held: tuple[pa.Table, list[Reject]] | None = None
    index = 0
    for piece in _cut(cleaned, reading):
        if held is not None:
            yield Chunk(index, False, *held)
            index += 1
        held = piece
    assert held is not None, "_cut yields at least once"
    yield Chunk(index, True, *held)


def read_blocks(reading: Reading) -> Iterator[Block]:
    """What a shard holds, in blocks."""
    if reading.source.reader == "parquet":
        return read_parquet(reading)
    rows = _ROW_READERS[reading.source.reader](reading)
    return rows_to_blocks(reading, islice(rows, reading.source.limit))


def known_columns(plan: ReadingPlan, shard: Shard) -> KeysView[str] | None:
    """The columns of a Parquet shard or a manifest, in their order (of JSON lines: those of the first rows); None of
    archives and folders."""
    reader = plan.sources[shard.source].reader
    known = {"parquet": parquet_columns, "manifest": manifest_columns}.get(reader)
    return known(Reading(plan, shard)) if known else None


def has_column(plan: ReadingPlan, shard: Shard, column: str) -> bool:
    """Whether a shard has what the source maps to one of our columns.
    Of JSON lines and WebDatasets the first rows decide."""
    source = plan.sources[shard.source]
    if source.reader == "webdataset":
        rows = islice(read_webdataset(Reading(plan, shard).only(column)), LOOK_ROWS)
        return any(isinstance(row, Row) and row.cells.get(column, row.sample_id) is not None for row in rows)
    if column in (reading := Reading(plan, shard)).arrays:
        return reading.has_array(column)
    known = known_columns(plan, shard)
    return known is None or bool(set(reading.only(column).settled(known).paths) & known)


def _cleaned(reading: Reading, blocks: Iterable[Block]) -> Iterator[tuple[pa.Table, list[Reject]]]:
    """The blocks as sample tables. Rows whose id an earlier row of the shard has are rejected."""
    ids_may_repeat = "sample_id" in reading.source.columns or reading.source.reader in (
        "webdataset",
        "folders",
    )
    seen: set[str] | None = set() if ids_may_repeat else None
    for block in blocks:
        yield clean(reading, block, seen)


def _cut(tables: Iterable[tuple[pa.Table, list[Reject]]], reading: Reading) -> Iterator[tuple[pa.Table, list[Reject]]]:
    """Join and cut tables at the limits of a chunk; boundaries depend on the rows, not on how they came."""
    limits = reading.plan
    pending = reading.schema.empty_table()
    rejects: list[Reject] = []
    num_yielded = 0
    for table, new_rejects in tables:
        pending = pa.concat_tables([pending, table])
        rejects += new_rejects
        while (num_rows := _rows_that_fit(pending, reading, limits.chunk_rows, limits.chunk_bytes)) is not None:
            yield pending.slice(0, num_rows).combine_chunks(), rejects
            num_yielded += 1
            pending, rejects = pending.slice(num_rows), []
    if pending.num_rows or rejects or not num_yielded:
        yield pending.combine_chunks(), rejects


def _rows_that_fit(table: pa.Table, reading: Reading, max_rows: int, max_bytes: int) -> int | None:
    """Number of rows of the next chunk; None while `table` does not fill one."""
    sizes = sum(kind.num_bytes(table.column(name)) for name, kind in reading.plan.modalities.items())
    fitting = int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right")) if table.num_rows else 0
    num_rows = min(max(fitting, 1), max_rows)
    return num_rows if table.num_rows > fitting or table.num_rows >= max_rows else None


def find_samples(plan: ReadingPlan, sample_ids: Iterable[str]) -> pa.Table:
    """The raw samples with these ids, in their order; ids that no shard has are left out.

    Reads the shards whose name begins an id, and those of sources that map `sample_id`, until all are found.
    """
    wanted = list(dict.fromkeys(sample_ids))
    missing = set(wanted)
    found = [sample_schema(plan).empty_table()]
    for shard in list_shards(plan):
        name = escape_id(shard.name)
        mapped = "sample_id" in plan.sources[shard.source].columns
        here = missing if mapped else {i for i in missing if i.startswith((f"{name}#", f"{name}/"))}
        for chunk in read_chunks(plan, shard) if here else ():
            rows = chunk.table.filter(pc.is_in(chunk.table["sample_id"], pa.array(here, pa.string())))
            found.append(rows)
            here = here - set(rows["sample_id"].to_pylist())
            missing -= set(rows["sample_id"].to_pylist())
            if not here:
                break
    table = pa.concat_tables(found)
    order = pc.index_in(pa.array(wanted, pa.string()), table["sample_id"]).drop_null()
    return table.take(order)
