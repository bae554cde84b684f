"""Kinds of modalities whose cells are encoded files: images and sounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.kinds.modality_kind import POOL, ListedKind, Source

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mmkt_ray.kinds.arrow import Converted

THUMBNAIL_SIDE = 96  # pixels


class FileKind(ListedKind):
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


class Image(FileKind):
    """An encoded image; its value is pixels (H, W, 3) uint8."""

    name: Literal["image"] = "image"
    holds: ClassVar[str] = "the bytes of an image file"
    media: ClassVar[str] = "image/*"
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


class Audio(FileKind):
    """An encoded sound; its value is a `kinds.sounds.Clip`."""

    name: Literal["audio"] = "audio"
    holds: ClassVar[str] = "the bytes of a sound file"
    media: ClassVar[str] = "audio/*"
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
