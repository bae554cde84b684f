"""One class in several spellings, `1.0` in one file and `1` in another: found where they meet, and written in one.

What counts as one class is `canonical` (kinds/cells.py). A spelling that meets no other one stays as it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray import storage
from mmkt_ray.kinds.cells import canonical

log = logging.getLogger(__name__)

MAX_TOLD = 20  # spellings in a warning


def respelled(names: Iterable[str]) -> dict[str, str]:
    """Class -> its canonical spelling, for the classes that change; empty where no two spellings of one class are among them."""
    names = list(names)
    found = {name: canonical(name) for name in names}
    return {old: new for old, new in found.items() if old != new} if len({*found.values()}) < len(found) else {}


def merge_spellings(uri: str, parts: list[str], by_task: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, str]:
    """Give classes with several spellings one, in the affected parts, and note it in `cleaned`.

    by_task: task -> split -> class -> rows, as in a manifest's counts. Returns the checksums of the affected parts.
    """
    names = {task: respelled({c for counts in splits.values() for c in counts}) for task, splits in by_task.items()}
    names = {task: changes for task, changes in names.items() if changes}
    if not names:
        return {}
    told = [f"{task} '{old}' as '{new}'" for task, changes in names.items() for old, new in sorted(changes.items())]
    log.warning("one class in several spellings, read as one: %s", ", ".join(told[:MAX_TOLD]))
    rewritten: dict[str, str] = {}
    for part in parts:
        path = storage.join(uri, "data", part)
        table = storage.read_table(path, [*names, "cleaned"])
        if any(_uses(table.column(task), changes) for task, changes in names.items()):
            rewritten[part] = storage.write_table(path, _rewritten(storage.read_table(path), names))
    return rewritten


def _uses(column: pa.ChunkedArray, changes: Mapping[str, str]) -> bool:
    names = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return not changes.keys().isdisjoint(names.unique().to_pylist())


def _classes(value: Any) -> set[str]:
    return set() if value is None else set(value) if isinstance(value, list) else {value}


def _rewritten(table: pa.Table, names: Mapping[str, Mapping[str, str]]) -> pa.Table:
    notes: list[list[str]] = [list(cell or []) for cell in table.column("cleaned").to_pylist()]
    for task, changes in names.items():
        before = table.column(task).to_pylist()
        after = [_respell(value, changes) for value in before]
        for note, value in zip(notes, before, strict=True):
            note += [f"{task}: '{old}' read as '{changes[old]}'" for old in sorted(changes.keys() & _classes(value))]
        table = table.set_column(table.column_names.index(task), task, pa.array(after, table.schema.field(task).type))
    cells = pa.array([note or None for note in notes], pa.list_(pa.string()))
    return table.set_column(table.column_names.index("cleaned"), "cleaned", cells)


def _respell(value: Any, changes: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return sorted({changes.get(name, name) for name in value})
    return changes.get(value, value)
