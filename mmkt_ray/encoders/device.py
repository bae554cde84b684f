"""Where a network runs: chunks of prepared values in, features out. torch and NumPy alone.

Axes: N values of a chunk, B values of a forward pass, D features.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

GPU_BUFFERS = 3  # one that the host fills, one on the bus, one that the network reads
WARM_UPS = 3  # passes before one is captured: libraries choose kernels and take memory in the first ones


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which convolutions and matrix products run in bfloat16 ("bf16") or everything in float32
    ("fp32").

    A GPU that only emulates bfloat16 stays with float32.
    """
    wanted = precision == "bf16"
    has_it = device.type != "cuda" or not wanted or torch.cuda.is_bf16_supported(including_emulation=False)
    # no cache: it would lend a CUDA graph copies of the weights that are gone when the graph is replayed
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_it, cache_enabled=device.type != "cuda")


def normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (B, C, S, S) -> float32, less mean and over std of each channel, channels last."""
    x = x.contiguous(memory_format=torch.channels_last)  # while a pixel is one byte
    # filled on the device: a CUDA graph takes no constants from the host
    shift, scale = (torch.cat([torch.full((1, 1, 1), v, device=x.device) for v in values]) for values in (mean, std))
    return ((x - shift) / scale).contiguous(memory_format=torch.channels_last)


@dataclass
class _Buffer:
    """Values of one pass on their way to the network, and the events that tell who is done with them."""

    host: Tensor  # (B, ..), pinned where the device is a GPU
    device: Tensor  # (B, ..); on a CPU the same memory
    copied: Any  # event: `host` may be filled again
    read: Any  # event: `device` may be overwritten


class Forward:
    """Applies `function`, a network or part of one, to chunks in passes of one fixed shape.

    The fixed shape makes a row's features independent of its neighbours, and lets a GPU replay each pass as a CUDA
    graph. On a GPU nothing waits but by events: the host fills pinned buffers while earlier passes run, copies and
    passes have a stream each, and features come back once per chunk. Threads may share a Forward: while one waits for
    its features, the other's passes are queued behind. On a CPU the same steps follow one another.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], device: torch.device, precision: str, encode_batch_size: int
    ) -> None:
        self.function, self.device = function, device
        self.precision, self.encode_batch_size = precision, encode_batch_size
        self._module: Any = torch.get_device_module(device)  # torch.cuda; torch.cpu has the same names
        self._is_gpu = device.type == "cuda"
        self._copying, self._running = self._module.Stream(), self._module.Stream()
        self._lock = threading.Lock()
        self._buffers: list[_Buffer] = []
        self._run: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Values (N, ..) of one shape and type, as an array or one by one -> (N, D) float32. N = 0 needs an array."""
        with self._lock:
            self._fit_buffers(values)
            features, done = self._submit(values)
        done.synchronize()
        return features.numpy()

    def _fit_buffers(self, values: Sequence[np.ndarray] | np.ndarray) -> None:
        """Make the buffers, once for all chunks of values of one shape."""
        shape = values.shape[1:] if isinstance(values, np.ndarray) else values[0].shape
        dtype = values.dtype if isinstance(values, np.ndarray) else values[0].dtype
        host = torch.from_numpy(np.empty(0, dtype)).dtype
        whole = (self.encode_batch_size, *shape)
        if self._buffers and (self._buffers[0].host.shape, self._buffers[0].host.dtype) == (whole, host):
            return
        self._module.synchronize()
        self._run, self._buffers = None, []
        for _ in range(GPU_BUFFERS if self._is_gpu else 1):
            staging = torch.empty(whole, dtype=host, pin_memory=self._is_gpu)
            self._buffers.append(_Buffer(staging, staging.to(self.device), self._event(), self._event()))
        self._module.synchronize()

    def _event(self) -> Any:
        # a thread that waits sleeps: its core is for decoding
        return torch.cuda.Event(blocking=True) if self._is_gpu else self._module.Event()

    def _submit(self, values: Sequence[np.ndarray] | np.ndarray) -> tuple[Tensor, Any]:
        """Queue all passes over a chunk; features (N, D) on the host, which are there once the event has come."""
        size, features = self.encode_batch_size, None
        self._running.wait_stream(self._module.current_stream())  # whoever changed the weights last
        for number, start in enumerate(range(0, max(len(values), 1), size)):
            buffer, some = self._buffers[number % len(self._buffers)], values[start : start + size]
            buffer.copied.synchronize()
            _fill(buffer.host.numpy(), some)
            with self._module.stream(self._copying):
                buffer.read.wait(self._copying)
                buffer.device.copy_(buffer.host, non_blocking=True)
                buffer.copied.record()
            with self._module.stream(self._running):
                buffer.copied.wait(self._running)
                found = self._pass(buffer.device)
                buffer.read.record()
                if features is None:
                    features = torch.empty((len(values), *found.shape[1:]), device=self.device)
                features[start : start + size] = found[: len(some)]
        assert features is not None
        done = self._event()
        with self._module.stream(self._running):
            fetched = features.to("cpu", non_blocking=True)  # into pinned memory
            done.record()
        return fetched, done

    def _pass(self, x: Tensor) -> Tensor:
        if self._run is None:
            self._run = self._captured(x) if self._is_gpu else self._eager
        return self._run(x)

    def _eager(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.function(x)

    def _captured(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """A pass as one CUDA graph: the same kernels as by themselves, without the host's time for each of them."""
        given = x.clone()
        for _ in range(WARM_UPS):
            self._eager(given)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads of the process do meanwhile does not end the capture
            with torch.cuda.graph(graph, stream=self._running, capture_error_mode="thread_local"):
                found = self._eager(given)
        except RuntimeError as error:  # a network that looks at its values, or copies constants from the host
            log.warning("this network runs without a CUDA graph, kernel by kernel: %s", str(error).split("\n")[0])
            return self._eager

        def replay(x: Tensor) -> Tensor:
            given.copy_(x)
            graph.replay()
            return found

        return replay


def _fill(host: np.ndarray, values: Sequence[np.ndarray] | np.ndarray) -> None:
    """Copy values to the beginning of a buffer, zeros behind them."""
    num = len(values)
    if isinstance(values, np.ndarray):
        np.copyto(host[:num], values)
    else:
        np.stack(values, out=host[:num])
    host[num:] = 0
