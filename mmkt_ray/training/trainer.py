"""Training as a job: a feature store in, a model folder out; on as many Ray Train workers as the config says.

Called by steps.py with the store of features/extract.py; each worker runs training/loop.py; evaluation/evaluate.py
scores the model folder.

Every worker opens the store itself. Rank 0 writes the checkpoint and, at the end, the model folder. Beside this file,
chosen_settings.py finds what the config leaves open, and composite.py has the parts trained that a model is made of.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mmkt_ray import storage
from mmkt_ray.cluster import Run, ask_workers, run_on_workers
from mmkt_ray.config import Config
from mmkt_ray.errors import UserError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import read_training
from mmkt_ray.inference.model_folder import save_model
from mmkt_ray.inference.training_record import ChosenSettings, Epoch, Outcome, Training
from mmkt_ray.scoring.heldout import HELDOUT_FILE, HeldOut, as_train, load_heldout, pattern_name, save_heldout
from mmkt_ray.training.auto import FEW_ROWS, is_plain, is_screened, with_settings
from mmkt_ray.training.batches import Worker
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.chosen_settings import find_settings
from mmkt_ray.training.composite import load_network, train_wide, train_with_experts
from mmkt_ray.training.experts import with_heldout
from mmkt_ray.training.fingerprint import has_experts, is_trained, training_fingerprint
from mmkt_ray.training.fold_stack import fit_and_hold_out, hold_out
from mmkt_ray.training.linear import is_linear, linear_result
from mmkt_ray.training.loop import Report, fit
from mmkt_ray.training.methods.transfer import load_knowledge
from mmkt_ray.training.validation import heldout_scores
from mmkt_ray.training.wide import widen

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 5.0
CHECKPOINT_INTERVAL_S = 10.0  # what a killed run loses at most, beside the epoch it was in


def train(
    config: Config,
    store_uri: str,
    model_uri: str,
    folder: str | None = None,
    run: Run = run_on_workers,
) -> Outcome:
    """Fit `config`'s model to the store and publish it as `model_uri`;
    a model of the same fingerprint is left as it is.

    folder: of the run's models, such as experts and those that `training.transfer` names; None: the one that this
    model is in. run: carries out a loop on workers. The same command resumes a killed run.

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
        return _outcome(read_training(model_uri), "up to date")
    storage.make_dir(model_uri)
    part = partial(train, run=run)
    if has_experts(config):
        return _outcome(train_with_experts(config, store, model_uri, folder, part), "trained")
    scratch = storage.join(model_uri, ".train")
    has_settings = bool(config.training.auto) and not is_linear(config)
    choice, settings = find_settings(config, store, run) if has_settings else (None, "")
    wide = train_wide(config, store, folder, part)
    args = WorkerArgs(config, choice, store_uri, model_uri, scratch, digest, folder, settings, wide)
    if args.holds_out and config.training.num_workers > 1:
        ask_workers(run, hold_out_on_worker, args, 1, scratch)
    num_workers = 1 if is_linear(args.settled) else config.training.num_workers
    outcome = ask_workers(run, train_on_worker, args, num_workers, scratch)
    storage.remove_folder(scratch)
    return _outcome(outcome, "trained")


def _outcome(training: Training, status: str) -> Outcome:
    return Outcome.model_validate({**training.to_dict(), "status": status})


@dataclass(frozen=True)
class WorkerArgs:
    """What a worker is given."""

    config: Config
    choice: ChosenSettings | None  # of the settings that the config leaves open
    store_uri: str
    model_uri: str
    scratch: str  # folder that a killed run resumes from
    fingerprint: str
    folder: str  # of the models that knowledge comes from
    settings: str = ""  # folder of held-out predictions that choosing the settings left
    wide: str = ""  # folder of the linear model that is added to the network

    @property
    def settled(self) -> Config:
        """The config with nothing left to choose."""
        return with_settings(self.config, self.choice.settings) if self.choice else self.config

    @property
    def holds_out(self) -> bool:
        """Whether the model learns from all rows, and models of the same settings that leave rows out are scored for
        it."""
        return self.choice is not None and is_plain(self.config)

    def in_stack(self, table: FeatureTable) -> bool:
        """Whether the model trains in one stack with those: with few rows all are done before a checkpoint would
        pay."""
        few = np.isin(table.split, ("train", "val")).sum() <= FEW_ROWS
        return self.holds_out and bool(few) and self.config.training.num_workers == 1

    def known(self) -> HeldOut | None:
        """Held-out predictions that choosing the settings left, if its models were those of this config."""
        return load_heldout(self.settings) if self.settings and is_screened(self.config) else None


def hold_out_on_worker(args: WorkerArgs, rank: int, world_size: int, device: torch.device) -> UserError | None:
    """Write predictions of held-out rows into the scratch folder, unless they are there."""
    if storage.exists(storage.join(args.scratch, HELDOUT_FILE)):
        return None
    try:
        table = open_store(args.store_uri).table(args.config.model_modalities, args.config.model_tasks)
        found = hold_out(args.settled, table, device, args.known())
        if found is not None:
            save_heldout(args.scratch, found)
    except UserError as error:
        return error
    return None


def train_on_worker(args: WorkerArgs, rank: int, world_size: int, device: torch.device) -> Training | UserError:
    """One worker's part. Returns what the card keeps; or the user's error as a value, see `ask_workers`."""
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
            report(result.epochs[-1], len(result.epochs))
    else:
        whole = as_train(table) if heldout else table
        result = fit(config, whole, worker=worker, knowledge=knowledge, report=report, checkpoint=checkpoint)
    model, seconds = result.model, result.seconds
    if args.wide and rank == 0:
        linear, known, judged = (
            load_network(args.wide),
            load_heldout(args.wide),
            with_heldout(model, heldout, table).heldout,
        )
        seconds += read_training(args.wide).seconds
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


def progress_log(what: str) -> Report:
    """A report for `fit` that logs an epoch every few seconds, and the last one; the others too where all is shown
    (`--verbose`). what: names the model."""
    told_s = time.monotonic()

    def tell(epoch: Epoch, num_epochs: int) -> None:
        nonlocal told_s
        due = epoch.epoch == num_epochs or time.monotonic() - told_s >= LOG_INTERVAL_S
        told_s = time.monotonic() if due else told_s
        score = f", val score {epoch.val.score:.3f}" if epoch.val else ""
        level = logging.INFO if due else logging.DEBUG
        log.log(level, "%s: epoch %d/%d: loss %.3f%s", what, epoch.epoch, num_epochs, epoch.train_loss, score)

    return tell
