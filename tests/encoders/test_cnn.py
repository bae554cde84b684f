"""The small CNN and its training: deterministic, resumable, the same on one worker and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkt_ray.encoders.cnn import MIN_IMAGE_SIZE, SmallCNN
from mmkt_ray.encoders.cnn_training import CNNRecipe, augment_images, fit_cnn
from mmkt_ray.encoders.device import Forward

CPU = torch.device("cpu")
RECIPE = CNNRecipe(epochs=3, batch_size=32, width=8, image_size=16)


def two_classes(num: int = 96, side: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with vertical (0) or horizontal stripes (1): flips and shifts keep the classes apart."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (num, 3, side, side), dtype=np.uint8)
    labels = np.arange(num, dtype=np.int64) % 2
    images[labels == 0, :, :, ::2] += 100
    images[labels == 1, :, ::2, :] += 100
    return images, labels


def apply(
    function: Callable[[torch.Tensor], torch.Tensor], images: np.ndarray, precision: str = "bf16", size: int = 0
) -> np.ndarray:
    """size: images of a pass; 0: all of them."""
    return Forward(function, CPU, precision, size or max(1, len(images)))(images)


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_same_seed_same_weights():
    """Catches a draw from an unseeded generator, and a seed that is ignored."""
    images, labels = two_classes()
    first, second = (fit_cnn(images, labels, 2, RECIPE, device=CPU) for _ in range(2))
    other = fit_cnn(images, labels, 2, replace(RECIPE, seed=1), device=CPU)
    assert same_state(first, second)
    assert not same_state(first, other)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_resume_equals_uninterrupted_run(precision: str, tmp_path: Path):
    """Catches what a checkpoint lacks (momentum, norm statistics), shares with the fit or cannot keep."""
    images, labels = two_classes()
    recipe = replace(RECIPE, precision=precision)
    states = {}

    def keep(epoch: int, _: dict, state_fn: Callable[[], dict]) -> None:
        states[epoch] = state_fn()

    whole = fit_cnn(images, labels, 2, recipe, device=CPU, on_epoch=keep)
    assert sorted(states) == [1, 2, 3]
    save_file({key: torch.as_tensor(value) for key, value in states[1].items()}, tmp_path / "state")
    resumed = fit_cnn(images, labels, 2, recipe, device=CPU, state=load_file(tmp_path / "state"))
    assert same_state(whole, resumed)


def test_whitening_knows_the_given_images_only():
    """Catches statistics of another data set, and statistics that change while encoding."""
    bright = torch.from_numpy(np.random.default_rng(0).integers(150, 255, (64, 3, 16, 16), dtype=np.uint8))
    model = SmallCNN(2, 16, 8)
    model.fit_whitening(bright)
    weight, bias = model.whiten_weight.clone(), model.whiten_bias.clone()
    whitened = torch.nn.functional.conv2d(bright.float(), weight, bias)[:, :12].transpose(0, 1).flatten(1)
    assert whitened.mean(dim=1).abs().max() < 0.05
    assert torch.allclose(torch.cov(whitened), torch.eye(12), atol=0.05)
    model.eval().features(bright // 2)
    assert torch.equal(weight, model.whiten_weight)
    model.fit_whitening(bright // 2)
    assert not torch.equal(weight, model.whiten_weight)


@pytest.mark.parametrize("side", [MIN_IMAGE_SIZE, 32, 48])
def test_features_have_the_promised_shape_and_type(side: int):
    """Catches a head or a pooling that is tied to one image size, and bfloat16 leaking out of autocast."""
    images = np.zeros((5, 3, side, side), np.uint8)
    model = SmallCNN(7, side, 8).eval()
    features = apply(model.features, images, size=2)
    assert features.shape == (5, model.dim)
    assert features.dtype == np.float32
    assert apply(model, images).shape == (5, 7)
    assert apply(model.forward_tta, images).shape == (5, 7)
    assert apply(model.features, images[:0]).shape == (0, model.dim)


def test_features_do_not_depend_on_the_batch():
    """Catches a model that is shipped in train mode: its norms would mix the images of a batch."""
    images, labels = two_classes(64)
    model = fit_cnn(images, labels, 2, replace(RECIPE, epochs=1), device=CPU)
    one_by_one = apply(model.features, images, precision="fp32", size=1)
    together = apply(model.features, images, precision="fp32")
    np.testing.assert_allclose(one_by_one, together, rtol=1e-3, atol=1e-4)


def test_round_trip_through_safetensors(tmp_path: Path):
    """Catches state outside the state_dict: the rebuilt model must give the very same features."""
    images, labels = two_classes(64)
    model = fit_cnn(images, labels, 2, replace(RECIPE, epochs=1), device=CPU)
    save_file(model.state_dict(), tmp_path / "cnn.safetensors")
    rebuilt = SmallCNN(**model.options)
    rebuilt.load_state_dict(load_file(tmp_path / "cnn.safetensors"))
    rebuilt.eval()
    first, second = (apply(either.features, images) for either in (model, rebuilt))
    np.testing.assert_array_equal(first, second)


def test_learns_a_separable_set():
    """Catches a recipe that trains nothing: frozen filters, wrong sign, labels out of step with images."""
    images, labels = two_classes(256)
    model = fit_cnn(images, labels, 2, replace(RECIPE, epochs=6), device=CPU)
    test_images, test_labels = two_classes(128, seed=1)
    assert (apply(model, test_images).argmax(1) == test_labels).mean() > 0.95


def test_augmentation_moves_each_image_on_its_own():
    """Catches one random shift for a whole batch, and pixels that come from another image."""
    images = torch.arange(1, 65, dtype=torch.uint8).view(64, 1, 1, 1).expand(64, 3, 16, 16).clone()
    images[:, :, 8, 8] = 255
    still = np.zeros(64, bool)

    def augment(*names: str, mirror: np.ndarray = still, seed: int = 0) -> torch.Tensor:
        return augment_images(images, mirror, replace(RECIPE, augment=names), (seed,))

    moved = augment("crop")
    assert len({int((image[0] == 255).flatten().nonzero()[0]) for image in moved}) > 10
    assert all(set(image.unique().tolist()) == {index + 1, 255} for index, image in enumerate(moved))
    assert torch.equal(moved, augment("crop"))
    assert not torch.equal(moved, augment("crop", seed=1))
    assert torch.equal(augment(mirror=~still), images.flip(-1))
    ramp = torch.arange(16, dtype=torch.uint8).expand(64, 3, 16, 16)  # as NumPy reflects a border
    borders = np.pad(np.arange(16), 2, mode="reflect")
    shifted = augment_images(ramp, still, replace(RECIPE, augment=("crop",)), (0,))[:, 0, 0].tolist()
    assert {tuple(row) for row in shifted} == {tuple(borders[at : at + 16].tolist()) for at in range(5)}
    blanked = augment("cutout")
    assert ((blanked == 128).sum(dim=(1, 2, 3)) == 3 * 4 * 4).sum() >= 63  # image 128 - 1 is not among them
    assert len({tuple((image[0] == 128).flatten().nonzero()[0].tolist()) for image in blanked}) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, "image_size"),
        ({"augment": ("mixup",)}, "known: flip, crop, cutout"),
        ({"precision": "fp16"}, "known: bf16, fp32"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(change: dict, message: str):
    """Catches a typo in the recipe that would silently train something else."""
    images, labels = two_classes(32)
    with pytest.raises(ValueError, match=message):
        fit_cnn(images, labels, 2, replace(RECIPE, **change), device=CPU)


def fit_as_rank(rank: int, folder: str) -> None:
    """What one of two workers does; 33 images a step, so that the workers' shares differ."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images, labels = two_classes(66)
    recipe = replace(RECIPE, epochs=2, batch_size=33)
    losses = []

    def keep(_epoch: int, metrics: dict, _: Callable[[], dict]) -> None:
        losses.append(metrics["loss"])

    model = fit_cnn(images, labels, 2, recipe, device=CPU, rank=rank, world_size=2, on_epoch=keep)
    save_file({**model.state_dict(), "losses": torch.tensor(losses)}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_end_with_the_same_model(tmp_path: Path):
    """Catches norm statistics or metrics of one rank taken for everyone's, and uneven shares that hang."""
    command = [sys.executable, __file__]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=os.environ) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(first["losses"]) == 2


if __name__ == "__main__":  # a worker of the test above
    fit_as_rank(int(sys.argv[1]), sys.argv[2])
