"""Arrays that child processes fill in place: what they decode to one size crosses no pipe."""

from __future__ import annotations

import mmap
import os
import weakref
from math import prod

import numpy as np

from mmkt_ray.errors import ResourceError


class SharedArray:
    """Zeros (N, ..) uint8, N > 0, in memory that a process with its file descriptor may write.

    Raises: ResourceError if there is no such memory.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        num_bytes = prod(shape)
        self.fd = os.memfd_create("decoded")
        weakref.finalize(self, os.close, self.fd)
        try:
            os.posix_fallocate(self.fd, 0, num_bytes)  # else a child that finds none left is killed as it writes
            memory = mmap.mmap(self.fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise ResourceError(f"no {num_bytes / 1e6:,.0f} MB of memory for a chunk of decoded values: {error}") from None
        self.array = np.frombuffer(memory, np.uint8).reshape(shape)  # outlives this object


def map_rows(fd: int, start: int, num_rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows (num_rows, ..) of a shared array from `start` on, in the process that writes them. shape: of a row."""
    row_bytes = prod(shape)
    skipped = start * row_bytes % mmap.ALLOCATIONGRANULARITY
    length = skipped + num_rows * row_bytes
    memory = mmap.mmap(fd, length, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=start * row_bytes - skipped)
    return np.frombuffer(memory, np.uint8, offset=skipped).reshape(num_rows, *shape)
