"""Image encoders from timm, their weights from a file.

Axes: B images, H x W pixels, S x S' pixels once prepared, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mmkt_ray.encoders.pretrained.adaptable import AdaptableSection
from mmkt_ray.encoders.pretrained.image_networks import PretrainedImageEncoder
from mmkt_ray.encoders.pretrained.weights import digest_of, read_weights, require
from mmkt_ray.errors import ConfigError, DataError, unknown_name
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from torch import nn

    from mmkt_ray import storage
else:
    np, timm, torch, Image = lazy("numpy"), lazy("timm"), lazy("torch"), lazy("PIL.Image")
    storage = lazy("mmkt_ray.storage")


class TimmImageEncoder(PretrainedImageEncoder):
    """A network of timm (https://github.com/huggingface/pytorch-image-models) without its classifier, pooled."""

    class Section(AdaptableSection):
        """Any image network of timm, frozen, its weights from a safetensors file; extra `timm`."""

        name: Literal["timm"] = "timm"
        architecture: str | None = Field(
            None,
            description="name in timm, e.g. vit_small_patch14_dinov2; null: as config.json beside the weights says",
        )
        weights: str = Field(description="a .safetensors file on every node")
        precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")

        @property
        def files(self) -> dict[str, str]:
            return {"weights": self.weights}

    def __init__(self, config: Section) -> None:
        require(config.name, "timm", extra="timm")
        super().__init__(config)
        if not config.weights.endswith(".safetensors"):
            raise ConfigError(f"encoder timm: weights must be a .safetensors file, got '{config.weights}'")
        self.card = self._read_card()
        architecture = config.architecture or self.card.get("architecture")
        if not architecture:
            raise ConfigError(f"encoder timm: name the architecture, as no config.json lies beside '{config.weights}'")
        if not timm.is_model(architecture):
            raise unknown_name("timm architecture", architecture, timm.list_models())
        self.architecture = architecture
        with torch.device("meta"):
            network: Any = self._network()
        self.dim = int(network.head_hidden_size if hasattr(network, "head_hidden_size") else network.num_features)
        self.settings = timm.data.resolve_model_data_config(network)
        self.mean, self.std = (tuple(255 * v for v in self.settings[k]) for k in ("mean", "std"))
        steps = timm.data.create_transform(**self.settings, is_training=False).transforms
        self.steps = [step for step in steps if type(step).__name__ not in ("ToTensor", "MaybeToTensor", "Normalize")]

    def _read_card(self) -> dict[str, Any]:
        """What the hub keeps beside a network's weights: its architecture and how its input is prepared."""
        file = Path(self.config.weights).parent / "config.json"
        card = storage.read_json(str(file)) if file.is_file() else {}
        return card if isinstance(card, dict) else {}

    def _network(self) -> nn.Module:
        asked = (
            {k: v for k, v in self.card.items() if k in ("global_pool", "pretrained_cfg")}
            if self._is_its_card()
            else {}
        )
        if "pretrained_cfg" in asked:
            asked["pretrained_cfg_overlay"] = asked.pop("pretrained_cfg")
        arguments = self.card.get("model_args", {}) if self._is_its_card() else {}
        return timm.create_model(self.architecture, pretrained=False, num_classes=0, **asked, **arguments)

    def _is_its_card(self) -> bool:
        return self.card.get("architecture") == self.architecture

    @property
    def side(self) -> int:
        return max(1, round((self.settings["input_size"][1] * self.settings["input_size"][2]) ** 0.5))

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(3, S, S')."""
        return tuple(self.settings["input_size"])

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (3, S, S') uint8, resized and cropped as the network's settings in timm say."""
        picture: Any = Image.fromarray(image)
        for step in self.steps:
            picture = step(picture)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def open(self) -> tuple[nn.Module, str]:
        weights = read_weights(self.config.weights)
        model = self._network()
        missing, _ = model.load_state_dict(timm.models.clean_state_dict(weights), strict=False)
        if missing:
            raise DataError(
                f"the weights in '{self.config.weights}' are not those of timm's {self.architecture}: they lack "
                f"{len(missing)} tensors, the first '{missing[0]}'"
            )
        return model, digest_of(weights)
