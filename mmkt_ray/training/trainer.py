"""Training as a job: a feature store in, a model folder out; on as many Ray Train workers as the config says.

Called by steps.py with the store of features/extract.py; each worker runs training/loop.py; evaluation/evaluate.py scores the
model folder.

Every worker opens the store itself. Rank 0 writes the checkpoint and, at the end, the model folder. Experts of single
modalities (`model.experts`) lie beside the models of a run, in `.experts/<fingerprint>`, for all variants to share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmkt_ray import cluster, storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import ConfigError, DataError, UserError
from mmkt_ray.features.store import FeatureTable, Store, open_store
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.model_folder import copy_model, load_model, save_model
from mmkt_ray.inference.rows import readable
from mmkt_ray.inference.training_record import ChosenSettings, Outcome, Training, ValScores
from mmkt_ray.models import ExpertModel
from mmkt_ray.scoring.heldout import FILE as HELDOUT_FILE
from mmkt_ray.scoring.heldout import HeldOut, as_train, load_heldout, pattern_name, save_heldout
from mmkt_ray.training.auto import (
    BASE,
    CANDIDATES,
    FEW_ROWS,
    choose_settings,
    for_depth,
    is_plain,
    is_screened,
    screening_config,
    with_settings,
)
from mmkt_ray.training.batches import Worker
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.experts import expert_configs, join_experts, with_heldout
from mmkt_ray.training.fingerprint import (
    find_model,
    has_experts,
    is_trained,
    linear_place,
    model_identity,
    training_fingerprint,
)
from mmkt_ray.training.fold_stack import fit_and_hold_out, hold_out
from mmkt_ray.training.linear import is_linear, linear_result
from mmkt_ray.training.loop import fit
from mmkt_ray.training.methods.imbalance import read_excluded
from mmkt_ray.training.methods.transfer import load_knowledge
from mmkt_ray.training.validation import summarise
from mmkt_ray.training.wide import is_wide, wide_config, widen

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
) -> Outcome:
    """Fit `config`'s model to the store and publish it as `model_uri`; a model of the same fingerprint is left as it is.

    folder: where the models lie that `training.transfer` names, and experts; None: beside this one. run: what does the work.
    The same command resumes a killed run.

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
        return _outcome(_trained(model_uri), "up to date")
    storage.make_dir(model_uri)
    if has_experts(config):
        return _outcome(_train_with_experts(config, store, model_uri, folder, run), "trained")
    scratch = storage.join(model_uri, ".train")
    has_settings = bool(config.training.auto) and not is_linear(config)
    choice, settings = find_settings(config, store, run) if has_settings else (None, "")
    wide = train_wide(config, store, folder, run)
    args = WorkerArgs(config, choice, store_uri, model_uri, scratch, digest, folder, settings, wide)
    if args.holds_out and config.training.num_workers > 1:
        _ask(run, hold_out_on_worker, args, 1)
    outcome = _ask(run, train_on_worker, args, 1 if is_linear(args.settled) else config.training.num_workers)
    storage.remove_folder(scratch)
    return _outcome(outcome, "trained")


def _outcome(training: Training, status: str) -> Outcome:
    return Outcome.model_validate({**training.to_dict(), "status": status})


def _trained(uri: str) -> Training:
    """How the model that lies there was trained. Raises: DataError if there is none."""
    card = read_card(uri)
    if card is None or card.fit is None:
        raise DataError(f"there is no trained model in '{uri}': remove the folder and train again")
    return card.fit


@dataclass(frozen=True)
class WorkerArgs:
    """What a worker is given."""

    config: Config
    choice: ChosenSettings | None  # of the settings that the config leaves open
    store_uri: str
    model_uri: str
    scratch: str  # folder of what a killed run goes on from
    fingerprint: str
    folder: str  # of the models that knowledge comes from
    settings: str = ""  # folder of what is known from choosing
    wide: str = ""  # folder of the linear model that the network gets beside it

    @property
    def settled(self) -> Config:
        """The config with nothing left to choose."""
        return with_settings(self.config, self.choice.settings) if self.choice else self.config

    @property
    def holds_out(self) -> bool:
        """Whether the model is judged by others of its settings that leave rows out, and itself learns from all rows."""
        return self.choice is not None and is_plain(self.config)

    def in_stack(self, table: FeatureTable) -> bool:
        """Whether the model trains in one stack with those that judge it: it is done before a checkpoint would pay."""
        few = np.isin(table.split, ("train", "val")).sum() <= FEW_ROWS
        return self.holds_out and bool(few) and self.config.training.num_workers == 1

    def known(self) -> HeldOut | None:
        """Held-out predictions of models of this config that are there from choosing its settings."""
        return load_heldout(self.settings) if self.settings and is_screened(self.config) else None


def _ask(run: Run, loop: Callable[..., Any], args: WorkerArgs, num_workers: int) -> Any:
    """Have the workers do it. Raises: the user's error, which they return as a value."""
    outcome = run(loop, args, num_workers, args.scratch)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def find_settings(config: Config, store: Store, run: Run = cluster.run_on_workers) -> tuple[ChosenSettings, str]:
    """The settings that `training.auto` leaves open, and the folder of held-out predictions that choosing them left.

    They are chosen once for the models of the same modalities and tasks, whatever their seeds.
    """
    folder = settings_uri(config, store)
    if storage.exists(f"{folder}.json"):
        choice = ChosenSettings.read(f"{folder}.json")
    else:
        choice, heldout = _ask(run, choose_on_worker, WorkerArgs(config, None, store.uri, "", "", "", ""), 1)
        if heldout is not None:
            save_heldout(folder, heldout)
        choice.write(f"{folder}.json")
    return choice.replaced(settings=for_depth(config, choice.settings)), folder


def settings_uri(config: Config, store: Store) -> str:
    """Where the settings of this config's model and of all like it are kept, in the store's folder: `<uri>.json`, and the
    folder `<uri>` of held-out predictions."""
    asked = screening_config(config)
    about = {
        "store": store.manifest.fingerprint,
        "modalities": asked.model_modalities,
        "tasks": {t: asked.tasks[t].model_dump(mode="json") for t in asked.model_tasks},
        "model": model_identity(asked),
        "training": asked.training.model_dump(mode="json", exclude={"exclude"}),
        "excluded": read_excluded(asked.training.exclude).tolist() if asked.training.exclude else [],
        "seed": asked.seed,
        "set": [dict(candidate) for candidate in (BASE, *CANDIDATES)],
    }
    return storage.join(store.uri, "settings", fingerprint(about))


def choose_on_worker(
    args: WorkerArgs, rank: int, world_size: int, device: torch.device
) -> tuple[ChosenSettings, HeldOut | None] | UserError:
    """One worker's part of `find_settings`."""
    try:
        return choose_settings(args.config, _table(args.config, args.store_uri), device)
    except UserError as error:
        return error


def hold_out_on_worker(args: WorkerArgs, rank: int, world_size: int, device: torch.device) -> UserError | None:
    """Predictions of held-out rows into the scratch folder, unless they are there."""
    if storage.exists(storage.join(args.scratch, HELDOUT_FILE)):
        return None
    try:
        found = hold_out(args.settled, _table(args.config, args.store_uri), device, args.known())
        if found is not None:
            save_heldout(args.scratch, found)
    except UserError as error:
        return error
    return None


def _table(config: Config, store_uri: str) -> FeatureTable:
    return open_store(store_uri).table(config.model_modalities, config.model_tasks)


def _train_with_experts(config: Config, store: Store, model_uri: str, folder: str, run: Run) -> Training:
    """The fused model and the experts that are not there yet one after the other, then all of them as one."""
    scratch = storage.join(model_uri, ".parts")
    own = config.with_overrides({"model.experts": False})
    fused_uri = find_model(own, store, folder) or storage.join(scratch, "fused")
    train(own, store.uri, fused_uri, folder, run)
    fused = _trained(fused_uri)
    experts, parts = dict[str, str](), dict[str, Training]()
    columns = (config.model_modalities, config.model_tasks)  # read twice, so that no table lies here while others train
    for name, expert in expert_configs(config, store.table(*columns)).items():
        try:
            experts[name] = train_expert(expert, store, storage.join(scratch, f"expert-{name}"), folder, run)
        except (ConfigError, DataError) as error:
            log.warning("no expert of %s: %s", name, error)
            continue
        parts[name] = _trained(experts[name])
    table = store.table(*columns)
    known = {name: with_heldout(_model(uri), load_heldout(uri), table) for name, uri in {"": fused_uri, **experts}.items()}
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


def _model(uri: str) -> Any:
    return load_model(uri)[0]


def train_wide(config: Config, store: Store, folder: str, run: Run) -> str:
    """Where the linear model lies that the config's model gets beside its network; empty if it gets none."""
    if not is_wide(config):
        return ""
    own = wide_config(config)
    uri = linear_place(own, store, folder)
    train(own, store.uri, uri, folder, run)
    return uri


def train_expert(config: Config, store: Store, scratch: str, folder: str, run: Run) -> str:
    """Where the expert lies: as a variant of the run or among its experts, to which it is added if it is new."""
    if found := find_model(config, store, folder):
        return found
    digest = train(config, store.uri, scratch, folder, run).fingerprint
    uri = storage.join(folder, ".experts", digest)
    copy_model(scratch, uri)
    return uri


def train_on_worker(args: WorkerArgs, rank: int, world_size: int, device: torch.device) -> Training | UserError:
    """One worker's part: what the card keeps, or the user's error as a value: raised, it would be tried again as a crash."""
    try:
        return _train_on_worker(args, rank, world_size, device)
    except UserError as error:  # a full disk among them
        return error


def _train_on_worker(args: WorkerArgs, rank: int, world_size: int, device: torch.device) -> Training:
    config, store = args.settled, open_store(args.store_uri)
    checkpoint = FileCheckpoint(storage.join(args.scratch, f"{args.fingerprint}.safetensors"), CHECKPOINT_INTERVAL_S)
    report = progress_log(f"{pattern_name(config.model_modalities)}, {config.model.fusion.name}") if rank == 0 else None
    knowledge = load_knowledge(config.training.transfer, args.folder)
    table = store.table(sorted({*config.model_modalities, *knowledge.modalities}), config.model_tasks)
    in_stack = args.in_stack(table)
    if args.holds_out and world_size == 1 and not in_stack and (error := hold_out_on_worker(args, 0, 1, device)):
        raise error
    heldout = load_heldout(args.scratch) if args.holds_out else None
    worker = Worker(rank, world_size, device)
    path, shares = None, None
    if is_linear(config):
        result, heldout, path = linear_result(config, table)
    elif in_stack:
        result, heldout = fit_and_hold_out(config, table, device, args.known())
        if report:
            report({**result.epochs[-1].to_dict(), "num_epochs": len(result.epochs)})
    else:
        whole = as_train(table) if heldout else table
        result = fit(config, whole, worker=worker, knowledge=knowledge, report=report, checkpoint=checkpoint)
    model, seconds = result.model, result.seconds
    if args.wide and rank == 0:
        linear, known, judged = _model(args.wide), load_heldout(args.wide), with_heldout(model, heldout, table).heldout
        seconds += _trained(args.wide).seconds
        if known is not None and len(judged.rows):
            heldout, shares = widen(model, judged, linear, known, table)
    by_part = model.num_parameters_by_part()
    training = Training(
        fingerprint=args.fingerprint,
        best_epoch=result.best_epoch,
        val=heldout_scores(heldout, config, table) if heldout else result.val,
        seconds=seconds,
        num_params=sum(by_part.values()),
        num_params_by_part=by_part,
        num_workers=world_size,
        device=device.type,
        history=result.epochs,
        auto=args.choice,
        linear=path,
        wide=shares,
    )
    if rank == 0:
        if heldout:
            save_heldout(args.model_uri, heldout)
        else:
            storage.remove(storage.join(args.model_uri, HELDOUT_FILE))
        save_model(args.model_uri, model, args.config, store.manifest, training, args.fingerprint)
    return training


def heldout_scores(heldout: HeldOut, config: Config, table: FeatureTable) -> ValScores:
    """The scores of `validate` on held-out rows, and how these were held out."""
    logits = heldout.logits[pattern_name(config.model_modalities)]
    tallies = {}
    for t, values in logits.items():
        able = readable(table, config.task_inputs(t))[heldout.rows]
        labels = table.labels[t][heldout.rows[able]].tensors()
        tallies[t] = labels.kind.tally(torch.from_numpy(values[able]), labels).numpy()
    return ValScores.model_validate({"on": heldout.on, **summarise(tallies, table.kinds)})


def progress_log(what: str) -> Callable[[dict[str, Any]], None]:
    """A report for `fit` that logs an epoch every few seconds, and the last one; the others too where all is shown (`--verbose`).
    what: is trained."""
    told_s = time.monotonic()

    def tell(record: dict[str, Any]) -> None:
        nonlocal told_s
        due = record["epoch"] == record["num_epochs"] or time.monotonic() - told_s >= LOG_INTERVAL_S
        told_s = time.monotonic() if due else told_s
        score = f", val score {record['val']['score']:.3f}" if record["val"] else ""
        epoch, num_epochs, loss = record["epoch"], record["num_epochs"], record["train_loss"]
        level = logging.INFO if due else logging.DEBUG
        log.log(level, "%s: epoch %d/%d: loss %.3f%s", what, epoch, num_epochs, loss, score)

    return tell
