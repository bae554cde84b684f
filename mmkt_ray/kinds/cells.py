"""One raw cell, as a layout's reader finds it, to what the sample schema holds;
ids that are safe in file names and logs.

The spelling of labels, ids and keys, for all readers:

- Typed values have one spelling: 3 and 3.0 are `3`, true is `true`. NaN and blanks are null.
- Text is stripped of blanks and invisible signs at both ends and composed (NFC). Otherwise it keeps its spelling:
  `1.0` may be a version.
- Ids and keys have to match across files, so there `1.0` is `1`, `True` is `true`, and any blanks within are one
  space (`canonical`).
- Class names stay as written until two spellings of one class meet in a task: `1.0` in one file and `1` in another.
  Then all classes of the task get their canonical spelling (features/spellings.py) and the audit says so. So versions
  1.0, 1.1 and 2.0 keep their names. A model's classes, a pairing map and the labels that they meet are compared in
  canonical form.
"""

from __future__ import annotations

import ast
import codecs
import io
import json
import math
import re
import tokenize
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmkt_ray.kinds.task_kind import TaskKind

if TYPE_CHECKING:
    from mmkt_ray.kinds.modality_kind import ModalityKind

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


def convert_cell(
    column: str, kind: ModalityKind | TaskKind | str, value: Any, encoding: str, separator: str = ""
) -> Any:
    """A raw cell as the sample schema holds it. kind: of a modality or a task; or `key`, `split`.

    Raises: ValueError that says what was got; also if the cell is one, which says why it could not be read.
    """
    if value is None or is_nan(value):
        return None
    if isinstance(value, ValueError):
        raise ValueError(f"{column}: {value}")
    try:
        if isinstance(kind, TaskKind):
            return kind.from_cell(decode_text(value, encoding) if isinstance(value, bytes) else value, separator)
        if not isinstance(kind, str):
            if isinstance(value, dict) and (
                wrong := [f"{k}: {v}" for k, v in value.items() if isinstance(v, ValueError)]
            ):
                raise ValueError("; ".join(wrong))
            found = kind.from_cell(value, encoding)
            if isinstance(found, str):
                found.encode()
            return found
        if isinstance(value, bytes):
            value = decode_text(value, encoding)
        text = TEXT_OF[kind](value)
        if text is not None:
            text.encode()
        return text
    except UnicodeEncodeError as error:
        raise ValueError(f"{column}: {not_unicode(error, encoding)}") from None
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None


def is_nan(value: Any) -> bool:
    """True for a float that is no number: what pandas writes for a missing value of any kind."""
    return isinstance(value, float) and math.isnan(value)


# --- encodings --------------------

_MARKS = {  # those of utf-32 first: that of utf-16-le begins one of them
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_text(data: bytes, encoding: str) -> str:
    """Decoded text. Raises: ValueError that names the first bad byte and a likely encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise ValueError(f"not {encoding}: {where}; {_encoding_hint(data)}") from None


def not_unicode(error: UnicodeEncodeError, encoding: str) -> str:
    """What is wrong with a text that holds undecodable bytes as surrogates, and its likely encoding."""
    if not "\udc80" <= error.object[error.start] <= "\udcff":
        return f"not valid Unicode at character {error.start}"
    data = error.object[error.start].encode("utf-8", "surrogateescape")
    return f"not valid Unicode at character {error.start} (not {encoding}); {_encoding_hint(data)}"


def _encoding_hint(data: bytes) -> str:
    guess = likely_encoding(data) or ("cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1")
    return f"if the files are in another encoding, name it in the source, e.g. encoding: {guess}"


def likely_encoding(data: bytes) -> str | None:
    """utf-8, utf-16 or utf-32 by the byte order mark or the zero bytes at the start of a text;
    None if it has neither."""
    if marked := next((name for mark, name in _MARKS.items() if data.startswith(mark)), None):
        return marked
    zeros = [data[i:400:4].count(0) > len(data[i:400:4]) / 2 for i in range(4)]
    wide = {(False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be"}
    narrow = {(False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be"}
    return (wide | narrow).get((zeros[0], zeros[1], zeros[2], zeros[3]))


def is_utf8(encoding: str) -> bool:
    """True if `encoding` is a name of UTF-8, which Arrow decodes by itself."""
    return codecs.lookup(encoding).name == "utf-8"


# --- labels, ids and keys --------------------

_WHOLE_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")  # as pandas writes integers of a column that lacks some
_EXACT_FLOAT = 2.0**53  # beyond it a float may stand for several integers


# marks and joiners, which mean nothing at the ends of a name
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"


def _stripped(text: str) -> str:
    return text.strip().strip(_INVISIBLE).strip()


def canonical(text: str) -> str:
    """One spelling of what is written in several: `1.0` as `1`, `True` as `true`, composed Unicode, one space for any
    blanks and none at the ends."""
    text = unicodedata.normalize("NFC", " ".join(_stripped(text).split()))
    if text.lower() in ("true", "false"):
        return text.lower()
    whole = _WHOLE_FLOAT.fullmatch(text)
    return text if whole is None else "0" if whole[1] == "-0" else whole[1]


def label_text(value: Any) -> str | None:
    """A class name as a string: 3 and 3.0 are '3', true is 'true'; blank and NaN are None. Text keeps its spelling.

    Raises: ValueError for lists, mappings and bytes that are no UTF-8.
    """
    if value is None or is_nan(value):
        return None
    if isinstance(value, bytes):
        value = decode_text(value, "utf-8")
    if isinstance(value, str):
        return _stripped(value) or None
    if hasattr(value, "__len__"):  # also of arrays and tables, whose text would be their printed form
        raise ValueError(f"must be a single value, got a {type(value).__name__}{_several(value)}")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) <= _EXACT_FLOAT else repr(value)
    return canonical(str(value)) or None


def _several(value: Any) -> str:
    kind = "" if isinstance(value, dict) else "; for several classes a row set the task's kind to multilabel"
    return f": {value!r:.60}{kind}"


def class_name(value: Any) -> str | None:
    """The same as `label_text`, of a task with one class a row.
    Raises: ValueError also for a list that is written as text."""
    name = label_text(value)
    try:
        several = None if name is None else read_list(name)
    except ValueError:  # as good a name as any
        several = None
    if several is not None:
        raise ValueError(f"must be a single value, got a list as text{_several(several)}")
    return name


def key_text(value: Any) -> str | None:
    """The same as `label_text`, of an id or a key: in its canonical spelling, so that it matches across files."""
    text = label_text(value)
    return None if text is None else canonical(text)


TEXT_OF: dict[str, Callable[[Any], str | None]] = {  # by kind of column
    "key": key_text,
    "split": label_text,
}


def label_names(value: Any, separator: str) -> list[str] | None:
    """The class names of a multilabel cell, sorted, each once: of a list, also one written as text, or of a string
    split at `separator`.

    An empty list, or a string of separators alone, is no class; null, NaN and a blank string are no label (None).
    Raises: ValueError for mappings, lists in lists, bytes that are no UTF-8,
    and text that begins as a list and is none.
    """
    if not isinstance(value, list | tuple | set | frozenset):
        text = label_text(value)
        if text is None:
            return None
        as_list = read_list(text)
        value = as_list if as_list is not None else text.split(separator) if isinstance(value, str | bytes) else [text]
    return sorted({name for name in map(label_text, value) if name is not None})


# --- lists written as text --------------------

_MAX_LIST_CHARS = 20_000
_NO_COMMA = re.compile(r"""['"]\s+['"]|[0-9.]\s+-?[0-9]""")


def read_list(text: str) -> list[Any] | None:
    """The items of a list that is written as JSON, Python or NumPy do: `["a", "b"]`, `['a', 'b']`, `['a' 'b']`;
    else None.

    Raises: ValueError for text in brackets that holds quotes or commas, and is no such list.
    """
    if not (text[:1] + text[-1:] in ("[]", "()", "{}") and len(text) >= 2):
        return None
    if text[0] == "(" and text[1:2] not in ("'", '"', ")"):
        return None  # a remark in brackets, not a tuple of names
    if len(text) <= _MAX_LIST_CHARS:
        for read in (json.loads, _read_numpy_list, ast.literal_eval):
            try:
                found = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
                continue
            if isinstance(found, list | tuple | set):
                return list(found)
            if isinstance(found, dict):
                raise ValueError(f"must be class names, got a mapping: {text:.60}")
    if re.search("[\"',]", text):
        raise ValueError(f"looks like a list and cannot be read as one: {text:.60}; write it as JSON does")
    return None


def _read_numpy_list(text: str) -> list[Any]:
    """Items without commas between them, which Python would take for one string.
    Raises: ValueError for anything else."""
    if not _NO_COMMA.search(text):
        raise ValueError("no list of NumPy")
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string.strip()]
    inner = tokens[1:-1]
    if tokens[0].string != "[" or not inner or any(t.type not in (tokenize.STRING, tokenize.NUMBER) for t in inner):
        raise ValueError("no list of NumPy")
    return [ast.literal_eval(t.string) for t in inner]
def json_int(digits: str) -> int | str:
    """`json.loads`'s parse_int: a whole number; its digits where they are more than Python makes a number of."""
    return int(digits) if len(digits) <= MAX_INT_DIGITS else digits
