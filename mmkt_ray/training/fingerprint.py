"""What decides a model's weights, as a fingerprint; and whether such a model is there."""

from __future__ import annotations

from typing import Any

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import DataError
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.scoring.heldout import pattern_name
from mmkt_ray.training.methods.imbalance import read_excluded
from mmkt_ray.training.methods.transfer import source_uris
from mmkt_ray.training.wide import is_wide

SAME_ALONE = {"task_modality": "task", "modality": "architecture"}  # with one modality these schemes are the same


def has_experts(config: Config) -> bool:
    """Whether the config asks for experts, and some task fuses modalities."""
    return config.model.experts and any(len(config.task_inputs(t)) > 1 for t in config.model_tasks)


def model_identity(config: Config) -> dict[str, Any]:
    """The model's keys, JSON-able. Keys without effect have a fixed value, so equal models have equal identities."""
    model = config.model
    found = model.model_dump(mode="json", exclude={"modalities", "tasks"})
    found |= {"sharing": list(model.schemes), "experts": has_experts(config), "wide": is_wide(config)}
    if len(config.model_modalities) == 1:
        sharing = [SAME_ALONE.get(scheme, scheme) for scheme in model.schemes]
        found |= {"sharing": sharing, "missing": "mask", "modality_dropout": 0.0}
    return found


def training_fingerprint(config: Config, store: Store, folder: str) -> str:
    """Digest of all that decides the weights: data, model, training, seed, and the models that knowledge comes from.

    Raises: DataError if one of these is not trained yet.
    """
    sources = {}
    for name, uri in source_uris(config.training.transfer, folder).items():
        card = read_card(uri)
        if card is None:
            raise DataError(
                f"training.transfer names '{name}', but there is no trained model at '{uri}': train it first"
            )
        sources[name] = card.fingerprint
    widths = {m: config.modalities[m].hidden_dim for m in config.model_modalities}
    parts = {
        "store": store.manifest.fingerprint,
        "modalities": widths,
        "tasks": config.model_tasks,
        "model": model_identity(config),
        "training": config.training.model_dump(mode="json", exclude={"exclude"}),
        "excluded": read_excluded(config.training.exclude).tolist() if config.training.exclude else [],
        "seed": [config.seed, config.training_seed],
        "sources": sources,
        "tasks_config": {t: config.tasks[t].model_dump(mode="json") for t in config.model_tasks},
    }
    return fingerprint(parts)


def linear_place(config: Config, store: Store, folder: str) -> str:
    """Where the linear model of this config lies, for all that need it. folder: of the run's models."""
    digest = training_fingerprint(config, store, folder)
    return storage.join(folder, ".linear", digest, pattern_name(config.model_modalities))


def is_trained(uri: str, digest: str) -> bool:
    """Whether a whole model of this fingerprint lies there."""
    card = read_card(uri)
    return card is not None and card.fingerprint == digest and storage.exists(storage.join(uri, "model.safetensors"))


def find_model(config: Config, store: Store, folder: str) -> str | None:
    """The model of this config among the folder's experts and models."""
    digest = training_fingerprint(config, store, folder)
    found = storage.glob(storage.join(folder, "*", "config.json"), fixed=folder)
    variants = [info.path.split("/")[-2] for info in found]
    places = [storage.join(folder, name) for name in (f".experts/{digest}", *variants)]
    return next((uri for uri in places if is_trained(uri, digest)), None)
