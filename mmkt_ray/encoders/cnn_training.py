"""The recipe that trains a `SmallCNN` in minutes on two CPU cores.

Axes: B batch, N images of a set, C channels, S side of a square image in pixels, K classes.

Recipe and schedule after airbench (Jordan 2024, https://arxiv.org/abs/2404.00498); Muon after
https://kellerjordan.github.io/posts/muon/. No Ray and no files in here: arrays in, module out; the caller writes
checkpoints from `on_epoch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmkt_ray.encoders.cnn import MIN_IMAGE_SIZE, SmallCNN
from mmkt_ray.encoders.device import autocast

AUGMENTATIONS = ("flip", "crop", "cutout")
PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class CNNRecipe:
    """How `fit_cnn` builds and trains a `SmallCNN`. The defaults are tuned for CIFAR-10 on two CPU cores."""

    epochs: int = 10  # passes over the images
    batch_size: int = 500  # images per optimizer step, over all workers
    lr: float = 0.1  # of Muon on the filters, whose norm is fixed; falls linearly to 0
    head_lr: float = 0.01  # of AdamW on norm biases and head; falls linearly to 0
    momentum: float = 0.6  # Nesterov momentum of Muon
    weight_decay: float = 0.01  # decoupled, of AdamW; filters have a fixed norm instead
    label_smoothing: float = 0.2  # share of the target that is spread over all classes
    width: int = 64  # channels of the first block; features have 4 * width
    image_size: int = 32  # side in pixels of the images given
    augment: tuple[str, ...] = ("flip", "crop")  # any of AUGMENTATIONS
    crop_pad: int = 2  # most pixels by which "crop" shifts an image; the border is reflected
    cutout_frac: float = 0.25  # side of the square that "cutout" blanks, as a share of image_size
    precision: str = "bf16"  # "bf16" (autocast) or "fp32"
    seed: int = 0  # of initialisation, order and augmentation


# --- batches ------------------------------------------------------------------------------------------------


def augment_images(images: Tensor, mirror: np.ndarray, recipe: CNNRecipe, seed: Sequence[int]) -> Tensor:
    """Mirrors some of the uint8 `images` (B, 3, S, S), `mirror` (B,) bool, then shifts and blanks each on its own.

    All at once and where the images are: one by one, as torchvision does it, takes a GPU's time many times over. The
    draws depend on `seed` alone.
    """
    rng, num, side, device = np.random.default_rng(seed), len(images), images.shape[-1], images.device
    where = np.broadcast_to(np.arange(side), (2, num, side))  # rows and columns that each image's pixels come from
    if "crop" in recipe.augment:
        where = where + rng.integers(-recipe.crop_pad, recipe.crop_pad + 1, (2, num, 1))
        where = side - 1 - np.abs(side - 1 - np.abs(where))  # the border is reflected
    rows, columns = where[0], np.where(mirror[:, None], side - 1 - where[1], where[1])
    which, channels = torch.arange(num, device=device), torch.arange(3, device=device)
    rows, columns = (torch.from_numpy(np.array(index)).to(device) for index in (rows, columns))
    images = images[
        which[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]
    if "cutout" in recipe.augment:
        size = round(recipe.cutout_frac * side)
        distance = np.arange(side) - rng.integers(0, side - size + 1, (2, num, 1))
        inside = torch.from_numpy((distance >= 0) & (distance < size)).to(device)
        images = images.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], 128)
    return images


def _resident(column: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """All of a set (N, ..) on the GPU that it is trained on, if that has room for four of it; else as it is."""
    if device.type != "cuda" or 4 * column.nbytes > torch.cuda.mem_get_info()[0]:
        return column
    return torch.from_numpy(np.array(column)).to(device)


# --- training -----------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised step, for filters (C', C, 3, 3) kept at norm sqrt(C').

    Own, as `torch.optim.Muon` takes matrices only and keeps no norm.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's takes a closure too
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                update = orthogonalise(weight.grad.add(buffer, alpha=group["momentum"]).flatten(1))
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(update.view_as(weight), alpha=-group["lr"])


def orthogonalise(matrix: Tensor, num_steps: int = 3) -> Tensor:
    """The matrix with its singular values moved near 1, by Newton-Schulz steps of fifth order in bfloat16."""
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(num_steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


@dataclass
class _Fit:
    """A model in training: its optimizers, its place among the workers, and its state as a flat dict."""

    model: SmallCNN
    recipe: CNNRecipe
    device: torch.device
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        recipe, trained = self.recipe, [p for p in self.model.parameters() if p.requires_grad]
        filters, others = ([p for p in trained if (p.ndim == 4) is is_filter] for is_filter in (True, False))
        self.optimizers: dict[torch.optim.Optimizer, float] = {  # with their first rates
            Muon(filters, recipe.lr, recipe.momentum): recipe.lr,
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=recipe.weight_decay): recipe.head_lr,
        }
        self.net: nn.Module = self.model
        if self.world_size > 1:
            self.net = nn.parallel.DistributedDataParallel(self.model, forward_sync_buffers=False)

    def _batches(self, epoch: int, images: Any, labels: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of each global batch, augmented: (B, 3, S, S), (B,). The remainder is dropped.

        All that is random is drawn from (seed, epoch, rank): a resumed run needs no generator state.
        """
        seed, batch_size = self.recipe.seed, min(self.recipe.batch_size, len(images))
        order = np.random.default_rng([seed, epoch]).permutation(len(images))
        # Every second epoch, starting with the first or the second at random: airbench's alternating flip.
        mirror = np.random.default_rng(seed).random(len(images)) < 0.5
        mirror = (mirror ^ bool(epoch % 2)) & ("flip" in self.recipe.augment)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = np.sort(order[start : start + batch_size][self.rank :: self.world_size])
            x, y = (self._rows(column, chosen) for column in (images, labels))
            yield augment_images(x, mirror[chosen], self.recipe, (seed, epoch, self.rank, start)), y

    def _rows(self, column: np.ndarray | Tensor, chosen: np.ndarray) -> Tensor:
        if isinstance(column, Tensor):
            return column[torch.from_numpy(chosen).to(self.device)]
        return torch.from_numpy(column[chosen]).to(self.device)

    def train_epoch(self, epoch: int, images: Any, labels: Any) -> dict[str, float]:
        """One pass over the images, which are arrays or lie on the device.
        Returns mean loss and accuracy over all workers."""
        recipe = self.recipe
        batch_size = min(recipe.batch_size, len(images))
        num_steps = len(images) // batch_size
        totals = torch.zeros(3, device=self.device)  # loss, hits, images
        self.model.train()
        for step, (x, y) in enumerate(self._batches(epoch, images, labels), epoch * num_steps):
            with autocast(self.device, recipe.precision):
                logits = self.net(x)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing, reduction="sum")
            # DDP takes the mean over workers, whose shares of a batch may differ by one image.
            (loss * (self.world_size / batch_size)).backward()
            for optimizer, lr in self.optimizers.items():
                optimizer.param_groups[0]["lr"] = lr * (1 - step / (recipe.epochs * num_steps))
                optimizer.step()
                optimizer.zero_grad()
            totals += torch.stack([loss.detach(), (logits.argmax(1) == y).sum(), loss.new_tensor(len(y))])
        self.model.eval()
        self._merge_workers(totals)
        loss_sum, num_hits, num_images = totals.tolist()
        return {"loss": loss_sum / num_images, "accuracy": num_hits / num_images}

    def _merge_workers(self, totals: Tensor) -> None:
        """Sums `totals` over workers and averages the norms' statistics, so that all hold the same model."""
        if self.world_size > 1:
            dist.all_reduce(totals)
            for name, buffer in self.model.named_buffers():
                if "running" in name:
                    dist.all_reduce(buffer)
                    buffer /= self.world_size

    def state(self, epoch: int) -> dict[str, Any]:
        """Copies named "model.<name>" or "optimizer.<which>.<parameter>.<name>", and the epochs done."""
        flat = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for which, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                flat |= {f"optimizer.{which}.{index}.{name}": value for name, value in slots.items()}
        copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in flat.items()}
        return {**copies, "epoch": epoch}

    def load_state(self, flat: dict[str, Any]) -> int:
        """Takes back what `state` returned. Returns the number of epochs done."""
        parts = {key.removeprefix("model."): value for key, value in flat.items() if key.startswith("model.")}
        self.model.load_state_dict(parts)
        for which, optimizer in enumerate(self.optimizers):
            slots: dict[int, dict[str, Tensor]] = {}
            for key in (key for key in flat if key.startswith(f"optimizer.{which}.")):
                _, _, index, name = key.split(".")
                slots.setdefault(int(index), {})[name] = flat[key].clone()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        return int(flat["epoch"])


def fit_cnn(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    recipe: CNNRecipe,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[int, dict[str, float], Callable[[], dict[str, Any]]], None] | None = None,
) -> SmallCNN:
    """Trains a `SmallCNN` on `images` (N, 3, S, S) uint8 and `labels` (N,) int64; returns it in eval mode.

    With `world_size` > 1, torch.distributed is initialised and each rank makes this call. After each epoch
    every rank calls `on_epoch(epochs done, metrics, state_fn)`. `state_fn()` is a flat dict of tensors and
    numbers; a call with it as `state` goes on from there as if never stopped.

    Raises:
        ValueError: images, labels and recipe do not fit together.
    """
    _check(images, labels, num_classes, recipe, world_size)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator alone
        torch.manual_seed(recipe.seed)
        model = SmallCNN(num_classes, recipe.image_size, recipe.width)
    sample = np.random.default_rng(recipe.seed).permutation(len(images))[:2000]  # enough for 12 x 12 moments
    model.fit_whitening(torch.from_numpy(images[np.sort(sample)]))
    model.to(device).to(memory_format=torch.channels_last)
    fit = _Fit(model, recipe, device, rank, world_size)
    held = _resident(images, device), _resident(labels, device)
    for epoch in range(fit.load_state(state) if state else 0, recipe.epochs):
        metrics = fit.train_epoch(epoch, *held)
        if on_epoch is not None:
            on_epoch(epoch + 1, metrics, partial(fit.state, epoch + 1))
    return model.to(memory_format=torch.contiguous_format).eval()  # as safetensors wants it


def _check(images: np.ndarray, labels: np.ndarray, num_classes: int, recipe: CNNRecipe, world_size: int) -> None:
    side = recipe.image_size
    if side < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE}, got {side}")
    if images.dtype != np.uint8 or images.shape[1:] != (3, side, side) or len(images) == 0:
        raise ValueError(
            f"images must be uint8 (N, 3, {side}, {side}) by image_size, got {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be N integers in 0..{num_classes - 1}, got {labels.shape}: {labels}")
    if (batch_size := min(recipe.batch_size, len(images))) < 2 * world_size:
        raise ValueError(f"each of {world_size} workers needs 2 images a step for its norms, got {batch_size}")
    if unknown := set(recipe.augment) - set(AUGMENTATIONS):
        raise ValueError(f"unknown augmentations {sorted(unknown)}; known: {', '.join(AUGMENTATIONS)}")
    if recipe.precision not in PRECISIONS:
        raise ValueError(f"unknown precision '{recipe.precision}'; known: {', '.join(PRECISIONS)}")
