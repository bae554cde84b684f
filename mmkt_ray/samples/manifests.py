"""Manifests: tables that name an image's or a sound's file and hold everything else, as CSV,
JSON lines or Parquet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, KeysView
from itertools import count, islice
from typing import Any

import pyarrow as pa

from mmkt_ray.errors import DataError, nearest
from mmkt_ray.kinds.cells import is_nan
from mmkt_ray.kinds.label_columns import plain_values, with_class_names
from mmkt_ray.kinds.lists import items_in
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.samples.addresses import Fetcher, find_addresses
from mmkt_ray.samples.arrays import open_arrays
from mmkt_ray.samples.columns import MAX_ROW_BYTES, Block, Reading, Row
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.json_rows import Fault, parse_row
from mmkt_ray.samples.lines import LINE, TextLines, open_lines, other_separator, read_header, separator_error
from mmkt_ray.samples.parquet import (
    RENAME,
    class_names_in,
    column_at,
    features_in,
    narrowed_to_shard,
    parquet_columns,
    read_batches,
)
from mmkt_ray.samples.schema import DAMAGE, Reject

_MAX_DEPTH = 8  # of mappings in one another whose names are shown
_NOWHERE = object()
_LOOK_ROWS = 64  # whose columns stand for those of a whole file of JSON lines
Raw = dict[str, Any]
Placed = tuple[str, Raw] | Reject  # the row's place, its cells by the source's column names


def read_manifest(reading: Reading) -> Iterator[Row | Reject]:
    """Rows of a manifest; image and audio cells are paths relative to its folder, text cells are the text itself.

    A row's place is the line it begins on (CSV, JSON lines; the first line is 1) or its index (Parquet).

    Raises: DataError if a column that the config names is missing; in JSON lines, if no row has it.
    """
    if reading.has_patterns:
        reading = reading.settled(manifest_columns(reading))
    files = FileReader(reading)
    rows = _fetched(reading, files, raw_rows(reading)) if reading.source.allow_http else raw_rows(reading)
    with open_arrays(reading.narrowed(manifest_columns(reading)) if reading.arrays else reading) as arrays:
        number = -1
        for number, row in enumerate(rows):
            if isinstance(row, Reject):
                is_damaged = row.stage == DAMAGE
                yield row
                if is_damaged:
                    return
                continue
            yield _convert(reading, files, *row, {column: array.row(number) for column, array in arrays.items()})
        for array in arrays.values() if reading.source.limit is None else ():
            array.check_length(number + 1)


def raw_rows(reading: Reading) -> Iterator[Placed]:
    """The rows of a table as they are: each with its place, by the source's column names.
    Raises: as `read_manifest`."""
    suffix = reading.shard.name.lower().rpartition(".")[2]
    return {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}[suffix](reading)


def _fetched(reading: Reading, files: FileReader, rows: Iterator[Placed]) -> Iterator[Placed]:
    """The rows in their order; the addresses in the next few are fetched at once, for `files` to give."""
    source = reading.source
    ours = [column for column, kind in reading.kinds.items() if isinstance(kind, ModalityKind) and kind.is_file]
    theirs = [name for column in ours for name in source.theirs(column)]
    with Fetcher(source) as fetcher:
        while group := list(islice(rows, source.http.concurrency)):
            cells = [row[1].get(name) for row in group if not isinstance(row, Reject) for name in theirs]
            files.fetched = fetcher.fetch(find_addresses(cells))
            yield from group


def manifest_columns(reading: Reading) -> KeysView[str]:
    """The columns of a manifest, in their order; of JSON lines those of its first rows."""
    suffix = reading.shard.name.lower().rpartition(".")[2]
    if suffix == "parquet":
        return parquet_columns(reading)
    with open_lines(reading, newline="" if suffix == "csv" else LINE) as lines:
        try:
            if suffix == "csv":
                return dict.fromkeys(read_header(csv.reader(lines))).keys()
            rows = [parse_row(line, []) for line in islice(lines, _LOOK_ROWS) if line.strip()]
        except (csv.Error, UnicodeError):  # the reader says so
            return dict[str, None]().keys()
    return {name: None for row in rows if isinstance(row, dict) for name in _names(row)}.keys()


def _names(row: Raw, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The columns of a row, and those nested in them by dotted path."""
    for name, cell in row.items():
        yield f"{prefix}{name}"
        if isinstance(cell, dict) and depth < _MAX_DEPTH:
            yield from _names(cell, f"{prefix}{name}.", depth + 1)


def _add_nested(row: Raw, paths: list[str]) -> None:
    """Give a row the cells at these dotted paths as columns of its own; a name with dots wins."""
    for path in paths:
        cell: Any = row
        for part in path.split("."):
            cell = cell.get(part, _NOWHERE) if isinstance(cell, dict) else _NOWHERE
        if cell is not _NOWHERE:
            row.setdefault(path, cell)


def _convert(reading: Reading, files: FileReader, place: str, raw: Raw, beside: Raw) -> Row | Reject:
    """beside: cells by our column, of arrays beside the shard."""
    cells = reading.gather(raw.get) | beside
    for column, kind in reading.kinds.items():
        if isinstance(kind, ModalityKind) and kind.is_file:
            cells[column] = _read_files(files, kind, cells[column])
    return reading.convert(place, cells)


def _read_files(files: FileReader, kind: ModalityKind, cell: Any) -> Any:
    """What the file that a cell names holds, or of several files, where the kind takes several."""
    if not kind.takes_several or isinstance(cell, ValueError) or cell is None or is_nan(cell):
        return _read_file(files, cell)
    found = [_read_file(files, item) for item in items_in(cell)]
    return next((item for item in found if isinstance(item, ValueError)), found or None)


def is_missing(cell: Any) -> bool:
    """Whether a row names no file: no file is called as pandas writes "missing"."""
    return cell is None or is_nan(cell) or (isinstance(cell, str) and cell in ("", "nan"))


def _read_file(files: FileReader, cell: Any) -> bytes | ValueError | None:
    if is_missing(cell):
        return None
    if isinstance(cell, ValueError):
        return cell
    if not isinstance(cell, str):
        return ValueError(f"must be the path of a file, got {type(cell).__name__}")
    return files.read_cell(cell)


# --- CSV --------------------

_MISSING = "NaN"  # as pandas writes it where asked to; a CSV has no other way to say so but an empty cell
# a field of CSV with what ends it; no match where its quote is not closed
_CSV_FIELD = re.compile(r'''"(?:[^"]++|"")*+"[^,\r\n]*(?:,|\r?\n|\r|\Z)|(?!")[^,\r\n]*(?:,|\r?\n|\r|\Z)''')


def _csv_rows(reading: Reading) -> Iterator[Placed]:
    csv.field_size_limit(MAX_ROW_BYTES)
    line = 1
    with open_lines(reading, newline="") as lines:
        table = csv.reader(lines)
        try:
            header = read_header(table)
            if not header:
                yield reading.unreadable(ValueError("it has no header, and no rows"))
                return
            if (mark := other_separator(header)) and header[0] not in reading.paths:
                raise separator_error(reading.shard.name, mark)
            _check_columns(reading, header)
            _check_closed(reading, lines, line)
            wanted, line = set(reading.paths), table.line_num + 1
            lines.start_row()
            for cells in table:
                _check_closed(reading, lines, line)
                why = f"{len(cells)} cells where the header names {len(header)}"
                if cells and len(cells) < len(header) and lines.is_open:
                    yield reading.unreadable(ValueError(f"it breaks off in line {line}, the last one: {why}"))
                    return
                lines.start_row()
                place, line = reading.place("#", line), table.line_num + 1
                if len(header) > 1 and read_header(iter([cells])) == header:
                    yield reading.reject(place, "the header once more, as if files had been joined")
                elif len(cells) == len(header):
                    pairs = zip(header, cells, strict=True)
                    yield place, {name: None if cell == _MISSING else cell for name, cell in pairs if name in wanted}
                elif any(cell.strip() for cell in cells):
                    yield reading.reject(place, why)
        except (csv.Error, UnicodeError) as error:  # UnicodeError: of an encoding in which a byte cannot be passed over
            if len(lines.row) > 1 and isinstance(error, csv.Error):  # within quotes
                raise _not_closed(reading, lines, line) from None
            yield reading.unreadable(error)


def _check_closed(reading: Reading, lines: TextLines, first: int) -> None:
    """Raises: DataError if the file ended within the row that began at line `first`:
    only an open quote asks for more lines."""
    if lines.ended:
        raise _not_closed(reading, lines, first)


def _not_closed(reading: Reading, lines: TextLines, first: int) -> DataError:
    """The error for a row, begun at line `first`, that goes on to the end of the file or is longer than a row may
    be."""
    row, start = "".join(lines.row), 0
    while (found := _CSV_FIELD.match(row, start)) and found.end() > start:
        start = found.end()
    return DataError(
        f"'{reading.shard.name}', line {first + row.count(LINE, 0, start)}: a quote opens here and is not closed, so "
        f"that the rest of the file would be one cell: {row[start:][:40]!r}; close it, or double a quote that "
        "belongs to the text"
    )


# --- JSON lines --------------------


def _json_rows(reading: Reading) -> Iterator[Placed]:
    seen: set[str] = set()
    wanted = reading.paths
    nested = [name for name in wanted if "." in name]
    num_rows = 0
    with open_lines(reading, newline=LINE) as lines:
        try:
            for number in count(1):
                place = reading.place("#", number)
                lines.start_row()
                try:
                    line = next(lines, None)
                except csv.Error:
                    lines.skip_rest()
                    line, num_rows = "", num_rows + 1
                    why = f"more than the {MAX_ROW_BYTES:,} characters of one row at most"
                    if lines.cut:
                        yield reading.unreadable(ValueError(f"line {number} goes on to its end: {why}"))
                        break
                    yield reading.reject(place, why)
                if line is None or num_rows == reading.source.limit:
                    break
                if not line.strip():
                    continue
                num_rows += 1
                row = parse_row(line, wanted)
                if isinstance(row, Fault) and row.is_broken and lines.is_open:
                    yield reading.unreadable(ValueError(f"it breaks off in line {number}, the last one: {row.reason}"))
                    break
                if isinstance(row, Fault):
                    yield reading.reject(place, row.reason, num_rows=row.num_rows)
                else:
                    _add_nested(row, nested)
                    seen |= row.keys()
                    yield place, row
        except UnicodeError as error:  # as in _csv_rows
            yield reading.unreadable(error)
    if seen:
        _check_columns(reading, sorted(seen))


def _parquet_rows(reading: Reading) -> Iterator[Placed]:
    first = 0
    paths = narrowed_to_shard(reading).paths
    for batch in read_batches(reading, paths):
        if isinstance(batch, Block):
            yield from batch.rejects
            continue
        features = features_in(batch.schema)
        columns = [_named_values(column_at(batch, path), class_names_in(features, path)) for path in paths]
        for i, values in enumerate(zip(*columns, strict=True), start=first):
            yield reading.place("#", i), dict(zip(paths, values, strict=True))
        first += batch.num_rows


def _named_values(column: pa.Array, class_names: list[str] | None) -> list[Any]:
    """The cells (N,) with the names of a ClassLabel; a ValueError where there is none."""
    values: list[Any] = plain_values(column)
    for i, value in enumerate(values) if class_names is not None else ():
        try:
            values[i] = value if isinstance(value, ValueError) else with_class_names(value, class_names)
        except ValueError as error:
            values[i] = error
    return values


def _check_columns(reading: Reading, known: list[str]) -> None:
    where = f"samples.sources[{reading.shard.source}].columns"
    for column in reading.narrowed(known).paths:
        if known.count(column) > 1:
            raise DataError(
                f"{where}: '{reading.shard.name}' has {known.count(column)} columns called '{column}': {RENAME}"
            )
        if column not in known:
            raise DataError(f"{where}: '{reading.shard.name}' has no column '{column}'; {nearest(column, known)}")
