"""Closing a store: check what is in it, count it, write its manifest last."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.errors import DataError
from mmkt_ray.features.audit import audit
from mmkt_ray.features.dropping import DUPLICATE, drop_leakage, parts_of_ids, read_part, read_rejects, reject_duplicates
from mmkt_ray.features.manifest import Counts, Manifest, ModalityFeatures, Speed, TaskClasses
from mmkt_ray.features.spellings import merge_spellings
from mmkt_ray.features.store import Store, column_of, open_store, write_manifest
from mmkt_ray.kinds.table_rows import NULLED
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.samples.schema import DAMAGE, LEAKAGE, MODALITY, REJECT_SCHEMA, UNMAPPED, Shard, count_stages

log = logging.getLogger(__name__)

MAX_REASON = 300  # characters of a reason in an error


def published(uri: str, units: list[str], source: Store | None = None) -> Store | None:
    """The store if it is complete for exactly these units (and this source store), else None.

    A store without one of its parts is incomplete: so a damaged part can be removed, and is made again.
    """
    if not storage.exists(storage.join(uri, "manifest.json")):
        return None
    store = open_store(uri)
    there = {f.base_name for f in storage.list_files(storage.join(uri, "data"), "*.parquet")}
    if not there.issuperset(store.manifest.parts):
        return None
    same_source = source is None or store.manifest.source == source.manifest.fingerprint
    return store if store.manifest.units == units and same_source else None


def num_rejected(lost: Counter[str]) -> int:
    """Number of rejected rows. lost: stage -> rows; not those left out on request or without one modality."""
    return sum(n for stage, n in lost.items() if stage not in (MODALITY, LEAKAGE, UNMAPPED))


def tell_counts(num_rows: int, lost: Counter[str]) -> str:
    """For the log: rows that are there, that were rejected, and that are there without an unreadable modality."""
    text = f"{num_rows:,} rows, {num_rejected(lost):,} rejected"
    return f"{text}, {lost[MODALITY]:,} kept without an unreadable modality" if lost[MODALITY] else text


def is_spent(samples: SamplesConfig, num_hit: int, total: int) -> bool:
    """Whether more rows than allowed are rejected or lost a modality. A few are tolerated if half are whole."""
    few = samples.min_reject_budget if 2 * num_hit <= total else 0
    return num_hit > max(samples.max_reject_frac * total, few)


def check_budget(
    uri: str, samples: SamplesConfig, num_rows: int, lost: Counter[str], names: dict[str, str], estimated: bool = False
) -> None:
    """Raises: DataError when more than the allowed share of rows is rejected or lost a modality, and more than a few.

    num_rows: in the store; estimated: by a job that is not at its end. lost: stage -> rows. names: unit -> shard
    name, for the message.
    """
    num_lost, num_kept = num_rejected(lost), lost[MODALITY]
    num_hit, total = num_lost + num_kept, num_rows + num_lost
    if not is_spent(samples, num_hit, total):
        return
    folder = storage.join(uri, "rejects")
    found = [f.base_name for f in storage.list_files(folder, "*.parquet")]
    parts = [name for name in found if name.split("-")[0] in names]  # not of shards that have changed since
    rejects = collect_rejects(uri, parts, names)
    counted = pc.invert(pc.is_in(rejects.column("stage"), pa.array([LEAKAGE, UNMAPPED])))
    reasons = count_reasons(rejects.filter(counted))
    share = min(1.0, math.ceil(1000 * num_hit / total) / 1000)
    damaged = f" (about {lost[DAMAGE]:,} of them in damaged shards)" if lost[DAMAGE] else ""
    advice = (
        f"mend the data, or allow it with --set samples.max_reject_frac={share:g} (predict: --max-reject-frac "
        f"{share:g})"
    )
    if reasons and reasons[0].reason.startswith(DUPLICATE):  # a higher budget would drop them
        advice = "give each row an id of its own, or join rows of one id (samples.combine: join)"
    elif not num_rows and not estimated:  # a higher budget would leave none
        advice = "mend the data, or name other columns"
    of = f"of about {total:,}" if estimated else f"of {total:,}"
    raise DataError(
        f"{num_lost:,} {of} rows were rejected{damaged} and {num_kept:,} lost a modality, more than "
        f"samples.max_reject_frac = {samples.max_reject_frac:g} allows{tell_reasons(reasons)}; {folder} has each "
        f"row's reason: {advice}, and give the same command again"
    )


@dataclass(frozen=True)
class Origin:
    """Where the parts of a store come from."""

    units: list[str]  # in the order of their shards
    shards: Sequence[Shard] = ()  # those, where the parts come from shards
    layout: str | None = None  # see `reading_layout`; None: the source's
    source: Store | None = None  # the store that this one is made from
    rejects: pa.Table | None = None  # before the checks of publishing; None: the source's
    num_conflicts: int | None = None  # labels of combined samples that disagree; None: these are not combined


def publish(
    uri: str,
    config: Config,
    origin: Origin,
    modalities: dict[str, ModalityFeatures],
    speed: Speed | None = None,
    checksums: Mapping[str, str] | None = None,
) -> Store:
    """Write rejects.parquet and manifest.json for the parts of the origin's units,
    after checking ids and the reject budget.

    checksums: of parts that were just written, others are read for theirs. Parts of other units (shards that are gone
    or changed) are moved to superseded/. Raises: DataError when too many rows are rejected or no row is left.
    """
    units, source, combined = origin.units, origin.source, origin.num_conflicts is not None
    parts = keep_parts(uri, units)
    known = dict(checksums or {}) | drop_rows(uri, config, origin, parts, sorted(modalities))
    kinds = {t: section.kind for t, section in sorted(config.tasks.items())}
    counts = count_rows(uri, parts, sorted(modalities), kinds)
    if not combined and (respelled := merge_spellings(uri, parts, counts.by_task, kinds)):
        known |= respelled
        counts = count_rows(uri, parts, sorted(modalities), kinds)
    cleaned = count_cleaned(uri, parts) if source is None else source.manifest.cleaned
    classes = {t: kind.class_names(counts.by_task[t].get("train", {})) for t, kind in kinds.items()}
    for t, kind in kinds.items():
        kind.check_classes(t, classes[t])
        kinds[t] = kind.fitted(t, train_labels(uri, parts, t))
    learnt = {t: kinds[t].as_json() for t in kinds if kinds[t] != config.tasks[t].kind}  # of the labels
    names = {shard.unit: shard.name for shard in origin.shards}
    rejects, unmapped = all_rejects(uri, origin, parts, names)
    reasons, lost = count_reasons(rejects), count_stages(rejects)
    num_kept = lost[MODALITY]  # they are among the rows
    if source is None:
        check_budget(uri, config.samples, counts.rows, lost, names)
    if not counts.rows:
        raise DataError("no sample is left: the sources hold no readable row" + tell_reasons(reasons))
    combine = config.samples.combine.model_dump(mode="json")
    made_from = source.manifest.fingerprint if source is not None else None
    about = {m: entry.to_dict() for m, entry in modalities.items()}
    decided_by = [units, about, counts.to_dict(), combine if combined else "", made_from] + ([learnt] if learnt else [])
    manifest = Manifest(
        fingerprint=fingerprint(decided_by),
        parts=parts,
        checksums={n: known.get(n) or storage.file_checksum(storage.join(uri, "data", n)) for n in parts},
        units=units,
        layout=layout_of(origin),
        source=made_from,
        combine=combine if combined else {"name": "union"},
        synthetic_pairs=combined and config.samples.combine.name == "pair",
        modalities=modalities,
        tasks={t: TaskClasses(kind=kind.as_json(), classes=classes[t]) for t, kind in kinds.items()},
        counts=counts.replaced(rejects=lost.total() - num_kept, unreadable_modalities=num_kept),
        reject_reasons={alike.reason: alike.num_rows for alike in reasons[:50]},
        unmapped=unmapped if source is None else source.manifest.unmapped,
        cleaned=cleaned,
        num_conflicting_labels=origin.num_conflicts,
        stages=speed.stages if speed else None,
        wall_s=speed.wall_s if speed else None,
        startup_s=speed.startup_s if speed else None,
        rows_per_s=speed.rows_per_s if speed else None,
    )
    storage.write_table(storage.join(uri, "rejects.parquet"), rejects)
    found = audit(uri, parts, sorted(modalities), sorted(config.tasks))
    found = found.replaced(spellings=spellings(config, cleaned), nulled=nulled(cleaned))
    found.write(storage.join(uri, "audit.json"))
    write_manifest(uri, manifest)
    log.info("published %s: %s", uri, tell_counts(counts.rows, lost))
    if unmapped:
        log.info("members of archives that no column maps: %s", tell_unmapped(unmapped))
    return Store(uri, manifest)


def keep_parts(uri: str, units: list[str]) -> list[str]:
    """The parts of these units, in their order; all others are moved to superseded/."""
    rank = {unit: i for i, unit in enumerate(units)}
    found = [f.base_name for f in storage.list_files(storage.join(uri, "data"), "*.parquet")]
    parts = sorted((n for n in found if n.split("-")[0] in rank), key=lambda n: (rank[n.split("-")[0]], n))
    for name in set(found) - set(parts):
        storage.move(storage.join(uri, "data", name), storage.join(uri, "superseded", name))
    return parts


def drop_rows(uri: str, config: Config, origin: Origin, parts: list[str], modalities: list[str]) -> dict[str, str]:
    """Move rows with a repeated id to the rejects, and leaking rows where the config asks for it.

    Returns the checksums of the parts that were written anew.
    """
    rewritten: dict[str, str] = {}
    if origin.source is None:
        for together in parts_of_ids(config, parts, origin.shards):
            rewritten |= reject_duplicates(uri, together)
    paired = config.samples.combine.name != "union"
    # the rows are samples, and decided here
    is_whole = origin.num_conflicts is not None if paired else origin.source is None
    if config.samples.drop_leakage and is_whole:
        rewritten |= drop_leakage(uri, parts, modalities)
    return rewritten


def all_rejects(
    uri: str, origin: Origin, parts: list[str], names: dict[str, str]
) -> tuple[pa.Table, dict[str, int]]:
    """The rejects of the parts and of what they were made from, and the members of archives that no column maps."""
    own = collect_rejects(uri, parts, names)
    if origin.source is not None:
        own = pa.concat_tables([origin.rejects if origin.rejects is not None else source_rejects(origin.source), own])
    return own.filter(pc.not_equal(own.column("stage"), UNMAPPED)), count_unmapped(own)


def layout_of(origin: Origin) -> str:
    """That of the origin, or of its source."""
    if origin.layout is not None:
        return origin.layout
    return origin.source.manifest.layout if origin.source is not None else ""


def collect_rejects(uri: str, parts: list[str], names: dict[str, str]) -> pa.Table:
    """All rejects of the parts, with shard names as source."""
    wanted = set(parts)
    files = [
        f.base_name for f in storage.list_files(storage.join(uri, "rejects"), "*.parquet") if f.base_name in wanted
    ]
    tables = [read_rejects(storage.join(uri, "rejects", n)) for n in files]
    table = pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables])
    sources = table.column("source").combine_chunks().dictionary_encode()
    named = pa.array([names.get(s, s) for s in sources.dictionary.to_pylist()], pa.string()).take(sources.indices)
    return table.set_column(1, "source", named).sort_by([("source", "ascending"), ("sample_id", "ascending")])


def source_rejects(source: Store) -> pa.Table:
    """The rejects of the store that this one is made from."""
    return read_rejects(storage.join(source.uri, "rejects.parquet"))


def count_rows(uri: str, parts: list[str], modalities: list[str], tasks: Mapping[str, TaskKind]) -> Counts:
    """Rows per split, per task and class, and per missing modality; one part in memory at a time."""
    by_split: Counter[str] = Counter()
    by_task: dict[str, dict[str, Counter[str]]] = {t: {} for t in tasks}
    missing: dict[str, Counter[str]] = {m: Counter() for m in modalities}
    for name in parts:
        table = read_part(uri, name, ["split", *tasks, *map(column_of, modalities)])
        split = table.column("split")
        by_split.update(split.to_pylist())
        for task, kind in tasks.items():
            rows, names = kind.members(table.column(task))
            labels = pa.table({"split": split.take(rows), "label": names}).group_by(["split", "label"])
            for pair in labels.aggregate([([], "count_all")]).to_pylist():
                if pair["label"] is not None:
                    by_task[task].setdefault(pair["split"], Counter())[pair["label"]] += pair["count_all"]
        for modality in modalities:
            missing[modality].update(split.filter(table.column(column_of(modality)).is_null()).to_pylist())
    return Counts(
        rows=sum(by_split.values()),
        by_split=dict(sorted(by_split.items())),
        by_task={t: {s: dict(sorted(c.items())) for s, c in sorted(v.items())} for t, v in by_task.items()},
        missing={m: dict(sorted(c.items())) for m, c in missing.items()},
    )


def train_labels(uri: str, parts: list[str], task: str) -> Iterator[pa.ChunkedArray]:
    """The labels of the train rows, part by part."""
    for name in parts:
        table = read_part(uri, name, ["split", task])
        yield table.column(task).filter(pc.equal(table.column("split"), "train"))


def count_cleaned(uri: str, parts: list[str]) -> dict[str, int]:
    """Values that were normalised, by modality and by what was changed: {"text: control characters": 12}."""
    total: Counter[str] = Counter()
    for name in parts:
        total.update(pc.list_flatten(read_part(uri, name, ["cleaned"]).column(0)).to_pylist())
    return dict(sorted(total.items()))


def nulled(cleaned: Mapping[str, int]) -> dict[str, int]:
    """Cells of tables that could not be read as their column's type, by column, as `cleaned` counts them."""
    return {change: n for change, n in cleaned.items() if change.endswith(NULLED)}


def spellings(config: Config, cleaned: Mapping[str, int]) -> dict[str, int]:
    """What was changed in labels, as `cleaned` counts it."""
    return {change: n for change, n in cleaned.items() if change.partition(": ")[0] in config.tasks}


class AlikeRejects(NamedTuple):
    """Rejects whose reasons differ in names and numbers only."""

    reason: str  # of the first of them
    first: str  # its sample_id, and the shard if that is not in it
    num_rows: int


def count_reasons(rejects: pa.Table) -> list[AlikeRejects]:
    """The reasons, the most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, tuple[tuple[str, int, str], str]] = {}
    for batch in rejects.select(["reason", "sample_id", "source", "num_rows"]).to_batches(max_chunksize=65536):
        for reason, row, shard, num_rows in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            counts[kind := without_details(reason)] += num_rows
            place = (shard, len(row), row)  # of two numbers the shorter one is the smaller
            first[kind] = min(first.get(kind, (place, reason)), (place, reason))
    return [
        AlikeRejects(first[kind][1], _row_name(*first[kind][0]), num_rows) for kind, num_rows in counts.most_common()
    ]


def _row_name(shard: str, _: int, row: str) -> str:
    return row if row.startswith(shard) else f"{row} in {shard}"


def without_details(reason: str) -> str:
    """A reject's reason without what differs from row to row, quoted names and numbers, for counting."""
    return re.sub(r"""(?<!\w)b?(['"]).*?\1|\b(0x[0-9a-f]+|\d+)\b""", "..", reason)[:120]


def tell_reasons(reasons: Sequence[AlikeRejects] | Counter[str]) -> str:
    """The most frequent of them, as the end of a sentence."""
    if isinstance(reasons, Counter):
        shown = [f"{num_rows:,} x {reason[:MAX_REASON]}" for reason, num_rows in reasons.most_common(3)]
    else:
        shown = [f"{t.num_rows:,} x {t.reason[:MAX_REASON]} (first: {t.first})" for t in reasons[:3]]
    return "; the most frequent: " + "; ".join(shown) if reasons else ""


def count_unmapped(rejects: pa.Table) -> dict[str, int]:
    """Suffix -> members of archives that have it, which no column maps."""
    notes = rejects.filter(pc.equal(rejects.column("stage"), UNMAPPED))
    counts: Counter[str] = Counter()
    for suffix, num_members in zip(notes["sample_id"].to_pylist(), notes["num_rows"].to_pylist(), strict=True):
        counts[suffix] += num_members
    return dict(counts.most_common(50))


def tell_unmapped(unmapped: dict[str, int]) -> str:
    """The most frequent suffixes, for the log."""
    shown = ", ".join(f"{n:,} x .{suffix}" for suffix, n in list(unmapped.items())[:5])
    return shown if len(unmapped) <= 5 else f"{shown} and others"
