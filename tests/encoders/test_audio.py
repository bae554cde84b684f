"""Log-mel images: against a slow formula, at every length and sample rate; silence, loudness and direction."""

import importlib
from itertools import product
from types import ModuleType

import numpy as np
import pytest

from mmkt_ray.encoders.audio import RANGE_DB, LogMelCnnAudioEncoder, fit_length, log_mel, mel_filters, to_image
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.sounds import Clip

pytest.importorskip("soundfile", reason="the extra `audio` is not installed")

RATE = 8000
ENCODER = LogMelCnnAudioEncoder.Section(pretrain="digit", width=8, precision="fp32")


def tone(hz: float, seconds: float = 1.0, rate: int = RATE) -> Clip:
    return Clip(0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32), rate)


def slow_log_mel(samples: np.ndarray, rate: int, side: int, num_fft: int) -> np.ndarray:
    """The definition, step by step and sum by sum."""
    step = len(samples) // side
    padded = np.concatenate([np.zeros(num_fft // 2), samples, np.zeros(num_fft)])
    window = np.zeros(num_fft)
    start = (num_fft - 2 * step) // 2
    window[start : start + 2 * step] = [0.5 - 0.5 * np.cos(np.pi * i / step) for i in range(2 * step)]

    def mel(hz: float) -> float:
        return 2595 * np.log10(1 + hz / 700)

    corners = [700 * (10 ** (k * mel(rate / 2) / (side + 1) / 2595) - 1) for k in range(side + 2)]
    power = np.zeros((side, side))
    for t in range(side):
        spectrum = np.abs(np.fft.fft(padded[t * step : t * step + num_fft] * window)[: num_fft // 2 + 1]) ** 2
        for band, k in product(range(side), range(num_fft // 2 + 1)):
            hz, (low, centre, high) = k * rate / num_fft, corners[band : band + 3]
            if low < hz <= centre:
                power[band, t] += spectrum[k] * (hz - low) / (centre - low)
            elif centre < hz < high:
                power[band, t] += spectrum[k] * (high - hz) / (high - centre)
    return np.maximum(10 * np.log10(np.maximum(power, 1e-30) / power.max()), -RANGE_DB)


def test_log_mel_is_what_its_formula_says():
    """Catches windows or frames that are off by a step, filters with wrong corners, magnitude for power."""
    samples = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    num_fft = 2 * (mel_filters(10, RATE, shortest=400).shape[1] - 1)
    np.testing.assert_allclose(log_mel(samples, RATE, 10), slow_log_mel(samples, RATE, 10, num_fft), atol=0.01)


@pytest.mark.parametrize(("rate", "side"), [(1000, 64), (8000, 32), (8000, 256), (44_100, 128), (192_000, 256)])
def test_every_mel_band_hears_something(rate: int, side: int):
    """Catches filters that fall between two bins: bands that are black in every image."""
    filters = mel_filters(side, rate, shortest=512)
    assert filters.max(axis=1).min() > 0
    assert (np.diff(filters.argmax(axis=1)) >= 0).all()


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100])
@pytest.mark.parametrize("seconds", [0.001, 0.3, 1.0, 2.7])
def test_any_clip_becomes_the_same_shape(rate: int, seconds: float):
    """Catches a clip that is one sample short after resampling, and one that is not in the middle."""
    samples = fit_length(tone(440, seconds, rate), RATE, RATE)
    assert samples.shape == (RATE,)
    assert samples.dtype == np.float32
    sounding = np.flatnonzero(np.abs(samples) > 0.01)
    if seconds >= 0.3:
        assert abs(sounding[0] - (RATE - 1 - sounding[-1])) < 20
        assert np.std(samples[sounding[0] : sounding[-1]]) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_the_loudest_band_is_the_tones():
    """Catches a spectrogram upside down, and a sample rate that is taken for another."""
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 34) / 2595) - 1)
    encoder = build_encoder(ENCODER)
    for hz, rate in product((200, 1000, 3000), (8000, 16_000)):
        band = encoder.prepare(tone(hz, rate=rate))[0][:, 16].argmax()
        assert corners[band] <= hz <= corners[band + 2]


def test_loudness_does_not_matter_and_silence_is_black():
    """Catches features that tell how far the microphone was, and noise made of an empty recording."""
    samples = tone(500).samples
    loud, soft = log_mel(samples, RATE, 32), log_mel(samples * 0.01, RATE, 32)
    np.testing.assert_allclose(loud, soft, atol=0.05)
    assert (log_mel(np.zeros(RATE, np.float32), RATE, 32) == -RANGE_DB).all()


def test_differences_follow_time():
    """Catches differences across bands, and a sign or scale that is wrong."""
    rising = np.tile(np.linspace(-62, 0, 32), (32, 1)).astype(np.float32)  # 2 dB a step
    image = to_image(rising)
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.uint8
    assert abs(int(image[1, 5, 16]) - (127.5 + 2 * 127.5 / 20)) <= 1
    assert abs(int(image[2, 5, 16]) - 127.5) <= 1
    assert (np.diff(image[0].astype(int), axis=1) >= 0).all()


def test_encoder_runs_frozen_on_prepared_clips():
    """Catches an audio encoder that cannot do what image encoders do: fixed batches, state that comes back."""
    encoder = build_encoder(ENCODER)
    values = [encoder.prepare(tone(hz)) for hz in (200, 900, 2500)]
    with pytest.raises(DataError, match="logmel_cnn encoder is not trained"):
        encoder.encode(values)
    encoder.adopt(SmallCNN(2, 32, 8), ["high", "low"])
    features = encoder.encode(values)
    assert features.shape == (3, encoder.dim)
    again = build_encoder(ENCODER)
    again.load_state(*encoder.state())
    np.testing.assert_array_equal(again.encode(values[1:2]), features[1:2])


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    """Catches a job that dies on a node hours later for want of a package."""

    real = importlib.import_module

    def refuse(name: str) -> ModuleType:
        if name == "soundfile":
            raise ImportError(f"No module named '{name}'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ConfigError, match=r"pip install '\.\[audio\]'"):
        LogMelCnnAudioEncoder(ENCODER)
