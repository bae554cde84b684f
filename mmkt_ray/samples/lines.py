"""The lines of a table that is text: decoded, without byte order marks, of bounded length;
what is no such text is named."""

from __future__ import annotations

import codecs
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.kinds.cells import likely_encoding
from mmkt_ray.kinds.content import what_else
from mmkt_ray.samples.columns import MAX_ROW_BYTES, Reading
from mmkt_ray.samples.schema import Shard

MAX_LOOKED = 200  # shards of a source whose end is looked at
BOM, LINE = "\ufeff", "\n"
_LINE_ENDS = ("\n", "\r")


class TextLines:
    """The lines of a text without its byte order mark; `room` is what is left of MAX_ROW_BYTES characters for a
    row."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.room = text, MAX_ROW_BYTES
        self.row: list[str] = []  # lines since `start_row`
        self.ended = self.cut = False  # at the end of the file; within a line that is too long

    def start_row(self) -> None:
        """What comes next is a new row."""
        self.room, self.row = MAX_ROW_BYTES, []

    def __iter__(self) -> TextLines:
        return self

    def __next__(self) -> str:
        line = self.text.readline(self.room + 1)
        self.room -= len(line)
        if self.room < 0:
            self.cut = not line.endswith(LINE)
            raise csv.Error(f"a row of more than {MAX_ROW_BYTES:,} characters")
        if not line:
            self.ended = True
            raise StopIteration
        self.row.append(line)
        return line

    @property
    def is_open(self) -> bool:
        """Whether the row lacks its line end: it is the file's last one, and may be cut."""
        return bool(self.row) and not self.row[-1].endswith(_LINE_ENDS)

    def skip_rest(self) -> None:
        """Pass over what is left of the line that was too long; `cut` stays where the file ends within it."""
        while self.cut and (part := self.text.readline(1 << 20)):
            self.cut = not part.endswith(LINE)


@contextmanager
def open_lines(reading: Reading, newline: str) -> Iterator[TextLines]:
    """The lines of a shard. Raises: DataError if it is plainly no text,
    or in another encoding than its source names."""
    fs, path = storage.resolve(reading.shard.uri)
    encoding = reading.source.encoding
    with fs.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        raw = io.BufferedReader(cast(Any, stream), 1 << 20)
        start = raw.peek(400)[:400]
        if other := what_else(start):
            raise DataError(f"'{reading.shard.name}' is no table: it is {other}")
        likely = likely_encoding(start)
        named = codecs.lookup(encoding).name
        if likely is not None and not _can_read(named, likely):
            raise DataError(
                f"'{reading.shard.name}', line 1: it begins as {likely} and is read as {encoding}: "
                f"set encoding: {likely} in samples.sources[{reading.shard.source}]"
            )
        if likely == "utf-8":
            raw.read(len(codecs.BOM_UTF8))  # the mark: it would be three characters in an encoding such as latin-1
        # undecodable bytes pass as surrogates, so that they cost their own row only
        text = io.TextIOWrapper(_without_mark(raw, named), encoding, errors="surrogateescape", newline=newline)
        yield TextLines(text)


def _can_read(named: str, likely: str) -> bool:
    """Whether a text that begins as `likely` may be read in the encoding called `named`."""
    # what a name without byte order means without a mark
    native = f"{named}-{'le' if sys.byteorder == 'little' else 'be'}"
    return named.startswith(likely) or likely == native


def _without_mark(raw: io.BufferedReader, named: str) -> IO[bytes]:
    """The stream after the byte order mark that an encoding of fixed byte order would take for a character."""
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(named)
    mark = mark or {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}.get(named)
    if mark and raw.peek(len(mark)).startswith(mark):
        raw.read(len(mark))
    return raw


def that_may_be_cut(shards: Sequence[Shard]) -> list[str]:
    """Names of CSV and JSON lines shards that do not end with a line end where others of their source do: one may be
    cut within its last cell, which nothing else shows. Of each source the first MAX_LOOKED are looked at."""
    named: list[str] = []
    for source in {shard.source for shard in shards}:
        tables = [s for s in shards if s.source == source and s.name.lower().endswith((".csv", ".jsonl"))][:MAX_LOOKED]
        is_open = [not _ends_with_line(shard.uri) for shard in tables] if len(tables) > 1 else []
        if not all(is_open):
            named += [shard.name for shard, open_end in zip(tables, is_open, strict=True) if open_end]
    return named


def _ends_with_line(uri: str) -> bool:
    """In any Unicode encoding. True too for a file that is empty or cannot be read: its reader reports that."""
    fs, path = storage.resolve(uri)
    try:
        with fs.open_input_file(path) as file:
            file.seek(max(0, file.size() - 4))
            end = file.read(4)
    except OSError:
        return True
    return not end or end.rstrip(b"\0").endswith((b"\n", b"\r"))


def read_header(table: Iterator[list[str]]) -> list[str]:
    """The names in the first row of a CSV that is not blank."""
    return next((names for row in table if any(names := [name.removeprefix(BOM).strip() for name in row])), [])


def other_separator(header: list[str]) -> str:
    """What a CSV is most likely separated by whose header is this one name; "" for none."""
    return next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), "")


def separator_error(file: str, mark: str) -> DataError:
    """The error for a CSV with another separator."""
    advice = f"pandas.read_csv(.., sep={mark!r}).to_csv(.., index=False)"
    return DataError(f"'{file}' is separated by {mark!r}, not by commas: write it again, {advice}")
