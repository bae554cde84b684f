"""Image encoders: a CNN trained on one modality and then frozen, and shallow features that need no training.

Axes: B images, H x W pixels, S side of the square that images are resized to, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import EncoderSection, ListedEncoder
from mmkt_ray.encoders.frozen import TrainedCnn
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy
from mmkt_ray.section import Once

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from mmkt_ray.kinds import images
    from mmkt_ray.kinds.images import InputSize
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")
    images = lazy("mmkt_ray.kinds.images")

BILINEAR, BICUBIC = 2, 3  # PIL.Image.Resampling


class Square:
    """An encoder that reads images of one size, (3, S, S) uint8."""

    resampling: ClassVar[int] = BILINEAR
    config: Any  # with `image_size`

    @property
    def input_size(self) -> InputSize:
        """Of `prepare`."""
        return images.InputSize(self.config.image_size, self.config.image_size, self.resampling)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (3, S, S) uint8, with antialiasing; the aspect ratio is not kept."""
        return images.resized(image, self.input_size)


class CnnImageEncoder(Square, TrainedCnn):
    """A small CNN over images that was trained on one task, then frozen."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    class Section(EncoderSection):
        """Small convolutional network, trained here on one modality and one task, then frozen."""

        name: Literal["cnn"] = "cnn"
        pretrain: str = Field(description="the task it is trained on")
        image_size: int = Field(32, ge=9, le=256, description="side in pixels that images are resized to")
        width: int = Field(64, ge=8, description="channels of the first block; later blocks are multiples")
        epochs: int = Field(10, ge=1, description="passes over the train split")
        batch_size: int = Field(500, ge=2, description="images per optimiser step, over all workers")
        lr: float | None = Field(None, gt=0, description="peak learning rate; null: the recipe's")
        augment: Annotated[tuple[Literal["flip", "crop", "cutout"], ...], Once] = Field(
            ("flip", "crop"), description="training augmentation; cutout pays in longer runs"
        )
        precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of training and encoding")
        num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 trains in one process on all its cores")

        @property
        def task(self) -> str:
            return self.pretrain

    def predict(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Logits (B, C) of the task it was trained on, averaged over six views; C as in `class_names`."""
        return self._apply(self._trained().forward_tta, values)


class PixelsImageEncoder(Square, ListedEncoder):
    """Colour thumbnail (8 x 8 x 3), colour histogram (4 x 4 x 4, square-rooted) and HOG (9 orientations, cells of S /
    8 pixels).

    HOG after Dalal & Triggs 2005 (https://doi.org/10.1109/CVPR.2005.177), each cell normalised by itself. D = 832.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    THUMB, CELLS, ORIENTATIONS, COLOURS = 8, 8, 9, 4

    class Section(EncoderSection):
        """Shallow image features without training: colour thumbnail and oriented-gradient histograms."""

        name: Literal["pixels"] = "pixels"
        image_size: int = Field(32, ge=8, le=256, description="side in pixels that images are resized to")

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        if config.image_size % self.CELLS:
            raise DataError(f"encoder pixels: image_size must be a multiple of {self.CELLS}, got {config.image_size}")

    @property
    def dim(self) -> int:
        return 3 * self.THUMB**2 + self.COLOURS**3 + self.ORIENTATIONS * self.CELLS**2

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared images (B, 3, S, S) -> (B, D) float32."""
        return self.features(torch.from_numpy(np.stack(values))).numpy()

    def features(self, images: Tensor) -> Tensor:
        """The same of uint8 images (B, 3, S, S), in tensors, whatever B is."""
        x = images.float() / 255
        thumb = F.adaptive_avg_pool2d(x, self.THUMB).flatten(1)
        return torch.cat([thumb, self._colour_histogram(x), self._hog(x)], dim=1)

    def _colour_histogram(self, x: Tensor) -> Tensor:
        levels = (x * self.COLOURS).long().clamp_max(self.COLOURS - 1)
        cell = (levels[:, 0] * self.COLOURS + levels[:, 1]) * self.COLOURS + levels[:, 2]
        counts = F.one_hot(cell.flatten(1), self.COLOURS**3).float().mean(1)
        return counts.sqrt()

    def _hog(self, x: Tensor) -> Tensor:
        grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        dx = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
        dy = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
        strength, angle = torch.hypot(dx, dy), torch.atan2(dy, dx) % torch.pi
        which = (angle / torch.pi * self.ORIENTATIONS).long().clamp_max(self.ORIENTATIONS - 1)
        votes = torch.zeros(x.shape[0], self.ORIENTATIONS, *x.shape[2:]).scatter_(1, which, strength)
        cells = F.adaptive_avg_pool2d(votes, self.CELLS)
        return (cells / (cells.norm(dim=1, keepdim=True) + 0.05)).flatten(1)
