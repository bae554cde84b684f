"""Samples of several modalities from rows of one modality: union (nothing to do), join on a key, pairs by label.

Works on encoded rows, so that nothing is encoded twice however often a row is used. The driver holds ids, splits,
keys and labels (about 500 bytes a row); features stay in a memory-mapped file and are gathered part by part.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, JoinCombine, PairCombine, fingerprint
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.publish import Origin, publish, published, source_rejects
from mmkt_ray.features.store import Store, column_of, hash_of
from mmkt_ray.kinds.cells import canonical
from mmkt_ray.samples.schema import Reject, reject_table

log = logging.getLogger(__name__)

ABSENT = -1
NO_KEY = "the row has no key to join on: give its source a column for key, or for sample_id"


@dataclass
class Combined:
    """Which source row each modality and each task of the new samples comes from:
    (S,) row numbers, ABSENT where none."""

    sample_ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    modality_rows: dict[str, list[int]] = field(default_factory=dict)
    task_rows: dict[str, list[int]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    num_conflicts: int = 0

    def add(
        self, sample_id: str, split: str, key: str | None, modality_rows: dict[str, int], task_rows: dict[str, int]
    ) -> None:
        """One more sample."""
        self.sample_ids.append(sample_id)
        self.splits.append(split)
        self.keys.append(key)
        for rows, chosen in ((self.modality_rows, modality_rows), (self.task_rows, task_rows)):
            for name, row in chosen.items():
                rows.setdefault(name, []).append(row)


@dataclass(frozen=True)
class RowIndex:
    """What combining needs of the N source rows; not their features."""

    sample_ids: list[str]
    splits: list[str]
    keys: list[str | None]
    present: dict[str, np.ndarray]  # modality -> (N,) bool
    labels: dict[str, list[str | None]]  # task -> N class names


def combine(config: Config, run_uri: str, source: Store) -> Store:
    """The store of combined samples; the source itself for a union. Raises: ConfigError, DataError."""
    how = config.samples.combine
    if how.name == "union":
        return source
    unit = {"join": "joined", "pair": "paired"}[how.name]
    plan = {
        "source": source.manifest.fingerprint,
        "combine": how.model_dump(mode="json"),
        "seed": config.seed if how.name == "pair" else 0,
    }
    if config.samples.drop_leakage:
        plan["drop_leakage"] = True
    uri = storage.join(run_uri, "features", f"{unit}-{fingerprint(plan)}")
    if store := published(uri, [unit], source=source):
        log.info("%s samples are up to date: %s", unit, uri)
        return store
    index = read_index(source, sorted(config.modalities), sorted(config.tasks))
    combined = join_by_key(index, how) if isinstance(how, JoinCombine) else pair(index, how, config.seed)
    write_combined(config, source, uri, unit, combined, index)
    rejects = pa.concat_tables([source_rejects(source), reject_table(combined.rejects)])
    origin = Origin([unit], source=source, rejects=rejects, num_conflicts=combined.num_conflicts)
    return publish(uri, config, origin, source.manifest.modalities)


def read_index(source: Store, modalities: list[str], tasks: list[str]) -> RowIndex:
    """Ids, splits, keys, labels and presence of every row of a store, in its order."""
    presence: dict[str, list[np.ndarray]] = {m: [] for m in modalities}
    tables = []
    for part in source.read():
        for m in modalities:
            presence[m].append(part.column(column_of(m)).is_valid().to_numpy())
        tables.append(part.select(["sample_id", "split", "key", *tasks]))
    table = pa.concat_tables(tables)
    return RowIndex(
        table.column("sample_id").to_pylist(),
        shared_values(table.column("split")),
        shared_values(table.column("key")),
        {m: np.concatenate(p) for m, p in presence.items()},
        {t: shared_values(table.column(t)) for t in tasks},
    )


def shared_values(column: pa.ChunkedArray) -> list[Any]:
    """The values, each of them one object however often it occurs."""
    known: dict[Any, Any] = {}
    return [
        known.setdefault(tuple(value) if isinstance(value, list) else value, value)
        for chunk in column.chunks
        for value in chunk.to_pylist()
    ]


def join_by_key(index: RowIndex, how: JoinCombine) -> Combined:
    """Rows with the same key become one sample. A second row of the same modality and key is rejected. Of conflicting
    labels the first is kept, and the conflict is counted. An inner join rejects rows without a partner."""
    by_key: dict[str, list[int]] = {}
    combined, taken = Combined(), set[str]()
    for row, key in enumerate(index.keys):
        if key is None:
            combined.rejects.append(Reject(index.sample_ids[row], "join", "combine", NO_KEY))
        else:
            by_key.setdefault(key, []).append(row)
    provided = [m for m, present in index.present.items() if present.any()]
    for key, rows in by_key.items():
        chosen, task_rows = dict.fromkeys(index.present, ABSENT), dict.fromkeys(index.labels, ABSENT)
        used: list[int] = []
        for row in rows:
            given = [m for m in provided if index.present[m][row]]
            if any(chosen[m] != ABSENT for m in given) or (used and index.splits[row] != index.splits[used[0]]):
                why = f"key '{key}' has this modality from another row already, or rows in two splits"
                combined.rejects.append(Reject(index.sample_ids[row], "join", "combine", why))
                continue
            used.append(row)
            chosen |= dict.fromkeys(given, row)
            for task, labels in index.labels.items():
                if labels[row] is not None and task_rows[task] == ABSENT:
                    task_rows[task] = row
                elif labels[row] is not None and labels[row] != labels[task_rows[task]]:
                    combined.num_conflicts += 1
        if how.how == "inner" and any(chosen[m] == ABSENT for m in provided):
            combined.rejects += [
                Reject(index.sample_ids[r], "join", "combine", f"no partner for key '{key}' (inner join)") for r in used
            ]
            continue
        sample_id = "|".join(dict.fromkeys(index.sample_ids[r] for r in used))
        sample_id = f"{sample_id}|{key}" if sample_id in taken else sample_id
        taken.add(sample_id)
        combined.add(sample_id, index.splits[used[0]], key, chosen, task_rows)
    return combined


def pair(index: RowIndex, how: PairCombine, seed: int) -> Combined:
    """Give each row of the first modality a row of the second of the same split and label, in any spelling.

    Partners come from repeated seeded shuffles of the class, so that all are used about equally often.
    Raises: ConfigError if the mapping names classes that are not there.
    """
    (first, first_task), (second, second_task) = how.labels.items()
    check_mapping(index, how)
    partners: dict[tuple[str, str], list[int]] = {}
    for row in np.flatnonzero(index.present[second]).tolist():
        label = index.labels[second_task][row]
        if label is not None:
            partners.setdefault((index.splits[row], canonical(label)), []).append(row)
    mapping = None if how.mapping is None else {canonical(a): canonical(b) for a, b in how.mapping.items()}
    rng = np.random.default_rng(seed)
    draws = {group: _cycle(rng, rows) for group, rows in sorted(partners.items())}
    combined, drawn = Combined(), set()
    for row in np.flatnonzero(index.present[first]).tolist():
        label = index.labels[first_task][row]
        same = canonical(label or "")
        wanted = same if mapping is None else mapping.get(same)
        stream = draws.get((index.splits[row], wanted or ""))
        if stream is None:
            why = (
                f"{first_task} '{label}' has no partner: no {second} with {second_task} '{wanted}' in split "
                f"{index.splits[row]}"
            )
            why = why if wanted else f"{first_task} '{label}' is not in samples.combine.mapping"
            combined.rejects.append(Reject(index.sample_ids[row], "pair", "combine", why))
            continue
        other = next(stream)
        drawn.add(other)
        tasks = {t: row if labels[row] is not None else other for t, labels in index.labels.items()}
        sample_id = f"{index.sample_ids[row]}|{index.sample_ids[other]}"
        modalities = {m: row if p[row] else other if p[other] else ABSENT for m, p in index.present.items()}
        combined.add(sample_id, index.splits[row], None, modalities, tasks)
    used = drawn | set(np.flatnonzero(index.present[first]).tolist())
    left = [r for r in range(len(index.sample_ids)) if r not in used]
    combined.rejects += [Reject(index.sample_ids[r], "pair", "combine", "not drawn as a partner") for r in left]
    return combined


def check_mapping(index: RowIndex, how: PairCombine) -> None:
    """Raises: ConfigError for a class in the mapping that no row has."""
    for (modality, task), names in zip(how.labels.items(), (how.mapping, (how.mapping or {}).values()), strict=True):
        known = {v for v in index.labels[task] if v is not None}
        spellings = set(map(canonical, known))
        if unknown := sorted(name for name in set(names or ()) if canonical(name) not in spellings):
            raise ConfigError(
                f"samples.combine.mapping: {task} of {modality} has no class {unknown}; it has {sorted(known)}"
            )


def _cycle(rng: np.random.Generator, rows: list[int]) -> Iterator[int]:
    while True:
        yield from rng.permutation(rows).tolist()


def write_combined(config: Config, source: Store, uri: str, unit: str, combined: Combined, index: RowIndex) -> None:
    """Gather the samples' features and labels from the source, one part at a time."""
    with tempfile.TemporaryDirectory(prefix="mmkt-combine-") as folder:
        spilled = _spill(source, f"{folder}/rows.arrow")
        size = config.extract.chunk_rows
        for number, start in enumerate(range(0, len(combined.sample_ids), size)):
            piece = slice(start, start + size)
            columns: dict[str, pa.Array] = {
                "sample_id": pa.array(combined.sample_ids[piece], pa.string()),
                "split": pa.array(combined.splits[piece], pa.string()),
                "key": pa.array(combined.keys[piece], pa.string()),
            }
            wanted = [(name(m), r) for name in (column_of, hash_of) for m, r in sorted(combined.modality_rows.items())]
            for name, rows in wanted + sorted(combined.task_rows.items()):
                columns[name] = gather(spilled.column(name), np.array(rows[piece], dtype=np.int64))
            end = start + size >= len(combined.sample_ids)
            storage.write_table(
                storage.join(uri, "data", f"{unit}-{number:06d}{'-end' if end else ''}.parquet"), pa.table(columns)
            )


def gather(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    """The values at some rows, null for ABSENT. Of the column only these are read:
    its own `take` would copy all of it."""
    starts = np.cumsum([0, *map(len, column.chunks)])
    chunk = np.searchsorted(starts, rows, side="right") - 1  # -1 for ABSENT
    order = np.argsort(chunk, kind="stable")
    pieces = [pa.nulls(int((chunk < 0).sum()), column.type)]
    for i in np.unique(chunk[chunk >= 0]).tolist():
        pieces.append(column.chunk(i).take(pa.array(rows[order][chunk[order] == i] - starts[i])))
    return pa.concat_arrays(pieces).take(pa.array(np.argsort(order, kind="stable")))


def _spill(source: Store, path: str) -> pa.Table:
    """The source's rows as an uncompressed Arrow file, mapped: gathering touches only the pages it needs."""
    writer = None
    for table in source.read():
        writer = writer or pa.ipc.new_file(path, table.schema)
        writer.write_table(table)
    if writer is None:
        raise ConfigError("the source store has no part to combine")
    writer.close()
    return pa.ipc.open_file(pa.memory_map(path)).read_all()
