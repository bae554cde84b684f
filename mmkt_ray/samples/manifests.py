"""Manifests: tables that name an image's or a sound's file and hold everything else, as CSV, JSON lines or Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import IO, Any, cast

from mmkt_ray import storage
from mmkt_ray.errors import DataError, nearest
from mmkt_ray.kinds.arrow import values_of
from mmkt_ray.kinds.cells import is_nan, json_int, likely_encoding
from mmkt_ray.kinds.lists import items_in
from mmkt_ray.kinds.modalities import ModalityKind
from mmkt_ray.samples.arrays import open_arrays
from mmkt_ray.samples.columns import MAX_ROW_BYTES, Block, Reading, Row
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.parquet import RENAME, column_at, narrowed_to_shard, parquet_columns, read_batches
from mmkt_ray.samples.schema import DAMAGE, Reject

_LOOK_ROWS = 64  # whose columns stand for those of a whole file of JSON lines
_BOM, _LINE = "\ufeff", "\n"
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
    with open_arrays(reading.narrowed(manifest_columns(reading)) if reading.arrays else reading) as arrays:
        number = -1
        for number, row in enumerate(raw_rows(reading)):
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
    """The rows of a table as they are: each with its place, by the source's column names. Raises: as `read_manifest`."""
    suffix = reading.shard.name.lower().rpartition(".")[2]
    return {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}[suffix](reading)


def manifest_columns(reading: Reading) -> set[str]:
    """The columns of a manifest; of JSON lines those of its first rows."""
    suffix = reading.shard.name.lower().rpartition(".")[2]
    if suffix == "parquet":
        return parquet_columns(reading)
    with _open_lines(reading, newline="" if suffix == "csv" else _LINE) as lines:
        try:
            if suffix == "csv":
                return set(_header(csv.reader(lines)))
            rows = [_parse_row(line.removeprefix(_BOM), []) for line in islice(lines, _LOOK_ROWS) if line.strip()]
        except (csv.Error, UnicodeError):  # told by the reader
            return set()
    return {name for row in rows if isinstance(row, dict) for name in row}


def _header(table: Iterator[list[str]]) -> list[str]:
    return [name.removeprefix(_BOM).strip() for name in next(table, [])]


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
    try:
        found = [_read_file(files, item) for item in items_in(cell)]
    except ValueError as error:
        return error
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


# --- lines of text --------------------


class _Lines:
    """The lines of a text without its byte order mark; `room` is what is left of MAX_ROW_BYTES characters for a row."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.room = text, MAX_ROW_BYTES
        self.row: list[str] = []  # lines since `start_row`
        self.ended = self.cut = False  # at the end of the file; within a line that is too long

    def start_row(self) -> None:
        """What comes next is a new row."""
        self.room, self.row = MAX_ROW_BYTES, []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.text.readline(self.room + 1)
        self.room -= len(line)
        if self.room < 0:
            self.cut = not line.endswith(_LINE)
            raise csv.Error(f"a row of more than {MAX_ROW_BYTES:,} characters")
        if not line:
            self.ended = True
            raise StopIteration
        self.row.append(line)
        return line

    def skip_rest(self) -> None:
        """Pass over what is left of the line that was too long."""
        while self.cut and (part := self.text.readline(1 << 20)):
            self.cut = not part.endswith(_LINE)


@contextmanager
def _open_lines(reading: Reading, newline: str) -> Iterator[_Lines]:
    """The lines of a shard. Raises: DataError if it is plainly in another encoding than its source names."""
    fs, path = storage.resolve(reading.shard.uri)
    encoding = reading.source.encoding
    with fs.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        raw = io.BufferedReader(cast(Any, stream), 1 << 20)
        likely = likely_encoding(raw.peek(400)[:400])
        named = codecs.lookup(encoding).name
        if likely is not None and not _can_read(named, likely):
            raise DataError(
                f"'{reading.shard.name}', line 1: it begins as {likely} and is read as {encoding}: "
                f"set encoding: {likely} in samples.sources[{reading.shard.source}]"
            )
        if likely == "utf-8":
            raw.read(len(codecs.BOM_UTF8))  # the mark: it would be three characters in an encoding such as latin-1
        # undecodable bytes pass as surrogates, so that they cost their own row only
        yield _Lines(io.TextIOWrapper(_without_mark(raw, named), encoding, errors="surrogateescape", newline=newline))


def _can_read(named: str, likely: str) -> bool:
    """Whether a text that begins as `likely` may be read in the encoding called `named`."""
    native = f"{named}-{'le' if sys.byteorder == 'little' else 'be'}"  # what a name without byte order means without a mark
    return named.startswith(likely) or likely == native


def _without_mark(raw: io.BufferedReader, named: str) -> IO[bytes]:
    """The stream after the byte order mark that an encoding of fixed byte order would take for a character."""
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(named)
    mark = mark or {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}.get(named)
    if mark and raw.peek(len(mark)).startswith(mark):
        raw.read(len(mark))
    return raw


# --- CSV --------------------

_MISSING = "NaN"  # as pandas writes it where asked to; a CSV has no other way to say so but an empty cell
# a field of CSV with what ends it; no match where its quote is not closed
_CSV_FIELD = re.compile(r'''"(?:[^"]++|"")*+"[^,\r\n]*(?:,|\r?\n|\r|\Z)|(?!")[^,\r\n]*(?:,|\r?\n|\r|\Z)''')


def _csv_rows(reading: Reading) -> Iterator[Placed]:
    csv.field_size_limit(MAX_ROW_BYTES)
    line = 1
    with _open_lines(reading, newline="") as lines:
        table = csv.reader(lines)
        try:
            header = _header(table)
            if not header:
                return
            _check_columns(reading, header)
            _check_closed(reading, lines, line)
            wanted, line = set(reading.paths), table.line_num + 1
            lines.start_row()
            for cells in table:
                _check_closed(reading, lines, line)
                lines.start_row()
                place, line = reading.place("#", line), table.line_num + 1
                if len(cells) == len(header):
                    pairs = zip(header, cells, strict=True)
                    yield place, {name: None if cell == _MISSING else cell for name, cell in pairs if name in wanted}
                elif cells:
                    yield reading.reject(place, f"{len(cells)} cells where the header names {len(header)}")
        except (csv.Error, UnicodeError) as error:  # UnicodeError: of an encoding in which a byte cannot be passed over
            if len(lines.row) > 1 and isinstance(error, csv.Error):  # within quotes
                raise _not_closed(reading, lines, line) from None
            yield reading.unreadable(error)


def _check_closed(reading: Reading, lines: _Lines, first: int) -> None:
    """Raises: DataError if the file ended within the row that began at line `first`: only an open quote asks for more lines."""
    if lines.ended:
        raise _not_closed(reading, lines, first)


def _not_closed(reading: Reading, lines: _Lines, first: int) -> DataError:
    """The error for a row, begun at line `first`, that goes on to the end of the file or is longer than a row may be."""
    row, start = "".join(lines.row), 0
    while (found := _CSV_FIELD.match(row, start)) and found.end() > start:
        start = found.end()
    return DataError(
        f"'{reading.shard.name}', line {first + row.count(_LINE, 0, start)}: a quote opens here and is not closed, so that the "
        f"rest of the file would be one cell: {row[start:][:40]!r}; close it, or double a quote that belongs to the text"
    )


# --- JSON lines --------------------


def _json_rows(reading: Reading) -> Iterator[Placed]:
    seen: set[str] = set()
    wanted = reading.paths
    num_rows = 0
    with _open_lines(reading, newline=_LINE) as lines:
        try:
            for number in count(1):
                place = reading.place("#", number)
                lines.start_row()
                try:
                    line = next(lines, None)
                except csv.Error:
                    lines.skip_rest()
                    line = ""
                    yield reading.reject(place, f"more than the {MAX_ROW_BYTES:,} characters of one row at most")
                    num_rows += 1
                if line is None or num_rows == reading.source.limit:
                    break
                if not line.strip():
                    continue
                num_rows += 1
                row = _parse_row(line.removeprefix(_BOM) if number == 1 else line, wanted)
                if isinstance(row, ValueError):
                    yield reading.reject(place, str(row))
                else:
                    seen |= row.keys()
                    yield place, row
        except UnicodeError as error:  # as in _csv_rows
            yield reading.unreadable(error)
    if seen:
        _check_columns(reading, sorted(seen))


def _parse_row(line: str, wanted: list[str]) -> Raw | ValueError:
    """The row of a JSON line, or why it is none."""
    try:
        row = json.loads(line, parse_int=json_int)
        if not isinstance(row, dict):
            return ValueError(f"a row must be a JSON object, got {type(row).__name__}")
        if twice := [name for name in wanted if line.count(f'"{name}"') > 1 and _is_twice(line, name)]:
            return ValueError(f"the column '{twice[0]}' is there twice: rename or remove one")
        return row
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


def _is_twice(line: str, name: str) -> bool:
    """Whether the line's object itself has a key twice."""
    outermost: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = [key for key, _ in pairs]  # objects come from within: the last is the outermost
        return dict(pairs)

    json.loads(line, object_pairs_hook=keep)
    return outermost.count(name) > 1


def _parquet_rows(reading: Reading) -> Iterator[Placed]:
    first = 0
    paths = narrowed_to_shard(reading).paths
    for batch in read_batches(reading, paths):
        if isinstance(batch, Block):
            yield from batch.rejects
            continue
        columns = [values_of(column_at(batch, path)) for path in paths]
        for i, values in enumerate(zip(*columns, strict=True), start=first):
            yield reading.place("#", i), dict(zip(paths, values, strict=True))
        first += batch.num_rows


def _check_columns(reading: Reading, known: list[str]) -> None:
    where = f"samples.sources[{reading.shard.source}].columns"
    for column in reading.narrowed(known).paths:
        if known.count(column) > 1:
            raise DataError(f"{where}: '{reading.shard.name}' has {known.count(column)} columns called '{column}': {RENAME}")
        if column not in known:
            raise DataError(f"{where}: '{reading.shard.name}' has no column '{column}'; {nearest(column, known)}")
