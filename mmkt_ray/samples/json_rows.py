"""A row as JSON text, or why it is none and how many rows are lost with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from mmkt_ray.kinds.cells import json_int

_BOM = "\ufeff"
_ALONE = "write each on a line of its own, as pandas does: df.to_json(.., orient='records', lines=True)"
_BETWEEN = re.compile(r"[\s,]*")


class Fault(NamedTuple):
    """Why a line is no row."""

    reason: str
    num_rows: int = 1  # that are in it
    is_broken: bool = False  # it is no JSON


def parse_row(line: str, wanted: list[str]) -> dict[str, Any] | Fault:
    """The row of a line of JSON, or why it is none. wanted: columns that are read, nested ones by dotted path."""
    line = line.removeprefix(_BOM)  # also where files with such marks were joined
    try:
        row = json.loads(line, parse_int=json_int)
    except (ValueError, RecursionError) as error:
        if (num_rows := _count_objects(line)) > 1:
            return Fault(f"{num_rows:,} JSON objects in one line: {_ALONE}", num_rows)
        return Fault(f"not valid JSON: {error}", is_broken=num_rows == 0)
    if isinstance(row, list) and (num_rows := sum(isinstance(item, dict) for item in row)):
        return Fault(f"a row must be a JSON object, got a list of {num_rows:,}: {_ALONE}", num_rows)
    if not isinstance(row, dict):
        return Fault(f"a row must be a JSON object, got {type(row).__name__}")
    twice = find_repeated(line, wanted)
    return Fault(f"the column '{twice}' is there twice: rename or remove one") if twice else row


def _count_objects(line: str) -> int:
    """How many JSON objects a line begins with, one after another."""
    decoder, at, found = json.JSONDecoder(), 0, 0
    with suppress(ValueError, RecursionError):
        while (match := _BETWEEN.match(line, at)) and line[match.end() : match.end() + 1] == "{":
            at = decoder.raw_decode(line, match.end())[1]
            found += 1
    return found


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys it has several times."""

    twice: set[str]


def _keep(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    found.twice = {key for key, times in Counter(key for key, _ in pairs).items() if times > 1}
    return found


def find_repeated(text: str, wanted: list[str]) -> str:
    """The first of the wanted columns that an object's JSON text has twice; "" if there is none."""
    suspects = [path for path in wanted if any(text.count(f'"{name}"') > 1 for name in (path, *path.split(".")))]
    row = json.loads(text, object_pairs_hook=_keep, parse_int=json_int) if suspects else None
    return next((path for path in suspects if _is_repeated(row, path)), "")


def _is_repeated(row: Any, path: str) -> bool:
    """Whether the column at a dotted path, or an object above it, is there twice; a name with dots wins."""
    if isinstance(row, _Object) and path in row:
        return path in row.twice
    for name in path.split("."):
        if not isinstance(row, _Object) or name in row.twice:
            return isinstance(row, _Object)
        row = row.get(name)
    return False
