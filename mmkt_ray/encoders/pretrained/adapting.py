"""The training that adapts a pretrained network to a task, over any number of workers. No Ray and no files in here.

Axes: B batch, N values of a set, D features, K classes, R rank.

A head is fitted on the frozen features first, and both are trained from there: fine-tuning from a random head distorts good
features (Kumar et al. 2022, https://arxiv.org/abs/2202.10054). LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Own,
in a few lines, as the package for it brings two more and renames the layers, and what we keep is the product alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from mmkt_ray.encoders.base import EncoderTraining
from mmkt_ray.encoders.device import autocast
from mmkt_ray.errors import ConfigError, DataError

log = logging.getLogger(__name__)

LR = {"lora": 1e-3, "last_layers": 1e-4, "full": 3e-5}
HEAD_LR = 1e-3
LORA_SCALE = 2.0  # alpha / R
WARM_UP_FRAC = 0.1  # of all steps
HEAD_ROWS = 20_000  # at most, that the head is fitted on first
HEAD_DECAY = 1e-3
MAX_NORM = 1.0  # of the gradient
FORWARD_ROWS = 64  # of a pass without gradients
LEARNT = "learnt"  # tensor of the state: hashes of the train values, where there are several folds


# --- which weights change --------------------


class LowRank(nn.Module):
    """A weight plus a product of two narrow matrices, of which one begins as zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        narrow = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        self.a = nn.Parameter(narrow.to(weight.device))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + LORA_SCALE * (self.b @ self.a)


def make_trainable(model: nn.Module, section: Any, seed: int) -> dict[str, nn.Parameter]:
    """Make the weights trainable that `section` asks for; returns them by name. Raises: ConfigError if there are none."""
    model.requires_grad_(False)
    if section.how == "full":
        model.requires_grad_(True)
    elif section.how == "last_layers":
        first = f"{blocks_of(model)}.{max(0, _num_blocks(model) - section.num_layers)}."
        names = [name for name, _ in model.named_parameters()]
        start = next(i for i, name in enumerate(names) if name.startswith(first))
        for _, parameter in list(model.named_parameters())[start:]:
            parameter.requires_grad_(True)
    else:
        generator = torch.Generator().manual_seed(seed)
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        for _, layer in layers:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, section.rank, generator))
            layer.get_parameter("parametrizations.weight.original").requires_grad_(False)
        if not layers:
            raise ConfigError("adapt.how: lora changes linear layers, and this network has none: use last_layers or full")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def blocks_of(model: nn.Module) -> str:
    """Name of the list of a network's blocks: the one with the most parameters among those of several members."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    if not lists:
        raise ConfigError("adapt.how: last_layers: this network has no list of blocks: use lora or full")
    inner = {id(child) for _, m in lists for child in m.modules() if child is not m}
    outer = [(n, m) for n, m in lists if id(m) not in inner]
    return max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))[0]


def _num_blocks(model: nn.Module) -> int:
    blocks = model.get_submodule(blocks_of(model))
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    return len(blocks)


def kept(trained: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors of a state: changed weights under their names; of LoRA `<layer>.lora_a` and `.lora_b`."""
    renamed = {_lora_name(name): value for name, value in trained.items()}
    return {name: value.detach().float().cpu().numpy() for name, value in renamed.items()}


def _lora_name(name: str) -> str:
    for part in ("a", "b"):
        name = name.replace(f".parametrizations.weight.0.{part}", f".lora_{part}")
    return name


def changed_weights(
    tensors: dict[str, np.ndarray], weights: dict[str, nn.Parameter], section: Any
) -> dict[str, Tensor]:
    """Weights as they are after the adaptation, by name. Raises: ValueError for one that the network lacks."""
    if section.how != "lora":
        changed = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    else:
        changed = {}
        for layer in sorted({name.rsplit(".", 1)[0] for name in tensors}):
            a, b = (torch.from_numpy(np.array(tensors[f"{layer}.lora_{part}"])) for part in ("a", "b"))
            name = f"{layer}.weight"
            if name in weights:
                changed[name] = weights[name].detach().cpu() + LORA_SCALE * (b @ a)
            else:
                changed[name] = b @ a
    if unknown := sorted(changed.keys() - weights.keys()):
        raise ValueError(f"the adapted weight '{unknown[0]}' is none of the network's")
    return changed


# --- folds --------------------


def hashes_of(contents: Sequence[bytes]) -> np.ndarray:
    """(N,) uint64."""
    return np.array([xxhash.xxh64_intdigest(content) for content in contents], dtype=np.uint64)


def fold_of(hashes: np.ndarray, num_folds: int) -> np.ndarray:
    """The fold (N,) that leaves a value out: equal ones are in one fold, and stay there when others are added."""
    return (hashes % np.uint64(num_folds)).astype(np.int64)


def by_fold(tensors: Mapping[str, np.ndarray], num_folds: int) -> list[dict[str, np.ndarray]]:
    """The changes of each fold. Raises: ValueError if there are none of one."""
    if num_folds == 1:
        return [dict(tensors)]
    starts = [f"fold{number}/" for number in range(num_folds)]
    found = [{k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)} for start in starts]
    if any(not changes or changes.keys() != found[0].keys() for changes in found):
        raise ValueError(f"the state does not hold the changes of {num_folds} folds")
    return found


# --- training --------------------


class Net(nn.Module):
    """Prepared values (B, ..) -> logits (B, K): the encoder's features, standardised, and a linear head."""

    def __init__(self, encoder: Any, num_classes: int, device: torch.device) -> None:
        super().__init__()
        self.model, self.forward_features = encoder.model, encoder.forward_features
        self.head = nn.Linear(encoder.dim, num_classes).to(device)
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
        return torch.cat([function(torch.from_numpy(np.array(values[i : i + FORWARD_ROWS])).to(device)) for i in starts])

    def fit_head(self, values: np.ndarray, labels: np.ndarray) -> None:
        """The head that a linear model of the frozen features has, features standardised by their mean and spread."""
        features = self.apply_to(values, self.forward_features).float()
        self.mean, self.std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
        x, y = (features - self.mean) / self.std, torch.from_numpy(labels).to(features.device)
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.head(x), y) + HEAD_DECAY * self.head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


@dataclass
class _Data:
    """Prepared values (N, ..) and class numbers (N,), and the rows to train and to stop on."""

    values: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    val: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, labels: np.ndarray, held_out: np.ndarray | None) -> _Data:
        held_out = np.zeros(len(labels), bool) if held_out is None else held_out
        known = labels >= 0  # val may have classes that train lacks
        return cls(values, labels, np.flatnonzero(~held_out & known), np.flatnonzero(held_out & known))


class _Run:
    """A network in training: its optimiser, its place among the workers, what was best so far."""

    def __init__(self, encoder: Any, num_classes: int, data: _Data, training: EncoderTraining) -> None:
        encoder.model = None  # as it was pretrained, also after another fold
        encoder.load()
        self.section, self.precision, self.data, self.training = encoder.config.adapt, encoder.config.precision, data, training
        if len(data.train) < training.world_size:
            raise DataError(f"{len(data.train)} labelled rows to adapt the encoder on, for {training.world_size} workers")
        self.net, self.augmented = Net(encoder, num_classes, training.device), encoder.augmented
        self.net.set_mode(False)
        rows = np.sort(np.random.default_rng(training.seed).permutation(data.train)[:HEAD_ROWS])
        if training.checkpoint is None:
            self.net.fit_head(data.values[rows], data.labels[rows])
        chosen = make_trainable(encoder.model, self.section, training.seed)
        self.trained = self._used(chosen, data.values[rows[:2]])
        lr = self.section.lr or LR[self.section.how]
        groups = [{"params": list(self.trained.values()), "lr": lr}, {"params": list(self.net.head.parameters()), "lr": HEAD_LR}]
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
        """One pass over the train rows. Returns loss and accuracy over all workers, on train and where there is one on val."""
        training = self.training
        totals = torch.zeros(3, device=training.device)  # loss, hits, values
        self.net.set_mode(True)
        with torch.random.fork_rng(devices=[training.device] if training.device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence([training.seed, self.epoch, training.rank]).generate_state(1)[0]))
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
        self._keep_best(val)
        found = {"loss": float(totals[0] / totals[2]), "accuracy": float(totals[1] / totals[2])}
        return found | ({"val_loss": float(val[0] / val[2]), "val_accuracy": float(val[1] / val[2])} if val[2] else {})

    def _step(self, rows: np.ndarray, number: int) -> Tensor:
        """One optimiser step on a batch, of which this worker has a share. Returns its loss, hits and values (3,)."""
        training, section = self.training, self.section
        share = rows[training.rank :: training.world_size]
        parts = list(np.array_split(share, min(section.accumulate, max(1, len(share)))))
        totals = torch.zeros(3, device=training.device)
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
        """Summed loss of rows; and loss, hits, number of rows (3,).

        batch: all rows of a training step, of which these are some: they are augmented as one, by the step's number alone, so
        that a row looks the same however many workers share the step.
        """
        rows, device = np.sort(rows), self.training.device
        y = torch.from_numpy(self.data.labels[rows]).to(device)
        net: nn.Module = self.net
        smoothing = 0.0
        if batch is None:
            x = torch.from_numpy(self.data.values[rows]).to(device)
        else:
            batch, net, smoothing = np.sort(batch), self.replica, self.section.label_smoothing
            whole = torch.from_numpy(self.data.values[batch]).to(device)
            x = self.augmented(whole, (self.training.seed, number))[torch.from_numpy(np.searchsorted(batch, rows)).to(device)]
        with autocast(self.training.device, self.precision):
            logits = net(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="sum")
        return loss, torch.stack([loss.detach(), (logits.argmax(1) == y).sum(), loss.new_tensor(len(y))])

    @torch.no_grad()
    def _scored(self) -> Tensor:
        """Loss, hits and number (3,) of this worker's share of the val rows."""
        totals = torch.zeros(3, device=self.training.device)
        share = self.data.val[self.training.rank :: self.training.world_size]
        for start in range(0, len(share), FORWARD_ROWS):
            totals += self._loss(share[start : start + FORWARD_ROWS])[1]
        return totals

    def _keep_best(self, val: Tensor) -> None:
        loss = float(val[0] / val[2]) if val[2] else -float(self.epoch)  # without val rows the last is the best
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
    encoder: Any, values: np.ndarray, labels: np.ndarray, num_classes: int, training: EncoderTraining
) -> dict[str, np.ndarray]:
    """Train an Adaptable encoder on prepared values (N, ..) and class numbers (N,). Returns what changed, as `kept` names it.

    With several workers torch.distributed is initialised and each rank makes this call. Resumes from `training.checkpoint`.
    """
    whole, num_folds = _Data.of(values, labels, training.held_out), encoder.config.adapt.folds
    if num_folds == 1:
        return kept(_fit(encoder, num_classes, whole, training, {}, 0))
    hashes = hashes_of(encoder.contents(values))
    fold = fold_of(hashes[whole.train], num_folds)
    done: dict[str, Tensor] = {}
    if training.checkpoint is not None:
        done = {k.removeprefix("done."): v for k, v in training.checkpoint.items() if k.startswith("done.")}
    for number in range(num_folds):
        if not any(name.startswith(f"fold{number}/") for name in done):
            data = replace(whole, train=whole.train[fold != number])
            best = _fit(encoder, num_classes, data, training, done, number)
            done |= {f"fold{number}/{name}": value for name, value in best.items()}
    return kept(done) | {LEARNT: np.unique(hashes[whole.train])}


def _fit(
    encoder: Any, num_classes: int, data: _Data, training: EncoderTraining, done: dict[str, Tensor], fold: int
) -> dict[str, Tensor]:
    """Train one network; returns what changed in its best epoch. done: what earlier folds have come to."""
    state = training.checkpoint if training.checkpoint is not None and int(training.checkpoint["fold"]) == fold else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        run = _Run(encoder, num_classes, data, replace(training, checkpoint=state))
    if state is not None:
        run.load_state(state)
    while not run.done:
        metrics = run.train_epoch()
        training.on_epoch(fold * run.section.epochs + run.epoch, metrics, partial(_checkpoint, run, done, fold))
    return run.best


def _checkpoint(run: _Run, done: dict[str, Tensor], fold: int) -> dict[str, Any]:
    return {**{f"done.{name}": value for name, value in done.items()}, **run.state(), "fold": fold}
