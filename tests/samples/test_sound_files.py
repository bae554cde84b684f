"""Audio of the kinds that real folders hold: decoded alike, or refused with a reason."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkt_ray.kinds import sounds
from mmkt_ray.kinds.sounds import decode_audio

soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")

KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "FLOAT"),
    ("RF64", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
]


def tone(seconds: float = 0.5, rate: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def encode(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None, rate: int = 8000) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format=kind, subtype=subtype)
    return sink.getvalue()


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_every_kind_gives_the_same_samples(kind: str, subtype: str):
    """Catches integers that are not scaled to -1..1, and a rate that is not told."""
    clip = decode_audio(encode(tone(), kind, subtype))
    assert clip.sample_rate == 8000
    assert clip.samples.dtype == np.float32
    assert np.abs(clip.samples - tone()).max() < (0.1 if kind == "OGG" else 0.02)


def test_channels_are_averaged_block_by_block():
    """Catches a stereo file read as one of twice the length, and blocks that are lost or out of order."""
    left, right = tone(40.0), np.linspace(-0.5, 0.5, 320_000, dtype=np.float32)
    clip = decode_audio(encode(np.stack([left, right, right], axis=1), "WAV", "FLOAT"))
    np.testing.assert_allclose(clip.samples, (left + 2 * right) / 3, atol=1e-6)


def test_nan_is_silence():
    """Catches one broken sample that makes a whole clip's features NaN."""
    samples = tone()
    samples[[3, 5]] = np.nan, np.inf
    clip = decode_audio(encode(samples, "WAV", "FLOAT"))
    assert clip.samples[[3, 5]].tolist() == [0.0, 0.0]
    assert np.isfinite(clip.samples).all()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF", "MP3"])
def test_a_cut_file_is_refused(kind: str):
    """Catches half a recording that goes on as a whole one."""
    data = encode(tone(2.0), kind)
    for end in (30, len(data) // 2, len(data) * 3 // 4 if kind == "MP3" else len(data) - 64):
        with pytest.raises(ValueError, match=r"damaged|no sound"):
            decode_audio(data[:end])


@pytest.mark.parametrize("kind", ["MP3", "AIFF", "AU", "CAF", "W64"])
def test_what_soundfile_reads_is_read(kind: str):
    """Catches a folder of MP3s refused by its first bytes. The right samples: soundfile's own."""
    data = encode(tone(), kind)
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    clip = decode_audio(data)
    assert clip.sample_rate == rate
    np.testing.assert_allclose(clip.samples, expected, atol=1e-6)


@pytest.mark.parametrize("where", ["RIFF", "data"])
@pytest.mark.parametrize("too_much", [-8, 1, 8, 44])
def test_a_size_that_is_a_few_bytes_off_is_no_damage(where: str, too_much: int):
    """Catches whole recordings refused, as their writer counted the header or a pad byte in."""
    data = bytearray(encode(tone()))
    at = data.index(where.encode()) + 4
    data[at : at + 4] = struct.pack("<I", struct.unpack_from("<I", data, at)[0] + too_much)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_array_equal(decode_audio(bytes(data)).samples, expected)
    assert len(expected) >= 3996


def test_a_pad_byte_between_chunks_is_passed_over():
    """Catches the sound's chunk missed behind a chunk of odd length, so that a cut file passes as whole."""
    data = encode(tone())
    odd = data[:36] + b"note" + struct.pack("<I", 3) + b"abc\0" + data[36:]
    assert len(decode_audio(odd).samples) == 4000
    with pytest.raises(ValueError, match="damaged"):
        decode_audio(odd[:-1000])


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_is_whole(size: int):
    """Catches ffmpeg's and sox's output, which states no length, refused as cut."""
    data = bytearray(encode(tone()))
    data[4:8] = struct.pack("<I", size)
    start = data.index(b"data") + 4
    data[start : start + 4] = struct.pack("<I", size or 0xFFFFFFFF)
    assert len(decode_audio(bytes(data)).samples) == 4000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"no sound", r"no sound that soundfile reads \(WAV, FLAC, OGG, MP3, ...\); it begins with b'no sound'"),
        (b"<html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "run git lfs pull"),
        (b"ID3\x04\x00\x00", "no sound that soundfile reads"),
        (b"OggS\x00\x02", "damaged|no sound that soundfile reads"),
        (encode(tone()[:0]), "no sound"),
        (encode(tone(), rate=500), "500 Hz"),
    ],
)
def test_what_is_no_usable_audio_says_why(data: bytes, reason: str):
    """Catches error pages saved as recordings, empty clips, and rates that no filter could be made for."""
    with pytest.raises(ValueError, match=reason):
        decode_audio(data)


def test_a_long_recording_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch):
    """Catches a FLAC of a few kB that holds hours of silence."""
    monkeypatch.setattr(sounds, "MAX_AUDIO_FRAMES", 3_000_000)
    bomb = encode(np.zeros(8_000_000, np.int16), "FLAC")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="more than 3,000,000 frames"):
        decode_audio(bomb)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.data())
def test_random_damage_never_raises_anything_but_value_error(kind: tuple[str, str], data: st.DataObject):
    """Catches decoder errors that would stop a whole job."""
    encoded = bytearray(encode(tone(0.02), *kind))
    for _ in range(data.draw(st.integers(1, 8))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        clip = decode_audio(bytes(encoded))
    except ValueError:
        return
    assert clip.samples.ndim == 1
    assert np.isfinite(clip.samples).all()
