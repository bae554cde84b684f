"""Models made of several: a fused model with experts of fewer modalities, a network with a linear model beside it.

Called by trainer.py, whose `train` comes in as `train`: each part is a model folder of its own. Experts lie beside
the models of a run, in `.experts/<fingerprint>`, for all variants to share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_card import read_training
from mmkt_ray.inference.model_folder import copy_model, load_model, save_model
from mmkt_ray.inference.training_record import Outcome, Training
from mmkt_ray.models import ExpertModel, MultimodalModel
from mmkt_ray.scoring.heldout import load_heldout, save_heldout
from mmkt_ray.training.experts import expert_configs, join_experts, with_heldout
from mmkt_ray.training.fingerprint import find_model, linear_place, training_fingerprint
from mmkt_ray.training.validation import heldout_scores
from mmkt_ray.training.wide import is_wide, wide_config

log = logging.getLogger(__name__)

Train = Callable[[Config, str, str, str], Outcome]  # config, store, model folder, folder of the run's models


def train_with_experts(config: Config, store: Store, model_uri: str, folder: str, train: Train) -> Training:
    """The fused model and the experts that are not there yet one after the other, then all of them as one."""
    scratch = storage.join(model_uri, ".parts")
    own = config.with_overrides({"model.experts": False})
    fused_uri = find_model(own, store, folder) or storage.join(scratch, "fused")
    train(own, store.uri, fused_uri, folder)
    fused = read_training(fused_uri)
    experts, parts = dict[str, str](), dict[str, Training]()
    columns = (config.model_modalities, config.model_tasks)  # read twice, so that no table lies here while others train
    for name, expert in expert_configs(config, store.table(*columns)).items():
        try:
            experts[name] = train_expert(expert, store, storage.join(scratch, f"expert-{name}"), folder, train)
        except (ConfigError, DataError) as error:
            log.warning("no expert of %s: %s", name, error)
            continue
        parts[name] = read_training(experts[name])
    table = store.table(*columns)
    known = {
        name: with_heldout(load_network(uri), load_heldout(uri), table)
        for name, uri in {"": fused_uri, **experts}.items()
    }
    model, heldout = join_experts(known.pop(""), known, table)
    routes = model.spec.routes if isinstance(model, ExpertModel) else {}
    answering = sorted({m for by_pattern in routes.values() for m in by_pattern.values()})
    by_part = fused.num_params_by_part | {f"expert.{m}": parts[m].num_params for m in answering}
    val = fused.val
    if load_heldout(fused_uri) is not None:
        val = heldout_scores(heldout, config, table)
        save_heldout(model_uri, heldout)
    training = fused.replaced(
        fingerprint=training_fingerprint(config, store, folder),
        seconds=fused.seconds + sum(part.seconds for part in parts.values()),
        num_params=sum(by_part.values()),
        num_params_by_part=by_part,
        experts_for=routes,
        val=val,
    )
    save_model(model_uri, model, config, store.manifest, training, training.fingerprint)
    storage.remove_folder(scratch)
    return training


def load_network(uri: str) -> MultimodalModel:
    """The model in a folder that holds a single one."""
    model = load_model(uri)[0]
    assert isinstance(model, MultimodalModel), uri
    return model


def train_wide(config: Config, store: Store, folder: str, train: Train) -> str:
    """Where the linear model lies that the config's model gets beside its network; empty if it gets none."""
    if not is_wide(config):
        return ""
    own = wide_config(config)
    uri = linear_place(own, store, folder)
    train(own, store.uri, uri, folder)
    return uri


def train_expert(config: Config, store: Store, scratch: str, folder: str, train: Train) -> str:
    """Where the expert lies: as a variant of the run or among its experts, to which it is added if it is new."""
    if found := find_model(config, store, folder):
        return found
    digest = train(config, store.uri, scratch, folder).fingerprint
    uri = storage.join(folder, ".experts", digest)
    copy_model(scratch, uri)
    return uri
