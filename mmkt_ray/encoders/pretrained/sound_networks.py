"""Sound encoders from a Hugging Face folder: Whisper, wav2vec 2.0 and its kin, CLAP's audio tower.

Axes: B clips, T samples in time, L time steps of the network, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mmkt_ray.encoders import audio
from mmkt_ray.encoders.encoder import ListedEncoder
from mmkt_ray.encoders.pretrained import folder as folders
from mmkt_ray.encoders.pretrained.adaptable import Adaptable
from mmkt_ray.errors import ConfigError, unknown_name
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from mmkt_ray.encoders import device as devices
    from mmkt_ray.kinds.sounds import Clip
else:
    np, torch, nn = lazy("numpy"), lazy("torch"), lazy("torch.nn")
    devices = lazy("mmkt_ray.encoders.device")

LARGEST_BATCH = {"cpu": 2, "cuda": 32}  # clips of a forward pass
SHORTEST_S = 0.05  # of what a network is given: shorter sounds are filled with silence


class SoundNetwork(Adaptable, ListedEncoder):
    """A network in a folder over the middle of a sound. Subclasses: how its input is made and what comes out."""

    kinds: ClassVar[tuple[str, ...]] = ("audio",)
    prepared_dtype: ClassVar[str] = "float32"
    longest_s = 600.0  # of what the network takes

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.device = torch.device("cpu")
        self.encode_batch_size = 256
        self.folder = Path(config.folder)
        self.file = folders.processor_file(self.folder, "sounds")
        self.settings = folders.read_config(self.folder)
        self.extractor = folders.open_processor(self.folder, "AutoFeatureExtractor")
        if not isinstance(getattr(self.extractor, "sampling_rate", None), int):
            raise ConfigError(
                f"encoder huggingface: '{self.file}' prepares no sounds: name a folder with a sound network"
            )
        self.dim = self._width()

    def _width(self) -> int:
        return int(self.settings.hidden_size)

    @property
    def sample_rate(self) -> int:
        """Of what the network takes, in Hz."""
        return int(self.extractor.sampling_rate)

    @property
    def num_samples(self) -> int:
        """T of a prepared clip."""
        return max(1, round(min(self.config.seconds, self.longest_s) * self.sample_rate))

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(T,)."""
        return (self.num_samples,)

    def forward_features(self, batch: Tensor) -> Tensor:
        """Prepared clips (B, T) -> features (B, D); those of other lengths than the first's one by one."""
        clips = [row[: int(np.isfinite(row).sum())] for row in batch.cpu().numpy()]
        if len({len(clip) for clip in clips}) == 1:
            return self.pooled(clips)
        return torch.cat([self.pooled([clip]) for clip in clips])

    def prepare(self, clip: Clip) -> np.ndarray:
        """The middle of a clip (T,) float32 at the network's sample rate; NaN behind the end of a shorter one."""
        samples = audio.cut_middle(clip, self.sample_rate, self.num_samples)
        samples = np.pad(samples, (0, max(0, self._shortest() - len(samples))))
        return np.pad(samples, (0, self.num_samples - len(samples)), constant_values=np.nan)

    def _shortest(self) -> int:
        return min(self.num_samples, round(SHORTEST_S * self.sample_rate))

    def to(self, device: torch.device, encode_batch_size: int) -> None:
        """Move to a device and say how many clips a forward pass takes at most."""
        self.device, self.encode_batch_size = device, encode_batch_size
        if self.model is not None:
            self.model.to(device)

    def encode_as_is(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared clips (B, T) -> (B, D) float32. A batch has one fixed shape, so that a clip's features do not
        depend on its neighbours."""
        clips = [value[: int(np.isfinite(value).sum())] for value in values]
        found = np.empty((len(clips), self.dim), dtype=np.float32)
        for rows, size in self._batches([len(clip) for clip in clips]):
            filled = [*rows, *rows[-1:] * (size - len(rows))]
            with torch.inference_mode(), devices.autocast(self.device, self.config.precision):
                pooled = self.pooled([clips[row] for row in filled])
            found[rows] = pooled[: len(rows)].float().cpu().numpy()
        return found

    def _batches(self, lengths: list[int]) -> list[tuple[list[int], int]]:
        """Rows of each forward pass, and how many it takes."""
        size = min(self.encode_batch_size, LARGEST_BATCH[self.device.type])
        return [(list(range(i, min(i + size, len(lengths)))), size) for i in range(0, len(lengths), size)]

    def _extracted(self, clips: list[np.ndarray], **options: Any) -> dict[str, Tensor]:
        """What the folder's feature extractor makes of them, on the device."""
        made = self.extractor(clips, sampling_rate=self.sample_rate, return_tensors="pt", **options)
        return {name: value.to(self.device) for name, value in made.items()}

    def pooled(self, clips: list[np.ndarray]) -> Tensor:
        """Samples of clips -> features (B, D)."""
        raise NotImplementedError

    def _digest(self) -> str:
        return folders.digest_files(self.folder, self.file)


class WaveNetwork(SoundNetwork):
    """Mean over time of the last layer of a network over the waveform (Baevski et al. 2020,
    https://arxiv.org/abs/2006.11477).

    Several clips share a forward pass only where all are as long:
    these networks see the silence that would fill a batch.
    """

    def open(self) -> tuple[nn.Module, str]:
        lack = ("masked_spec_embed", "pooler.")  # for training alone
        return folders.open_network(self.folder, "AutoModel", may_lack=lack)[0], self._digest()

    def _batches(self, lengths: list[int]) -> list[tuple[list[int], int]]:
        size = min(self.encode_batch_size, LARGEST_BATCH[self.device.type])
        whole = [row for row, length in enumerate(lengths) if length == self.num_samples]
        alone = [([row], 1) for row, length in enumerate(lengths) if length != self.num_samples]
        return [(whole[i : i + size], size) for i in range(0, len(whole), size)] + alone

    def pooled(self, clips: list[np.ndarray]) -> Tensor:
        given = self._extracted(clips, return_attention_mask=False)
        return self.model(given["input_values"]).last_hidden_state.float().mean(1)


class WhisperNetwork(SoundNetwork):
    """Mean of the encoder's last layer over the time steps of the sound, without the silence that fills its 30
    seconds (Radford et al. 2022, https://arxiv.org/abs/2212.04356)."""

    @property
    def longest_s(self) -> float:  # type: ignore[override]  # a constant in the base
        return float(self.extractor.chunk_length)

    def _width(self) -> int:
        return int(self.settings.d_model)

    def open(self) -> tuple[nn.Module, str]:
        model: Any = folders.open_network(self.folder, "WhisperModel")[0]
        return model.get_encoder(), self._digest()

    def pooled(self, clips: list[np.ndarray]) -> Tensor:
        given = self._extracted(clips, return_attention_mask=True)
        hidden = self.model(given["input_features"]).last_hidden_state.float()  # (B, L, D)
        share = given["attention_mask"].shape[1] // hidden.shape[1]  # spectrogram frames of a time step
        mask = given["attention_mask"][:, ::share].unsqueeze(2).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


class ClapNetwork(SoundNetwork):
    """CLAP's audio tower, projected into the space that it shares with the text tower, at unit length (Wu et al.
    2023, https://arxiv.org/abs/2211.06687)."""

    @property
    def longest_s(self) -> float:  # type: ignore[override]  # a constant in the base
        return float(self.extractor.max_length_s)  # of a longer one the extractor takes a piece at random

    def _width(self) -> int:
        return int(self.settings.projection_dim)

    def open(self) -> tuple[nn.Module, str]:
        return folders.open_network(self.folder, "ClapAudioModelWithProjection")[0], self._digest()

    def pooled(self, clips: list[np.ndarray]) -> Tensor:
        given = self._extracted(clips)
        longer = torch.zeros(len(clips), 1, dtype=torch.bool, device=self.device)  # the extractor marks one at random
        embedded = self.model(input_features=given["input_features"], is_longer=longer).audio_embeds
        return nn.functional.normalize(embedded.float(), dim=1)


WAVES = ("wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio")
NETWORKS: dict[str, type[SoundNetwork]] = {
    "whisper": WhisperNetwork,
    "clap": ClapNetwork,
    **dict.fromkeys(WAVES, WaveNetwork),
}


def network_of(model_type: str, config: Any) -> SoundNetwork:
    """The encoder for a folder. Raises: ConfigError if its network takes no sounds that are known here."""
    if model_type not in NETWORKS:
        raise unknown_name(f"sound network in '{config.folder}' (model_type)", model_type, list(NETWORKS))
    return NETWORKS[model_type](config)
