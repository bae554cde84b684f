"""The training loop: features in, best model out. Plain torch; one process or many under torch.distributed.

Axes: B rows of a batch, C classes of one task.

Sources: AdamW (https://arxiv.org/abs/1711.05101), cosine decay (https://arxiv.org/abs/1608.03983).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.store import FeatureTable
from mmkt_ray.models import ModelSpec, MultimodalModel, build_spec
from mmkt_ray.models.sharing import module_name
from mmkt_ray.training.batches import EpochBatches, World, feature_statistics, narrow, usable_rows
from mmkt_ray.training.checkpoint import Checkpoint
from mmkt_ray.training.objective import Objective, check_task, count_classes
from mmkt_ray.training.validation import validate

WARMUP_FRAC = 0.05

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class FitResult:
    """What a finished run leaves."""

    model: MultimodalModel  # in eval mode, with the best epoch's weights, or the last one's where there is no val split
    history: list[dict[str, Any]]  # per epoch: epoch (from 1), train_loss, val (scores or None), seconds
    best_epoch: int  # from 1
    val: dict[str, Any] | None  # scores of the best epoch
    num_parameters: dict[str, int]  # by part of the model
    seconds: float  # of all epochs, those before a resume included


def fit(
    config: Config,
    table: FeatureTable,
    *,
    world: World = World(),  # noqa: B008  (immutable)
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Fit the model that `config` describes to the train split of `table`.

    With `world.size` > 1, torch.distributed is initialised and every rank calls with the same config and table. The same
    seed and world give the same bits on a CPU. `report` gets each epoch's record, on every rank.

    Raises:
        ConfigError: the table lacks a modality or a task of the model; the loss is no number.
        DataError: a task has nothing to learn in the train split.
    """
    cuda = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's random state stays as it was
        run = Fitting(config, narrow(table, config.model_modalities, config.model_tasks), world)
        saved = checkpoint.load() if checkpoint else None
        if saved is not None:
            run.load_state(*saved)
        while not run.finished:
            record = run.run_epoch()
            if checkpoint is not None and world.rank == 0:
                checkpoint.save(*run.state())
            if report is not None:
                report(record)
        return run.result()


def spec_of(config: Config, table: FeatureTable) -> ModelSpec:
    """The model that `config` describes over the features of `table`."""
    return build_spec(
        config,
        dims={m: f.shape[1] for m, f in table.features.items()},
        sparse={m: sp.issparse(f) for m, f in table.features.items()},
        num_classes={t: len(names) for t, names in table.class_names.items()},
    )


class Fitting:
    """A run between two epochs: model, optimiser, and what is known so far."""

    def __init__(self, config: Config, table: FeatureTable, world: World) -> None:
        self.training, self.seed, self.table, self.world = config.training, config.seed, table, world
        train_rows, self.val_rows = usable_rows(table, "train"), usable_rows(table, "val")
        counts = {t: count_classes(y[train_rows], len(table.class_names[t])) for t, y in table.labels.items()}
        for t in sorted(counts):
            check_task(t, counts[t], table.class_names[t])
        torch.manual_seed(self.seed)
        self.model = MultimodalModel(spec_of(config, table))
        for m, features in table.features.items():
            statistics = feature_statistics(features, table.present[m] & (table.split == "train"))
            self.model.inputs[module_name(m)].set_statistics(*statistics)
        self.model.to(world.device)
        self.net = parallel(self.model, world)
        self.batches = EpochBatches(table, train_rows, self.training.batch_size_per_worker, self.seed, world)
        self.objective = Objective(
            counts,
            class_weights=self.training.class_weights,
            label_smoothing=self.training.label_smoothing,
            device=world.device,
        )
        self.optimizer = build_optimizer(self.model, self.training.lr, self.training.weight_decay)
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self.best: dict[str, Tensor] = {}  # the best epoch's weights; empty without a val split

    @property
    def finished(self) -> bool:
        """All epochs are done, or `patience` epochs went by without a better score."""
        waited = len(self.history) - self.best_epoch
        return len(self.history) >= self.training.epochs or 0 < self.training.patience <= waited

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch, validate, keep the weights if they are the best so far; the epoch's record."""
        started_s, epoch = time.perf_counter(), len(self.history) + 1
        train_loss = self._train_epoch(epoch)
        if not math.isfinite(train_loss):
            raise ConfigError(
                f"the training loss is {train_loss} in epoch {epoch}: lower training.lr (now {self.training.lr:g})"
            )
        val = validate(self.model, self.table, self.val_rows, self.world) if len(self.val_rows) else None
        record = {"epoch": epoch, "train_loss": train_loss, "val": val, "seconds": time.perf_counter() - started_s}
        self.history.append(record)
        best = self.history[self.best_epoch - 1]["val"] if self.best_epoch else None
        if val is None or best is None or val["score"] > best["score"]:
            self.best_epoch = epoch
            self.best = {k: v.clone() for k, v in self.model.state_dict().items()} if val is not None else {}
        return record

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the train rows; the mean loss of its steps over all ranks."""
        # a seed of its own for every epoch and rank: dropout needs no generator state kept for a resume
        torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, self.world.rank]).generate_state(1)[0]))
        self.net.train()
        total = torch.zeros((), device=self.world.device)
        num_steps = self.batches.num_steps
        for step, batch in enumerate(self.batches.epoch(epoch), start=(epoch - 1) * num_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.training.lr * rate(step, self.training.epochs * num_steps)
            logits = self.net(batch.features, batch.present)
            loss = self.objective(logits, batch.labels, self.objective.total_weights(batch.step_labels))
            # DDP takes the mean over ranks, the step's loss is the sum of their parts
            (loss * self.world.size).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total.item() / num_steps

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Flat tensors `model.*`, `best.*`, `optimizer.<parameter>.*`, and the JSON-able rest."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        return tensors, {"history": self.history, "best_epoch": self.best_epoch}

    def load_state(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.model.load_state_dict(_under("model.", tensors))
        self.best = {name: value.to(self.world.device) for name, value in _under("best.", tensors).items()}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", tensors).items():
            index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.history, self.best_epoch = list(rest["history"]), rest["best_epoch"]

    def result(self) -> FitResult:
        """The finished run, its model at the best epoch."""
        if self.best:
            self.model.load_state_dict(self.best)
        return FitResult(
            model=self.model.eval(),
            history=self.history,
            best_epoch=self.best_epoch,
            val=self.history[self.best_epoch - 1]["val"],
            num_parameters=self.model.num_parameters_by_part(),
            seconds=sum(record["seconds"] for record in self.history),
        )


def parallel(model: MultimodalModel, world: World) -> nn.Module:
    """The model, averaging gradients over ranks where there are several."""
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no biases, norms or combination weights."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def rate(step: int, num_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP_FRAC * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
