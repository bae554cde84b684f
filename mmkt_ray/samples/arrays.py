"""Arrays of NumPy beside a shard: row i of `vectors.npy` belongs to row i of `rows.csv`.

A source names one in the place of a column: `columns: {vector: vectors.npy}`, or `"{shard}.npy"` for one with the
shard's own name. Rows are read a few at a time, on disk and on object stores alike;
a pickle within the file is never loaded.

Axes: N rows, D numbers of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from mmkt_ray.errors import DataError
from mmkt_ray.samples.columns import MAX_FILE_BYTES, Reading
from mmkt_ray.samples.files import FileReader

_READ_ROWS = 256
_MAX_HEADER_CHARS = 10_000
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayFile:
    """An open array (N, D) of numbers."""

    def __init__(self, name: str, shard: str, stream: Any) -> None:
        self.name, self.shard, self._stream = name, shard, stream
        try:
            header = _HEADERS.get(np.lib.format.read_magic(stream))
            if header is None:
                raise ValueError("a header of another version than 1.0 and 2.0")
            shape, by_columns, self._dtype = header(stream, max_header_size=_MAX_HEADER_CHARS)
        except (ValueError, EOFError, OSError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(f"'{name}' beside '{shard}' is no array of NumPy: {error}") from None
        if self._dtype.kind not in "fiu" or self._dtype.itemsize > 8 or len(shape) != 2 or by_columns or shape[1] < 1:
            how = ", by columns" if by_columns else ""
            raise DataError(
                f"'{name}' beside '{shard}' holds {self._dtype} of shape {shape}{how}: save an array (N, D) of "
                "float16, float32 or float64, e.g. by np.save(path, np.ascontiguousarray(vectors, np.float32))"
            )
        self.num_rows, self._width = int(shape[0]), int(shape[1])
        self._start, self._row_bytes = stream.tell(), self._width * self._dtype.itemsize
        size = stream.size()
        if self._row_bytes > MAX_FILE_BYTES or size != self._start + self.num_rows * self._row_bytes:
            raise DataError(
                f"'{name}' beside '{shard}' is damaged: its header says {shape} {self._dtype}, its {size:,} bytes "
                "are of another size: copy it again"
            )
        self._held, self._first = np.empty((0, self._width), self._dtype), 0

    def rows(self, first: int, num_rows: int) -> np.ndarray:
        """(num_rows, D) from row `first` on. Raises: DataError if there are not as many."""
        if first + num_rows > self.num_rows:
            raise self._other_length("more")
        self._stream.seek(self._start + first * self._row_bytes)
        data = self._stream.read(num_rows * self._row_bytes)
        return np.frombuffer(data, self._dtype).reshape(num_rows, self._width)

    def row(self, i: int) -> np.ndarray:
        """(D,); rows that follow one another are read together."""
        if not self._first <= i < self._first + len(self._held):
            most = max(1, min(_READ_ROWS, MAX_FILE_BYTES // self._row_bytes // 8))
            self._first, self._held = i, self.rows(i, max(1, min(most, self.num_rows - i)))
        return np.asarray(self._held[i - self._first])

    def column(self, first: int, num_rows: int) -> pa.Array:
        """The rows as lists (num_rows,)."""
        flat = pa.array(self.rows(first, num_rows).astype(self._dtype.newbyteorder("="), copy=False).ravel())
        return pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1) * self._width, pa.int32()), flat)

    def check_length(self, num_rows: int) -> None:
        """Raises: DataError if the shard has another number of rows, so that rows would get other rows' vectors."""
        if num_rows != self.num_rows:
            raise self._other_length(f"{num_rows:,}")

    def _other_length(self, num_rows: str) -> DataError:
        return DataError(
            f"'{self.name}' has {self.num_rows:,} rows and '{self.shard}' beside it has {num_rows}: row i of one "
            "must belong to row i of the other; write both again"
        )


@contextmanager
def open_arrays(reading: Reading) -> Iterator[dict[str, ArrayFile]]:
    """Our column -> the array that fills it. Raises: DataError for one that is missing, or no array of numbers."""
    with ExitStack() as stack:
        files, opened = FileReader(reading), {}
        for column, name in reading.arrays.items():
            try:
                fs, path = files.find(name, max_bytes=None)
            except ValueError as error:
                where = f"samples.sources[{reading.shard.source}].columns.{column}"
                raise DataError(f"{where}: {error}; '{reading.shard.name}' needs it beside it") from None
            stream = stack.enter_context(fs.open_input_file(path))
            opened[column] = ArrayFile(name, reading.shard.name, stream)
        yield opened
