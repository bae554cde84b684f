"""One class in several spellings, `1.0` in one file and `1` in another: found where they meet, and written in one.

What counts as one class is `canonical` (kinds/cells.py). A spelling that meets no other one stays as it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.kinds.cells import canonical
from mmkt_ray.kinds.task_kind import TaskKind

log = logging.getLogger(__name__)

MAX_SHOWN = 20  # spellings in a warning


def respelled(names: Iterable[str]) -> dict[str, str]:
    """Class -> its canonical spelling, for the classes that change;
    empty where no two spellings of one class are among them."""
    names = list(names)
    found = {name: canonical(name) for name in names}
    return {old: new for old, new in found.items() if old != new} if len({*found.values()}) < len(found) else {}


def _apart_by_case(names: Iterable[str]) -> list[list[str]]:
    """Classes that are one but for capital letters, in groups."""
    groups: dict[str, list[str]] = {}
    for name in sorted({canonical(name) for name in names}):
        groups.setdefault(name.casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def merge_spellings(
    uri: str,
    parts: list[str],
    by_task: Mapping[str, Mapping[str, Mapping[str, int]]],
    kinds: Mapping[str, TaskKind],
) -> dict[str, str]:
    """Give classes with several spellings one, in the affected parts, and note it in `cleaned`.

    by_task: task -> split -> class -> rows, as in a manifest's counts; kinds: of the tasks. Returns the checksums of
    the affected parts.
    """
    for task, splits in by_task.items():
        if apart := _apart_by_case({c for counts in splits.values() for c in counts}):
            pairs = ", ".join(" and ".join(map(repr, group)) for group in apart[:MAX_SHOWN])
            log.warning(
                "%s: classes that differ in case alone stay apart, write them alike if they are one: %s", task, pairs
            )
    names = {task: respelled({c for counts in splits.values() for c in counts}) for task, splits in by_task.items()}
    names = {task: changes for task, changes in names.items() if changes}
    if not names:
        return {}
    changed = [f"{task} '{old}' as '{new}'" for task, changes in names.items() for old, new in sorted(changes.items())]
    log.warning("one class in several spellings, read as one: %s", ", ".join(changed[:MAX_SHOWN]))
    rewritten: dict[str, str] = {}
    for part in parts:
        path = storage.join(uri, "data", part)
        table = storage.read_table(path, [*names, "cleaned"])
        if any(_uses(kinds[task], table.column(task), changes) for task, changes in names.items()):
            rewritten[part] = storage.write_table(path, _rewritten(storage.read_table(path), names, kinds))
    return rewritten


def _uses(kind: TaskKind, column: pa.ChunkedArray, changes: Mapping[str, str]) -> bool:
    return not changes.keys().isdisjoint(kind.members(column)[1].unique().to_pylist())


def _rewritten(table: pa.Table, names: Mapping[str, Mapping[str, str]], kinds: Mapping[str, TaskKind]) -> pa.Table:
    notes: list[list[str]] = [list(cell or []) for cell in table.column("cleaned").to_pylist()]
    for task, changes in names.items():
        column = table.column(task)
        for row, name in zip(*(part.to_pylist() for part in kinds[task].members(column)), strict=True):
            if name in changes:
                notes[row].append(f"{task}: '{name}' read as '{changes[name]}'")
        after = [kinds[task].rename(cell, changes) for cell in column.to_pylist()]
        table = table.set_column(table.column_names.index(task), task, pa.array(after, table.schema.field(task).type))
    cells = pa.array([note or None for note in notes], pa.list_(pa.string()))
    return table.set_column(table.column_names.index("cleaned"), "cleaned", cells)
