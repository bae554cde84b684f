"""Rows of a table -> features: numbers made comparable, categories one-hot, dates as parts, what is missing marked.

Fitted on statistics that merge over shards; equal to scikit-learn's QuantileTransformer and OneHotEncoder on all rows
at once.
Axes: B rows in a batch, D features, C columns with numbers (dates too), Q quantiles, T bins.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from mmkt_ray.encoders.encoder import EncoderSection, Features, ListedEncoder, check_array
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.kinds.value_kinds import Table
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp
    from scipy import special

    from mmkt_ray.kinds import table_rows
    from mmkt_ray.kinds.table_rows import ColumnStatistics, ColumnType, ValueCounts
else:
    np, sp, special, table_rows = map(lazy, ("numpy", "scipy.sparse", "scipy.special", "mmkt_ray.kinds.table_rows"))

log = logging.getLogger(__name__)

BOUND = 1e-7  # scikit-learn's: ranks closer to 0 and 1 count as this
SPARSE_ROWS = 256  # made dense at a time where features are sparse
DAY_S, YEAR_DAYS = 86_400.0, 365.25
DATE_PARTS = ("year sin", "year cos", "week sin", "week cos")  # where in the year and in the week
TIME_PARTS = ("day sin", "day cos")


class TableStatistics(NamedTuple):
    """What the encoder must know of a set of rows: as large as the columns' different values,
    bounded for each column."""

    num_rows: int
    columns: dict[str, ColumnStatistics]


@dataclass(frozen=True)
class Column:
    """What is fitted of one column, beside its numbers."""

    name: str
    type: ColumnType
    stated: bool  # by the config; else found
    num_cells: int
    num_unreadable: int
    has_missing: bool  # null or unreadable in some train row: it has an indicator
    mean: float = 0.0  # of a number after its transform, of a boolean
    scale: float = 0.0  # 0: constant, and left out
    has_time: bool = False  # of a date: not always midnight
    categories: tuple[str, ...] = ()  # sorted
    separator: str | None = None


class TableEncoder(ListedEncoder):
    """Rows of a table, by column as its type says; see Section."""

    kinds: ClassVar[tuple[str, ...]] = ("table",)

    class Section(EncoderSection):
        """Numbers, categories, booleans and dates of a table as features, fitted in one distributed pass."""

        name: Literal["table"] = "table"
        types: dict[str, Literal["number", "category", "boolean", "date"]] = Field(
            default_factory=dict, description="those of the modality's kind: state them there"
        )
        numbers: Literal["quantile", "piecewise_linear"] = Field(
            "quantile",
            description="numbers through their quantiles to a normal distribution, then to mean 0 and variance 1; or "
            "`num_bins` features each, piecewise linear between quantiles (Gorishniy et al. 2022)",
        )
        num_quantiles: int = Field(
            1000, ge=2, le=10_000, description="quantiles of a number, at most as many as train rows"
        )
        num_bins: int = Field(
            16, ge=2, le=256, description="piecewise_linear: bins of a number, fewer where values repeat"
        )
        min_count: int = Field(5, ge=1, description="categories in fewer train rows share one feature with unseen ones")
        max_categories: int = Field(500, ge=1, description="categories of a column that have a feature of their own")
        split: dict[str, str] = Field(
            default_factory=dict, description="column of categories -> what separates several of them in one cell"
        )
        sparse: bool = Field(False, description="sparse features: for many columns of many categories")

        def of_kind(self, kind: ModalityKind) -> EncoderSection:
            if not isinstance(kind, Table):
                return self
            if self.types and not kind.types:
                raise ConfigError("encoder.types: state the types of columns at the kind, {name: table, types: {..}}")
            if wrong := [c for c in self.split if kind.types.get(c, "category") != "category"]:
                raise ConfigError(
                    f"encoder.split: column '{wrong[0]}' is a {kind.types[wrong[0]]} by kind.types, no category"
                )
            return self.model_copy(update={"types": kind.types})

    def __init__(self, section: Section) -> None:
        super().__init__(section)
        self._section = section
        self.sparse = section.sparse  # type: ignore[misc]  # by instance
        self._types: dict[str, ColumnType] = {**dict.fromkeys(section.split, "category"), **section.types}
        self._columns: tuple[Column, ...] | None = None
        self._points: dict[str, np.ndarray] = {}  # column -> quantiles (Q,), or the edges of bins (T + 1,)

    # --- fit --------------------

    def partial(self, values: Sequence[Mapping[str, str]]) -> TableStatistics:
        """Statistics of one chunk of rows."""
        return TableStatistics(len(values), table_rows.column_statistics(values, self._types, self._section.split))

    def merge(self, parts: list[TableStatistics]) -> TableStatistics:
        """Statistics of all parts' rows."""
        return TableStatistics(sum(p.num_rows for p in parts), table_rows.merge_columns([p.columns for p in parts]))

    def finish(self, total: TableStatistics) -> None:
        """Settle types, and learn each column's numbers or categories.

        Raises: DataError for a stated column that is not there or not of its type, and where no feature is left.
        """
        table_rows.check_stated(self._types, total.columns, "modalities: kind.types, encoder.split")
        for name, stated in self._types.items():
            total.columns[name].check(name, stated)
        self._points = {}
        fitted = (self._fit_column(name, found, total.num_rows) for name, found in total.columns.items())
        self._columns = tuple(column for column in fitted if column is not None)
        self.__dict__.pop("feature_names", None)
        if not self.feature_names:
            raise DataError("no column of the table differs between train rows: look at the source's columns")

    def _fit_column(self, name: str, found: ColumnStatistics, num_rows: int) -> Column | None:
        kind: ColumnType = self._types.get(name) or found.type_of()
        readable = found.readable.get(kind, found.num_cells)
        about: dict[str, Any] = {
            "name": name,
            "type": kind,
            "stated": name in self._types,
            "num_cells": found.num_cells,
        }
        about |= {"num_unreadable": found.num_cells - readable, "has_missing": readable < num_rows}
        if kind == "category":
            if found.items is None:
                why = (
                    f"column '{name}' has more than {table_rows.MAX_TEXTS:,} different texts, too many for "
                    "categories"
                )
                if about["stated"]:
                    raise DataError(f"{why}: make it a modality of kind text, or leave it out")
                log.warning("%s: it is left out; a modality of kind text could read it", why)
                return None
            often = [item for item, num in found.items.items() if num >= self._section.min_count]
            often.sort(key=lambda item: (-found.items[item], item))  # type: ignore[index]
            categories = tuple(sorted(often[: self._section.max_categories]))
            return Column(**about, categories=categories, separator=self._section.split.get(name))
        values = found.values[kind]
        has_time = kind == "date" and bool((values.centres() % DAY_S).any())
        if kind == "boolean":
            mean, scale = _mean_and_scale(values.values, values.counts)
        else:
            mean, scale = self._fit_numbers(name, values, num_rows)
        return Column(**about, mean=mean, scale=scale, has_time=has_time)

    def _fit_numbers(self, name: str, values: ValueCounts, num_rows: int) -> tuple[float, float]:
        """Mean and scale after the transform, whose points are kept."""
        if len(values.values) < 2:
            return 0.0, 0.0
        if self._section.numbers == "piecewise_linear":
            self._points[name] = np.unique(values.quantiles(np.linspace(0, 1, self._section.num_bins + 1)))
            return 0.0, 1.0
        fractions = np.linspace(0, 1, min(self._section.num_quantiles, num_rows))
        self._points[name] = values.quantiles(fractions)
        return _mean_and_scale(to_normal(values.centres(), self._points[name]), values.counts)

    # --- encode --------------------

    @property
    def dim(self) -> int:
        """D."""
        return len(self.feature_names)

    @cached_property
    def feature_names(self) -> list[str]:
        """What each feature is of, in order: `price`, `brand = Acme`, `price is missing`."""
        return [name for column in self._fitted() for name in self._names(column)]

    def encode(self, values: Sequence[Mapping[str, str]]) -> Features:
        """(B, D) float32."""
        if not self.sparse:
            return self._encode_dense(values)
        parts = [self._encode_dense(values[i : i + SPARSE_ROWS]) for i in range(0, max(len(values), 1), SPARSE_ROWS)]
        return sp.vstack([sp.csr_matrix(part) for part in parts], format="csr")

    def changes(self, values: Sequence[Mapping[str, str]]) -> list[list[str]]:
        """By row the columns whose cell cannot be read as their type, and so counts as null."""
        notes: list[list[str]] = [[] for _ in values]
        for column in self._fitted():
            read = table_rows.READ.get(column.type)
            if read is not None:
                for own, row in zip(notes, values, strict=True):
                    text = row.get(column.name)
                    if text is not None and read(text, column.stated) is None:
                        own.append(f"'{column.name}' is no {column.type}{table_rows.NULLED}")
        return notes

    def _encode_dense(self, values: Sequence[Mapping[str, str]]) -> np.ndarray:
        features = np.zeros((len(values), self.dim), np.float32)
        start = 0
        for column in self._fitted():
            width = len(self._names(column))
            self._fill(features[:, start : start + width], column, [row.get(column.name) for row in values])
            start += width
        return features

    def _fill(self, out: np.ndarray, column: Column, texts: list[str | None]) -> None:
        """Write the features of a column, zeros so far. out: (B, width)."""
        if column.type == "category":
            index = {category: i for i, category in enumerate(column.categories)}
            for row, text in enumerate(texts):
                for item in [] if text is None else table_rows.items_of(text, column.separator):
                    out[row, index.get(item, len(index))] = 1
            missing = np.array([text is None for text in texts], bool)
        else:
            read = table_rows.READ[column.type]
            found = {text: None if text is None else read(text, column.stated) for text in set(texts)}
            numbers = np.array([math.nan if found[text] is None else found[text] for text in texts], np.float64)
            missing = np.isnan(numbers)
            parts = self._parts(column, numbers)
            out[:, : parts.shape[1]] = np.where(missing[:, None], 0, parts)
        if column.has_missing:
            out[:, -1] = missing

    def _parts(self, column: Column, numbers: np.ndarray) -> np.ndarray:
        """Features of a column's numbers (B, width), without the indicator."""
        parts: list[np.ndarray] = []
        if column.scale:
            points = self._points.get(column.name)
            if points is not None and self._section.numbers == "piecewise_linear":
                parts += list(piecewise_linear(numbers, points).T)
            else:
                values = numbers if points is None else to_normal(numbers, points)
                parts.append((values - column.mean) / column.scale)
        if column.type == "date":
            days = numbers / DAY_S
            periods = [days / YEAR_DAYS, np.floor(days) / 7, *([days] if column.has_time else [])]
            parts += [wave(2 * np.pi * (period % 1)) for period in periods for wave in (np.sin, np.cos)]
        return np.stack(parts, axis=1) if parts else np.empty((len(numbers), 0))

    def _names(self, column: Column) -> list[str]:
        """Of the features of a column."""
        name = column.name
        missing = [f"{name} is missing"] if column.has_missing else []
        if column.type == "category":
            return [*(f"{name} = {c}" for c in column.categories), f"{name} = (another)", *missing]
        names = [name] if column.scale else []
        if column.scale and self._section.numbers == "piecewise_linear" and column.name in self._points:
            edges = self._points[name]
            names = [f"{name} in {low:.6g} .. {high:.6g}" for low, high in itertools.pairwise(edges)]
        if column.type == "date":
            names += [f"{name} ({part})" for part in (*DATE_PARTS, *(TIME_PARTS if column.has_time else ()))]
        return [*names, *missing]

    # --- state --------------------

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Quantiles or edges of each column (Q,); the columns; `found`: what the manifest tells of them."""
        columns = self._fitted()
        points = {f"points {i}": self._points[c.name] for i, c in enumerate(columns) if c.name in self._points}
        return points, {"columns": [asdict(c) for c in columns], "found": {"columns": dict(self._told())}}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Become what `state` was taken of. Raises: ValueError, KeyError, TypeError if that was no state."""
        columns = tuple(Column(**{**fields, "categories": tuple(fields["categories"])}) for fields in rest["columns"])
        points = {}
        for i, column in enumerate(columns):
            known = column.type in ("category", *table_rows.READ)
            if not known or not all(map(math.isfinite, (column.mean, column.scale))):
                raise ValueError(f"column '{column.name}' is damaged")
            if f"points {i}" in tensors:
                own = check_array(f"points {i}", tensors[f"points {i}"], "float64", (None,))
                if len(own) < 2 or (np.diff(own) < 0).any():
                    raise ValueError(f"the points of column '{column.name}' do not ascend")
                points[column.name] = own
        self._columns, self._points = columns, points
        self.__dict__.pop("feature_names", None)

    def _told(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for column in self._fitted():
            about = {"type": column.type, "stated": column.stated, "cells": column.num_cells}
            yield column.name, about | {"unreadable": column.num_unreadable, "features": len(self._names(column))}

    def _fitted(self) -> tuple[Column, ...]:
        if self._columns is None:
            raise DataError("this table encoder is not fitted: fit it on the train split, or load its state, first")
        return self._columns


def to_normal(numbers: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Numbers (N,) to a normal distribution by their rank among quantiles (Q,), as QuantileTransformer does;
    NaN stays."""
    references = np.linspace(0, 1, len(quantiles))
    ranks = 0.5 * (
        np.interp(numbers, quantiles, references) - np.interp(-numbers, -quantiles[::-1], -references[::-1])
    )  # the middle of where a repeated quantile stands
    ranks = np.where(numbers <= quantiles[0], 0.0, np.where(numbers >= quantiles[-1], 1.0, ranks))
    edge = BOUND - np.spacing(1)
    return np.asarray(np.clip(special.ndtri(ranks), special.ndtri(edge), special.ndtri(1 - edge)))


def piecewise_linear(numbers: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(N, T): 1 for each bin below a number, its place 0..1 in the bin that it is in,
    0 above (Gorishniy et al. 2022, eq. 1).

    Other than there, a number outside the outer edges counts as on them. edges: (T + 1,) ascending.
    """
    return np.asarray(np.clip((numbers[:, None] - edges[:-1]) / np.diff(edges), 0, 1))


def _mean_and_scale(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of values, each as often as counted; 0 for the latter where it is only rounding."""
    if not counts.sum():
        return 0.0, 0.0
    mean = float(np.average(values, weights=counts))
    scale = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    return mean, scale if scale > 1e-9 * max(abs(mean), 1) else 0.0
