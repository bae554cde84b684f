"""Manifests: tables that name an image's or a sound's file and hold everything else, as CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any, cast

from mmkt_ray import storage
from mmkt_ray.errors import DataError, nearest
from mmkt_ray.samples.cells import FILE_KINDS, json_int
from mmkt_ray.samples.columns import MAX_ROW_BYTES, Block, Reading, Row
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.parquet import column_at, narrowed_to_shard, read_batches, values_of
from mmkt_ray.samples.schema import Reject

Raw = dict[str, Any]
Placed = tuple[str, Raw] | Reject  # the row's place, its cells by the source's column names


def read_manifest(reading: Reading) -> Iterator[Row | Reject]:
    """Rows of a manifest; image and audio cells are paths relative to its folder, text cells are the text itself.

    A row's place is the line it begins on (CSV, JSON lines; the first line is 1) or its index (Parquet).

    Raises: DataError if a column that the config names is missing; in JSON lines, if no row has it.
    """
    suffix = reading.shard.name.rpartition(".")[2]
    rows = {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}[suffix](reading)
    files = FileReader(reading)
    for row in rows:
        yield row if isinstance(row, Reject) else _convert(reading, files, *row)


def _convert(reading: Reading, files: FileReader, place: str, raw: Raw) -> Row | Reject:
    cells = {column: raw.get(name) for column, name in reading.source.columns.items()}
    for column, kind in reading.kinds.items():
        if kind in FILE_KINDS:
            cells[column] = _read_file(files, cells[column])
    return reading.convert(place, cells)


def _read_file(files: FileReader, cell: Any) -> bytes | ValueError | None:
    if cell is None or cell == "":
        return None
    if isinstance(cell, ValueError):
        return cell
    if not isinstance(cell, str):
        return ValueError(f"must be the path of a file, got {type(cell).__name__}")
    return files.read_cell(cell)


class _Lines:
    """The lines of a text, as long as no row has more than MAX_ROW_BYTES characters; who takes a row sets `room` again."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.room = text, MAX_ROW_BYTES

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.text.readline(self.room + 1)
        self.room -= len(line)
        if self.room < 0:
            raise csv.Error(f"a row of more than {MAX_ROW_BYTES:,} characters")
        if not line:
            raise StopIteration
        return line


def _csv_rows(reading: Reading) -> Iterator[Placed]:
    fs, path = storage.resolve(reading.shard.uri)
    csv.field_size_limit(MAX_ROW_BYTES)
    with fs.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        # undecodable bytes pass as surrogates, so that they cost their own row only
        text = io.TextIOWrapper(cast(IO[bytes], stream), reading.source.encoding, errors="surrogateescape", newline="")
        lines = _Lines(text)
        table = csv.reader(lines)
        try:
            header = [name.removeprefix("\ufeff").strip() for name in next(table, [])]
            if not header:
                return
            _check_columns(reading, header)
            line = table.line_num + 1
            for cells in table:
                lines.room = MAX_ROW_BYTES
                place, line = reading.place("#", line), table.line_num + 1
                if len(cells) == len(header):
                    yield place, dict(zip(header, cells, strict=True))
                elif cells:
                    yield reading.reject(place, f"{len(cells)} cells where the header names {len(header)}")
        except (csv.Error, UnicodeError) as error:  # UnicodeError: of an encoding in which a byte cannot be passed over
            yield reading.unreadable(error)


def _json_rows(reading: Reading) -> Iterator[Placed]:
    fs, path = storage.resolve(reading.shard.uri)
    seen: set[str] = set()
    num_rows = 0
    with fs.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        lines = io.BufferedReader(cast(Any, stream), 1 << 20)
        for number, line in enumerate(iter(lambda: lines.readline(MAX_ROW_BYTES + 1), b""), start=1):
            if num_rows == reading.source.limit:
                break
            if not line.strip():
                continue
            num_rows += 1
            place = reading.place("#", number)
            if len(line) > MAX_ROW_BYTES:
                yield reading.reject(place, f"more than the {MAX_ROW_BYTES:,} bytes of one row at most")
                _skip_line(lines, line)
                continue
            try:
                text = line.decode(reading.source.encoding, "surrogateescape")  # as in _csv_rows
                row = json.loads(text, parse_int=json_int)
            except (ValueError, RecursionError) as error:
                yield reading.reject(place, f"not valid JSON: {error}")
                continue
            if isinstance(row, dict):
                seen |= row.keys()
                yield place, row
            else:
                yield reading.reject(place, f"a row must be a JSON object, got {type(row).__name__}")
    if seen:
        _check_columns(reading, sorted(seen))


def _skip_line(lines: io.BufferedReader, part: bytes) -> None:
    """Pass over the rest of the line that begins with `part`."""
    while part and not part.endswith(b"\n"):
        part = lines.readline(1 << 20)


def _parquet_rows(reading: Reading) -> Iterator[Placed]:
    first = 0
    paths = sorted(set(narrowed_to_shard(reading).source.columns.values()))
    for batch in read_batches(reading, paths):
        if isinstance(batch, Block):
            yield from batch.rejects
            continue
        columns = [values_of(column_at(batch, path)) for path in paths]
        for i, values in enumerate(zip(*columns, strict=True), start=first):
            yield reading.place("#", i), dict(zip(paths, values, strict=True))
        first += batch.num_rows


def _check_columns(reading: Reading, known: list[str]) -> None:
    for column in reading.narrowed(known).source.columns.values():
        if column not in known:
            where = f"samples.sources[{reading.shard.source}].columns"
            raise DataError(f"{where}: '{reading.shard.name}' has no column '{column}'; {nearest(column, known)}")
