"""From a layout's raw cells to the columns of the sample schema; what cannot become a sample is told why.

A layout's reader yields `Block`s: converted cells, and the rows that could not be converted. `clean` makes
sample tables of them.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.config import Config, SourceConfig
from mmkt_ray.errors import ConfigError
from mmkt_ray.samples.content import normalise_texts
from mmkt_ray.samples.schema import Reject, Shard, sample_schema
from mmkt_ray.samples.splits import assign_split

BLOCK_ROWS, BLOCK_BYTES = 256, 4_000_000  # small beside a chunk: chunks decide a reader's memory
FILE_KINDS = ("image", "audio")  # kinds whose cells are the bytes of an encoded file
MAX_FILE_BYTES = 512_000_000  # a larger file or archive member is rejected unread

_UNSAFE_IN_ID = re.compile("[%|\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One converted row: image and audio cells are bytes, multilabel ones lists, all others strings; any may be absent."""

    sample_id: str
    cells: dict[str, Any]
    num_bytes: int = 0


@dataclass(frozen=True)
class Block:
    """Some converted rows of a shard, in order."""

    ids: list[str]
    columns: dict[str, pa.Array]  # some of the sample schema's columns; `split` as given
    errors: dict[int, str] = field(default_factory=dict)  # row of this block -> why it is no sample
    rejects: list[Reject] = field(default_factory=list)  # rows that have no place in the block


@dataclass(frozen=True)
class Reading:
    """What a layout's reader needs to know. Raises: ConfigError for an unknown text encoding."""

    config: Config
    shard: Shard

    def __post_init__(self) -> None:
        try:
            "".encode(self.source.encoding)
        except LookupError:
            raise ConfigError(
                f"samples.sources[{self.shard.source}].encoding: unknown text encoding "
                f"'{self.source.encoding}'; usual ones: utf-8, latin-1, cp1252, utf-16"
            ) from None

    @cached_property
    def source(self) -> SourceConfig:
        """The source that the shard belongs to."""
        return self.config.samples.sources[self.shard.source]

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the samples."""
        return sample_schema(self.config)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Each column that the source fills -> image, audio, text, labels (multilabel) or label (sample_id, key, split too)."""
        kinds = {t: "labels" for t, task in self.config.tasks.items() if task.kind == "multilabel"}
        kinds |= {m: modality.kind for m, modality in self.config.modalities.items()}
        return {c: kinds.get(c, "label") for c in self.source.columns}

    def narrowed(self, known: Collection[str]) -> Reading:
        """This reading without the modalities and tasks whose column is not among the shard's, where `absent: null` says so.

        If no modality is left it stays as it is, so that the reader's own check tells what the shard lacks.
        """
        fixed = {"sample_id", "split", "key"}
        columns = {c: theirs for c, theirs in self.source.columns.items() if c in fixed or theirs in known}
        if self.source.absent == "error" or not set(columns) & set(self.config.modalities):
            return self
        sources = list(self.config.samples.sources)
        sources[self.shard.source] = self.source.model_copy(update={"columns": columns})
        samples = self.config.samples.model_copy(update={"sources": tuple(sources)})
        return Reading(self.config.model_copy(update={"samples": samples}), self.shard)

    def separator(self, column: str) -> str:
        """What separates the classes of a multilabel column where they stand in one string."""
        return self.config.tasks[column].separator if column in self.config.tasks else ""

    def place(self, mark: str, where: object) -> str:
        """The id of a row that has none of its own: the shard's name, a mark, and where in it the row is."""
        return escape_id(f"{self.shard.name}{mark}{where}")

    def convert(self, place: str, raw: dict[str, Any]) -> Row | Reject:
        """Make a row of raw cells; its id is the mapped `sample_id` if the source has one, else its place."""
        cells: dict[str, Any] = {"split": raw["split"]} if "split" in raw else {}
        try:
            for column, kind in self.kinds.items():
                value = raw.get(column)
                cells[column] = convert_cell(column, kind, value, self.source.encoding, self.separator(column))
        except ValueError as error:
            return self.reject(place, str(error))
        if "sample_id" in self.kinds:
            if cells["sample_id"] is None:
                return self.reject(place, "sample_id is null")
            place = escape_id(cells.pop("sample_id"))
        num_bytes = sum(len(cells[c] or "") for c, kind in self.kinds.items() if not kind.startswith("label"))
        return Row(place, cells, num_bytes)

    def reject(self, sample_id: str, reason: str) -> Reject:
        """A rejected row of this shard, with the id it has or would have had."""
        printable = reason.encode("utf-8", "backslashreplace").decode()  # names may hold bytes that are no text
        return Reject(sample_id, self.shard.name, "read", printable)

    def unreadable(self, error: Exception) -> Reject:
        """The reject that stands for all rows of the shard that come after a fault in the file itself."""
        return self.reject(
            escape_id(self.shard.name),
            f"the shard is damaged, its rows from here on are lost: {error}; fetch or write the file again",
        )


# --- one cell --------------------


def escape_id(text: str) -> str:
    """`text` with %, |, control characters and undecodable bytes percent-escaped; two texts stay two ids."""
    return _UNSAFE_IN_ID.sub(lambda m: "".join(f"%{byte:02X}" for byte in _as_bytes(m[0])), text)


def _as_bytes(char: str) -> bytes:
    try:
        return char.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return char.encode("utf-8", "surrogatepass")


def convert_cell(column: str, kind: str, value: Any, encoding: str, separator: str = "") -> Any:
    """A raw cell as bytes (image, audio), string (text, label) or list of strings (labels).

    Raises: ValueError that says what was got.
    """
    if value is None:
        return None
    try:
        if kind in FILE_KINDS:
            if not isinstance(value, bytes):
                raise ValueError(f"{kind} must be encoded bytes, got {type(value).__name__}")
            return value
        if kind == "labels":
            names = label_names(value, separator)
            "".join(names or ()).encode()
            return names
        if kind == "text" and isinstance(value, bytes):
            return decode_text(value, encoding)
        text = value if kind == "text" and isinstance(value, str) else label_text(value)
        if text is not None:
            text.encode()
        return text
    except UnicodeEncodeError as error:
        raise ValueError(f"{column}: not valid Unicode at character {error.start}; {_ENCODING_HINT}") from None
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None


_ENCODING_HINT = "if the files are in another encoding, name it in the source, e.g. encoding: latin-1"


def decode_text(data: bytes, encoding: str) -> str:
    """Decoded text. Raises: ValueError that names the first bad byte."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not {encoding}: byte 0x{data[error.start]:02x} at position {error.start}; {_ENCODING_HINT}"
        ) from None


def label_text(value: Any) -> str | None:
    """A class name, id or key as a string: 3 and 3.0 are '3', true is 'true'; blank and NaN are None.

    Raises: ValueError for lists, mappings and bytes that are no UTF-8.
    """
    if isinstance(value, list | tuple | dict | set):
        raise ValueError(f"must be a single value, got a {type(value).__name__}")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bytes):
        value = decode_text(value, "utf-8")
    return None if value is None else str(value).strip() or None


def label_names(value: Any, separator: str) -> list[str] | None:
    """The class names of a multilabel cell, sorted, each once: of a list, or of a string split at `separator`.

    An empty list, or a string of separators alone, is no class; null, NaN and a blank string are no label (None).
    Raises: ValueError for mappings, lists in lists and bytes that are no UTF-8.
    """
    if not isinstance(value, list | tuple | set):
        text = label_text(value)
        if text is None:
            return None
        value = text.split(separator) if isinstance(value, str | bytes) else [text]
    return sorted({name for name in map(label_text, value) if name is not None})


# --- blocks --------------------


def rows_to_blocks(reading: Reading, items: Iterable[Row | Reject]) -> Iterator[Block]:
    """Gather rows into blocks of bounded size."""
    rows: list[Row] = []
    rejects: list[Reject] = []
    num_bytes = 0
    for item in items:
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            rows.append(item)
            num_bytes += item.num_bytes
        if len(rows) + len(rejects) >= BLOCK_ROWS or num_bytes >= BLOCK_BYTES:
            yield _block(reading, rows, rejects)
            rows, rejects, num_bytes = [], [], 0
    if rows or rejects:
        yield _block(reading, rows, rejects)


def _block(reading: Reading, rows: list[Row], rejects: list[Reject]) -> Block:
    names = {"split", *reading.kinds} - {"sample_id"}
    columns = {n: pa.array([r.cells.get(n) for r in rows], reading.schema.field(n).type) for n in names}
    return Block([r.sample_id for r in rows], columns, rejects=rejects)


def clean(reading: Reading, block: Block, seen: set[str] | None) -> tuple[pa.Table, list[Reject]]:
    """The samples of a block, and the rows that are none.

    Texts are normalised, blank ones become null. A row is rejected if no modality is left, if its split is no known word, or if
    its id is in `seen`: the ids of the shard so far, extended here; None where ids cannot repeat.
    """
    num_rows = len(block.ids)
    columns = {f.name: block.columns.get(f.name, pa.nulls(num_rows, f.type)) for f in reading.schema}
    present = pa.array([False] * num_rows, pa.bool_())
    cleaned: dict[int, list[str]] = {}
    for name, modality in sorted(reading.config.modalities.items()):
        if modality.kind == "text" and name in block.columns:
            text, changed = normalise_texts(columns[name])
            columns[name] = _blank_to_null(text)
            for i, changes in changed.items():
                cleaned.setdefault(i, []).extend(f"{name}: {change}" for change in changes)
        present = pc.or_(present, columns[name].is_valid())
    errors = {i: "no modality is present" for i, ok in enumerate(present.to_pylist()) if not ok} | block.errors
    splits: list[str | None] = [None] * num_rows
    keys, given = columns["key"].to_pylist(), columns["split"].to_pylist()
    for i, sample_id in enumerate(block.ids):
        if i in errors:
            continue
        try:
            splits[i] = assign_split(sample_id, keys[i], given[i], reading.config, reading.source)
            if seen is not None:
                _check_unseen(sample_id, seen)
        except ValueError as error:
            errors[i] = str(error)
    columns |= {"sample_id": pa.array(block.ids, pa.string()), "split": pa.array(splits, pa.string())}
    columns["cleaned"] = pa.array([cleaned.get(i) for i in range(num_rows)], pa.list_(pa.string()))
    table = pa.table(columns, schema=reading.schema)
    if errors:
        table = table.filter(pa.array([i not in errors for i in range(num_rows)]))
    return table, block.rejects + [reading.reject(block.ids[i], errors[i]) for i in sorted(errors)]


def _check_unseen(sample_id: str, seen: set[str]) -> None:
    if sample_id in seen:
        raise ValueError("duplicate sample id: an earlier row of this shard has it")
    seen.add(sample_id)


def _blank_to_null(text: pa.Array) -> pa.Array:
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(text)), 0)
    if not pc.any(blank).as_py():
        return text
    return pc.if_else(pc.fill_null(blank, False), pa.scalar(None, text.type), text)


def is_utf8(encoding: str) -> bool:
    """True if `encoding` is a name of UTF-8, which Arrow decodes by itself."""
    return codecs.lookup(encoding).name == "utf-8"
