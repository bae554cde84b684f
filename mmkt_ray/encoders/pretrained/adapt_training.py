"""The training that adapts a pretrained network to a task, over any number of workers. No Ray and no files in here.

Called by adaptable.py; adapted_weights.py says which weights change.

Axes: B batch, N values of a set, D features, K numbers that a model of the task gives, such as one for each class.

A head is fitted on the frozen features first, and both are trained from there: fine-tuning from a random head
distorts good features (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmkt_ray.encoders.device import autocast
from mmkt_ray.encoders.encoder import EncoderTraining
from mmkt_ray.encoders.pretrained.adapted_weights import LEARNT, fold_of, hashes_of, kept, make_trainable
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.labels import Labels

log = logging.getLogger(__name__)

LR = {"lora": 1e-3, "last_layers": 1e-4, "full": 3e-5}
HEAD_LR = 1e-3
WARM_UP_FRAC = 0.1  # of all steps
HEAD_ROWS = 20_000  # at most, that the head is fitted on first
HEAD_DECAY = 1e-3
MAX_NORM = 1.0  # of the gradient
FORWARD_ROWS = 64  # of a pass without gradients


class Net(nn.Module):
    """Prepared values (B, ..) -> logits (B, K): the encoder's features, standardised, and a linear head."""

    def __init__(self, encoder: Any, width: int, device: torch.device) -> None:
        super().__init__()
        self.model, self.forward_features = encoder.model, encoder.forward_features
        self.head = nn.Linear(encoder.dim, width).to(device)
        self.mean, self.std = torch.zeros(encoder.dim, device=device), torch.ones(encoder.dim, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.forward_features(x).float() - self.mean) / self.std)

    def set_mode(self, training: bool) -> None:
        """Dropout as asked; norms keep the statistics that they were pretrained with."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    @torch.no_grad()
    def apply_to(self, values: np.ndarray, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of all values (N, ..), in batches."""
        device = self.head.weight.device
        starts = range(0, len(values), FORWARD_ROWS)
        return torch.cat(
            [function(torch.from_numpy(np.array(values[i : i + FORWARD_ROWS])).to(device)) for i in starts]
        )

    def fit_head(self, values: np.ndarray, labels: Labels) -> None:
        """The head that a linear model of the frozen features has, features standardised by their mean and spread."""
        features = self.apply_to(values, self.forward_features).float()
        self.mean, self.std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
        x, y = (features - self.mean) / self.std, labels.tensors(features.device)
        weights = torch.ones(self.head.out_features, device=features.device)
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = y.kind.row_losses(self.head(x), y, weights, 0.0)
            loss = losses.mean() + HEAD_DECAY * self.head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


@dataclass
class _Data:
    """Prepared values (N, ..) and their labels, and the rows to train and to stop on."""

    values: np.ndarray
    labels: Labels
    train: np.ndarray
    val: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, labels: Labels, held_out: np.ndarray | None) -> _Data:
        held_out = np.zeros(len(labels), bool) if held_out is None else held_out
        known = labels.known  # val may have classes that train lacks
        return cls(values, labels, np.flatnonzero(~held_out & known), np.flatnonzero(held_out & known))


class _Run:
    """A network in training: its optimiser, its place among the workers, what was best so far."""

    def __init__(self, encoder: Any, width: int, data: _Data, training: EncoderTraining) -> None:
        encoder.model = None  # as it was pretrained, also after another fold
        encoder.load()
        self.section, self.precision, self.data, self.training = (
            encoder.config.adapt,
            encoder.config.precision,
            data,
            training,
        )
        if len(data.train) < training.world_size:
            raise DataError(
                f"{len(data.train)} labelled rows to adapt the encoder on, for {training.world_size} workers"
            )
        self.net, self.augmented = Net(encoder, width, training.device), encoder.augmented
        self.kind, self.weights = data.labels.kind, torch.ones(width, device=training.device)
        self.net.set_mode(False)
        rows = np.sort(np.random.default_rng(training.seed).permutation(data.train)[:HEAD_ROWS])
        if training.checkpoint is None:
            self.net.fit_head(data.values[rows], data.labels[rows])
        chosen = make_trainable(encoder.model, self.section, training.seed)
        self.trained = self._used(chosen, data.values[rows[:2]])
        lr = self.section.lr or LR[self.section.how]
        groups = [
            {"params": list(self.trained.values()), "lr": lr},
            {"params": list(self.net.head.parameters()), "lr": HEAD_LR},
        ]
        self.peaks = [lr, HEAD_LR]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.section.weight_decay)
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.bad_epochs, self.epoch = float("inf"), 0, 0
        self.replica: Net | DistributedDataParallel = self.net
        if training.world_size > 1:
            self.replica = DistributedDataParallel(self.net, broadcast_buffers=False)

    def _used(self, chosen: dict[str, nn.Parameter], values: np.ndarray) -> dict[str, nn.Parameter]:
        """Those that the features depend on; the others, such as a pooler that is not read, stay as they are."""
        x = torch.from_numpy(np.array(values)).to(self.training.device)
        self.net.forward_features(x).float().square().sum().backward()
        used = {name: p for name, p in chosen.items() if p.grad is not None}
        for name, parameter in chosen.items():
            parameter.grad = None
            parameter.requires_grad_(name in used)
        if not used:
            raise ConfigError(f"adapt.how: {self.section.how}: the features depend on none of these weights")
        return used

    @property
    def num_steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.data.train) // self.section.batch_size)

    def train_epoch(self) -> dict[str, float]:
        """One pass over the train rows. Returns loss and main metric over all workers,
        on train and where there is one on val."""
        training = self.training
        totals = self._no_tally()
        self.net.set_mode(True)
        with torch.random.fork_rng(devices=[training.device] if training.device.type == "cuda" else []):
            torch.manual_seed(
                int(np.random.SeedSequence([training.seed, self.epoch, training.rank]).generate_state(1)[0])
            )
            order = np.random.default_rng([training.seed, self.epoch]).permutation(self.data.train)
            for step in range(self.num_steps):
                rows = order[step * self.section.batch_size : (step + 1) * self.section.batch_size]
                totals += self._step(rows, self.epoch * self.num_steps + step)
        self.net.set_mode(False)
        val = self._scored()
        if training.world_size > 1:
            dist.all_reduce(totals)
            dist.all_reduce(val)
        self.epoch += 1
        on_train, on_val = (self.kind.tally_scores(tally.cpu().numpy()) for tally in (totals, val))
        self._keep_best(on_val.get("loss"))
        logged = ("loss", self.kind.reported[0])
        found = {name: on_train[name] for name in logged if name in on_train}
        return found | {f"val_{name}": on_val[name] for name in logged if name in on_val}

    def _no_tally(self) -> Tensor:
        """Zeros, to which the tallies of batches are added."""
        return torch.zeros(self.kind.tally_size(len(self.weights)), dtype=torch.float64, device=self.training.device)

    def _step(self, rows: np.ndarray, number: int) -> Tensor:
        """One optimiser step on a batch, of which this worker has a share. Returns the tally of the share."""
        training, section = self.training, self.section
        share = rows[training.rank :: training.world_size]
        parts = list(np.array_split(share, min(section.accumulate, max(1, len(share)))))
        totals = self._no_tally()
        for i, part in enumerate(parts):
            last, replica = i == len(parts) - 1, self.replica
            with nullcontext() if last or not isinstance(replica, DistributedDataParallel) else replica.no_sync():
                loss, found = self._loss(part if len(part) else rows[:1], rows, number)
                # DDP takes the mean over workers, whose shares of a batch may differ by one value.
                (loss * (training.world_size / len(rows) * bool(len(part)))).backward()
            totals += found * bool(len(part))
        nn.utils.clip_grad_norm_(self.trained.values(), MAX_NORM)
        for group, factor in zip(self.optimizer.param_groups, self._factors(number), strict=True):
            group["lr"] = factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return totals

    def _factors(self, number: int) -> Iterator[float]:
        """Learning rates at a step: up for a tenth of all, then down to zero."""
        total = self.section.epochs * self.num_steps
        rise = max(1, int(WARM_UP_FRAC * total))
        factor = min((number + 1) / rise, (total - number) / max(1, total - rise), 1.0)
        yield from (peak * factor for peak in self.peaks)

    def _loss(self, rows: np.ndarray, batch: np.ndarray | None = None, number: int = 0) -> tuple[Tensor, Tensor]:
        """Summed loss of rows, and their tally.

        batch: all rows of a training step, of which these are some: they are augmented as one, by the step's number
        alone, so that a row looks the same however many workers share the step.
        """
        rows, device = np.sort(rows), self.training.device
        y = self.data.labels[rows].tensors(device)
        net: nn.Module = self.net
        smoothing = 0.0
        if batch is None:
            x = torch.from_numpy(self.data.values[rows]).to(device)
        else:
            batch, net, smoothing = np.sort(batch), self.replica, self.section.label_smoothing
            whole = torch.from_numpy(self.data.values[batch]).to(device)
            x = self.augmented(whole, (self.training.seed, number))[
                torch.from_numpy(np.searchsorted(batch, rows)).to(device)
            ]
        with autocast(self.training.device, self.precision):
            logits = net(x).float()
        losses = self.kind.row_losses(logits, y, self.weights, smoothing)
        return losses.sum(), self.kind.tally(logits.detach(), y)

    @torch.no_grad()
    def _scored(self) -> Tensor:
        """The tally of this worker's share of the val rows."""
        totals = self._no_tally()
        share = self.data.val[self.training.rank :: self.training.world_size]
        for start in range(0, len(share), FORWARD_ROWS):
            totals += self._loss(share[start : start + FORWARD_ROWS])[1]
        return totals

    def _keep_best(self, val_loss: float | None) -> None:
        loss = -float(self.epoch) if val_loss is None else val_loss  # without val rows the last is the best
        self.bad_epochs = 0 if loss < self.best_loss else self.bad_epochs + 1
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or val has not got better for long enough."""
        return self.epoch >= self.section.epochs or self.bad_epochs >= self.section.patience

    def state(self) -> dict[str, Any]:
        """All that it takes to go on, as named tensors and numbers."""
        flat: dict[str, Any] = {f"best.{name}": value for name, value in self.best.items()}
        flat |= {f"trained.{name}": p.detach().clone() for name, p in self.trained.items()}
        flat |= {f"head.{name}": value.clone() for name, value in self.net.head.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            flat |= {f"optimizer.{index}.{name}": value.clone() for name, value in slots.items()}
        flat |= {"mean": self.net.mean.clone(), "std": self.net.std.clone()}
        best_loss = torch.tensor(self.best_loss, dtype=torch.float64)
        return flat | {"best_loss": best_loss, "bad_epochs": self.bad_epochs, "epoch": self.epoch}

    def load_state(self, flat: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        device = self.training.device
        parts: dict[str, dict[str, Tensor]] = {"best": {}, "trained": {}, "head": {}, "optimizer": {}}
        for key, value in flat.items():
            if (part := key.split(".", 1)[0]) in parts:
                parts[part][key.split(".", 1)[1]] = value if part == "optimizer" else value.to(device)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(parts["trained"][name])
        self.net.head.load_state_dict(parts["head"])
        self.net.mean, self.net.std = flat["mean"].to(device), flat["std"].to(device)
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.best, self.best_loss = parts["best"], float(flat["best_loss"])
        self.bad_epochs, self.epoch = int(flat["bad_epochs"]), int(flat["epoch"])


def adapt(
    encoder: Any, values: np.ndarray, labels: Labels, width: int, training: EncoderTraining
) -> dict[str, np.ndarray]:
    """Train an Adaptable encoder on prepared values (N, ..) and their labels. width: K of the labels' kind.
    Returns what changed, as `kept` names it.

    With several workers torch.distributed is initialised and each rank makes this call.
    Resumes from `training.checkpoint`.
    """
    whole, num_folds = _Data.of(values, labels, training.held_out), encoder.config.adapt.folds
    if num_folds == 1:
        return kept(_fit(encoder, width, whole, training, {}, 0))
    hashes = hashes_of(encoder.contents(values))
    fold = fold_of(hashes[whole.train], num_folds)
    done: dict[str, Tensor] = {}
    if training.checkpoint is not None:
        done = {k.removeprefix("done."): v for k, v in training.checkpoint.items() if k.startswith("done.")}
    for number in range(num_folds):
        if not any(name.startswith(f"fold{number}/") for name in done):
            data = replace(whole, train=whole.train[fold != number])
            best = _fit(encoder, width, data, training, done, number)
            done |= {f"fold{number}/{name}": value for name, value in best.items()}
    return kept(done) | {LEARNT: np.unique(hashes[whole.train])}


def _fit(
    encoder: Any, width: int, data: _Data, training: EncoderTraining, done: dict[str, Tensor], fold: int
) -> dict[str, Tensor]:
    """Train one network; returns what changed in its best epoch. done: what earlier folds have come to."""
    state = (
        training.checkpoint if training.checkpoint is not None and int(training.checkpoint["fold"]) == fold else None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        run = _Run(encoder, width, data, replace(training, checkpoint=state))
    if state is not None:
        run.load_state(state)
    while not run.done:
        metrics = run.train_epoch()
        training.on_epoch(fold * run.section.epochs + run.epoch, metrics, partial(_checkpoint, run, done, fold))
    return run.best


def _checkpoint(run: _Run, done: dict[str, Tensor], fold: int) -> dict[str, Any]:
    return {**{f"done.{name}": value for name, value in done.items()}, **run.state(), "fold": fold}
