"""Encoded images of any common kind -> RGB pixels that all look alike, or a reason why not."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, upright as its EXIF orientation says.

    Transparency is laid on white; of an animation the first frame is taken; 16-bit and float greys are scaled
    to 8 bit. The size that the header states is checked before anything is decoded.

    Raises: ValueError if the data is no image, is damaged or of another format than FORMATS, or has more than
        `max_pixels` pixels.
    """
    if not data:
        raise ValueError("empty (0 bytes)")
    pixels = _decode_plain_jpeg(data, max_pixels)
    return _decode_any(data, max_pixels) if pixels is None else pixels


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} = {width * height:,} pixels, more than samples.max_image_pixels = {max_pixels:,}"
        )


def _decode_plain_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Fast path for RGB and grey JPEG without EXIF data; None leaves the image or its fault to Pillow."""
    if not data.startswith(b"\xff\xd8") or b"Exif\x00\x00" in data:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _decode_any(data: bytes, max_pixels: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a job over millions of images must not fill its log with notes on metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"not a readable {', '.join(FORMATS)}; it begins with {data[:8]!r}") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error}") from None
        except Exception as error:  # decoders meet damaged data with errors of every kind
            raise ValueError(f"damaged: {type(error).__name__}: {error}") from error
        _check_size(*image.size, max_pixels)
        try:
            image.load()
            return _to_rgb(_upright(image))
        except Exception as error:  # as above
            raise ValueError(f"damaged: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data costs the orientation, not the image
        return image


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_to_8_bit(image)[:, :, None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """Grey (H, W) -> uint8. Integers span 16 bit; floats 0..1, 0..255 or 0..65535, by their maximum."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    highest = float(values.max(initial=0.0))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((r for r in ranges if highest <= r), highest)
    return np.rint(np.clip(values, 0.0, white) * (255.0 / white)).astype(np.uint8)
