"""Images of every kind that real folders hold: decoded alike, or refused with a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmkt_ray.kinds.images import decode_and_tell, decode_image

MAX_PIXELS = 1_000_000


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours, 40 wide and 24 high."""
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((40, 24), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_jpeg_path_agrees_with_pillow(photo, quality, subsampling, mode):
    """Catches a fast path that swaps channels or upsamples coarsely: features would depend on the path."""
    options = {"quality": quality} | ({"subsampling": subsampling} if mode == "RGB" else {})
    data = encode(photo.convert(mode), "JPEG", **options)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, MAX_PIXELS) - expected).max() <= 3


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[("RGB", kind) for kind in ("PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF")],
        *[
            ("P", "PNG"),
            ("P", "GIF"),
            ("L", "PNG"),
            ("LA", "PNG"),
            ("RGBA", "PNG"),
            ("RGBA", "WEBP"),
            ("1", "PNG"),
        ],
        *[("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")],
    ],
)
def test_every_mode_becomes_rgb(photo, mode, kind):
    """Catches a mode that decodes to one or four channels, or with wrong colours."""
    pixels = decode_image(encode(photo.convert(mode), kind), MAX_PIXELS)
    assert pixels.shape == (24, 40, 3)
    assert pixels.dtype == np.uint8
    reference = np.array(photo.convert("L" if mode in ("L", "LA", "1") else "RGB").convert("RGB")).astype(float)
    assert abs(pixels.mean() - reference.mean()) < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(kind):
    """Catches the clipping of all values over 255 to white, Pillow's own conversion."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decode_image(encode(Image.fromarray(ramp), kind), MAX_PIXELS)
    assert np.abs(pixels[:, :, 0] - ramp / 257.0).max() <= 1
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


@pytest.mark.parametrize("white", [1.0, 255.0, 4000.0])
def test_float_grey_is_scaled_and_survives_nan(white):
    """Catches float images in 0..1 that become black, and NaN that becomes noise."""
    ramp = np.linspace(0, white, 64, dtype=np.float32).reshape(8, 8)
    ramp[0, 0] = np.nan
    grey = decode_image(encode(Image.fromarray(ramp), "TIFF"), MAX_PIXELS)[:, :, 0]
    assert grey[0, 0] == 0
    assert abs(int(grey[-1, -1]) - 255 * white / next(r for r in (1, 255, 65535) if white <= r)) <= 1


@pytest.mark.parametrize("kind", ["palette", "RGBA", "grey key"])
def test_transparency_is_laid_on_white(kind):
    """Catches logos on a transparent ground that become black on black."""
    if kind == "palette":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        data = encode(image, "PNG", transparency=0)
    elif kind == "RGBA":
        data = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")
    else:
        data = encode(Image.new("L", (4, 4), 7), "PNG", transparency=7)
    assert (decode_image(data, MAX_PIXELS) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_an_animation(kind):
    """Catches a last frame, or an array with a frame axis."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    pixels = decode_image(data, MAX_PIXELS)
    assert pixels.shape == (4, 4, 3)
    assert pixels[0, 0].argmax() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(kind):
    """Catches phone pictures that lie on their side, above all by the fast JPEG path."""
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side comes on top
    pixels = decode_image(encode(image, kind, exif=exif), MAX_PIXELS)
    assert pixels.shape == (16, 8, 3)
    assert pixels[2].mean() > 240
    assert pixels[-2].mean() < 15


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])  # CMYK is left to Pillow
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_equals_pillows(photo, orientation, mode):
    """Catches mirrored or wrongly turned pictures of the fast JPEG path, and turns that go untold."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo.convert(mode), "JPEG", exif=exif, quality=95)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    pixels, changes = decode_and_tell(data, MAX_PIXELS)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 6
    assert pixels.flags.c_contiguous
    assert changes == ["turned upright"] * (orientation > 1) + ["CMYK to RGB"] * (mode == "CMYK")


def test_exif_data_without_a_turn_keeps_the_fast_path(photo, monkeypatch):
    """Catches every photo of a camera going the slow way."""
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = encode(photo, "JPEG", exif=exif)
    monkeypatch.setattr(Image, "open", None)
    assert decode_image(data, MAX_PIXELS).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("mode", "kind", "changes"),
    [
        ("RGB", "PNG", []),
        ("P", "GIF", []),
        ("RGBA", "PNG", []),  # opaque
        ("CMYK", "TIFF", ["CMYK to RGB"]),
        ("I;16", "PNG", ["scaled to 8 bit"]),
    ],
)
def test_changes_are_told(photo, mode, kind, changes):
    """Catches conversions that nobody hears of, and alarms about images that look as before."""
    image = Image.fromarray(np.full((24, 40), 999, np.uint16)) if mode == "I;16" else photo.convert(mode)
    assert decode_and_tell(encode(image, kind), MAX_PIXELS)[1] == changes
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 7))
    assert decode_and_tell(encode(clear, "PNG"), MAX_PIXELS)[1] == ["laid on white"]


def test_the_orientation_is_the_picture_s_own(photo):
    """Catches a picture turned by the EXIF of a second JPEG behind it, or of a thumbnail in another block."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = encode(photo, "JPEG", quality=95), encode(photo, "JPEG", exif=exif, quality=95)
    # a whole picture as another application's block
    segment = b"\xff\xe2" + struct.pack(">H", len(turned) + 2) + turned
    for data in (plain + turned, plain[:2] + segment + plain[2:]):
        assert Image.open(io.BytesIO(data)).getexif().get(0x0112) is None
        assert decode_and_tell(data, MAX_PIXELS)[1] == []
        np.testing.assert_array_equal(decode_image(data, MAX_PIXELS), decode_image(plain, MAX_PIXELS))
    assert decode_image(turned + plain, MAX_PIXELS).shape == (40, 24, 3)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")):  # each way of decoding: XMP is no EXIF
        assert decode_image(encode(photo.convert(mode), kind, xmp=xmp), MAX_PIXELS).shape == (24, 40, 3)


def test_damaged_exif_costs_the_orientation_only(photo):
    """Catches pictures lost for their metadata."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo, "JPEG", exif=exif).replace(b"Exif\x00\x00MM", b"Exif\x00\x00XX")
    assert decode_image(data, MAX_PIXELS).shape == (24, 40, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_truncated_image_is_refused(photo, kind):
    """Catches half images that go on as grey pixels: every cut is refused, whatever the decoder says."""
    data = encode(photo, kind)
    for end in (3, len(data) // 4, len(data) // 2):
        with pytest.raises(ValueError, match=r"damaged|not a readable"):
            decode_image(data[:end], MAX_PIXELS)


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"%PDF-1.7 ...", b"\xff\xd8\xff", b"version https://git-lfs.github.com"]
)
def test_not_an_image_says_what_it_begins_with(data):
    """Catches error pages saved as pictures, and a reason that helps nobody."""
    with pytest.raises(
        ValueError, match=r"0 bytes|not a readable JPEG, PNG.*(it begins with|it is a web page|run git lfs pull)"
    ):
        decode_image(data, MAX_PIXELS)


def test_formats_beyond_the_list_are_refused():
    """Catches all of Pillow's decoders, PostScript's external program too, meeting untrusted files."""
    with pytest.raises(ValueError, match="not a readable"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", MAX_PIXELS)
    with pytest.raises(ValueError, match="not a readable"):
        decode_image(encode(Image.new("RGB", (4, 4)), "ICO"), MAX_PIXELS)


def bomb_png(side: int, bits: int = 8, colours: int = 2) -> bytes:
    """A PNG of a few bytes whose header states side x side pixels, RGB or as the format's numbers say."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


@pytest.mark.parametrize("side", [1001, 12_000, 60_000])
def test_decompression_bomb_is_refused_by_its_header(side):
    """Catches gigabytes allocated for a file of 60 bytes, and Pillow's warning that only prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="pixels"):
            decode_image(bomb_png(side), MAX_PIXELS)


def test_the_config_s_limit_is_the_only_one():
    """Catches Pillow's own limit of 179 million pixels above one that the user has raised."""
    bilevel = bomb_png(14_000, bits=1, colours=0)
    with pytest.raises(ValueError, match="14000 x 14000 = 196,000,000 pixels, more than samples"):
        decode_image(bilevel, 195_999_999)
    with pytest.raises(ValueError, match="damaged: OSError"):  # it went on to the picture, which is empty
        decode_image(bilevel, 196_000_000)


def test_size_limit_holds_on_the_fast_path(photo):
    """Catches a JPEG bomb that never meets Pillow's check."""
    with pytest.raises(ValueError, match=r"40 x 24 = 960 pixels, more than samples.max_image_pixels = 959"):
        decode_image(encode(photo, "JPEG"), 959)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]), st.data())
def test_random_damage_never_raises_anything_but_value_error(kind, data):
    """Catches decoder errors (struct.error, SyntaxError, IndexError ...) that would stop a whole job."""
    image = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
    encoded = bytearray(encode(image, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(encoded), 100_000)
    except ValueError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
