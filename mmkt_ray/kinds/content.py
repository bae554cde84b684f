"""What a sample holds, however it is written: texts and labels in one Unicode form,
and hashes that find the same content.

Axes: N rows.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_64_intdigest

from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
else:  # processes that decode hash what they decode, and need neither
    pa, pc = lazy("pyarrow"), lazy("pyarrow.compute")

NORMALISATION = 2  # version of the rules below: part of what identifies features

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
_BOM = "\ufeff"


def normalise_text(text: str) -> tuple[str, list[str]]:
    """The text in Unicode's composed form (NFC), without byte order mark and control characters;
    and what was changed.

    Windows line ends become line feeds. Any other control character becomes a space,
    so that it still separates words.
    """
    changes = []
    if text.startswith(_BOM):
        text = text.removeprefix(_BOM)
        changes.append("byte order mark")
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
        changes.append("line ends")
    if _CONTROL.search(text):
        text = _CONTROL.sub(" ", text)
        changes.append("control characters")
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        changes.append("Unicode form")
    return text, changes


def normalise_texts(column: pa.LargeStringArray) -> tuple[pa.LargeStringArray, dict[int, list[str]]]:
    """Normalised texts (N,), and row -> what was changed in it.
    Plain ASCII, most of most corpora, is passed over quickly."""
    changed: dict[int, list[str]] = {}
    values: dict[int, str] = {}
    for i in _rows_to_look_at(column).tolist():
        text, changes = normalise_text(column[i].as_py())
        if changes:
            values[i], changed[i] = text, changes
    if not values:
        return column, {}
    texts = column.to_pylist()
    for i, text in values.items():
        texts[i] = text
    return pa.array(texts, column.type), changed


def _rows_to_look_at(column: pa.LargeStringArray) -> np.ndarray:
    """Rows with a byte that is a control character's or not ASCII."""
    _, offset_buffer, data_buffer = column.buffers()
    if not len(column) or data_buffer is None:
        return np.array([], dtype=np.int64)
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
    special = (data - np.uint8(0x20)) >= 0x5F  # below a space, where it wraps round, or above a tilde
    special &= (data != 0x09) & (data != 0x0A)
    return np.unique(np.searchsorted(offsets - offsets[0], np.flatnonzero(special), side="right") - 1)


def blank_to_null(column: pa.Array) -> pa.Array:
    """Texts (N,) with null where there is nothing but white space."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(column)), 0)
    if not pc.any(blank).as_py():
        return column
    return pc.if_else(pc.fill_null(blank, False), pa.scalar(None, column.type), column)


def hash_text(text: str) -> int:
    """64-bit hash of a text (XXH3); the same for texts that differ in case and white space only."""
    return xxh3_64_intdigest(text.casefold().encode().translate(None, b" \t\n"))


def hash_array(values: np.ndarray) -> int:
    """64-bit hash of decoded pixels or audio samples (XXH3), their shape included."""
    return xxh3_64_intdigest(np.ascontiguousarray(values).data, seed=xxh3_64_intdigest(repr(values.shape).encode()))


def hash_json(value: Any) -> int:
    """64-bit hash of any value of plain Python types (XXH3), whatever the order of its keys."""
    return xxh3_64_intdigest(json.dumps(value, sort_keys=True, default=str).encode())


# --- files of another kind --------------------

_OTHERS = {  # how a file begins, in lower case -> what it is, and what to do
    b"\x1f\x8b": "packed by gzip: unpack it, gunzip",
    b"bzh": "packed by bzip2: unpack it, bunzip2",
    b"\xfd7zxz": "packed by xz: unpack it, unxz",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it, unzstd",
    b"pk\x03\x04": "a zip archive, or a spreadsheet: unpack it, or save it as CSV",
    b"par1": "a Parquet file: give it the suffix .parquet",
    b"sqlite format 3": "a database of SQLite: write its table as CSV or Parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull",
    b"<!doctype html": "a web page, perhaps what a server said in place of the file: fetch it again",
    b"<html": "a web page, perhaps what a server said in place of the file: fetch it again",
}


def what_else(start: bytes) -> str:
    """What a file is, and what to do, that begins so and is none of those that are read;
    "" where that cannot be told."""
    start = start[:64].lower()
    if start and not any(start):
        return "full of zeros, as a transfer that broke off leaves it: fetch it again"
    return next((meaning for begin, meaning in _OTHERS.items() if start.startswith(begin)), "")
