"""Decoded chunks: one array for all images, which nobody copies on the way to the encoder."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from PIL import Image

from mmkt_ray.config import Config
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.encoders.image import PixelsImageEncoder
from mmkt_ray.features.chunks import make_row, open_row
from mmkt_ray.features.decode import Prepared, decode_column, prepared_values
from mmkt_ray.features.encode import encode_column
from mmkt_ray.features.resume import reading_layout
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.samples.schema import reject_table

IMAGE = MODALITY_KINDS["image"]()
ENCODER = PixelsImageEncoder(PixelsImageEncoder.Section(image_size=8))
SAMPLES = SamplesConfig(sources=[{"reader": "manifest", "path": "x.csv", "columns": {"image": "x"}}])


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 7), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def column(*cells: bytes | None) -> pa.ChunkedArray:
    """In two chunks."""
    halves = cells[: len(cells) // 2], cells[len(cells) // 2 :]
    return pa.chunked_array([pa.array(half, pa.large_binary()) for half in halves])


def test_decoded_images_are_one_array() -> None:
    """Catches a list of images that somebody stacks again, and images that belong to other rows after a null or a
    broken one."""
    decoded = decode_column(column(png(1), None, png(3), b"broken", png(5), png(6)), IMAGE, ENCODER, SAMPLES)
    values = decoded.values
    assert isinstance(values, Prepared)
    assert [value if value is None else int(value[0, 0, 0]) for value in values] == [1, None, 3, None, 5, 6]
    assert list(decoded.broken) == [3]
    assert [digest is None for digest in decoded.hashes] == [False, True, False, True, False, False]
    kept = values.filter(np.array([True, False, True, False, True, True]))
    assert np.shares_memory(kept.take(np.array([2, 3])), values.array)
    assert kept.take(np.arange(4))[:, 0, 0, 0].tolist() == [1, 3, 5, 6]


def test_the_config_says_whether_photos_are_scaled() -> None:
    """Catches `samples.decode` that nobody obeys."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((160, 128)).save(buffer, "JPEG")
    photo = column(buffer.getvalue())
    exact = decode_column(photo, IMAGE, ENCODER, SAMPLES.model_copy(update={"decode": "exact"})).values[0]
    np.testing.assert_array_equal(exact, ENCODER.prepare(decode_image(buffer.getvalue(), 10**6)))
    assert not np.array_equal(decode_column(photo, IMAGE, ENCODER, SAMPLES).values[0], exact)


def test_hashes_alone_are_the_same_and_keep_no_image() -> None:
    """Catches a search for leaking rows that finds others than the audit does, or that holds a chunk's images."""
    cells = column(png(1), None, b"broken", png(1))
    alone = decode_column(cells, IMAGE, ENCODER, SAMPLES, only_hashes=True)
    assert alone.hashes == decode_column(cells, IMAGE, ENCODER, SAMPLES).hashes
    assert list(alone.values) == [None] * 4


def test_an_encoder_gets_the_chunk_s_array() -> None:
    """Catches images that are copied one by one between the object store and the encoder."""
    given = []

    class Looking(PixelsImageEncoder):
        def encode(self, values: np.ndarray) -> np.ndarray:
            given.append(values)
            return super().encode(values)

    array = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)
    values = Prepared(array, np.array([0, -1, 1, 2, 3]))
    found, wrong = encode_column(Looking(ENCODER.config), values)
    assert not wrong
    assert found.is_null().to_pylist() == [False, True, False, False, False]
    assert given[0].base is array
    np.testing.assert_array_equal(
        np.stack(found.drop_null().to_numpy(zero_copy_only=False)), ENCODER.encode(list(array))
    )


def test_a_row_is_opened_in_place() -> None:
    """Catches a copy of all images where a chunk is made to travel or is taken up again."""
    array = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), np.uint8)
    look = {b"prepared": b'[[3, 3, 8, 8], "uint8"]'}
    schema = pa.schema([pa.field("image", pa.int32(), metadata=look), ("text", pa.large_string())])
    table = pa.table([[2, None, 0], ["a", None, "c"]], schema=schema)
    row = make_row("unit", 4, True, table, reject_table([]), {"read": 0.5}, {"image": array})
    chunk = open_row(row)
    assert chunk[:3] == ("unit", 4, True)
    assert (chunk.samples.equals(table), len(chunk.rejects), chunk.seconds) == (True, 0, {"read": 0.5})
    assert np.shares_memory(np.frombuffer(chunk.prepared["image"], np.uint8), array)
    stream, text = row["table"].chunk(0).buffers()[2], chunk.samples["text"].chunk(0).buffers()[2]
    assert stream.address <= text.address < stream.address + stream.size
    values = prepared_values(chunk.samples, "image", chunk.prepared["image"])
    assert values is not None
    np.testing.assert_array_equal(values[0], array[2])
    assert values[1] is None


def test_only_scaled_images_are_others_than_before(make_config: Callable[..., Config]) -> None:
    """Catches stores of texts, or of `decode: exact`, that are made anew though nothing in them differs; and stores
    in which both ways of decoding mix."""
    columns = {"sample_id": "id", "text": "caption", "colour": "colour"}
    texts = {
        "samples__sources": [{"reader": "parquet", "path": "shapes/*.parquet", "columns": columns}],
        "modalities": {"text": {"kind": "text", "encoder": "tfidf"}},
    }
    assert reading_layout(make_config())["decode"] == "scaled"
    for plain in (make_config(samples__decode="exact"), make_config(**texts)):
        layout = reading_layout(plain)
        assert "decode" not in layout
        assert "decode" not in layout["samples"]
