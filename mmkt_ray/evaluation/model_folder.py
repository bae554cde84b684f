"""The model folder: weights and everything needed to use them.

    <model>/model.safetensors   the model's state
    <model>/config.json         its card, published last: a folder without it is no model; evaluation adds `temperatures`

Nothing in it is a pickle.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mmkt_ray import __version__, storage
from mmkt_ray.config import Config
from mmkt_ray.errors import DataError
from mmkt_ray.models import Predictor, build_model

SCHEMA_VERSION = 2


def save_model(
    uri: str, model: Predictor, config: Config, store_manifest: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Publish a model. `extra` (JSON-able) goes into the card as it is, e.g. the training's fingerprint and summary."""
    spec = model.spec
    card = {
        "schema_version": SCHEMA_VERSION,
        "spec": spec.to_dict(),
        "class_names": {t: list(store_manifest["tasks"][t]["classes"]) for t in spec.tasks},
        "encoders": {m: store_manifest["modalities"][m] for m in spec.modalities},
        "config": config.model_dump(mode="json"),
        "versions": {"mmkt_ray": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        **extra,
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    storage.remove(storage.join(uri, "config.json"))  # an older model's card must never stand beside new weights
    storage.write_bytes(storage.join(uri, "model.safetensors"), save_tensors(weights))
    storage.write_json(storage.join(uri, "config.json"), card)


def copy_model(source: str, target: str) -> None:
    """Publish a model at another place too, where none of another fingerprint may lie."""
    for name in ("model.safetensors", "config.json"):
        storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def save_temperatures(uri: str, temperatures: Mapping[str, float]) -> None:
    """Put into the card what each task's logits are to be divided by from now on; none: nothing."""
    card = read_card(uri)
    if card is not None and card.get("temperatures", {}) != temperatures:
        storage.write_json(storage.join(uri, "config.json"), card | {"temperatures": dict(temperatures)})


def read_card(uri: str) -> dict[str, Any] | None:
    """The card of a published model; None if there is none. Raises: DataError if it is damaged."""
    try:
        card = storage.read_json(storage.join(uri, "config.json"))
    except FileNotFoundError:
        return None
    if not isinstance(card, dict):
        raise DataError(f"'{uri}/config.json' is damaged: remove the folder and train again")
    return card


def load_model(uri: str) -> tuple[Predictor, dict[str, Any]]:
    """The model in eval mode, on the CPU, and its card (`class_names`, `encoders`, `config`, `temperatures`, ..).

    Raises: DataError if the folder is missing, unfinished, damaged, or of another schema version.
    """
    card = read_card(uri)
    if card is None:
        raise DataError(f"'{uri}' is no finished model folder (no config.json): run `mmkt train` with the same config")
    if card.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"'{uri}' has schema version {card.get('schema_version')}, this is {SCHEMA_VERSION}: train again"
        )
    if lacking := [part for part in ("spec", "class_names", "encoders", "config") if not isinstance(card.get(part), dict)]:
        raise DataError(f"'{uri}/config.json' is damaged (no {', '.join(lacking)}): remove the folder and train again")
    try:
        model = build_model(card["spec"])
        model.load_state_dict(load_tensors(storage.read_bytes(storage.join(uri, "model.safetensors"))))
    except FileNotFoundError:
        raise DataError(f"'{uri}' has no model.safetensors: remove the folder and train again") from None
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{uri}' is damaged ({error}): remove the folder and train again") from None
    model.temperatures = dict(card.get("temperatures", {}))
    return model.eval(), card
