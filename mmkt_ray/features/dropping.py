"""Rows that leave the parts of a store before it is published: repeated ids, and on request train rows that leak.

A row moves to the rejects of its part; only parts that lose rows are written anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.features.audit import leaking_rows, read_contents
from mmkt_ray.samples.schema import LEAKAGE, Reject, Shard, reject_table

DUPLICATE = "duplicate sample_id"


def parts_of_ids(config: Config, parts: list[str], shards: Sequence[Shard]) -> list[list[str]]:
    """Groups of parts within which ids must be unique: all parts, or, where rows are joined, those of each source."""
    if config.samples.combine.name != "join":
        return [parts]
    source_of = {shard.unit: shard.source for shard in shards}
    by_source: dict[int, list[str]] = {}
    for name in parts:
        by_source.setdefault(source_of[name.split("-")[0]], []).append(name)
    return list(by_source.values())


def reject_duplicates(uri: str, parts: list[str]) -> dict[str, str]:
    """Keep the first row of each sample_id; later ones move to the part's rejects. Rewrites only affected parts.

    Returns the checksums of these. Memory: 8 bytes a row for hashes, and the ids of rows whose hashes collide.
    """
    hashes = [hash_strings(read_part(uri, name, ["sample_id"]).column(0)) for name in parts]
    repeated = _repeated(np.concatenate([np.empty(0, np.uint64), *hashes]))
    rewritten: dict[str, str] = {}
    if not len(repeated):
        return rewritten
    seen: set[str] = set()
    for name, own in zip(parts, hashes, strict=True):
        candidates = np.flatnonzero(np.isin(own, repeated))  # hashes may collide
        if not len(candidates):
            continue
        ids = read_part(uri, name, ["sample_id"]).column(0).take(pa.array(candidates)).to_pylist()
        keep = np.ones(len(own), dtype=bool)
        for row, sample_id in zip(candidates, ids, strict=True):
            keep[row] = sample_id not in seen
            seen.add(sample_id)
        if not keep.all():
            rewritten[name] = _drop_rows(uri, name, keep, "check", f"{DUPLICATE}: an earlier row has it already")
    return rewritten


def hash_strings(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) uint64, the same for the same string."""
    values = column.cast(pa.binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values))


def _repeated(values: np.ndarray) -> np.ndarray:
    """The values that occur more than once, sorted; `values` are sorted in place."""
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def drop_leakage(uri: str, parts: list[str], modalities: list[str]) -> dict[str, str]:
    """Train rows whose whole content is in val or test too move to the part's rejects. Rewrites only affected parts.

    Returns the checksums of these.
    """
    why = "the same content is in val or test; left out by samples.drop_leakage"
    contents = read_contents(uri, parts, modalities)
    keep = ~leaking_rows(contents)
    kept = dict(zip(parts, np.split(keep, np.cumsum(contents.lengths)[:-1]), strict=True))
    return {n: _drop_rows(uri, n, rows, LEAKAGE, why) for n, rows in kept.items() if not rows.all()}


def _drop_rows(uri: str, name: str, keep: np.ndarray, stage: str, reason: str) -> str:
    table = read_part(uri, name)
    lost = table.column("sample_id").filter(pa.array(~keep)).to_pylist()
    rejects = [Reject(i, name.split("-")[0], stage, reason) for i in lost]
    old = storage.join(uri, "rejects", name)
    before = read_rejects(old) if storage.exists(old) else reject_table([])
    repeated = pc.and_(pc.equal(before["stage"], stage), pc.is_in(before["sample_id"], pa.array(lost, pa.string())))
    # rejects first: the step can then be repeated after a crash
    storage.write_table(old, pa.concat_tables([before.filter(pc.invert(repeated)), reject_table(rejects)]))
    return storage.write_table(storage.join(uri, "data", name), table.filter(pa.array(keep)))


def read_rejects(uri: str) -> pa.Table:
    """A table of REJECT_SCHEMA, also from a file that was written before each reject had its number of rows."""
    table = storage.read_table(uri)
    if "num_rows" not in table.column_names:
        table = table.append_column("num_rows", pa.array([1] * len(table), pa.int64()))
    return table


def read_part(uri: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """A part of the store at `uri`, or some of its columns."""
    return storage.read_table(storage.join(uri, "data", name), columns)
