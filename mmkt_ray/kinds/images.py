"""Encoded images of any common kind -> RGB pixels that all look alike, or a reason why not."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from xxhash import xxh3_64

from mmkt_ray.kinds.content import hash_array, what_else

# Pillow's own limit: each image is held to samples.max_image_pixels, before it is decoded
Image.MAX_IMAGE_PIXELS = None
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, upright as its EXIF orientation says.

    Transparency is laid on white; of an animation the first frame is taken; 16-bit and float greys are scaled
    to 8 bit. The size that the header states is checked before anything is decoded.

    Raises: ValueError if the data is no image, is damaged or of another format than FORMATS, or has more than
        `max_pixels` pixels. MemoryError.
    """
    return decode_and_tell(data, max_pixels)[0]


def decode_and_tell(data: bytes, max_pixels: int) -> tuple[np.ndarray, list[str]]:
    """The same as `decode_image`, and what had to be changed for the image to look like the others."""
    if not data:
        raise ValueError("empty (0 bytes)")
    decoded = _decode_plain_jpeg(data, max_pixels)
    return _decode_any(data, max_pixels) if decoded is None else decoded


class InputSize(NamedTuple):
    """The images that an encoder reads."""

    height: int
    width: int
    resampling: int  # PIL.Image.Resampling, with antialiasing; the aspect ratio is not kept
    scaled: bool = False  # large JPEGs may be made smaller while they are decoded

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image as an encoder gets it, uint8."""
        return (3, self.height, self.width)


def resized(pixels: np.ndarray, size: InputSize) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, height, width) uint8."""
    return np.ascontiguousarray(_planes(pixels, size))


def _planes(pixels: np.ndarray, size: InputSize) -> np.ndarray:
    if pixels.shape[:2] != (size.height, size.width):
        how = Image.Resampling(size.resampling)
        pixels = np.asarray(Image.fromarray(pixels).resize((size.width, size.height), how))
    return pixels.transpose(2, 0, 1)  # copied once, where it goes to


# of a decoding function: array, number, what was normalised, content's hash
Reply = tuple[np.ndarray, int, list[str], int]


def decode_file(data: bytes, max_pixels: int, wanted: Sequence[Any] | None = None) -> Reply:
    """What a decoding process sends of an image: an array, no number, what was changed, a hash of the content.

    wanted: the fields of an `InputSize`; the array is (3, height, width) then, else the pixels (H, W, 3).
    Equal pixels have equal hashes; of a JPEG that was made smaller while it was decoded, equal codings.
    Raises: as `decode_image`.
    """
    size = None if wanted is None else InputSize(*wanted)
    if size is not None and size.scaled and (found := _decode_scaled(data, max_pixels, size)) is not None:
        return found
    pixels, changes = decode_and_tell(data, max_pixels)
    return pixels if size is None else _planes(pixels, size), 0, changes, hash_array(pixels)


def warm_up() -> None:
    """Import Pillow's decoders, for which the first image would pay otherwise."""
    Image.init()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} = {width * height:,} pixels, more than samples.max_image_pixels = {max_pixels:,}"
        )


Decoded = tuple[np.ndarray, list[str]]  # pixels, what was changed


def _plain_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width of an RGB or grey JPEG; None leaves the image or its fault to Pillow."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    return (height, width) if colours in ("YCbCr", "Gray", "RGB") else None


def _decode_plain_jpeg(data: bytes, max_pixels: int) -> Decoded | None:
    """Fast path for RGB and grey JPEG; None as above."""
    if _plain_jpeg_size(data, max_pixels) is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    orientation = _exif_orientation(data)
    if orientation not in _TURNS:
        return pixels, []
    return np.ascontiguousarray(_TURNS[orientation](pixels)), ["turned upright"]


# scale -> how many times the wanted size must be left: a half may leave just that, where the time is
_SCALES = {8: 3.0, 4: 3.0, 2: 1.0}


def _decode_scaled(data: bytes, max_pixels: int, size: InputSize) -> Reply | None:
    """As `decode_file`, by an inverse DCT of fewer coefficients; None where full pixels are needed.

    Halves, quarters and eighths alone: libjpeg-turbo takes longer for other fractions than for the whole.
    """
    found = _plain_jpeg_size(data, max_pixels)
    if found is None:
        return None
    orientation = _exif_orientation(data)
    lies = orientation in (5, 6, 7, 8)
    rows, columns = (size.width, size.height) if lies else (size.height, size.width)
    height, width = found
    scales = (s for s, left in _SCALES.items() if height >= s * left * rows and width >= s * left * columns)
    if (scale := next(scales, None)) is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=-(-height // scale), min_width=-(-width // scale)
        )
    except ValueError:
        return None
    picture = Image.fromarray(pixels)  # its last row and column may be of less than a whole pixel
    box = (0, 0, min(picture.width, width / scale), min(picture.height, height / scale))
    small: np.ndarray = np.asarray(picture.resize((columns, rows), Image.Resampling(size.resampling), box=box))
    if orientation in _TURNS:
        small = _TURNS[orientation](small)
    changes = ["turned upright"] if orientation in _TURNS else []
    return small.transpose(2, 0, 1), 0, changes, _hash_coding(data, orientation)


_ORIENTATION = 0x0112  # EXIF tag
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # its values, on pixels (H, W, 3); 1 is upright
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


def _exif_orientation(data: bytes) -> int:
    """What the EXIF block of a JPEG says; 1 where there is none or it is damaged."""
    block = _exif_block(data)
    if not block:
        return 1
    try:
        exif = Image.Exif()
        exif.load(block)
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data costs the orientation, not the image
        return 1


def _exif_block(data: bytes) -> bytes:
    """The first one among the segments before a JPEG's own picture;
    thumbnails in it and pictures behind it have others."""
    exif = (
        data[a + 4 : b] for kind, a, b in _segments(data) if kind == 0xE1 and data[a + 4 : a + 10] == b"Exif\x00\x00"
    )
    return next(exif, b"")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of the segments before a JPEG's own picture; at last 0 and all that follows."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # fills up
            at += 1
        elif marker in (0xDA, 0xD9):  # the picture, the end
            break
        else:
            yield marker, at, at + 2 + length
            at += 2 + length
    yield 0, at, len(data)


def _hash_coding(data: bytes, orientation: int) -> int:
    """64-bit hash (XXH3) of a JPEG as it is coded and turned, whatever its other metadata say."""
    coding, view = xxh3_64(bytes([orientation & 0xFF])), memoryview(data)
    for marker, begin, end in _segments(data):
        # application data and comments say nothing of the pixels, but for Adobe's, which name the colours
        if marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            coding.update(view[begin:end])
    return coding.intdigest()


def _decode_any(data: bytes, max_pixels: int) -> Decoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a job over millions of images must not fill its log with notes on metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            seen = f"it is {what_else(data)}" if what_else(data) else f"it begins with {data[:8]!r}"
            raise ValueError(f"not a readable {', '.join(FORMATS)}; {seen}") from None
        except MemoryError:
            raise
        except Exception as error:  # decoders meet damaged data with errors of every kind
            raise ValueError(f"damaged: {type(error).__name__}: {error}") from error
        _check_size(*image.size, max_pixels)
        try:
            image.load()
            return _to_rgb(*_upright(image))
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise ValueError(f"damaged: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    for name in ("xmp", "XML:com.adobe.xmp"):  # Pillow would take the orientation from there
        image.info.pop(name, None)
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in _TURNS
        return ImageOps.exif_transpose(image), ["turned upright"] if turned else []
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data costs the orientation, not the image
        return image, []


def _to_rgb(image: Image.Image, changes: list[str]) -> Decoded:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_to_8_bit(image)[:, :, None], 3, axis=2), [*changes, "scaled to 8 bit"]
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if np.asarray(image)[:, :, 3].min(initial=255) < 255:
            changes = [*changes, "laid on white"]
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    elif image.mode not in ("RGB", "L", "P", "1"):
        changes = [*changes, f"{image.mode} to RGB"]
    return np.array(image.convert("RGB")), changes


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """Grey (H, W) -> uint8. Integers span 16 bit; floats 0..1, 0..255 or 0..65535, by their maximum."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0.0))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((r for r in ranges if highest <= r), highest)
    return np.rint(np.clip(values, 0.0, white) * (255.0 / white)).astype(np.uint8)


def thumbnail(pixels: np.ndarray, side: int) -> str:
    """Pixels (H, W, 3) uint8 -> base64 PNG of at most `side` pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


# --- images in memory -----------------------------------------------------------------------------------------------


def file_of(value: Any) -> bytes | None:
    """A PIL image, or an array of pixels, as the bytes of a file; None for anything else. Raises: ValueError."""
    if isinstance(value, Image.Image):
        return _encoded(value)
    return _encoded(_as_image(value)) if isinstance(value, np.ndarray) else None


def _as_image(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, or grey ones of uint16, as an image.
    Raises: ValueError."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_grey = pixels.ndim == 2
    if not pixels.size or not (is_grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(
            f"an array must be (height, width), (height, width, 3) or (height, width, 4), got {pixels.shape}"
        )
    if pixels.dtype != np.uint8 and not (is_grey and pixels.dtype == np.uint16):
        raise ValueError(
            f"an array must hold uint8 from 0 to 255, got {pixels.dtype}: scale it, (x * 255).astype('uint8')"
        )
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
