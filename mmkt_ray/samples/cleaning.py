"""Encoded images of any common kind -> RGB pixels that all look alike, or a reason why not."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from mmkt_ray.errors import ConfigError

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit: each image is held to samples.max_image_pixels, before it is decoded
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


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} = {width * height:,} pixels, more than samples.max_image_pixels = {max_pixels:,}"
        )


Decoded = tuple[np.ndarray, list[str]]  # pixels, what was changed


def _decode_plain_jpeg(data: bytes, max_pixels: int) -> Decoded | None:
    """Fast path for RGB and grey JPEG; None leaves the image or its fault to Pillow."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, max_pixels)
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    orientation = _exif_orientation(data)
    if orientation not in _TURNS:
        return pixels, []
    return np.ascontiguousarray(_TURNS[orientation](pixels)), ["turned upright"]


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
    """The first one among the segments before a JPEG's own picture; thumbnails in it and pictures behind it have others."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # fills up
            at += 1
        elif marker in (0xDA, 0xD9):  # the picture, the end
            break
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\x00\x00":
            return data[at + 4 : at + 2 + length]
        else:
            at += 2 + length
    return b""


def _decode_any(data: bytes, max_pixels: int) -> Decoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a job over millions of images must not fill its log with notes on metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"not a readable {', '.join(FORMATS)}; it begins with {data[:8]!r}") from None
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


# --- audio --------------------

MAX_AUDIO_FRAMES = 64_000_000  # 22 minutes at 48 kHz; 256 MB as float32
SAMPLE_RATES = (1_000, 400_000)  # in Hz
OPEN_ENDED = 0x7FFF0000  # a file that was written to a pipe states a size from here on, as it did not know
_UNKNOWN_FORMAT = 1  # code of libsndfile's error
_SLACK_BYTES = 48  # that writers state too much: a pad byte, the header of 44 bytes counted in
_MP3_SLACK_FRAMES = 2 * 1152  # what its encoder and its decoder may see differently
# the first bytes of kinds whose chunks state their size -> byte order, name of the chunk with the sound
_CHUNKS: dict[bytes, tuple[Literal["little", "big"], bytes]] = {
    b"RIFF": ("little", b"data"),
    b"RIFX": ("big", b"data"),
    b"FORM": ("big", b"SSND"),
}


class Clip(NamedTuple):
    """Decoded audio, mixed to one channel."""

    samples: np.ndarray  # (T,) float32 in -1..1
    sample_rate: int  # in Hz


def import_soundfile() -> Any:
    """The module soundfile, which is an extra. Raises: ConfigError if it is not installed."""
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: without its C library
        raise ConfigError(f"reading audio needs soundfile ({error}): pip install 'mmkt-ray[audio]'") from None


def decode_audio(data: bytes) -> Clip:
    """Decode whatever soundfile reads (WAV, FLAC, OGG, MP3, AIFF, ...), channels averaged; NaN and infinities become silence.

    Decoded block by block, so that a small file that claims hours costs no memory. A cut WAV, AIFF, FLAC or MP3 is found out
    by the length it states, where that is more than a few bytes off; other kinds are taken as far as they go.

    Raises: ValueError if the data is no such audio, is damaged or cut, is empty, or has more than MAX_AUDIO_FRAMES frames.
        ConfigError if soundfile is not installed.
    """
    soundfile = import_soundfile()
    if not data:
        raise ValueError("empty (0 bytes)")
    if (missing := _missing_bytes(data)) > _SLACK_BYTES:
        raise ValueError(f"damaged: {len(data):,} bytes are there of {len(data) + missing:,}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            samples, sample_rate = _read_mono(sound), sound.samplerate
    except soundfile.LibsndfileError as error:
        if error.code == _UNKNOWN_FORMAT:
            raise ValueError(f"no sound that soundfile reads (WAV, FLAC, OGG, MP3, ...); begins with {data[:8]!r}") from None
        raise ValueError(f"damaged: {error.error_string}") from None
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a header that names no known encoding
        raise ValueError(f"damaged: {error}") from None
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise ValueError(f"its sample rate is {sample_rate:,} Hz, outside {SAMPLE_RATES[0]:,} to {SAMPLE_RATES[1]:,}")
    return Clip(samples, sample_rate)


def _missing_bytes(data: bytes) -> int:
    """Bytes of sound that a file of chunks states and that are not there; the size of the whole file says nothing."""
    order, name = _CHUNKS.get(data[:4], ("little", b""))
    at = 12
    while name and at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], order)
        if data[at : at + 4] == name:
            return max(0, at + 8 + size - len(data)) if size < OPEN_ENDED else 0
        at += 8 + size + size % 2
    return 0


def _read_mono(sound: Any) -> np.ndarray:
    """All frames (T,) float32 of an open soundfile.SoundFile."""
    blocks: list[np.ndarray] = []
    num_frames, block_frames = 0, max(1, (1 << 20) // sound.channels)
    while len(block := sound.read(block_frames, dtype="float32", always_2d=True)):
        num_frames += len(block)
        if num_frames > MAX_AUDIO_FRAMES:
            raise ValueError(
                f"more than {MAX_AUDIO_FRAMES:,} frames ({MAX_AUDIO_FRAMES // 48_000 // 60} minutes at 48 kHz)"
            )
        mono = np.nan_to_num(block, posinf=0.0, neginf=0.0).mean(axis=1)
        blocks.append(np.nan_to_num(mono, posinf=0.0, neginf=0.0))  # the mean of extreme floats overflows
    if num_frames == 0:
        raise ValueError("it holds no sound (0 frames)")
    slack = _MP3_SLACK_FRAMES if sound.format == "MP3" else 0
    if num_frames < sound.frames - slack and sound.frames < 1 << 62:  # a FLAC written to a pipe states no length
        raise ValueError(f"damaged: {num_frames:,} frames are there of {sound.frames:,}")
    return np.concatenate(blocks)
