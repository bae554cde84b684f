"""Sizes that the pages of a Parquet file state in their headers, looked at before Arrow makes room for them.

The footer's sizes are no bound: nothing checks them, and a page of a few bytes may state 2 GB and hold that. On a
local disk all headers are looked at first. On an object store each look would be a request: there only what decides
the size of batches, the dictionaries' headers, is asked for, and the other headers are looked at in the bytes that
Arrow reads (`WatchedFile`). Format: https://github.com/apache/parquet-format,
its headers in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import pyarrow.parquet as pq

MAX_PAGE_BYTES = 1_000_000_000  # writers begin a page after 1 MB, but not within a value
MAX_LIST_VALUES = 50_000_000  # in the lists of a row group, which may all be one row's
_HEADER_BYTES = (1 << 10, 1 << 14, 1 << 24)  # usual, with statistics of long values, and the most that Arrow reads
_OLD_WRITERS_BYTES = 100  # by which some state a chunk's length too small; Arrow reads so many more
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7  # of the format's enumerations
_MAX_DEPTH = 8

_Fields = dict[int, Any]  # number -> integer or structure; other fields are passed over


def most_bytes_of_a_value(
    file: pq.ParquetFile, stream: IO[bytes], columns: Iterable[int], groups: Iterable[int], thrifty: bool = False
) -> int:
    """The largest value that dictionaries or shared prefixes can repeat in each row of the columns;
    0 if there are none.

    thrifty: look at no other pages than the footer says have such values; the others are for a `WatchedFile`.
    A damaged header ends the look at its column chunk: the read finds the damage, after the rows before it.
    Raises: ValueError for a page of more than MAX_PAGE_BYTES, or lists of more than MAX_LIST_VALUES values.
    """
    largest = 0
    for watch in _column_chunks(file, columns, groups):
        if thrifty and not (watch.chunk.has_dictionary_page or "DELTA_BYTE_ARRAY" in watch.chunk.encodings):
            continue
        while (page := watch.next_page(stream)) is not None:
            largest = max(largest, page.num_bytes if page.repeats else 0)
            if thrifty and "DELTA_BYTE_ARRAY" not in watch.chunk.encodings:
                break
    return largest


class WatchedFile:
    """A Parquet file on an object store, for `pyarrow.PythonFile`:
    its pages' headers are looked at in the bytes that are read.

    Raises ValueError from a read, before Arrow sees the header, as `most_bytes_of_a_value`, and for a value that
    repeats of more bytes than the footer told of.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.tell, self.seek, self.close = stream.tell, stream.seek, stream.close
        self.waiting: list[_ColumnChunk] = []
        self.most_repeated = 0

    @property
    def closed(self) -> bool:
        return bool(self.stream.closed)

    def watch(self, file: pq.ParquetFile, columns: Iterable[int], groups: Iterable[int], most_repeated: int) -> None:
        """From now on. most_repeated: bytes of a value that may repeat."""
        self.waiting, self.most_repeated = list(_column_chunks(file, columns, groups)), most_repeated

    def read(self, size: int | None = None) -> bytes:
        start = self.stream.tell()
        data: bytes = self.stream.read(size)
        end = start + len(data)
        for watch in self.waiting:
            while start <= watch.position < min(end, watch.end):
                if (page := watch.next_page(_Known(data, start, self.stream))) is None:
                    break
                if page.repeats and page.num_bytes > self.most_repeated:
                    raise ValueError(
                        f"values of {page.num_bytes:,} bytes that repeat, of which the footer says nothing"
                    )
        self.waiting = [watch for watch in self.waiting if watch.position < watch.end]
        self.stream.seek(end)
        return data


class _Known:
    """Reads from bytes that are here already, and from the file what is not:
    a header may begin in them and end behind."""

    def __init__(self, data: bytes, start: int, stream: Any) -> None:
        self.data, self.start, self.stream, self.at = data, start, stream, start

    def seek(self, position: int) -> None:
        self.at = position

    def read(self, size: int) -> bytes:
        here = self.data[self.at - self.start : self.at - self.start + size]
        if len(here) == size or (here and size == _HEADER_BYTES[0]):
            return here
        self.stream.seek(self.at)
        return bytes(self.stream.read(size))


class _ColumnChunk:
    """A column chunk whose pages are looked at one after another, up to the first damaged header."""

    def __init__(self, chunk: pq.ColumnChunkMetaData, in_lists: bool) -> None:
        self.chunk, self.in_lists, self.num_values = chunk, in_lists, 0
        self.position = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < self.position:
            self.position = chunk.dictionary_page_offset
        self.end = self.position + chunk.total_compressed_size + _OLD_WRITERS_BYTES

    def next_page(self, stream: Any) -> _Page | None:
        """The page, checked; None at the end. Raises: ValueError as `most_bytes_of_a_value`."""
        found = _header(stream, self.position) if 0 < self.position < self.end else None
        if found is None:
            self.position = self.end
            return None
        header, length = found
        page = _page(header)
        self.position += length + max(0, _number(header, 3))
        self.num_values += page.num_values
        if not 0 <= page.num_bytes <= MAX_PAGE_BYTES:
            raise ValueError(f"a page of {page.num_bytes:,} bytes, more than {MAX_PAGE_BYTES:,}")
        if self.in_lists and self.num_values > MAX_LIST_VALUES:
            raise ValueError(f"lists of more than {MAX_LIST_VALUES:,} values in a row group")
        return page


def _column_chunks(file: pq.ParquetFile, columns: Iterable[int], groups: Iterable[int]) -> Iterator[_ColumnChunk]:
    columns = list(columns)
    for g in groups:
        for c in columns:
            chunk = file.metadata.row_group(g).column(c)
            yield _ColumnChunk(chunk, file.schema.column(c).max_repetition_level > 0)


class _Page(NamedTuple):
    """What a page's header states."""

    num_bytes: int  # that room is made for, packed or unpacked
    num_values: int
    repeats: bool  # values are made of others: a dictionary, or prefixes that values share


def _page(header: _Fields) -> _Page:
    first = header.get(5)
    data = first or header.get(8)  # of a data page, in two versions
    data = data if isinstance(data, dict) else {}
    repeats = header.get(1) == _DICTIONARY_PAGE or data.get(2 if first else 4) == _DELTA_BYTE_ARRAY
    return _Page(max(_number(header, 2), _number(header, 3)), _number(data, 1), repeats)


def _number(fields: _Fields, number: int) -> int:
    value = fields.get(number)
    return value if isinstance(value, int) else 0


def _header(stream: IO[bytes], position: int) -> tuple[_Fields, int] | None:
    """A page header and its length; None if there is none."""
    for num_bytes in _HEADER_BYTES:
        stream.seek(position)
        try:
            return _structure(stream.read(num_bytes), 0, depth=0)
        except IndexError:  # it goes on after these bytes
            continue
        except ValueError:
            break
    return None


def _structure(data: bytes, i: int, depth: int) -> tuple[_Fields, int]:
    """A Thrift structure at `i`: its fields, and where it ends.

    Raises: IndexError if it goes on after `data`, ValueError if it is none.
    """
    fields: _Fields = {}
    number = 0
    while data[i]:
        step, kind = data[i] >> 4, data[i] & 15
        number, i = (number + step, i + 1) if step else _integer(data, i + 1)
        value, i = (None, i) if kind in (1, 2) else _value(data, i, kind, depth)
        if value is not None:
            fields[number] = value
    return fields, i + 1


def _value(data: bytes, i: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if kind in (4, 5, 6):
        return _integer(data, i)
    if kind == 12:
        return _structure(data, i, depth + 1)
    if kind in (1, 2, 3, 7):  # true, false and a byte in a list; a double
        return None, i + (8 if kind == 7 else 1)
    if kind == 8:
        length, i = _varint(data, i)
        return None, i + length
    if kind in (9, 10):
        size, inner, i = data[i] >> 4, data[i] & 15, i + 1
        if size == 15:
            size, i = _varint(data, i)
        for _ in range(size):
            if i >= len(data):
                raise IndexError
            _, i = _value(data, i, inner, depth + 1)
        return None, i
    raise ValueError(f"no page header has a field of type {kind}")


def _varint(data: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while data[i] & 128 and shift < 63:
        value, shift, i = value | (data[i] & 127) << shift, shift + 7, i + 1
    return value | (data[i] & 127) << shift, i + 1


def _integer(data: bytes, i: int) -> tuple[int, int]:
    value, i = _varint(data, i)
    return value >> 1 ^ -(value & 1), i
