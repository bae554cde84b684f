"""Encoded sounds of any common kind -> one channel of float samples, or a reason why not."""

from __future__ import annotations

import importlib
import io
from typing import Any, Literal, NamedTuple

import numpy as np

from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.content import hash_array, what_else

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
        advice = "run pip install '.[audio]' in the project's folder"
        raise ConfigError(f"reading audio needs soundfile ({error}): {advice}") from None


def decode_audio(data: bytes) -> Clip:
    """Decode whatever soundfile reads (WAV, FLAC, OGG, MP3, AIFF, ...), channels averaged;
    NaN and infinities become silence.

    Decoded block by block, so that a small file that claims hours costs no memory. A cut WAV, AIFF, FLAC or MP3 is
    found out by the length it states, where that is more than a few bytes off;
    other kinds are taken as far as they go.

    Raises: ValueError if the data is no such audio, is damaged or cut, is empty,
    or has more than MAX_AUDIO_FRAMES frames.
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
            seen = f"it is {what_else(data)}" if what_else(data) else f"it begins with {data[:8]!r}"
            raise ValueError(f"no sound that soundfile reads (WAV, FLAC, OGG, MP3, ...); {seen}") from None
        raise ValueError(f"damaged: {error.error_string}") from None
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a header that names no known encoding
        raise ValueError(f"damaged: {error}") from None
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise ValueError(f"its sample rate is {sample_rate:,} Hz, outside {SAMPLE_RATES[0]:,} to {SAMPLE_RATES[1]:,}")
    return Clip(samples, sample_rate)


def decode_file(data: bytes, max_pixels: int, wanted: object = None) -> tuple[np.ndarray, int, list[str], int]:
    """What a decoding process sends of a sound: its samples, their rate, no changes,
    the samples' hash whatever their rate.

    Raises: as `decode_audio`.
    """
    clip = decode_audio(data)
    return clip.samples, clip.sample_rate, [], hash_array(clip.samples)


def warm_up() -> None:
    """Import the decoder. Raises: ConfigError if it is not installed."""
    import_soundfile()


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
