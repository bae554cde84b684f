"""The process that decodes: `decoding.py` says what it is asked for and how it answers."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mmkt_ray.config.samples_config import SamplesConfig  # not imported here: this process is light
    from mmkt_ray.kinds.images import Reply

BASE_BYTES, BYTES_PER_PIXEL = 1 << 30, 40  # memory of the child: itself and any sound; the largest image in floats
OUT_OF_MEMORY = 71  # exit code
READY = b"ready\n"
# decoded or not; bytes of the note; the kind's number; the content's hash; of an array that follows its type's code,
# number of axes and their lengths
REPLY = struct.Struct("<?IqQBB4Q")
TYPES = ("uint8", "float32", "int16", "int32", "int64", "float64")
IN_PLACE = 255  # in the place of a type: the array stands in shared memory
ROWS_BYTES = 16 << 20  # of shared memory for such arrays



class Limits(NamedTuple):
    """What one sample may take."""

    max_pixels: int
    timeout_s: float

    @classmethod
    def of(cls, samples: SamplesConfig) -> Limits:
        """As the config has them."""
        return cls(samples.max_image_pixels, samples.decode_timeout_s)

    @property
    def memory_bytes(self) -> int:
        """The address space of the child, for itself, its libraries and one sample."""
        return BASE_BYTES + BYTES_PER_PIXEL * self.max_pixels


def map_shared(fd: int) -> tuple[memoryview, np.ndarray]:
    """What both processes map: numbers that tell progress, and room for arrays, ROWS_BYTES uint8."""
    os.truncate(fd, mmap.PAGESIZE + ROWS_BYTES)
    memory = mmap.mmap(fd, mmap.PAGESIZE + ROWS_BYTES)
    return memoryview(memory)[: mmap.PAGESIZE].cast("Q"), np.frombuffer(memory, np.uint8, offset=mmap.PAGESIZE)


def serve_decoding(shared_fd: int, function: str) -> None:
    """Answer requests with `function` until the parent closes the pipe or is gone."""
    requests, replies = _take_pipes()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also in the midst of C code
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    progress, shared = map_shared(shared_fd)
    module, _, name = function.partition(":")
    decode = getattr(importlib.import_module(module), name)
    getattr(sys.modules[module], "warm_up", lambda: None)()
    replies.write(READY)
    replies.flush()
    while line := requests.readline():
        request = json.loads(line)
        samples = [requests.read(length) for length in request["lengths"]]
        limits, rows = Limits(*request["limits"]), None
        if request["row"] is not None:
            rows = shared[: len(samples) * prod(request["row"])].reshape(len(samples), *request["row"])
        _limit_memory(limits.memory_bytes)
        for i, data in enumerate(samples):
            progress[0] = i
            array, number, note, digest = _decode(decode, data, limits, request["size"])
            if array is not None and rows is not None:
                rows[i] = array
            _reply(replies, array, number, note, digest, in_place=rows is not None)
        replies.flush()


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output; from here on what libraries print goes to standard error."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return open(requests, "rb"), open(replies, "wb", buffering=1 << 18)


def _limit_memory(num_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = 1 << 62 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_AS, (min(num_bytes, most), hard))


def _decode(
    decode: Callable[[bytes, int, Any], Reply], data: bytes, limits: Limits, size: list[Any] | None
) -> tuple[np.ndarray | None, int, list[str] | str, int]:
    """As the function replies; None and a reason if the sample is broken."""
    signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
    try:
        return decode(data, limits.max_pixels, size)
    except MemoryError:  # perhaps of samples before this one: a new child tells
        os._exit(OUT_OF_MEMORY)
    except ValueError as error:
        return None, 0, str(error) or "damaged", 0
    except Exception as error:  # decoders meet damaged data with errors of every kind
        return None, 0, f"damaged: {type(error).__name__}: {error}", 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # writing may wait for the parent


def _reply(
    replies: IO[bytes], array: np.ndarray | None, number: int, note: list[str] | str, digest: int, *, in_place: bool
) -> None:
    text = json.dumps(note).encode() if note else b""
    code, shape = (
        (0, ()) if array is None else (IN_PLACE, ()) if in_place else (TYPES.index(array.dtype.name), array.shape)
    )
    lengths = (*shape, *[0] * (4 - len(shape)))
    replies.write(REPLY.pack(array is not None, len(text), number, digest, code, len(shape), *lengths) + text)
    if array is not None and not in_place:
        replies.write(np.ascontiguousarray(array).data)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        serve_decoding(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # without another try to write what the parent did not take
