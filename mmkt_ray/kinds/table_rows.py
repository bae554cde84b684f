"""Rows of a table: cells in one spelling, what a text can be read as, statistics of columns, the types that columns
are found to have.

A cell is text, a list of texts joined by ITEM_MARK. Nothing is guessed: "12,5", "n/a" and " 1.5 lbs" are no numbers,
and "03/04/2020" is no date. Statistics merge associatively, and the same rows give the same types however they are
cut into shards.

Axes: N cells, U distinct values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mmkt_ray.errors import DataError, nearest
from mmkt_ray.kinds.arrow import Converted, check_value, is_list, is_string, values_of
from mmkt_ray.kinds.cells import canonical, decode_text, key_text, label_text
from mmkt_ray.kinds.label_columns import label_column, with_class_names

ColumnType = Literal["number", "category", "boolean", "date"]

ITEM_MARK = "\x1f"  # between the items of a cell that is a list
NULLED = ", read as null"  # end of what the audit says of a cell that is not of its column's type
MAX_BAD_FRAC = 0.1  # of a column's cells that may be unreadable as its type
NUM_BAD_SHOWN = 5
MAX_TEXTS = 2**16  # different texts of a column that are counted; with more it is no category
MAX_VALUES = 2**14  # different numbers of a column that are kept exactly
_MAX_DEPTH = 8  # of mappings in one another
_MAX_TEXT_CHARS = 200  # of a category's name: longer ones are cut, and told apart by a hash

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_CODE = re.compile(r"[+-]?0\d")  # 007: a number where the config says so, else a code
_DATE = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?: ?(?:Z|UTC|[+-]\d\d:?\d\d))?)?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


# --- cells --------------------


def cell_text(value: Any, encoding: str = "utf-8") -> str | None:
    """A cell in one spelling: 3, 3.0 and "3.0" are "3", True is "true"; None where it is null, NaN or blank.

    Raises: ValueError for bytes that are no text, and for lists that hold more than single values.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        items = [text for item in value if (text := cell_text(item, encoding)) is not None]
        return ITEM_MARK.join(sorted(items) if isinstance(value, set) else items) or None
    if isinstance(value, bytes):
        value = decode_text(value, encoding)
    text = key_text(value)
    return None if text is None else _shortened(text)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_TEXT_CHARS:
        return text
    return f"{text[: _MAX_TEXT_CHARS - 16]}{xxhash.xxh3_64_hexdigest(text.encode('utf-8', 'surrogatepass'))}"


def row_texts(row: Mapping[str, Any], encoding: str) -> dict[str, str]:
    """The cells of a row that are there, by column; a mapping in a cell becomes columns `outer.inner`.

    Raises: ValueError that names the column.
    """
    found: dict[str, str] = {}
    for column, value in _flat(row, "", 0):
        try:
            text = cell_text(value, encoding)
        except ValueError as error:
            raise ValueError(f"column '{column}': {error}") from None
        if text is not None:
            found[column] = text
    return found


def _flat(row: Mapping[str, Any], prefix: str, depth: int) -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        column = f"{prefix}{name}" if prefix else str(name).removeprefix("json.")  # as a WebDataset's are called
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _flat(value, f"{column}.", depth + 1)
        else:
            yield column, value


def row_type() -> pa.DataType:
    """Arrow type of a row: column -> text, absent cells left out."""
    return pa.map_(pa.string(), pa.string())


def rows_from_arrow(raw: pa.StructArray, class_names: Callable[[str], list[str] | None]) -> Converted:
    """Columns side by side (N,) as rows of `row_type`; null where all are. class_names: what whole numbers in a
    column stand for, where the file says so."""
    errors: dict[int, str] = {}
    names, columns = [], []
    for theirs, column in _flat_arrow(raw, ""):
        texts, wrong = _column_texts(column, class_names(theirs))
        name = theirs.removeprefix("json.")  # as in `row_texts`
        names.append(name)
        columns.append(texts)
        for i, reason in wrong.items():
            errors[i] = f"{errors[i]}; column '{name}': {reason}" if i in errors else f"column '{name}': {reason}"
    there = np.stack([c.is_valid().to_numpy(zero_copy_only=False) for c in columns], axis=1)  # (N, C)
    there[list(errors)] = False
    rows, which = np.nonzero(there)
    items = pa.concat_arrays(columns).take(pa.array(which * len(raw) + rows))
    keys = pa.array(names, pa.string()).take(pa.array(which))
    counts = there.sum(axis=1)
    starts = pa.array(np.append(0, np.cumsum(counts)).astype(np.int32), mask=np.append(counts == 0, False))
    return pa.MapArray.from_arrays(starts, keys, items, row_type()), errors


def _flat_arrow(raw: pa.StructArray, prefix: str) -> Iterable[tuple[str, pa.Array]]:
    for f, column in zip(raw.type, raw.flatten(), strict=True):
        name = f"{prefix}{f.name}"
        if pa.types.is_struct(f.type):
            yield from _flat_arrow(column, f"{name}.")
        else:
            yield name, column


def _column_texts(column: pa.Array, class_names: list[str] | None) -> Converted:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.string()), {}
    if is_list(column.type):
        texts: list[str | None] = []
        wrong: dict[int, str] = {}
        for i, value in enumerate(values_of(column)):
            try:
                check_value(value)
                texts.append(cell_text(with_class_names(value, class_names)))
            except ValueError as error:
                texts.append(None)
                wrong[i] = str(error)
        return pa.array(texts, pa.string()), wrong
    column, wrong = label_column(column, class_names, label_text)
    encoded = column.dictionary_encode()
    spelt = [None if text is None else cell_text(canonical(text)) for text in encoded.dictionary.to_pylist()]
    assert is_string(column.type)
    return pa.array(spelt, pa.string()).take(encoded.indices), wrong


def bytes_of_rows(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Bytes of each row (N,) int64, 0 for null: of the texts, and a few for each cell."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.add(pc.binary_length(column.keys), pc.binary_length(column.items)).to_numpy(zero_copy_only=False)
    ends = np.append(0, np.cumsum(lengths.astype(np.int64) + 8))
    starts = column.offsets.to_numpy()
    return np.asarray(ends[starts[1:]] - ends[starts[:-1]])


def items_of(text: str, separator: str | None) -> list[str]:
    """The different items of a cell, in order: of a list, or split at a separator."""
    parts = [
        part.strip() for item in text.split(ITEM_MARK) for part in (item.split(separator) if separator else [item])
    ]
    return list(dict.fromkeys(part for part in parts if part))


# --- what a text can be read as --------------------


def read_number(text: str, stated: bool = True) -> float | None:
    """A finite number, written with a decimal point. stated: by the config; else 007 is a code."""
    if not _NUMBER.fullmatch(text) or (not stated and _CODE.match(text)):
        return None
    number = float(text)
    return number + 0.0 if math.isfinite(number) else None


def read_date(text: str, stated: bool = True) -> float | None:
    """Seconds since 1970 of an ISO 8601 date or time (2026-11-30, 2026-11-30T12:00+01:00);
    UTC where it names no zone."""
    if not _DATE.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text.replace(" UTC", "Z").replace(" Z", "Z"))
    except ValueError:
        return None
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH).total_seconds()


def read_boolean(text: str, stated: bool = True) -> float | None:
    """1 for true and 0 for false; where the config says so also of 1, 0, yes and no."""
    known = {"true": 1.0, "false": 0.0} | ({"1": 1.0, "0": 0.0, "yes": 1.0, "no": 0.0} if stated else {})
    return known.get(text.lower())


READ: dict[str, Callable[[str, bool], float | None]] = {
    "boolean": read_boolean,
    "number": read_number,
    "date": read_date,
}
"""By type what reads a text as a number; in the order in which a column's type is looked for."""


# --- statistics --------------------


@dataclass(frozen=True)
class ValueCounts:
    """Numbers with how often each is there, exact up to MAX_VALUES different ones.

    With more, the lowest bits of all are dropped until they fit, and each is known to a relative 2**(dropped - 52).
    How many bits does not depend on how the numbers came, other than in KLL sketches: uniform collapse as in
    UDDSketch (Epicoco et al. 2020), here on the bits of float64.
    """

    values: np.ndarray  # (U,) float64, ascending
    counts: np.ndarray  # (U,) int64
    dropped: int  # lowest bits, 0: exact
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Iterable[float], counts: Iterable[int]) -> ValueCounts:
        """Of finite numbers."""
        array = np.fromiter(numbers, np.float64) + 0.0  # no -0.0
        low, high = (float(array.min()), float(array.max())) if len(array) else (math.inf, -math.inf)
        return cls(array, np.fromiter(counts, np.int64), 0, low, high)._fitting()

    @classmethod
    def merged(cls, parts: Sequence[ValueCounts]) -> ValueCounts:
        """Of all parts' numbers together."""
        values, counts = (np.concatenate([getattr(p, name) for p in parts]) for name in ("values", "counts"))
        extremes = min(p.low for p in parts), max(p.high for p in parts)
        return cls(values, counts, max(p.dropped for p in parts), *extremes)._fitting()

    def _fitting(self) -> ValueCounts:
        dropped = self.dropped
        while True:
            bits = self.values.view(np.int64) >> dropped << dropped
            values, place = np.unique(bits.view(np.float64), return_inverse=True)
            if len(values) <= MAX_VALUES:
                counts = np.bincount(place, self.counts, len(values)).astype(np.int64)
                return ValueCounts(values, counts, dropped, self.low, self.high)
            dropped += 1

    @property
    def num(self) -> int:
        """N."""
        return int(self.counts.sum())

    def centres(self) -> np.ndarray:
        """The values (U,); of those known in part only the middle of what they may be."""
        if not self.dropped:
            return self.values
        middle = self.values.view(np.int64) | (1 << (self.dropped - 1))
        return np.clip(middle.view(np.float64), self.low, self.high)

    def quantiles(self, fractions: np.ndarray) -> np.ndarray:
        """As `np.quantile` of all numbers, linear between them. fractions: ascending in 0..1."""
        centres, ends = self.centres(), np.cumsum(self.counts)
        places = fractions * (self.num - 1)
        below = np.floor(places).astype(np.int64)
        at, after = (
            centres[np.searchsorted(ends, np.minimum(i, self.num - 1), side="right")] for i in (below, below + 1)
        )
        found = at + (after - at) * (places - below)
        found[fractions == 0], found[fractions == 1] = self.low, self.high
        return np.maximum.accumulate(found)


@dataclass(frozen=True)
class ColumnStatistics:
    """What is known of the present cells of a column."""

    num_cells: int
    readable: dict[str, int] = field(default_factory=dict)  # type -> cells that can be read as it
    bad: dict[str, list[str]] = field(default_factory=dict)  # type -> the first different texts that cannot
    values: dict[str, ValueCounts] = field(default_factory=dict)  # type -> what was read
    # text -> cells that hold it; None: too many different ones
    items: dict[str, int] | None = field(default_factory=dict)

    @classmethod
    def of(
        cls, texts: Iterable[str], stated: ColumnType | None = None, separator: str | None = None
    ) -> ColumnStatistics:
        """stated: the column's type, so that nothing is counted for others."""
        counts = Counter(texts)
        readable, bad, values = {}, {}, {}
        for name, read in READ.items():
            if stated not in (None, name):
                continue
            found = {text: number for text in counts if (number := read(text, stated is not None)) is not None}
            readable[name] = sum(counts[text] for text in found)
            bad[name] = [text for text in counts if text not in found][:NUM_BAD_SHOWN]
            values[name] = ValueCounts.of(found.values(), (counts[text] for text in found))
        items: Counter[str] = Counter()
        if stated in (None, "category"):
            for text, num in counts.items():
                for item in items_of(text, separator):
                    items[item] += num
        return cls(counts.total(), readable, bad, values, _countable(items))

    @classmethod
    def merged(cls, parts: Sequence[ColumnStatistics]) -> ColumnStatistics:
        """Of all parts' cells together; of their order depends only which bad cells are shown."""
        types = list(parts[0].readable)
        items: Counter[str] | None = Counter()
        for part in parts:
            items = None if items is None or part.items is None else items
            if items is not None:
                items.update(part.items)
        return cls(
            sum(part.num_cells for part in parts),
            {t: sum(part.readable[t] for part in parts) for t in types},
            {t: list(dict.fromkeys(text for part in parts for text in part.bad[t]))[:NUM_BAD_SHOWN] for t in types},
            {t: ValueCounts.merged([part.values[t] for part in parts]) for t in types},
            None if items is None else _countable(items),
        )

    def type_of(self) -> ColumnType:
        """The first type that nine of ten cells can be read as, else category."""
        for name in READ:
            if self.num_cells - self.readable[name] <= MAX_BAD_FRAC * self.num_cells:
                return name  # type: ignore[return-value]  # of READ
        return "category"

    def check(self, column: str, stated: ColumnType) -> None:
        """Raises: DataError if more than a tenth of the cells cannot be read as the stated type."""
        wrong = self.num_cells - self.readable.get(stated, self.num_cells)
        if wrong > MAX_BAD_FRAC * self.num_cells:
            shown = ", ".join(map(repr, self.bad[stated]))
            raise DataError(
                f"column '{column}' is no {stated}, as the config says: {wrong:,} of {self.num_cells:,} cells cannot "
                f"be read as one, the first: {shown}; mend the cells, or state another type, or none, in kind.types"
            )


def _countable(items: dict[str, int]) -> dict[str, int] | None:
    return dict(items) if len(items) <= MAX_TEXTS else None


def column_statistics(
    rows: Sequence[Mapping[str, str]], types: Mapping[str, ColumnType], separators: Mapping[str, str]
) -> dict[str, ColumnStatistics]:
    """By column, of the cells that are there."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        for column, text in row.items():
            cells.setdefault(column, []).append(text)
    return {c: ColumnStatistics.of(texts, types.get(c), separators.get(c)) for c, texts in sorted(cells.items())}


def merge_columns(parts: Sequence[Mapping[str, ColumnStatistics]]) -> dict[str, ColumnStatistics]:
    """By column, of all parts."""
    columns = sorted({column for part in parts for column in part})
    return {c: ColumnStatistics.merged([part[c] for part in parts if c in part]) for c in columns}


def check_stated(stated: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises: DataError for a column that the config says something of, and that no row has a cell of."""
    known = sorted(known)
    for column in stated:
        if column not in known:
            raise DataError(f"{where}: no row has a cell in column '{column}'; {nearest(column, known)}")
