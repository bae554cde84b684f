"""What stands in a DataFrame, an Arrow table or a list of dicts -> cells as the readers of shards give them.

An image may be a path, the bytes of a file, a PIL image or an array; whatever it is, it becomes the bytes of a file, so that
one decoder sees them all. None, NaN, pandas.NA and an empty path are an absent modality.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from mmkt_ray.errors import DataError
from mmkt_ray.samples.cells import FILE_KINDS
from mmkt_ray.samples.files import FileReader

if TYPE_CHECKING:
    from mmkt_ray.samples.columns import Reading

Rows: TypeAlias = pd.DataFrame | pa.Table | Sequence[Mapping[str, Any]]


def column_names(rows: Rows) -> list[str]:
    """The names of the columns; of a list of dicts all keys. Raises: DataError for anything else, and for a name that is
    there twice."""
    if isinstance(rows, pd.DataFrame):
        names = list(rows.columns)
    elif isinstance(rows, pa.Table):
        names = rows.column_names
    elif isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        return list(dict.fromkeys(name for row in rows for name in row))
    else:
        raise DataError(
            f"rows must be a pandas DataFrame, a pyarrow Table or a list of dicts, got {_described(rows)}; "
            "put a single row in a list: [{'text': ..}]"
        )
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise DataError(f"the columns {twice} are there twice: rename or drop one")
    return names


def column_values(rows: Rows, name: str) -> list[Any]:
    """The cells of a column; None where there is no value."""
    if isinstance(rows, pd.DataFrame):
        values: Iterable[Any] = rows[name].tolist()
    elif isinstance(rows, pa.Table):
        values = rows.column(name).to_pylist()
    else:
        values = (row.get(name) for row in rows)
    return [None if _is_absent(value) else value for value in values]


def _is_absent(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def raw_cell(kind: str, value: Any, files: FileReader | None) -> Any:
    """A cell as a reader of shards gives it, a ValueError where it cannot be read. files: None where paths are not read."""
    if value is None or kind not in FILE_KINDS:
        return value.item() if isinstance(value, np.generic) else value
    try:
        return _file_bytes(kind, value, files)
    except ValueError as error:
        return error


def _file_bytes(kind: str, value: Any, files: FileReader | None) -> bytes | None:
    """The bytes of an image's or a sound's file. Raises: ValueError that says what was got."""
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():  # as Hugging Face's data sets have it
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if path in ("", "nan"):  # as a CSV that pandas wrote has it
            return None
        if files is None:
            raise ValueError("paths are not read here: give the file's bytes")
        return files.read(path)
    if kind == "image" and isinstance(value, Image.Image):
        return _encoded(value)
    if kind == "image" and isinstance(value, np.ndarray):
        return _encoded(_as_image(value))
    known = "a path, bytes, a PIL image or an array" if kind == "image" else "a path or bytes"
    raise ValueError(f"must be {known}, got {_described(value)}")


def _as_image(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, or grey ones of uint16, as an image. Raises: ValueError."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_grey = pixels.ndim == 2
    if not pixels.size or not (is_grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"an array must be (height, width), (height, width, 3) or (height, width, 4), got {pixels.shape}")
    if pixels.dtype != np.uint8 and not (is_grey and pixels.dtype == np.uint16):
        raise ValueError(f"an array must hold uint8 from 0 to 255, got {pixels.dtype}: scale it, (x * 255).astype('uint8')")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _encoded(image: Image.Image) -> bytes:
    """An image as the bytes of a file without loss, as it is turned and coloured."""
    buffer = io.BytesIO()
    if image.mode in ("RGB", "L") and not image.getexif() and "transparency" not in image.info:
        image.save(buffer, "PPM")  # a header and the pixels: nothing is packed
    elif image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image.save(buffer, "PNG", compress_level=1, exif=image.getexif())
    else:
        image.save(buffer, "TIFF", exif=image.getexif())
    return buffer.getvalue()


def _described(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def file_reader(reading: Reading, root: str | None) -> FileReader:
    """Reads paths in cells: relative ones from `root`, out of which none may lead; without it from the current folder."""
    if root is not None:
        return FileReader(reading, os.path.abspath(root))
    source = reading.source.model_copy(update={"allow_outside": True})
    samples = reading.config.samples.model_copy(update={"sources": (source,)})
    free = type(reading)(reading.config.model_copy(update={"samples": samples}), reading.shard)
    return FileReader(free, os.getcwd())
