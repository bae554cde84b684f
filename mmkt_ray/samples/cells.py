"""One raw cell, as a layout's reader finds it, to what the sample schema holds; ids that are safe in file names and logs."""

from __future__ import annotations

import codecs
import math
import re
from typing import Any

FILE_KINDS = ("image", "audio")  # kinds whose cells are the bytes of an encoded file
MAX_INT_DIGITS = 4000  # of a number in JSON; Python refuses to make one of more than 4,300

_UNSAFE_IN_ID = re.compile("[%|\x00-\x1f\x7f-\x9f\ud800-\udfff]")


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

    Raises: ValueError that says what was got; also if the cell is one, which says why it could not be read.
    """
    if value is None:
        return None
    if isinstance(value, ValueError):
        raise ValueError(f"{column}: {value}")
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


def is_utf8(encoding: str) -> bool:
    """True if `encoding` is a name of UTF-8, which Arrow decodes by itself."""
    return codecs.lookup(encoding).name == "utf-8"


def json_int(digits: str) -> int | str:
    """`json.loads`'s parse_int: a whole number; its digits where they are more than Python makes a number of."""
    return int(digits) if len(digits) <= MAX_INT_DIGITS else digits
