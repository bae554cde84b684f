"""Kinds of modalities whose cells are values themselves: texts, rows of tables, vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.kinds.modality_kind import POOL, ListedKind, ModalityKind, Source, excerpt

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mmkt_ray.kinds.arrow import Converted


class Text(ListedKind):
    """A string, in Unicode's composed form without control characters."""

    name: Literal["text"] = "text"
    holds: ClassVar[str] = "a string"
    is_text: ClassVar[bool] = True
    pool: Literal["mean", "max", "first", "join"] | None = Field(
        None, description=f"{POOL}; join: one text, a line for each"
    )

    def example(self, rng: np.random.Generator, words: Sequence[str]) -> Any:
        return " ".join(words[i] for i in rng.integers(0, len(words), 12))

    @property
    def item_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.large_string()

    def item_from_cell(self, cell: Any, encoding: str) -> str | None:
        """Also of numbers, spelt as labels are."""
        from mmkt_ray.kinds.cells import decode_text, label_text

        text = decode_text(cell, encoding) if isinstance(cell, bytes) else cell
        return text if isinstance(text, str) else label_text(text)

    def items_from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        """Decoded and checked text: Arrow does not check the strings that it reads from a file."""
        import pyarrow as pa

        from mmkt_ray.kinds.arrow import is_binary, is_string
        from mmkt_ray.kinds.cells import decode_text, is_utf8, label_text
        from mmkt_ray.kinds.label_columns import label_column

        if not is_binary(raw.type) and not is_string(raw.type):
            column, errors = label_column(raw, source.class_names(""), label_text)
            return column.cast(pa.large_string()), errors
        encoding = source.encoding if is_binary(raw.type) else "utf-8"
        data = raw.cast(pa.large_binary())
        if is_utf8(encoding):
            try:
                return data.cast(pa.large_string()), {}
            except pa.ArrowInvalid:
                pass  # some row is not UTF-8: find out which
        values, errors = [], {}
        for i, value in enumerate(data.to_pylist()):
            try:
                values.append(None if value is None else decode_text(value, encoding))
            except ValueError as error:
                values.append(None)
                errors[i] = str(error)
        return pa.array(values, pa.large_string()), errors

    def normalise(self, column: pa.Array) -> tuple[pa.Array, dict[int, list[str]]]:
        from mmkt_ray.kinds.content import blank_to_null, normalise_texts
        from mmkt_ray.kinds.lists import map_items

        def normalised(texts: pa.Array) -> tuple[pa.Array, dict[int, list[str]]]:
            texts, changed = normalise_texts(texts)
            return blank_to_null(texts), changed

        return map_items(column, normalised) if self.pooled else normalised(column)

    def digest(self, value: str) -> int:
        """The same for texts that differ in case and white space only."""
        from mmkt_ray.kinds.content import hash_text

        return hash_text(value)

    def show(self, cell: Any, decode: Callable[[Any], Any]) -> dict[str, Any]:
        return {"kind": "text", "text": excerpt(" / ".join(cell) if isinstance(cell, list) else cell)}


class Table(ModalityKind):
    """A row of several columns; its value is {column: text} of the cells that are there,
    spelled as in table_rows.py."""

    name: Literal["table"] = "table"
    types: dict[str, Literal["number", "category", "boolean", "date"]] = Field(
        default_factory=dict,
        description="column -> what its cells are; of others it is found in the train rows: what nine of ten cells "
        "can be read as, else category",
    )
    holds: ClassVar[str] = "a row of cells, each a number, a category, a boolean or a date, or null"
    takes_several: ClassVar[bool] = True
    is_table: ClassVar[bool] = True
    stored_bytes: ClassVar[float] = 1.0

    def columns_in(self, words: str) -> str | tuple[str, ...]:
        return tuple(words.split(","))

    @property
    def arrow_type(self) -> pa.DataType:
        from mmkt_ray.kinds.table_rows import row_type

        return row_type()

    def from_cell(self, cell: Any, encoding: str) -> dict[str, str] | None:
        from mmkt_ray.kinds.table_rows import row_texts

        if not isinstance(cell, dict):
            raise ValueError(f"must be several columns, got {cell!r:.40}: write the source's column as a list, [price]")
        return row_texts(cell, encoding) or None

    def from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        import pyarrow as pa

        from mmkt_ray.kinds.table_rows import rows_from_arrow

        if not pa.types.is_struct(raw.type):
            raise TypeError("it is a single column: write the source's column as a list, [price]")
        return rows_from_arrow(raw, source.class_names)

    def num_bytes(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        from mmkt_ray.kinds.table_rows import bytes_of_rows

        return bytes_of_rows(column)

    def values(self, column: pa.Array | pa.ChunkedArray) -> list[Any]:
        return list(column.to_pylist(maps_as_pydicts="strict"))

    def look(self, column: pa.ChunkedArray) -> str:
        """The types that columns have in these rows."""
        from mmkt_ray.kinds.table_rows import check_stated, column_statistics

        rows = self.values(column.drop_null())
        found = column_statistics(rows, self.types, {})
        check_stated(self.types, found, "kind.types")
        for name, stated in self.types.items():
            found[name].check(name, stated)
        types = {c: self.types.get(c) or statistics.type_of() for c, statistics in found.items()}
        by_type = {t: [c for c, own in types.items() if own == t] for t in dict.fromkeys(types.values())}
        return "; ".join(f"{t}: {', '.join(columns)}" for t, columns in sorted(by_type.items()))

    def show(self, cell: Any, decode: Callable[[Any], Any]) -> dict[str, Any]:
        from mmkt_ray.kinds.table_rows import ITEM_MARK

        pairs = cell.items() if isinstance(cell, dict) else cell
        shown = "; ".join(f"{column}: {text.replace(ITEM_MARK, ', ')}" for column, text in pairs)
        return {"kind": "text", "text": excerpt(shown)}


class Vector(ModalityKind):
    """Numbers that another encoder made of something; its value is an array (D,) float32, finite."""

    name: Literal["vector"] = "vector"
    holds: ClassVar[str] = (
        "a list of numbers, such as an embedding made elsewhere; or as many columns; or a row of a .npy file"
    )
    takes_several: ClassVar[bool] = True
    takes_arrays: ClassVar[bool] = True

    def columns_in(self, words: str) -> str | tuple[str, ...]:
        return tuple(words.split(",")) if "," in words or "*" in words else words

    @property
    def arrow_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.list_(pa.float32())

    def from_cell(self, cell: Any, encoding: str) -> list[float] | None:
        from mmkt_ray.kinds.vectors import vector_of

        return vector_of(cell)

    def from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        from mmkt_ray.kinds.vectors import vectors_from_arrow

        return vectors_from_arrow(raw) or super().from_arrow(raw, source)

    def values(self, column: pa.Array | pa.ChunkedArray) -> list[Any]:
        from mmkt_ray.kinds.vectors import vectors_in

        return vectors_in(column)

    def digest(self, value: np.ndarray) -> int:
        from mmkt_ray.kinds.content import hash_array

        return hash_array(value)

    def look(self, column: pa.ChunkedArray) -> str:
        """The vectors' length."""
        lengths = sorted({len(value) for value in self.values(column.drop_null())})
        return f"{' or '.join(map(str, lengths))} numbers each" if lengths else ""

    def show(self, cell: Any, decode: Callable[[Any], Any]) -> dict[str, Any]:
        shown = ", ".join(f"{number:.4g}" for number in cell[:8])
        return {"kind": "text", "text": f"{len(cell)} numbers: {shown}{', …' if len(cell) > 8 else ''}"}
