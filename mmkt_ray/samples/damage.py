"""How many rows a damaged shard has lost: its one reject stands for all of them, and the reject budget counts them.

Known where a Parquet file's footer is left. Else estimated: as many rows as the source's other shards hold, or where
there are none, as many for each byte as in the part of the shard that can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from mmkt_ray import storage
from mmkt_ray.errors import UserError
from mmkt_ray.samples.archives import count_samples
from mmkt_ray.samples.columns import Block, Reading
from mmkt_ray.samples.schema import DAMAGE, Reject
from mmkt_ray.samples.shards import list_shards

MAX_ROWS = 10**12  # that a damaged footer is believed
MAX_PEERS = 3  # other shards that are looked at
LOOK_BYTES = 64_000_000  # of an archive, a CSV or JSONL file: its rows are counted in so many


def with_estimates(reading: Reading, blocks: Iterable[Block], is_deadly: bool) -> Iterator[Block]:
    """The blocks, in which each reject of a damaged shard stands for the rows that were lost, about.

    is_deadly: reading the shard has ended a process, so that only other shards are looked at.
    """
    num_before = 0
    for block in blocks:
        rejects = [_estimated(reading, reject, num_before + len(block.ids), is_deadly) for reject in block.rejects]
        num_before += len(block.ids) + sum(reject.num_rows for reject in rejects)
        yield replace(block, rejects=rejects) if rejects else block


def _estimated(reading: Reading, reject: Reject, num_before: int, is_deadly: bool) -> Reject:
    if reject.stage != DAMAGE or reject.num_rows:
        return reject
    total, why = _rows_of(reading, is_deadly)
    num_lost = max(1, min(total, reading.source.limit or total) - num_before)
    return replace(reject, num_rows=num_lost, reason=f"{reject.reason}; lost: about {num_lost:,} rows, {why}")


def _rows_of(reading: Reading, is_deadly: bool) -> tuple[int, str]:
    """Rows that the shard held, about, and how that is known."""
    if not is_deadly and (rows := _footer_rows(reading)) is not None:
        return rows, "as its footer says"
    size = _size(reading)
    peers = [(rows, _size(peer)) for peer in _peers(reading) if (rows := _count(peer))]
    if peers:
        rows, num_bytes = (sum(numbers) / len(peers) for numbers in zip(*peers, strict=True))
        return round(rows * max(1.0, size / num_bytes)), "as in the other shards"
    return (0, "or more") if is_deadly else (_count(reading), "by its size")


def _peers(reading: Reading) -> list[Reading]:
    """Some other shards of the source; if it has none, of another one of the same kind."""
    own = reading.shard
    try:
        others = [s for s in list_shards(reading.plan) if s.uri != own.uri and _suffix(s.uri) == _suffix(own.uri)]
    except (UserError, OSError):  # another source is gone
        return []
    others = [s for s in others if s.source == own.source] or others
    return [Reading(reading.plan, s) for s in others[:: max(1, len(others) // MAX_PEERS)]][:MAX_PEERS]


def _suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2]


def _size(reading: Reading) -> int:
    fs, path = storage.resolve(reading.shard.uri)
    return int(fs.get_file_info(path).size or 0)


def _count(reading: Reading) -> int:
    """Rows of a shard, about: counted at its beginning, as many for each byte of the rest;
    0 if nothing can be read."""
    suffix = _suffix(reading.shard.uri)
    if suffix == "parquet":
        return _footer_rows(reading) or 0
    if suffix in ("csv", "jsonl"):
        start = next(storage.read_pieces(reading.shard.uri, LOOK_BYTES), b"")
        num_rows, num_bytes = start.count(b"\n"), len(start)
    else:
        num_rows, num_bytes = count_samples(reading, LOOK_BYTES)
    return round(num_rows * _size(reading) / max(1, num_bytes))


def _footer_rows(reading: Reading) -> int | None:
    fs, path = storage.resolve(reading.shard.uri)
    if path.endswith(".parquet"):
        with suppress(pa.ArrowException, OSError, ValueError):
            return min(int(pq.read_metadata(path, filesystem=fs).num_rows), MAX_ROWS)
    return None
