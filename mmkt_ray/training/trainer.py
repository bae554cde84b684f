"""Training as a job: a feature store in, a model folder out; on as many Ray Train workers as the config says.

Every worker opens the store itself. Rank 0 writes the checkpoint and, at the end, the model folder. Experts of single
modalities (`model.experts`) lie beside the models of a run, in `.experts/<fingerprint>`, for all variants to share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from mmkt_ray import cluster, storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import DataError, UserError
from mmkt_ray.evaluation.model_folder import copy_model, load_model, read_card, save_model
from mmkt_ray.features.store import Store, open_store
from mmkt_ray.models import ExpertModel
from mmkt_ray.training.batches import World
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.experts import expert_configs, has_experts, join_experts, model_identity
from mmkt_ray.training.imbalance import read_excluded
from mmkt_ray.training.loop import FitResult, fit
from mmkt_ray.training.transfer import load_knowledge, source_uris

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
CHECKPOINT_INTERVAL_S = 10.0  # what a killed run loses at most, beside the epoch it was in


Run = Callable[[Callable[..., Any], Any, int, str | None], Any]  # see cluster.run_on_workers


def train(
    config: Config,
    store_uri: str,
    model_uri: str,
    folder: str | None = None,
    run: Run = cluster.run_on_workers,
) -> dict[str, Any]:
    """Fit `config`'s model to the store and publish it as `model_uri`; a model of the same fingerprint is left as it is.

    folder: where the models lie that `training.transfer` names, and experts; None: beside this one. run: what does the work.
    The same command resumes a killed run.

    Returns: `status` (trained | up to date), `fingerprint`, `best_epoch`, `val` (its scores or None), `seconds`, `num_params`,
    `num_params_by_part`, `num_workers`, `device`, `history` (per epoch: epoch, train_loss, val, seconds). Of a model with
    experts these are the fused part's, `seconds` and `num_params` the sums over all parts, those that it shares included, and
    `experts_for` says who answers what, see `ExpertSpec.routes`.
    Raises: DataError, ConfigError (see `fit`); ResourceError if the workers do not fit the cluster.
    """
    # workers have another current folder
    store_uri, model_uri = storage.absolute(store_uri), storage.absolute(model_uri)
    if config.training.exclude:
        config = config.with_overrides({"training.exclude": storage.absolute(config.training.exclude)})
    folder = folder or model_uri.rpartition("/")[0]
    store = open_store(store_uri)
    digest = training_fingerprint(config, store, folder)
    if is_trained(model_uri, digest):
        for left in (".train", ".parts"):  # by a run that was killed just after it published
            storage.remove_folder(storage.join(model_uri, left))
        return {**(read_card(model_uri) or {})["training"], "status": "up to date"}
    storage.make_dir(model_uri)
    if has_experts(config):
        return {**_train_with_experts(config, store, model_uri, folder, run), "status": "trained"}
    scratch = storage.join(model_uri, ".train")
    job = {"config": config, "store_uri": store_uri, "model_uri": model_uri, "scratch": scratch, "fingerprint": digest}
    job["folder"] = folder
    outcome = run(train_on_worker, job, config.training.num_workers, scratch)
    if isinstance(outcome, UserError):
        raise outcome
    storage.remove_folder(scratch)
    return {**outcome, "status": "trained"}


def is_trained(uri: str, digest: str) -> bool:
    """Whether a whole model of this fingerprint lies there."""
    card = read_card(uri) or {}
    return card.get("fingerprint") == digest and storage.exists(storage.join(uri, "model.safetensors"))


def _train_with_experts(config: Config, store: Store, model_uri: str, folder: str, run: Run) -> dict[str, Any]:
    """The fused model and the experts that are not there yet one after the other, then all of them as one."""
    scratch = storage.join(model_uri, ".parts")
    own = config.with_overrides({"model.experts": False})
    fused_uri = _find(own, store, folder) or storage.join(scratch, "fused")
    summary = train(own, store.uri, fused_uri, folder, run)
    experts, parts = {}, {}
    columns = (config.model_modalities, config.model_tasks)  # read twice, so that no table lies here while others train
    for m, expert in expert_configs(config, store.table(*columns)).items():
        try:
            uri = _train_expert(expert, store, storage.join(scratch, f"expert-{m}"), folder, run)
        except UserError as error:
            log.warning("no expert of %s: %s", m, error)
            continue
        experts[m], card = load_model(uri)
        parts[m] = card["training"]
    model = join_experts(load_model(fused_uri)[0], experts, store.table(*columns))
    routes = model.spec.routes if isinstance(model, ExpertModel) else {}
    answering = sorted({m for by_pattern in routes.values() for m in by_pattern.values()})
    by_part = summary["num_params_by_part"] | {f"expert.{m}": parts[m]["num_params"] for m in answering}
    summary = {k: v for k, v in summary.items() if k != "status"} | {
        "fingerprint": training_fingerprint(config, store, folder),
        "seconds": summary["seconds"] + sum(part["seconds"] for part in parts.values()),
        "num_params": sum(by_part.values()),
        "num_params_by_part": by_part,
        "experts_for": routes,
    }
    extra = {"fingerprint": summary["fingerprint"], "training": summary}
    save_model(model_uri, model, config, store.manifest, extra)
    storage.remove_folder(scratch)
    return summary


def _train_expert(config: Config, store: Store, scratch: str, folder: str, run: Run) -> str:
    """Where the expert lies: as a variant of the run or among its experts, to which it is added if it is new."""
    if found := _find(config, store, folder):
        return found
    digest = train(config, store.uri, scratch, folder, run)["fingerprint"]
    uri = storage.join(folder, ".experts", digest)
    copy_model(scratch, uri)
    return uri


def _find(config: Config, store: Store, folder: str) -> str | None:
    """The model of this config among the folder's experts and models."""
    digest = training_fingerprint(config, store, folder)
    found = storage.glob(storage.join(folder, "*", "config.json"), fixed=folder)
    variants = [info.path.split("/")[-2] for info in found]
    places = [storage.join(folder, name) for name in (f".experts/{digest}", *variants)]
    return next((uri for uri in places if is_trained(uri, digest)), None)


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
        sources[name] = card["fingerprint"]
    widths = {m: config.modalities[m].hidden_dim for m in config.model_modalities}
    parts = {
        "store": store.manifest["fingerprint"],
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


def train_on_worker(
    job: dict[str, Any], rank: int, world_size: int, device: torch.device
) -> dict[str, Any] | UserError:
    """One worker's part: the summary, or the user's error as a value, because raised it would be tried again as a crash."""
    config: Config = job["config"]
    store = open_store(job["store_uri"])
    digest = job["fingerprint"]
    checkpoint = FileCheckpoint(storage.join(job["scratch"], f"{digest}.safetensors"), CHECKPOINT_INTERVAL_S)
    report = progress_log(config.training.epochs) if rank == 0 else None
    try:
        knowledge = load_knowledge(config.training.transfer, job["folder"])
        table = store.table(sorted({*config.model_modalities, *knowledge.modalities}), config.model_tasks)
        world = World(rank, world_size, device)
        result = fit(config, table, world=world, knowledge=knowledge, report=report, checkpoint=checkpoint)
    except UserError as error:
        return error
    summary = summarise(result, digest, world_size, device)
    if rank == 0:
        extra = {"fingerprint": digest, "training": summary}
        save_model(job["model_uri"], result.model, config, store.manifest, extra)
    return summary


def progress_log(num_epochs: int) -> Callable[[dict[str, Any]], None]:
    """A report for `fit` that logs an epoch every few seconds, and the last one."""
    told_s = time.monotonic()

    def tell(record: dict[str, Any]) -> None:
        nonlocal told_s
        if record["epoch"] < num_epochs and time.monotonic() - told_s < LOG_INTERVAL_S:
            return
        told_s = time.monotonic()
        score = f", val macro-F1 {record['val']['score']:.3f}" if record["val"] else ""
        log.info("epoch %d/%d: loss %.3f%s", record["epoch"], num_epochs, record["train_loss"], score)

    return tell


def summarise(result: FitResult, digest: str, num_workers: int, device: torch.device) -> dict[str, Any]:
    """What `train` returns and the model's card keeps, but for the status."""
    return {
        "fingerprint": digest,
        "best_epoch": result.best_epoch,
        "val": result.val,
        "seconds": result.seconds,
        "num_params": sum(result.num_parameters.values()),
        "num_params_by_part": result.num_parameters,
        "num_workers": num_workers,
        "device": device.type,
        "history": result.history,
    }
