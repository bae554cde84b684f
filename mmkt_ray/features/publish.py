"""Closing a store: check what is in it, count it, write its manifest last."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import DataError
from mmkt_ray.features.audit import audit, leaking_rows, read_contents
from mmkt_ray.features.store import SCHEMA_VERSION, Store, column_of, open_store
from mmkt_ray.samples.schema import MODALITY, REJECT_SCHEMA, Reject, Shard, reject_table

log = logging.getLogger(__name__)

DUPLICATE = "duplicate sample_id"
LEAKAGE = "leakage"  # stage of the rejects that are left out because they leak


def published(uri: str, units: list[str], source: Store | None = None) -> Store | None:
    """The store if it is complete for just these units (and just this source store), else None."""
    if not storage.exists(storage.join(uri, "manifest.json")):
        return None
    store = open_store(uri)
    same_source = source is None or store.manifest["source"] == source.manifest["fingerprint"]
    return store if store.manifest["units"] == units and same_source else None


def check_budget(uri: str, num_rows: int, num_rejects: int, max_reject_frac: float) -> None:
    """Raises: DataError when more than the allowed share of rows is rejected."""
    total = num_rows + num_rejects
    if num_rejects > max_reject_frac * total:
        rejects = storage.join(uri, "rejects")
        parts = [_read_uri(storage.join(rejects, f.base_name)) for f in storage.list_files(rejects, "*.parquet")]
        reasons = count_reasons(pa.concat_tables([REJECT_SCHEMA.empty_table(), *parts]))
        doubled = any(reason.replace(" id", "_id").startswith(DUPLICATE) for reason, _ in reasons.most_common(1))
        advice = "mend the data or raise the budget"
        if doubled:  # a higher budget would drop them
            advice = "give each row an id of its own, or join rows of one id (samples.combine: join)"
        raise DataError(
            f"{num_rejects} of {total} rows were rejected or lost a modality, more than samples.max_reject_frac = "
            f"{max_reject_frac:g} allows{tell_reasons(reasons)}; {rejects} has each row's reason: {advice}, and give the same "
            "command again"
        )


def publish(
    uri: str,
    config: Config,
    units: list[str],
    modalities: dict[str, Any],
    run_summary: dict[str, Any],
    *,
    source: Store | None = None,
    shards: Sequence[Shard] = (),
    layout: str | None = None,
    rejects: pa.Table | None = None,
    extra: dict[str, Any] | None = None,
) -> Store:
    """Write rejects.parquet and manifest.json for the parts of `units`, after checking ids and the reject budget.

    units: in the order of their shards; shards: those, where the parts come from shards. Parts of other units (shards that are
    gone or changed) are moved to superseded/.
    Raises: DataError when too many rows are rejected or no row is left.
    """
    rank = {unit: i for i, unit in enumerate(units)}
    found = [f.base_name for f in storage.list_files(storage.join(uri, "data"), "*.parquet")]
    parts = sorted((n for n in found if n.split("-")[0] in rank), key=lambda n: (rank[n.split("-")[0]], n))
    for name in set(found) - set(parts):
        storage.move(storage.join(uri, "data", name), storage.join(uri, "superseded", name))
    if source is None:
        for together in parts_of_ids(config, parts, shards):
            reject_duplicates(uri, together)
    paired = config.samples.combine.name != "union"
    is_whole = extra is not None if paired else source is None  # the rows are samples, and decided here
    if config.samples.drop_leakage and is_whole:
        drop_leakage(uri, parts, sorted(modalities))
    counts = count_rows(uri, parts, sorted(modalities), sorted(config.tasks))
    check_binary(config, counts)
    own = collect_rejects(uri, parts, {shard.unit: shard.name for shard in shards})
    if source is not None:
        own = pa.concat_tables([rejects if rejects is not None else source_rejects(source), own])
    rejects = own
    reasons = count_reasons(rejects)
    num_faulty = pc.sum(pc.not_equal(rejects.column("stage"), LEAKAGE)).as_py() or 0  # those left out on request aside
    num_kept = pc.sum(pc.equal(rejects.column("stage"), MODALITY)).as_py() or 0  # they are among the rows
    if source is None:
        check_budget(uri, counts["rows"] - num_kept, num_faulty, config.samples.max_reject_frac)
    if not counts["rows"]:
        raise DataError("no sample is left: the sources hold no readable row" + tell_reasons(reasons))
    classes = {t: sort_classes(counts["by_task"][t].get("train", {})) for t in sorted(config.tasks)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "parts": parts,
        "units": units,
        "layout": layout if layout is not None else source.manifest["layout"] if source is not None else "",
        "source": source.manifest["fingerprint"] if source is not None else None,
        "combine": config.samples.combine.model_dump(mode="json") if extra else {"name": "union"},
        "synthetic_pairs": False,
        "modalities": modalities,
        "tasks": {t: {"kind": config.tasks[t].kind, "classes": classes[t]} for t in sorted(config.tasks)},
        "counts": counts | {"rejects": len(rejects) - num_kept, "unreadable_modalities": num_kept},
        "reject_reasons": dict(reasons.most_common(50)),
        "cleaned": count_cleaned(uri, parts) if source is None else source.manifest.get("cleaned", {}),
        **run_summary,
        **(extra or {}),
    }
    manifest["fingerprint"] = fingerprint(
        [units, modalities, counts, config.samples.combine.model_dump(mode="json") if extra else "", manifest["source"]]
    )
    storage.write_table(storage.join(uri, "rejects.parquet"), rejects)
    storage.write_json(storage.join(uri, "audit.json"), audit(uri, parts, sorted(modalities), sorted(config.tasks)))
    storage.write_json(storage.join(uri, "manifest.json"), manifest)
    log.info("published %s: %d rows, %d rejected", uri, counts["rows"], len(rejects) - num_kept)
    return Store(uri, manifest)


def parts_of_ids(config: Config, parts: list[str], shards: Sequence[Shard]) -> list[list[str]]:
    """Parts among which an id stands for one sample: all of them; where rows are joined, those of one source."""
    if config.samples.combine.name != "join":
        return [parts]
    source_of = {shard.unit: shard.source for shard in shards}
    by_source: dict[int, list[str]] = {}
    for name in parts:
        by_source.setdefault(source_of[name.split("-")[0]], []).append(name)
    return list(by_source.values())


def reject_duplicates(uri: str, parts: list[str]) -> None:
    """Of rows with the same sample_id the first stays; later ones move to the part's rejects. Rewrites only affected parts.

    Memory: 8 bytes a row for hashes, and the ids of rows whose hashes collide.
    """
    hashes = [hash_strings(_read(uri, name, ["sample_id"]).column(0)) for name in parts]
    repeated = _repeated(np.concatenate([np.empty(0, np.uint64), *hashes]))
    if not len(repeated):
        return
    seen: set[str] = set()
    for name, own in zip(parts, hashes, strict=True):
        suspects = np.flatnonzero(np.isin(own, repeated))
        if not len(suspects):
            continue
        ids = _read(uri, name, ["sample_id"]).column(0).take(pa.array(suspects)).to_pylist()
        keep = np.ones(len(own), dtype=bool)
        for row, sample_id in zip(suspects, ids, strict=True):
            keep[row] = sample_id not in seen
            seen.add(sample_id)
        if not keep.all():
            _drop_rows(uri, name, keep, "check", f"{DUPLICATE}: an earlier row has it already")


def hash_strings(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) uint64, the same for the same string."""
    values = column.cast(pa.binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values))


def _repeated(values: np.ndarray) -> np.ndarray:
    """The values that occur more than once, sorted; `values` are sorted in place."""
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def drop_leakage(uri: str, parts: list[str], modalities: list[str]) -> None:
    """Train rows whose whole content is in val or test too move to the part's rejects. Rewrites only affected parts."""
    contents = read_contents(uri, parts, modalities)
    keep = ~leaking_rows(contents)
    for name, kept in zip(parts, np.split(keep, np.cumsum(contents.lengths)[:-1]), strict=True):
        if not kept.all():
            _drop_rows(uri, name, kept, LEAKAGE, "the same content is in val or test; left out by samples.drop_leakage")


def _drop_rows(uri: str, name: str, keep: np.ndarray, stage: str, reason: str) -> None:
    table = _read(uri, name)
    lost = table.column("sample_id").filter(pa.array(~keep)).to_pylist()
    rejects = [Reject(i, name.split("-")[0], stage, reason) for i in lost]
    old = storage.join(uri, "rejects", name)
    before = _read_uri(old) if storage.exists(old) else reject_table([])
    told = pc.and_(pc.equal(before["stage"], stage), pc.is_in(before["sample_id"], pa.array(lost, pa.string())))
    # first: a publishing that breaks off here has told of rows that are still there, and is given again
    storage.write_table(old, pa.concat_tables([before.filter(pc.invert(told)), reject_table(rejects)]))
    storage.write_table(storage.join(uri, "data", name), table.filter(pa.array(keep)))


def collect_rejects(uri: str, parts: list[str], names: dict[str, str]) -> pa.Table:
    """All rejects of the parts, with shard names as source."""
    wanted = set(parts)
    files = [
        f.base_name for f in storage.list_files(storage.join(uri, "rejects"), "*.parquet") if f.base_name in wanted
    ]
    tables = [_read_uri(storage.join(uri, "rejects", n)) for n in files]
    table = pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables])
    sources = table.column("source").combine_chunks().dictionary_encode()
    named = pa.array([names.get(s, s) for s in sources.dictionary.to_pylist()], pa.string()).take(sources.indices)
    return table.set_column(1, "source", named).sort_by([("source", "ascending"), ("sample_id", "ascending")])


def source_rejects(source: Store) -> pa.Table:
    """The rejects of the store that this one is made from."""
    return _read_uri(storage.join(source.uri, "rejects.parquet"))


def count_rows(uri: str, parts: list[str], modalities: list[str], tasks: list[str]) -> dict[str, Any]:
    """Rows per split, per task and class, and per missing modality; one part in memory at a time."""
    by_split: Counter[str] = Counter()
    by_task: dict[str, dict[str, Counter[str]]] = {t: {} for t in tasks}
    missing: dict[str, Counter[str]] = {m: Counter() for m in modalities}
    for name in parts:
        table = _read(uri, name, ["split", *tasks, *map(column_of, modalities)])
        split = table.column("split")
        by_split.update(split.to_pylist())
        for task in tasks:
            labels = _labels(split, table.column(task)).group_by(["split", "label"])
            for pair in labels.aggregate([([], "count_all")]).to_pylist():
                if pair["label"] is not None:
                    by_task[task].setdefault(pair["split"], Counter())[pair["label"]] += pair["count_all"]
        for modality in modalities:
            missing[modality].update(split.filter(table.column(column_of(modality)).is_null()).to_pylist())
    return {
        "rows": sum(by_split.values()),
        "by_split": dict(sorted(by_split.items())),
        "by_task": {t: {s: dict(sorted(c.items())) for s, c in sorted(v.items())} for t, v in by_task.items()},
        "missing": {m: dict(sorted(c.items())) for m, c in missing.items()},
    }


def _labels(split: pa.ChunkedArray, labels: pa.ChunkedArray) -> pa.Table:
    """Columns split and label: a row for each label, of a multilabel task for each class of each row."""
    if pa.types.is_list(labels.type):
        labels = labels.combine_chunks()
        split, labels = split.take(pc.list_parent_indices(labels)), pc.list_flatten(labels)
    return pa.table({"split": split, "label": labels})


def check_binary(config: Config, counts: dict[str, Any]) -> None:
    """Raises: DataError if a binary task has more than two classes in the train split."""
    for task, section in sorted(config.tasks.items()):
        classes = sort_classes(counts["by_task"][task].get("train", {}))
        if section.kind == "binary" and len(classes) > 2:
            raise DataError(
                f"task '{task}' is binary, but the train split has {len(classes)} classes: {', '.join(classes[:20])}; "
                f"set tasks.{task}.kind: multiclass, or map another column"
            )


def count_cleaned(uri: str, parts: list[str]) -> dict[str, int]:
    """Values that were normalised, by modality and by what was changed: {"text: control characters": 12}."""
    total: Counter[str] = Counter()
    for name in parts:
        total.update(pc.list_flatten(_read(uri, name, ["cleaned"]).column(0)).to_pylist())
    return dict(sorted(total.items()))


def sort_classes(counts: dict[str, int]) -> list[str]:
    """Class names in order: by value if all are whole numbers, else by name."""
    return sorted(counts, key=int if all(c.isdecimal() for c in counts) else None)


def count_reasons(rejects: pa.Table) -> Counter[str]:
    """How often each reason occurs, without what differs from row to row."""
    counts: Counter[str] = Counter()
    for batch in rejects.select(["reason"]).to_batches(max_chunksize=65536):
        counts.update(shorten(reason) for reason in batch.column(0).to_pylist())
    return counts


def shorten(reason: str) -> str:
    """A reject's reason without what differs from row to row, quoted names and numbers, for counting."""
    return re.sub(r"""(?<!\w)b?(['"]).*?\1|\b(0x[0-9a-f]+|\d+)\b""", "..", reason)[:120]


def tell_reasons(reasons: Counter[str]) -> str:
    """The most frequent of them, as the end of a sentence."""
    return "; the most frequent: " + "; ".join(f"{n} x {r}" for r, n in reasons.most_common(3)) if reasons else ""


def _read(uri: str, name: str, columns: list[str] | None = None) -> pa.Table:
    return _read_uri(storage.join(uri, "data", name), columns)


def _read_uri(uri: str, columns: list[str] | None = None) -> pa.Table:
    return storage.read_table(uri, columns)
