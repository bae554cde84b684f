"""Encoded images of any common kind -> RGB pixels that all look alike, or a reason why not."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from mmkt_ray.errors import ConfigError

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
    start = data.find(b"Exif\x00\x00")
    if start < 0:
        return 1
    try:
        exif = Image.Exif()
        exif.load(data[start : start + 65_536])  # no block is longer
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data costs the orientation, not the image
        return 1


def _decode_any(data: bytes, max_pixels: int) -> Decoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a job over millions of images must not fill its log with notes on metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"not a readable {', '.join(FORMATS)}; it begins with {data[:8]!r}") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error}") from None
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

AUDIO_MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS")  # WAV, long WAV, FLAC, OGG (Vorbis and Opus)
MAX_AUDIO_FRAMES = 64_000_000  # 22 minutes at 48 kHz; 256 MB as float32
SAMPLE_RATES = (1_000, 400_000)  # in Hz
OPEN_ENDED = 0x7FFF0000  # a WAV that was written to a pipe states a size from here on, as it did not know


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
    """Decode WAV, FLAC or OGG, channels averaged; NaN and infinities become silence.

    Decoded block by block, so that a small file that claims hours costs no memory. A cut WAV or FLAC is found out by the
    length it states; an OGG stream states none and is taken as far as it goes.

    Raises: ValueError if the data is no such audio, is damaged or cut, is empty, or has more than MAX_AUDIO_FRAMES frames.
        ConfigError if soundfile is not installed.
    """
    soundfile = import_soundfile()
    if not data:
        raise ValueError("empty (0 bytes)")
    if not data.startswith(AUDIO_MAGIC):
        raise ValueError(f"not a readable WAV, FLAC, OGG; it begins with {data[:8]!r}")
    if data.startswith(b"RIFF") and len(data) < int.from_bytes(data[4:8], "little") + 8 < OPEN_ENDED:
        raise ValueError(f"damaged: {len(data):,} bytes are there of {int.from_bytes(data[4:8], 'little') + 8:,}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            samples, sample_rate = _read_mono(sound), sound.samplerate
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a header that names no known encoding
        raise ValueError(f"damaged: {error}") from None
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise ValueError(f"its sample rate is {sample_rate:,} Hz, outside {SAMPLE_RATES[0]:,} to {SAMPLE_RATES[1]:,}")
    return Clip(samples, sample_rate)


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
    if num_frames < sound.frames < 1 << 62:  # a FLAC written to a pipe states no length
        raise ValueError(f"damaged: {num_frames:,} frames are there of {sound.frames:,}")
    return np.concatenate(blocks)
