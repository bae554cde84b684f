"""The training loop: features in, best model out. Plain torch; one process or many under torch.distributed.

Called by training/trainer.py on each worker; the model is models/multimodal.py.

Axes: N rows of the table, C classes of one task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.training_record import Epoch, ValScores
from mmkt_ray.models import MultimodalModel
from mmkt_ray.scoring.objective import Score
from mmkt_ray.training.batches import EpochBatches, Worker, narrow, usable_rows
from mmkt_ray.training.checkpoint import Checkpoint
from mmkt_ray.training.methods.augment import augment_batch, check_augment
from mmkt_ray.training.methods.balance import LEARNERS
from mmkt_ray.training.methods.imbalance import add_synthetic, sampling_weights
from mmkt_ray.training.methods.task_weighting import TASK_WEIGHTINGS
from mmkt_ray.training.methods.transfer import Knowledge, distillation_targets, freeze, take_over, trainable_stages
from mmkt_ray.training.optimizer import build_optimizer, lr_factor
from mmkt_ray.training.setup import build_criterion, build_model, training_rows
from mmkt_ray.training.validation import validate

Report = Callable[[Epoch, int], None]  # an epoch, and how many there are in all


@dataclass(frozen=True)
class FitResult:
    """A fitted model and its training record."""

    model: MultimodalModel  # in eval mode, with the best epoch's weights, or the last one's where there is no val split
    epochs: list[Epoch]
    best_epoch: int  # from 1
    val: ValScores | None  # of the best epoch
    seconds: float  # of all epochs, those before a resume included


def fit(
    config: Config,
    table: FeatureTable,
    *,
    worker: Worker = Worker(),  # noqa: B008  (immutable)
    knowledge: Knowledge = Knowledge(),  # noqa: B008  (immutable)
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Fit the model that `config` describes to the train split of `table`.

    With `worker.world_size` > 1, torch.distributed is initialised and every rank calls with the same config and
    table. The same seed and number of workers give the same bits on a CPU. `report` gets each epoch's record, on
    every rank. `knowledge` holds the models that `training.transfer` names.
    The table must have what the teachers among them read.

    Raises:
        ConfigError: the table lacks a modality or a task of the model; the loss is no number.
        DataError: a task has nothing to learn in the train split.
    """
    cuda = [worker.device] if worker.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's random state stays as it was
        run = Fitting(config, table, worker, knowledge)
        saved = checkpoint.load() if checkpoint else None
        if saved is not None:
            run.load_state(*saved)
        while not run.finished:
            epoch = run.run_epoch()
            if checkpoint is not None and worker.rank == 0:
                checkpoint.save(*run.state())
            if report is not None:
                report(epoch, run.num_epochs)
        return run.result()


class Fitting:
    """The state of a run between two epochs: model, optimiser, epochs so far."""

    def __init__(
        self,
        config: Config,
        table: FeatureTable,
        worker: Worker,
        knowledge: Knowledge = Knowledge(),  # noqa: B008  (immutable)
    ) -> None:
        self.training, self.seed, self.worker = config.training, config.training_seed, worker
        self.score = Score.of(self.training.objective, config.task_kinds)
        targets = distillation_targets(knowledge, table, config.model_tasks, self.training.transfer.temperature)
        table = narrow(table, config.model_modalities, config.model_tasks)
        check_augment(self.training.augment, {m: sp.issparse(f) for m, f in table.features.items()})
        table, train_rows = training_rows(config, table, targets)
        torch.manual_seed(self.seed)
        self.model = build_model(config, table).to(worker.device)
        self.taken_over = take_over(self.model, knowledge)  # stage by stage
        self.stds = {m: self.model.input_stage(m).std for m in table.features}
        if self.training.generate:
            table, train_rows = add_synthetic(table, train_rows, self.training.generate, self.seed)
        self.table, self.train_rows, self.val_rows = table, train_rows, usable_rows(table, "val")
        if self.training.patience and not len(self.val_rows):
            raise ConfigError(
                f"training.patience: {self.training.patience} waits for a better score on val, and the model can "
                "read no val row: set samples.split.val_frac above 0, or leave patience out"
            )
        self.batches = EpochBatches(
            table,
            train_rows,
            self.training.batch_size_per_worker,
            self.seed,
            worker,
            weights=sampling_weights(table, train_rows) if self.training.resample else None,
            targets=targets,
        )
        criterion = build_criterion(config, table, train_rows, worker)
        spec = self.model.spec
        weighting = TASK_WEIGHTINGS[self.training.task_weighting](spec.tasks, spec.kinds, worker)
        self.learner = LEARNERS[self.training.balance](self.model, criterion, weighting, worker).to(worker.device)
        self.net = parallel(self.learner, worker)
        self.epochs: list[Epoch] = []
        self.best_epoch = 0
        self.best: dict[str, Tensor] = {}  # the best epoch's weights; empty without a val split

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """Made on first use: a stack of models has an optimiser of its own,
        and the first one of a process takes seconds."""
        return build_optimizer(self.learner, self.training.lr, self.training.weight_decay)

    @property
    def num_epochs(self) -> int:
        """Passes over the train rows: as `training.steps` asks for, else `training.epochs`."""
        steps = self.training.steps
        return self.training.epochs if steps is None else max(1, math.ceil(steps / max(1, self.batches.num_steps)))

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `patience` epochs went by without a better score."""
        waited = len(self.epochs) - self.best_epoch
        return len(self.epochs) >= self.num_epochs or 0 < self.training.patience <= waited

    def run_epoch(self) -> Epoch:
        """Train one epoch, validate, keep the weights if they are the best so far."""
        started_s, epoch = time.perf_counter(), len(self.epochs) + 1
        train_loss = self._train_epoch(epoch)
        if not math.isfinite(train_loss):
            raise diverged(self.training.lr, train_loss, epoch)
        self.learner.end_epoch(epoch, self.table, self.train_rows, self.val_rows)
        rows, extra = self.val_rows, self.score.extra
        val = validate(self.model, self.table, rows, self.worker, metric=extra) if len(rows) else None
        best = self.epochs[self.best_epoch - 1].val if self.best_epoch else None
        top = max((self.score(e.val.metrics) for e in self.epochs if e.val), default=-math.inf)
        seconds = time.perf_counter() - started_s
        self.epochs.append(Epoch(epoch=epoch, train_loss=train_loss, val=val, seconds=seconds))
        if val is None or best is None or is_better(val, best, top, len(self.val_rows), self.score):
            self.best_epoch = epoch
            self.best = {k: v.clone() for k, v in self.model.state_dict().items()} if val is not None else {}
        return self.epochs[-1]

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the train rows; the mean loss of its steps over all ranks."""
        # a seed of its own for every epoch and rank: dropout needs no generator state kept for a resume
        torch.manual_seed(seed_of(self.seed, epoch, self.worker.rank))
        self.learner.begin_epoch(seed_of(self.seed, epoch))
        self.net.train()
        total = torch.zeros((), device=self.worker.device)
        num_steps = self.batches.num_steps
        frozen = self._frozen(epoch)
        for step, batch in enumerate(self.batches.epoch(epoch), start=(epoch - 1) * num_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.training.lr * lr_factor(step, self.num_epochs * num_steps)
            total += self.learner.gradients(self.net, augment_batch(batch, self.training.augment, self.stds))
            freeze(frozen)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.worker.world_size > 1:
            dist.all_reduce(total)
        return total.item() / num_steps

    def _frozen(self, epoch: int) -> list[nn.Parameter]:
        """Parameters from `training.transfer.init` that are not trained in this epoch."""
        num_stages = len(self.taken_over)
        learning = trainable_stages(self.training.transfer.tuning, num_stages, epoch, self.num_epochs)
        return [p for stage, parameters in enumerate(self.taken_over) if stage not in learning for p in parameters]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Flat tensors `learner.*`, `best.*`, `optimizer.<parameter>.*`, and the JSON-able rest."""
        tensors = {f"learner.{name}": value for name, value in self.learner.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        return tensors, {"history": [epoch.to_dict() for epoch in self.epochs], "best_epoch": self.best_epoch}

    def load_state(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.learner.load_state_dict(_under("learner.", tensors))
        self.best = {name: value.to(self.worker.device) for name, value in _under("best.", tensors).items()}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.epochs = [Epoch.model_validate(epoch) for epoch in rest["history"]]
        self.best_epoch = rest["best_epoch"]

    def result(self) -> FitResult:
        """The result, with the model of the best epoch."""
        if self.best:
            self.model.load_state_dict(self.best)
        return FitResult(
            model=self.model.eval(),
            epochs=self.epochs,
            best_epoch=self.best_epoch,
            val=self.epochs[self.best_epoch - 1].val,
            seconds=sum(epoch.seconds for epoch in self.epochs),
        )


def is_better(val: ValScores, best: ValScores, top: float, num_rows: int, score: Score) -> bool:
    """Whether an epoch's val scores are better than those of the best epoch so far. top: the highest score so far.

    Scores within half a standard error of `top` are ties, and the lower loss decides. The standard error is that of a
    share over `num_rows`; scores outside of [0, 1] tie only if they are equal.
    """
    ours, theirs = score(val.metrics), score(best.metrics)
    top = max(top, ours)
    level = top
    if 0 <= top <= 1:
        level -= 0.5 * math.sqrt(max(top * (1 - top), 1 / num_rows) / num_rows)
    if not ours >= level:
        return False
    return not theirs >= level or val.loss < best.loss


def diverged(lr: float, loss: float, epoch: int) -> ConfigError:
    """The error for a loss that is not finite."""
    return ConfigError(f"the training loss is {loss} in epoch {epoch}: lower training.lr (now {lr:g})")


def seed_of(*parts: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def parallel(learner: nn.Module, worker: Worker) -> nn.Module:
    """The learner, averaging gradients over ranks where there are several."""
    if worker.world_size == 1:
        return learner
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(learner, device_ids=device_ids, gradient_as_bucket_view=True)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
