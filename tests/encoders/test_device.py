"""Chunks through a network where it runs: the same features whatever the chunk, and whoever else asks for some."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mmkt_ray.encoders.device import Forward, autocast, normalised

CPU = torch.device("cpu")


def chunk(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 3, 8, 8), dtype=np.uint8)


def sums(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, 8, 8) -> (B, 3), exact in float32."""
    return x.float().sum(dim=(2, 3))


def forward(function: Callable[[torch.Tensor], torch.Tensor] = sums, size: int = 4) -> Forward:
    return Forward(function, CPU, "fp32", size)


@pytest.mark.parametrize("num", [1, 3, 4, 5, 8, 9])
def test_features_are_those_of_each_value(num: int) -> None:
    """Catches a last pass that is lost or padded into the result, passes in the wrong order, and a buffer that is
    filled again before its pass has run."""
    expected = chunk(num).sum(axis=(2, 3), dtype=np.float32)
    apply = forward()
    for values in (chunk(num), list(chunk(num)), chunk(num)[::-1][::-1]):
        features = apply(values)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, expected)


def test_every_pass_has_one_shape() -> None:
    """Catches a pass of another shape, which would give other bits, and no CUDA graph; and what an earlier chunk left
    in the padding."""
    seen = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(x.shape), int(x[1:].sum())))
        return sums(x)

    apply = forward(watch)
    apply(chunk(9))
    apply(chunk(1))
    assert {shape for shape, _ in seen} == {(4, 3, 8, 8)}
    assert seen[-2][1] == seen[-1][1] == 0


def test_values_of_another_shape_or_type_get_buffers_of_their_own() -> None:
    """Catches values that are squeezed into the buffer of the values before."""
    apply = forward(lambda x: x.double().flatten(1).sum(1, keepdim=True))
    for values in (chunk(2), chunk(2)[:, :1], np.full((3, 5), 0.25)):
        np.testing.assert_array_equal(apply(values)[:, 0], values.reshape(len(values), -1).sum(1, dtype=np.float32))


def test_threads_share_it() -> None:
    """Catches buffers that two chunks in flight fill at once."""
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        start.wait()
        return all(np.array_equal(apply(chunk(9, s)), chunk(9, s).sum(axis=(2, 3))) for s in range(seed, seed + 20))

    apply = forward()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_features_outlive_the_next_chunk() -> None:
    """Catches features that are a view of a buffer: the next chunk in flight would change them."""
    apply = forward(lambda x: x.flatten(1).float())
    first = apply(chunk(4))
    kept = first.copy()
    apply(chunk(4, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_normalising_on_the_device_is_exact_and_channels_last() -> None:
    """Catches normalisation in bfloat16, channels that are mixed up,
    and a layout that every convolution would change again."""
    mean, std = (120.5, 110.0, 100.25), (58.0, 57.0, 55.5)
    with autocast(CPU, "bf16"):
        x = normalised(torch.from_numpy(chunk(2)), mean, std)
    expected = (chunk(2) - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    np.testing.assert_array_equal(x.numpy(), expected)
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_without_bfloat16_stays_with_float32(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches emulated bfloat16, which is slower than float32 and less exact."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it or including_emulation)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # as if one were there
    assert autocast(torch.device("cuda"), "bf16")._enabled is has_it
    assert not autocast(torch.device("cuda"), "fp32")._enabled
    assert autocast(CPU, "bf16")._enabled
