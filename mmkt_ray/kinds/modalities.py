"""The kinds of modalities: all that differs between images, texts and sounds, one class each.

A new kind is one class and one entry in MODALITY_KINDS. Its fields, if it has any, are keys of the config:
`kind: {name: table, types: {price: number}}`; one without is written as its bare name.

Nothing heavy is imported here before it is used: the config comes from these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_serializer

from mmkt_ray.section import Choice

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mmkt_ray.kinds.arrow import Converted

THUMBNAIL_SIDE = 96  # pixels
EXCERPT_CHARS = 300
POOL = "cells are lists, or several columns: mean or max of the features, or the first alone; null: one in each cell"


class Source(NamedTuple):
    """What a reader of Parquet offers to a kind that converts a column."""

    encoding: str  # of bytes that stand for text
    read_file: Callable[[str], bytes]  # a file that a cell names. Raises: ValueError
    class_names: Callable[[str], list[str] | None]  # what whole numbers stand for, by the source's column; "": the column itself


class ModalityKind(Choice):
    """What one modality holds. A cell is what a source has; a value is what an encoder takes.

    By default a value is the cell, as Arrow gives it: override what differs.
    """

    holds: ClassVar[str]  # for the config's help
    # may be made of several of the source's columns: a list in the config, for which cells are dicts and columns structs
    takes_several: ClassVar[bool] = False
    is_table: ClassVar[bool] = False  # features are facts of several columns, which trees split well
    is_text: ClassVar[bool] = False  # a value is what somebody may type
    takes_arrays: ClassVar[bool] = False  # may be filled from the rows of an array beside the shard, `vectors.npy`
    is_file: ClassVar[bool] = False  # a cell is a file's content; a manifest names the file
    decoder: ClassVar[str] = ""  # `module:function` that a child process decodes values with; "": a value needs none
    scales: ClassVar[bool] = False  # the decoder makes large values smaller, where `samples.decode` lets it
    # of one encoded float32 feature in a store, for estimates: what bf16 networks give, and zeros, compress
    stored_bytes: ClassVar[float] = 3.7

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        """A kind whose options are as by default as its bare name."""
        dumped = handler(self)
        plain = all(getattr(self, n) == f.get_default(call_default_factory=True) for n, f in type(self).model_fields.items())
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
        """The column (N,) with equal content in one form, blank values as nulls; and row -> what was changed in it."""
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
        """64-bit hash of a value's content: equal for what counts as a duplicate. Of encoded files the decoder says it."""
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
        """A cell in the gallery: {kind: text, text} or {kind: image, png (base64)}. decode: cell -> value, None if broken."""
        return {"kind": "text", "text": excerpt(str(cell))}


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


class _Listed(ModalityKind):
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
        return f"must be one {self.name}, got several: say what becomes of them, kind: {{name: {self.name}, pool: first}}"


class _File(_Listed):
    """A kind whose cells are encoded files."""

    is_file: ClassVar[bool] = True
    stored_bytes: ClassVar[float] = 1.8
    objects: ClassVar[str] = "a path or bytes"  # what may stand in a DataFrame
    pool: Literal["mean", "max", "first"] | None = Field(None, description=POOL)

    @property
    def item_type(self) -> pa.DataType:
        import pyarrow as pa

        return pa.large_binary()

    def item_from_cell(self, cell: Any, encoding: str) -> bytes:
        if not isinstance(cell, bytes):
            raise ValueError(f"{self.name} must be encoded bytes, got {type(cell).__name__}")
        return cell

    def from_object(self, value: Any) -> bytes:
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        raise ValueError(f"must be {self.objects}, got {type(value).__name__} {value!r:.60}")

    def items_from_arrow(self, raw: pa.Array, source: Source) -> Converted:
        """Bytes as they are; of the Hugging Face struct the bytes, or else the file that its path names."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from mmkt_ray.kinds.arrow import check_value, is_binary, values_of

        if not pa.types.is_struct(raw.type):
            if not is_binary(raw.type):
                raise TypeError(f"{self.name} must be encoded bytes; if these are paths, set reader: manifest")
            return raw.cast(pa.large_binary()), {}
        data = pc.struct_field(raw, "bytes").cast(pa.large_binary())
        if data.null_count == 0 or raw.type.get_field_index("path") < 0:
            return data, {}
        values, errors = data.to_pylist(), {}
        for i, path in enumerate(values_of(pc.struct_field(raw, "path"))):
            if values[i] is None and path:
                try:
                    check_value(path)
                    values[i] = source.read_file(path)
                except ValueError as error:
                    errors[i] = str(error)
        return pa.array(values, pa.large_binary()), errors


class Image(_File):
    """An encoded image; its value is pixels (H, W, 3) uint8."""

    name: Literal["image"] = "image"
    holds: ClassVar[str] = "the bytes of an image file"
    decoder: ClassVar[str] = "mmkt_ray.kinds.images:decode_file"
    scales: ClassVar[bool] = True
    objects: ClassVar[str] = "a path, bytes, a PIL image or an array"

    def from_object(self, value: Any) -> bytes:
        """Also PIL images, and arrays of pixels."""
        from mmkt_ray.kinds.images import file_of

        return file_of(value) or super().from_object(value)

    def example(self, rng: np.random.Generator, words: Sequence[str]) -> Any:
        return rng.integers(0, 256, (int(rng.integers(20, 90)), 64, 3), "uint8")

    def show(self, cell: Any, decode: Callable[[Any], Any]) -> dict[str, Any]:
        """A thumbnail of at most THUMBNAIL_SIDE pixels a side; png is None if the image can't be decoded."""
        from mmkt_ray.kinds.images import thumbnail

        pixels = decode(cell[0] if isinstance(cell, list) else cell)
        return {"kind": "image", "png": None if pixels is None else thumbnail(pixels, THUMBNAIL_SIDE)}


class Audio(_File):
    """An encoded sound; its value is a `kinds.sounds.Clip`."""

    name: Literal["audio"] = "audio"
    holds: ClassVar[str] = "the bytes of a sound file"
    decoder: ClassVar[str] = "mmkt_ray.kinds.sounds:decode_file"

    def example(self, rng: np.random.Generator, words: Sequence[str]) -> Any:
        from mmkt_ray.kinds.sounds import Clip

        return Clip(rng.normal(0, 0.1, 16_000).astype("float32").clip(-1, 1), 16_000)

    def from_decoder(self, array: np.ndarray, number: int) -> Any:
        from mmkt_ray.kinds.sounds import Clip

        return Clip(array, number)

    def check(self) -> None:
        from mmkt_ray.kinds.sounds import import_soundfile

        import_soundfile()

    def show(self, cell: Any, decode: Callable[[Any], Any]) -> dict[str, Any]:
        sizes = [f"audio, {len(sound):,} bytes" for sound in (cell if isinstance(cell, list) else [cell])]
        return {"kind": "text", "text": "; ".join(sizes)}


class Text(_Listed):
    """A string, in Unicode's composed form without control characters."""

    name: Literal["text"] = "text"
    holds: ClassVar[str] = "a string"
    is_text: ClassVar[bool] = True
    pool: Literal["mean", "max", "first", "join"] | None = Field(None, description=f"{POOL}; join: one text, a line for each")

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
    """A row of several columns; its value is {column: text} of the cells that are there, spelled as in table_rows.py."""

    name: Literal["table"] = "table"
    types: dict[str, Literal["number", "category", "boolean", "date"]] = Field(
        default_factory=dict,
        description="column -> what its cells are; of others it is found in the train rows: what nine of ten cells can be read "
        "as, else category",
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
    holds: ClassVar[str] = "a list of numbers, such as an embedding made elsewhere; or as many columns; or a row of a .npy file"
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


MODALITY_KINDS: dict[str, type[ModalityKind]] = {
    "image": Image,
    "text": Text,
    "audio": Audio,
    "table": Table,
    "vector": Vector,
}
