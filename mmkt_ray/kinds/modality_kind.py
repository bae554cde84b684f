"""What a kind of modality is: all that differs between images, texts, sounds, tables and vectors, as one class each.

A kind's fields, if it has any, are keys of the config: `kind: {name: table, types: {price: number}}`; one without is
written as its bare name. Nothing heavy is imported here before it is used: the config comes from these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import model_serializer

from mmkt_ray.section import Choice

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mmkt_ray.kinds.arrow import Converted

EXCERPT_CHARS = 300
POOL = "cells are lists, or several columns: mean or max of the features, or the first alone; null: one in each cell"


class Source(NamedTuple):
    """What a reader of Parquet offers to a kind that converts a column."""

    encoding: str  # of bytes that stand for text
    read_file: Callable[[str], bytes]  # a file that a cell names. Raises: ValueError
    # what whole numbers stand for, by the source's column; "": the column itself
    class_names: Callable[[str], list[str] | None]


class ModalityKind(Choice):
    """What one modality holds. A cell is what a source has; a value is what an encoder takes.

    By default a value is the cell, as Arrow gives it: override what differs.
    """

    holds: ClassVar[str]  # for the config's help
    # may be made of several of the source's columns: a list in the config,
    # for which cells are dicts and columns structs
    takes_several: ClassVar[bool] = False
    is_table: ClassVar[bool] = False  # features are facts of several columns, which trees split well
    is_text: ClassVar[bool] = False  # a value is what somebody may type
    takes_arrays: ClassVar[bool] = False  # may be filled from the rows of an array beside the shard, `vectors.npy`
    is_file: ClassVar[bool] = False  # a cell is a file's content; a manifest names the file
    media: ClassVar[str] = ""  # type of such files, as a browser's file dialog takes it; "": any
    decoder: ClassVar[str] = ""  # `module:function` that a child process decodes values with; "": a value needs none
    scales: ClassVar[bool] = False  # the decoder makes large values smaller, where `samples.decode` lets it
    # of one encoded float32 feature in a store, for estimates: what bf16 networks give, and zeros, compress
    stored_bytes: ClassVar[float] = 3.7

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        """A kind whose options are as by default as its bare name."""
        dumped = handler(self)
        plain = all(
            getattr(self, n) == f.get_default(call_default_factory=True) for n, f in type(self).model_fields.items()
        )
        return self.name if plain else dumped

    # --- reading --------------------

    def columns_in(self, words: str) -> str | tuple[str, ...]:
        """The source's columns as a command line names them, as a config does."""
        return words

    @property
    def arrow_type(self) -> pa.DataType:
        """Type of the column in a chunk of samples."""
        raise NotImplementedError

    def from_cell(self, cell: Any, encoding: str) -> Any:
        """One raw cell, never null or NaN, as `arrow_type` holds it. encoding: of bytes that stand for text.

        Raises: ValueError that says what was got.
        """
        return cell

    def from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        """A column of raw cells (N,) as one of `arrow_type`, and why some of its rows, null in it, cannot be read.

        Raises: TypeError, pa.ArrowException if no row of such a column can be.
        """
        import pyarrow as pa

        from mmkt_ray.kinds.arrow import check_value, values_of
        from mmkt_ray.kinds.cells import is_nan

        values, errors = [], {}
        for i, cell in enumerate(values_of(raw)):
            try:
                check_value(cell)
                values.append(None if cell is None or is_nan(cell) else self.from_cell(cell, source.encoding))
            except ValueError as error:
                values.append(None)
                errors[i] = str(error)
        return pa.array(values, self.arrow_type), errors

    def normalise(self, column: pa.Array) -> tuple[pa.Array, dict[int, list[str]]]:
        """The column (N,) with equal content in one form, blank values as nulls;
        and row -> what was changed in it."""
        return column, {}

    def num_bytes(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Bytes of each value (N,) int64, 0 where null: chunks are cut by them."""
        from mmkt_ray.kinds.arrow import bytes_of_values

        return bytes_of_values(column)

    # --- values --------------------

    @property
    def pooled(self) -> str | None:
        """How features are pooled where a value is a list of several: mean or max; None where it is a single one."""
        return None

    def values(self, column: pa.Array | pa.ChunkedArray) -> list[Any]:
        """The values of a column (N,), where the kind has no decoder; None where null."""
        return list(column.to_pylist())

    def from_decoder(self, array: np.ndarray, number: int) -> Any:
        """A value, of the array and the number that the decoder sent."""
        return array

    def digest(self, value: Any) -> int:
        """64-bit hash of a value's content: equal for what counts as a duplicate.
        Of encoded files the decoder says it."""
        from mmkt_ray.kinds.content import hash_json

        return hash_json(value)

    # --- for people --------------------

    def from_object(self, value: Any) -> Any:
        """A Python object that stands in a DataFrame, as a raw cell; of files all but paths. Raises: ValueError."""
        return value.item() if type(value).__module__ == "numpy" and not getattr(value, "shape", ()) else value

    def example(self, rng: np.random.Generator, words: Sequence[str]) -> Any:
        """A random value, for checks; None: of this kind there is none. words: for kinds that are made of them."""
        return None

    def look(self, column: pa.ChunkedArray) -> str:
        """What the first rows (N,) of a source show, for `mmkt doctor`; "" for nothing that needs saying.

        Raises: DataError for what would stop a run if all rows were so.
        """
        return ""

    def check(self) -> None:
        """Raises: ConfigError if this machine lacks what the kind needs."""

    def show(self, cell: Any, decode: Callable[[Any], Any]) -> dict[str, Any]:
        """A cell in the gallery: {kind: text, text} or {kind: image, png (base64)}.
        decode: cell -> value, None if broken."""
        return {"kind": "text", "text": excerpt(str(cell))}


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


class ListedKind(ModalityKind):
    """A kind whose cells may be lists of several, where its option `pool` says what becomes of them."""

    pool: str | None = None

    @property
    def takes_several(self) -> bool:  # type: ignore[override]  # by option
        return self.pool is not None

    @property
    def pooled(self) -> str | None:
        return self.pool if self.pool in ("mean", "max") else None

    @property
    def arrow_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.list_(self.item_type) if self.pooled else self.item_type

    @property
    def item_type(self) -> pa.DataType:
        """Type of one of several."""
        raise NotImplementedError

    def item_from_cell(self, cell: Any, encoding: str) -> Any:
        """As `from_cell`, of one."""
        raise NotImplementedError

    def items_from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        """As `from_arrow`, of one in each row."""
        raise NotImplementedError

    def from_cell(self, cell: Any, encoding: str) -> Any:
        from mmkt_ray.kinds.lists import items_in, one_of

        if self.pool is None:
            if isinstance(cell, list | tuple):
                raise ValueError(self._why_not_several())
            return self.item_from_cell(cell, encoding)
        items = [self.item_from_cell(item, encoding) for item in items_in(cell)]
        return one_of([item for item in items if item is not None], self.pool)

    def from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        from mmkt_ray.kinds.arrow import is_list
        from mmkt_ray.kinds.lists import lists_from_arrow

        if self.pool is None:
            if is_list(raw.type):
                raise TypeError(self._why_not_several())
            return self.items_from_arrow(raw, source)
        column, errors = lists_from_arrow(raw, self.pool, lambda items: self.items_from_arrow(items, source))
        return column.cast(self.arrow_type), errors

    def _why_not_several(self) -> str:
        return (
            f"must be one {self.name}, got several: say what becomes of them, kind: {{name: {self.name}, pool: "
            f"first}}"
        )
