"""A small CNN for small images.

Axes: B batch, N images of a set, C channels, S side of a square image in pixels, D features, K classes.

Network and whitening after airbench (Jordan 2024, https://arxiv.org/abs/2404.00498), which goes back to David Page's
ResNet (DAWNBench 2018). How it is trained: cnn_training.py. No Ray and no files in here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_IMAGE_SIZE = 9  # one pixel is left after the whitening and three poolings


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with norms, a 2x2 max pool inside: (B, C, S, S) -> (B, C', S // 2, S // 2).

    Norms learn a bias only. Filters start near the identity.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels, momentum=0.2)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, momentum=0.2)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.silu(self.norm2(self.conv2(x)))


class SmallCNN(nn.Module):
    """uint8 images (B, 3, S, S) -> logits (B, K), S >= 9. Rebuilt from `options` and its state dict."""

    whiten_weight: Tensor
    whiten_bias: Tensor

    def __init__(self, num_classes: int, image_size: int = 32, width: int = 64) -> None:
        super().__init__()
        self.options = {"num_classes": num_classes, "image_size": image_size, "width": width}
        self.dim = 4 * width
        self.register_buffer("whiten_weight", torch.zeros(24, 3, 2, 2))
        self.register_buffer("whiten_bias", torch.zeros(24))
        widths = (24, width, 2 * width, 4 * width)
        self.blocks = nn.Sequential(*(ConvBlock(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(self.dim, num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / self.dim)

    @torch.no_grad()
    def fit_whitening(self, images: Tensor, eps: float = 5e-4) -> None:
        """Makes the first layer whiten 2x2 patches of uint8 `images` (N, 3, S, S), less mean and std.

        Mean and std are folded into weight and bias, so that `forward` takes raw pixels, which bfloat16 holds
        exactly. The weight is rounded to bfloat16 here, so that both precisions compute the same layer.
        """
        std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), keepdim=True)
        std = std.clamp_min(1.0)  # a constant colour
        patches = F.unfold(((images - mean) / std).float(), 2).transpose(1, 2).reshape(-1, 12).double()
        eigenvalues, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (eigenvalues + eps).sqrt()).T.reshape(12, 3, 2, 2) / std
        weight = torch.cat([filters, -filters]).bfloat16().double()
        self.whiten_weight.copy_(weight)
        self.whiten_bias.copy_(-(weight * mean).sum(dim=(1, 2, 3)))

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (B, D) float32 of uint8 images (B, 3, S, S)."""
        x = x.contiguous(memory_format=torch.channels_last).to(self.whiten_weight.dtype)
        x = F.silu(F.conv2d(x, self.whiten_weight, self.whiten_bias))
        return self.blocks(x).amax(dim=(2, 3)).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).float()

    def forward_tta(self, x: Tensor) -> Tensor:
        """Logits (B, K) averaged over six views: mirrored or not, moved diagonally by -1, 0 or 1 pixel."""
        side = x.shape[-1]
        padded = F.pad(x.float(), (1, 1, 1, 1), mode="reflect").to(x.dtype)
        views = [(x, 0.25), (padded[..., :side, :side], 0.125), (padded[..., 2:, 2:], 0.125)]
        return torch.stack([share * (self(view) + self(view.flip(-1))) for view, share in views]).sum(0)
