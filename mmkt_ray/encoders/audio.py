"""Audio encoder: a log-mel spectrogram as an image for a small CNN, which is trained on one task and then frozen.

Axes: T samples in time, F frequency bins, S mel bands and as many time steps, B clips, D features.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import EncoderSection
from mmkt_ray.encoders.frozen import TrainedCnn
from mmkt_ray.lazy import lazy
from mmkt_ray.section import Once

if TYPE_CHECKING:
    import numpy as np
    import torch
    from scipy import signal

    from mmkt_ray.kinds import sounds
    from mmkt_ray.kinds.sounds import Clip
else:
    np, torch, signal, sounds = lazy("numpy"), lazy("torch"), lazy("scipy.signal"), lazy("mmkt_ray.kinds.sounds")

RANGE_DB = 80.0  # what is softer than the loudest point of the clip by more than this counts as silence
DELTA_DB = (20.0, 10.0)  # changes per time step, and changes of these, that span uint8
SILENCE = 1e-10  # power of a clip that is silent throughout


class LogMelCnnAudioEncoder(TrainedCnn):
    """Log-mel spectrogram and its first two differences in time, as three channels of a `SmallCNN`'s image."""

    kinds: ClassVar[tuple[str, ...]] = ("audio",)

    class Section(EncoderSection):
        """Log-mel spectrogram as an image for a small convolutional network,
        trained here on one modality and one task."""

        name: Literal["logmel_cnn"] = "logmel_cnn"
        pretrain: str = Field(description="the task it is trained on")
        sample_rate: int = Field(8000, ge=1000, le=192_000, description="samples per second that audio is resampled to")
        seconds: float = Field(1.0, gt=0, le=60, description="length that clips are cut or padded to")
        image_size: int = Field(32, ge=9, le=256, description="mel bands, and time steps that the clip is divided into")
        width: int = Field(32, ge=8, description="channels of the first block; later blocks are multiples")
        epochs: int = Field(10, ge=1, description="passes over the train split")
        batch_size: int = Field(128, ge=2, description="clips per optimiser step, over all workers")
        lr: float | None = Field(None, gt=0, description="peak learning rate; null: the recipe's")
        augment: Annotated[tuple[Literal["crop", "cutout"], ...], Once] = Field(
            ("crop",), description="training augmentation: shift in time and pitch, cutout"
        )
        precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of training and encoding")
        num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 trains in one process on all its cores")

        @property
        def task(self) -> str:
            return self.pretrain

    def __init__(self, config: Section) -> None:
        sounds.import_soundfile()
        super().__init__(config)

    def prepare(self, clip: Clip) -> np.ndarray:
        """A decoded clip -> (3, S, S) uint8: channels, mel bands from low to high, time steps."""
        config = self.config
        samples = fit_length(clip, config.sample_rate, round(config.seconds * config.sample_rate))
        return to_image(log_mel(samples, config.sample_rate, config.image_size))


def fit_length(clip: Clip, sample_rate: int, num_samples: int) -> np.ndarray:
    """The middle of a clip at another sample rate, or all of it with silence on both sides:
    (num_samples,) float32."""
    samples = cut_middle(clip, sample_rate, num_samples)
    before = (num_samples - len(samples)) // 2
    return np.pad(samples, (before, num_samples - len(samples) - before))


def cut_middle(clip: Clip, sample_rate: int, num_samples: int) -> np.ndarray:
    """The middle of a clip at another sample rate: (at most num_samples,) float32."""
    samples = clip.samples
    longest = num_samples * clip.sample_rate // sample_rate + 1  # cut before resampling: a long file costs no more
    start = max(0, len(samples) - longest) // 2
    samples = samples[start : start + longest]
    if clip.sample_rate != sample_rate:
        samples = signal.resample_poly(samples, sample_rate, clip.sample_rate).astype(np.float32)
    return samples[:num_samples]


def log_mel(samples: np.ndarray, sample_rate: int, side: int) -> np.ndarray:
    """Samples (T,) -> decibels (S, S), 0 at the loudest point and -RANGE_DB at most below: mel bands by time steps.

    Windows are two steps long, so that they overlap by half.
    """
    step = max(1, len(samples) // side)
    filters = mel_filters(side, sample_rate, shortest=2 * step)
    num_fft, window = 2 * (filters.shape[1] - 1), torch.hann_window(2 * step)
    spectrum = torch.stft(
        torch.from_numpy(samples), num_fft, step, 2 * step, window, pad_mode="constant", return_complex=True
    )
    power = torch.from_numpy(filters) @ spectrum.abs().square()[:, :side]
    loudest = power.max().clamp_min(SILENCE)
    return (10 * torch.log10((power / loudest).clamp_min(10 ** (-RANGE_DB / 10)))).numpy()


@cache
def mel_filters(num_bands: int, sample_rate: int, shortest: int) -> np.ndarray:
    """Triangular filters (S, F) float32, their corners evenly spaced in mel from 0 to half the sample rate.

    Mel as in O'Shaughnessy 1987: 2595 log10(1 + Hz / 700). F is that of the shortest transform, a power of two of at
    least `shortest` samples, that gives every filter a bin.
    """
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, num_bands + 2) / 2595) - 1)  # Hz
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    num_fft = 1 << (shortest - 1).bit_length()
    while True:
        bins = np.fft.rfftfreq(num_fft, 1 / sample_rate)
        filters = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)
        if filters.max(axis=1).min() > 0:
            return filters.astype(np.float32)
        num_fft *= 2


def to_image(decibels: np.ndarray) -> np.ndarray:
    """Decibels (S, S) and their first and second differences in time, as uint8 (3, S, S).

    Differences are slopes over five steps, the usual regression deltas (Furui 1986).
    """
    channels = [(decibels + RANGE_DB) * (255 / RANGE_DB)]
    slope = decibels
    for span in DELTA_DB:
        slope = signal.savgol_filter(slope, 5, 1, deriv=1, axis=1, mode="nearest")
        channels.append(127.5 + slope * (127.5 / span))
    return np.asarray(np.rint(np.stack(channels).clip(0, 255)).astype(np.uint8))
