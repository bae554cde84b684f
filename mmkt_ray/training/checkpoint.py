"""The state of an unfinished run in one file, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mmkt_ray import storage
from mmkt_ray.errors import DataError


class Checkpoint(Protocol):
    """Where `fit` keeps its state. Rank 0 saves, every rank loads."""

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep flat tensors and a JSON-able rest; the caller offers them after every epoch."""
        ...

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last, on the CPU; None if nothing was."""
        ...


class FileCheckpoint:
    """One safetensors file with the JSON in its metadata, replaced atomically."""

    def __init__(self, uri: str, interval_s: float = 0.0) -> None:
        """interval_s: skip a save that comes sooner after the last one,
        so that short epochs are not spent on writing."""
        self.uri, self.interval_s = uri, interval_s
        self._last_s = time.monotonic()

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """See Checkpoint."""
        if time.monotonic() - self._last_s < self.interval_s:
            return
        on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        storage.write_bytes(self.uri, save_tensors(on_cpu, metadata={"state": json.dumps(state)}))
        self._last_s = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """See Checkpoint."""
        try:
            data = storage.read_bytes(self.uri)
        except FileNotFoundError:
            return None
        header_bytes = int.from_bytes(data[:8], "little")  # the safetensors format: length, JSON header, tensors
        try:
            metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
            return load_tensors(data), json.loads(metadata["state"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the checkpoint '{self.uri}' is damaged ({error}): remove it to train from the start"
            ) from None
