"""From a layout's raw cells to the columns of the sample schema; what cannot become a sample gets a reason.

A layout's reader yields `Block`s: converted cells, and the rows that could not be converted. `clean` makes
sample tables of them. A raw cell may be a ValueError, which says why it could not be read.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray import storage
from mmkt_ray.config import SourceConfig
from mmkt_ray.kinds.arrow import bytes_of_cell
from mmkt_ray.kinds.cells import convert_cell, escape_id
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import DAMAGE, MODALITY, Reject, Shard, sample_schema
from mmkt_ray.samples.splits import assign_split

BLOCK_ROWS, BLOCK_BYTES = 256, 4_000_000  # small beside a chunk: chunks decide a reader's memory
MAX_FILE_BYTES = 512_000_000  # a larger file or archive member is rejected unread
MAX_ROW_BYTES = (
    16_000_000  # a larger row of CSV or JSON is rejected unparsed: as Python objects JSON may take 20 times as much
)


@dataclass(frozen=True)
class Row:
    """One converted row; any cell may be absent."""

    sample_id: str
    cells: dict[str, Any]
    num_bytes: int = 0
    unread: str = ""  # why modalities could not be read, which are absent for that reason


@dataclass(frozen=True)
class Block:
    """Some converted rows of a shard, in order."""

    ids: list[str]
    columns: dict[str, pa.Array]  # some of the sample schema's columns; `split` as given
    errors: dict[int, str] = field(default_factory=dict)  # row of this block -> why it is no sample
    unread: dict[int, str] = field(default_factory=dict)  # row -> why modalities of it, null here, could not be read
    rejects: list[Reject] = field(default_factory=list)  # rows that have no place in the block


@dataclass(frozen=True)
class Reading:
    """What a layout's reader needs to know."""

    plan: ReadingPlan
    shard: Shard

    @cached_property
    def source(self) -> SourceConfig:
        """The source that the shard belongs to."""
        return self.plan.sources[self.shard.source]

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the samples."""
        return sample_schema(self.plan)

    @cached_property
    def kinds(self) -> dict[str, ModalityKind | TaskKind | str]:
        """Each column that the source fills -> its modality's or its task's kind,
        or key (sample_id, key) or split."""
        kinds: dict[str, ModalityKind | TaskKind | str] = {"sample_id": "key", "key": "key", "split": "split"}
        kinds |= {t: task.kind for t, task in self.plan.tasks.items()}
        kinds |= self.plan.modalities
        return {c: kinds[c] for c in self.source.columns}

    def narrowed(self, known: Collection[str]) -> Reading:
        """This reading without the modalities and tasks whose column is not among the shard's,
        where `absent: null` says so.

        Of several columns that make one those stay that are there. If no modality is left the reading stays as it is,
        so that the reader's own check tells what the shard lacks.
        """
        fixed = {"sample_id", "split", "key"}
        there = {c: tuple(name for name in self.source.theirs(c) if name in known) for c in self.source.columns}
        there |= {c: (name,) for c, name in self.arrays.items() if self.has_array(c)}
        columns = {c: theirs for c, theirs in self.source.columns.items() if c in fixed or there[c]}
        columns |= {c: there[c] for c in self._lists if there[c]}
        if self.source.absent == "error" or not set(columns) & set(self.plan.modalities):
            return self
        return Reading(self.plan.with_source(self.shard.source, columns=columns), self.shard)

    @property
    def has_patterns(self) -> bool:
        """Whether the shard's columns have to be known before it can be read: see `settled`."""
        return any("*" in name for theirs in self._lists.values() for name in theirs)

    @property
    def _lists(self) -> dict[str, tuple[str, ...]]:
        """Of our columns those that several of the source's make, with these or patterns for them."""
        return {c: theirs for c, theirs in self.source.columns.items() if not isinstance(theirs, str)}

    def settled(self, known: Collection[str]) -> Reading:
        """This reading with names in place of patterns: the shard's columns that match and that the config names
        nowhere.

        In natural order: `x2` before `x10`. A pattern that matches none stays,
        and the reader's own check tells of it.
        """
        if not self.has_patterns:
            return self
        free = sorted(set(known) - set(self.plan.named[self.shard.source]), key=_natural)
        settled = {column: tuple(_expanded(theirs, free)) for column, theirs in self._lists.items()}
        return Reading(self.plan.with_source(self.shard.source, columns={**self.source.columns, **settled}), self.shard)

    @cached_property
    def paths(self) -> list[str]:
        """The source's columns that are read, sorted."""
        return sorted({name for c in self.source.columns.keys() - self.arrays.keys() for name in self.source.theirs(c)})

    @cached_property
    def arrays(self) -> dict[str, str]:
        """Our columns that arrays beside the shard fill -> the file's name."""
        return self.source.arrays(posixpath.basename(self.shard.name))

    def has_array(self, column: str) -> bool:
        """Whether the file is there."""
        return storage.exists(storage.join(self.shard.uri.rpartition("/")[0] or "/", self.arrays[column]))

    def gather(self, cell_of: Callable[[str], Any]) -> dict[str, Any]:
        """The raw cells of a row by our columns, a dict where several of the source's make one.
        cell_of: their column -> cell."""
        return {
            column: cell_of(theirs) if isinstance(theirs, str) else {name: cell_of(name) for name in theirs}
            for column, theirs in self.source.columns.items()
        }

    def only(self, column: str) -> Reading:
        """This reading of one column alone."""
        return Reading(self.plan.with_columns(self.shard.source, [column]), self.shard)

    def as_text(self, column: str) -> Reading:
        """This reading of one column alone, called `split`, whose cells are text also where they are paths of
        files."""
        return Reading(
            self.plan.with_source(self.shard.source, columns={"split": self.source.columns[column]}), self.shard
        )

    def separator(self, column: str) -> str:
        """What separates the classes of a multilabel column where they stand in one string."""
        return self.plan.tasks[column].separator if column in self.plan.tasks else ""

    def theirs(self, column: str) -> str:
        """The source's own name of a column, as the end of a reason; empty where it is the same."""
        name = self.source.columns.get(column, column)
        return f" (column '{name}')" if isinstance(name, str) and name != column else ""

    def place(self, mark: str, where: object) -> str:
        """The id of a row that has none of its own: the shard's name, a mark, and where in it the row is."""
        return escape_id(f"{self.shard.name}{mark}{where}")

    def convert(self, place: str, raw: dict[str, Any]) -> Row | Reject:
        """Make a row of raw cells; its id is the mapped `sample_id` if the source has one, else its place.

        A modality that cannot be read is left out of the row, which tells why; any other such cell costs the row.
        """
        cells: dict[str, Any] = {"split": raw["split"]} if "split" in raw else {}
        unread = []
        for column, kind in self.kinds.items():
            try:
                value = raw.get(column)
                cells[column] = convert_cell(column, kind, value, self.source.encoding, self.separator(column))
            except ValueError as error:
                reason = f"{error}{self.theirs(column)}"
                if column not in self.plan.modalities:
                    return self.reject(place, reason)
                unread.append(reason)
        if "sample_id" in self.kinds:
            if cells["sample_id"] is None:
                return self.reject(place, "sample_id is null")
            place = escape_id(cells.pop("sample_id"))
        num_bytes = sum(bytes_of_cell(cells.get(m)) for m in self.plan.modalities)
        return Row(place, cells, num_bytes, "; ".join(unread))

    def reject(self, sample_id: str, reason: str, stage: str = "read", num_rows: int = 1) -> Reject:
        """A rejected row of this shard, with the id it has or would have had."""
        printable = reason.encode("utf-8", "backslashreplace").decode()  # names may hold bytes that are no text
        return Reject(sample_id, self.shard.name, stage, printable, num_rows)

    def unreadable(self, error: Exception, what_else: str = "") -> Reject:
        """The reject that stands for all rows of the shard that come after a fault in the file itself (see
        damage.py).

        what_else: what the file is, and what to do, if it is another kind of file.
        """
        why = f"the shard is {what_else}" if what_else else (
            f"the shard is damaged, its rows from here on are lost: {error}; fetch or write the file again"
        )
        return self.reject(
            escape_id(self.shard.name),
            why,
            DAMAGE,
            num_rows=0,
        )


def _expanded(names: Iterable[str], known: list[str]) -> Iterator[str]:
    """Each name once, patterns replaced by those of `known` that match them."""
    seen: dict[str, None] = {}
    for name in names:
        pattern = "[^.]*".join(map(re.escape, name.split("*")))
        matching = [k for k in known if re.fullmatch(pattern, k)] if "*" in name else []
        seen |= dict.fromkeys(matching or [name])
    yield from seen


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- blocks --------------------


def rows_to_blocks(reading: Reading, items: Iterable[Row | Reject]) -> Iterator[Block]:
    """Gather rows into blocks of bounded size."""
    rows: list[Row] = []
    rejects: list[Reject] = []
    num_bytes = 0
    for item in items:
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            rows.append(item)
            num_bytes += item.num_bytes
        if len(rows) + len(rejects) >= BLOCK_ROWS or num_bytes >= BLOCK_BYTES:
            yield _block(reading, rows, rejects)
            rows, rejects, num_bytes = [], [], 0
    if rows or rejects:
        yield _block(reading, rows, rejects)


def _block(reading: Reading, rows: list[Row], rejects: list[Reject]) -> Block:
    names = {"split", *reading.kinds} - {"sample_id"}
    columns = {n: pa.array([r.cells.get(n) for r in rows], reading.schema.field(n).type) for n in names}
    unread = {i: r.unread for i, r in enumerate(rows) if r.unread}
    return Block([r.sample_id for r in rows], columns, unread=unread, rejects=rejects)


def clean(reading: Reading, block: Block, seen: set[str] | None) -> tuple[pa.Table, list[Reject]]:
    """The samples of a block, the rows that are none, and those that lack an unreadable modality (stage `modality`).

    Texts and labels are normalised, blank texts become null. A row is rejected if no modality is left, if its split
    is no known word, or if its id is in `seen`: the ids of the shard so far, extended here;
    None where ids cannot repeat.
    """
    num_rows = len(block.ids)
    columns = {f.name: block.columns.get(f.name, pa.nulls(num_rows, f.type)) for f in reading.schema}
    present = pa.array([False] * num_rows, pa.bool_())
    cleaned: dict[int, list[str]] = {}
    for name, kind in sorted(reading.plan.modalities.items()):
        if name in block.columns:
            columns[name], changed = kind.normalise(columns[name])
            for i, changes in changed.items():
                cleaned.setdefault(i, []).extend(f"{name}: {change}" for change in changes)
        present = pc.or_(present, columns[name].is_valid())
    absent = [i for i, ok in enumerate(present.to_pylist()) if not ok]
    errors = {i: block.unread.get(i, "no modality is present") for i in absent} | block.errors
    splits: list[str | None] = [None] * num_rows
    if reading.plan.joins and joins_by_id(reading.source):
        columns["key"] = pa.array(block.ids, pa.string())
    keys, given = columns["key"].to_pylist(), columns["split"].to_pylist()
    for i, sample_id in enumerate(block.ids):
        if i in errors:
            continue
        try:
            splits[i] = assign_split(sample_id, keys[i], given[i], reading.plan, reading.source)
            if seen is not None:
                _check_unseen(sample_id, seen)
        except ValueError as error:
            errors[i] = str(error)
    for name in sorted(set(reading.plan.tasks) & set(block.columns)):
        columns[name], composed = reading.plan.tasks[name].kind.normalise(columns[name])
        for i in composed:
            cleaned.setdefault(i, []).append(f"{name}: Unicode form")
    columns |= {"sample_id": pa.array(block.ids, pa.string()), "split": pa.array(splits, pa.string())}
    columns["cleaned"] = pa.array([cleaned.get(i) for i in range(num_rows)], pa.list_(pa.string()))
    table = pa.table(columns, schema=reading.schema)
    if errors:
        table = table.filter(pa.array([i not in errors for i in range(num_rows)]))
    rejects = {i: reading.reject(block.ids[i], reason, MODALITY) for i, reason in block.unread.items()}
    rejects |= {i: reading.reject(block.ids[i], reason) for i, reason in errors.items()}
    return table, block.rejects + [rejects[i] for i in sorted(rejects)]


def _check_unseen(sample_id: str, seen: set[str]) -> None:
    if sample_id in seen:
        raise ValueError("duplicate sample id: an earlier row of this shard has it")
    seen.add(sample_id)


def joins_by_id(source: SourceConfig) -> bool:
    """Whether a join's key is the sample's id: the source names ids, and no key."""
    return "sample_id" in source.columns and "key" not in source.columns
