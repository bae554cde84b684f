"""Encoders and reducers by name, and their fitted state on disk: safetensors + JSON, never pickle."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mmkt_ray import storage
from mmkt_ray.config import CustomEncoder, EncoderConfig, ReduceConfig, Section, fingerprint
from mmkt_ray.encoders.base import Encoder
from mmkt_ray.encoders.reduce import REDUCERS
from mmkt_ray.errors import ConfigError, DataError

ENCODERS = {  # imported when built: a process that counts words needs no torch
    "cnn": "mmkt_ray.encoders.image:CnnImageEncoder",
    "pixels": "mmkt_ray.encoders.image:PixelsImageEncoder",
    "tfidf": "mmkt_ray.encoders.text:TfidfEncoder",
    "logmel_cnn": "mmkt_ray.encoders.audio:LogMelCnnAudioEncoder",
    "torchvision": "mmkt_ray.encoders.pretrained.images:TorchvisionImageEncoder",
    "efficientnet-lite0": "mmkt_ray.encoders.pretrained.images:EfficientNetLite0ImageEncoder",
    "minilm": "mmkt_ray.encoders.pretrained.texts:MinilmTextEncoder",
    "huggingface": "mmkt_ray.encoders.pretrained.texts:HuggingFaceTextEncoder",
}


def build_encoder(config: EncoderConfig) -> Encoder:
    """An unfitted encoder. Raises: ConfigError if a user's class can't be imported or refuses its options."""
    if not isinstance(config, CustomEncoder):
        return _load(ENCODERS[config.name])(config)
    try:
        return _load(config.name)(**config.options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"cannot build encoder '{config.name}': {error}; it must be importable on every node that runs the job"
        ) from None


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build_reducer(config: ReduceConfig) -> Any:
    """An unfitted reducer for its config section; what it can do: encoders/reduce.py."""
    return REDUCERS[config.name](config)


def save_fitted(fitted: Any, config: Section, uri: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Write `state.safetensors`, then `encoder.json` (config, dim, fingerprint, `extra`). Returns the latter."""
    tensors, rest = fitted.state()
    data = save_tensors({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    card = {"config": config.model_dump(mode="json"), "version": fitted.version, "rest": rest}
    # hashed by content, not by the file's bytes: the order of tensors in it is not promised
    digests = {n: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for n, v in sorted(tensors.items())}
    card |= {"dim": fitted.dim, "fingerprint": fingerprint([card, digests]), **extra}
    storage.write_bytes(storage.join(uri, "state.safetensors"), data)
    storage.write_json(storage.join(uri, "encoder.json"), card)
    return card


def read_card(uri: str) -> dict[str, Any]:
    """The JSON side of a fitted encoder or reducer. Raises: DataError if there is none."""
    try:
        return storage.read_json(storage.join(uri, "encoder.json"))
    except FileNotFoundError:
        raise DataError(f"no fitted encoder in '{uri}': run `mmkt extract` (or `mmkt run`) first") from None


def load_fitted(fitted: Any, uri: str) -> Any:
    """Give a freshly built encoder or reducer its fitted state. Raises: DataError if there is none, or it is damaged."""
    card = read_card(uri)
    try:
        tensors, rest = load_tensors(storage.read_bytes(storage.join(uri, "state.safetensors"))), card["rest"]
    except (FileNotFoundError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"the encoder in '{uri}' is damaged ({error}): remove the folder and extract again") from None
    fitted.load_state(tensors, rest)
    return fitted
