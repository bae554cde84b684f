"""The settings that `training.auto` leaves open, chosen once for all models of the same modalities and tasks,
and kept.

Called by trainer.py before it trains; auto.py says how they are chosen.
"""

from __future__ import annotations

import torch

from mmkt_ray import storage
from mmkt_ray.cluster import Run, ask_workers
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import UserError
from mmkt_ray.features.store import Store, open_store
from mmkt_ray.inference.training_record import ChosenSettings
from mmkt_ray.scoring.heldout import HeldOut, save_heldout
from mmkt_ray.training.auto import BASE, candidates_of, choose_settings, for_depth, screening_config
from mmkt_ray.training.fingerprint import model_identity
from mmkt_ray.training.methods.imbalance import read_excluded


def find_settings(config: Config, store: Store, run: Run) -> tuple[ChosenSettings, str]:
    """The settings that `training.auto` leaves open, and the folder of held-out predictions that choosing them left.

    They are chosen once for the models of the same modalities and tasks, whatever their seeds.
    """
    folder = settings_uri(config, store)
    if storage.exists(f"{folder}.json"):
        choice = ChosenSettings.read(f"{folder}.json")
    else:
        choice, heldout = ask_workers(run, choose_on_worker, (config, store.uri), 1)
        if heldout is not None:
            save_heldout(folder, heldout)
        choice.write(f"{folder}.json")
    return choice.replaced(settings=for_depth(config, choice.settings)), folder


def settings_uri(config: Config, store: Store) -> str:
    """Where the settings of this config's model and of all like it are kept, in the store's folder: `<uri>.json`, and
    the folder `<uri>` of held-out predictions."""
    asked = screening_config(config)
    about = {
        "store": store.manifest.fingerprint,
        "modalities": asked.model_modalities,
        "tasks": {t: asked.tasks[t].model_dump(mode="json") for t in asked.model_tasks},
        "model": model_identity(asked),
        "training": asked.training.model_dump(mode="json", exclude={"exclude"}),
        "excluded": read_excluded(asked.training.exclude).tolist() if asked.training.exclude else [],
        "seed": asked.seed,
        "set": [dict(candidate) for candidate in (BASE, *candidates_of(asked))],
    }
    return storage.join(store.uri, "settings", fingerprint(about))


def choose_on_worker(
    job: tuple[Config, str], rank: int, world_size: int, device: torch.device
) -> tuple[ChosenSettings, HeldOut | None] | UserError:
    """One worker's part of `find_settings`. job: config and store."""
    config, store_uri = job
    try:
        return choose_settings(config, open_store(store_uri).table(config.model_modalities, config.model_tasks), device)
    except UserError as error:
        return error
