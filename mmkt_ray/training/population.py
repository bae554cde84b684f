"""Candidates of one architecture and one seed, trained as one stacked model on the same minibatches.

Members differ in learning rate, weight decay, label smoothing and dropout rates. All of their parameters lie in tensors
with one more axis in front, so a step is a handful of wide products instead of P small ones. The members start from the
same weights, read the same batches and draw the same random numbers (a dropout mask is where the number falls below the
member's own rate), just as each would alone with that seed: so a member's result is that of `fit` with its config.

Axes: P members, B rows of a batch, C classes of one task.

Source: horizontally fused training, Wang et al. 2021 (https://arxiv.org/abs/2102.02344), here by `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.evaluation.inference import model_inputs
from mmkt_ray.features.store import FeatureTable
from mmkt_ray.models import Features, MultimodalModel
from mmkt_ray.training.batches import Batch, World
from mmkt_ray.training.learner import Logits
from mmkt_ray.training.loop import Fitting, build_objective, seed_of, spec_of
from mmkt_ray.training.objective import Objective
from mmkt_ray.training.optimizer import rate
from mmkt_ray.training.validation import summarise, tally_batch

MEMBER_KEYS = frozenset(
    {
        "training.lr",
        "training.weight_decay",
        "training.label_smoothing",
        "model.dropout",
        "model.feature_dropout",
        "model.modality_dropout",
    }
)
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # as torch.optim.AdamW

T = TypeVar("T")
Score = Callable[[Mapping[str, Any]], float]  # of a member's validation scores, see training.validation
Stack = dict[str, Tensor]  # parameter name -> (P, ..)


def mean_macro_f1(val: Mapping[str, Any]) -> float:
    """The validation score by which `fit` chooses its epoch."""
    return float(val["score"])


class Population:
    """P candidates between two epochs: their stacked parameters and optimiser state, and what is known of each."""

    def __init__(
        self,
        config: Config,
        table: FeatureTable,
        members: Sequence[Mapping[str, Any]],
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
        objective: Score = mean_macro_f1,
    ) -> None:
        """members: overrides of some of MEMBER_KEYS each; what they leave out is the config's. objective: what a member's
        epochs are compared by.

        Raises: ConfigError, DataError as `fit`, and for what can't be stacked.
        """
        check_stackable(config, table, members)
        self.config, self.objective = config, objective
        self.members = [dict(member) for member in members]
        self.values = {key: _column(config, members, key).to(device) for key in MEMBER_KEYS}  # key -> (P,)
        self.run = Fitting(config, table, World(device=device))  # rows, batches and the weights that all start from
        self.ends = smoothing_ends(config, self.run)
        size = len(members)
        self.stack: Stack = {n: p.detach().expand(size, *p.shape).clone() for n, p in self.run.model.named_parameters()}
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.stack.items()}
        self.best: Stack = {n: p.clone() for n, p in self.stack.items()}
        self.val: list[dict[str, Any] | None] = [None] * size
        self.scores, self.best_epoch = np.full(size, -np.inf), np.zeros(size, dtype=int)
        self.epoch = 0

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, until_epoch: int) -> None:
        """Train on until so many epochs are done, validating after each. A diverged member's score becomes NaN."""
        for p in self.stack.values():
            p.requires_grad_(True)
        for epoch in range(self.epoch + 1, until_epoch + 1):
            self._train_epoch(epoch)
            self.epoch = epoch
            self._validate()
        for p in self.stack.values():
            p.requires_grad_(False)

    def _train_epoch(self, epoch: int) -> None:
        model, batches, num_epochs = self.run.model.train(), self.run.batches, self.config.training.epochs
        torch.manual_seed(seed_of(self.config.training_seed, epoch, 0))
        for step, batch in enumerate(batches.epoch(epoch), start=(epoch - 1) * batches.num_steps):
            losses = self._forward(model, batch.features, batch.present, partial(self._loss, batch))
            losses.sum().backward()
            self._update(step, rate(step, num_epochs * batches.num_steps))

    def _forward(
        self,
        model: MultimodalModel,
        features: dict[str, Features],
        present: dict[str, Tensor],
        read: Callable[[Logits, Tensor], T],
    ) -> T:
        """What `read` makes of each member's logits and label smoothing, stacked."""
        buffers = dict(model.named_buffers())

        def one(parameters: Stack, rates: Stack, smoothing: Tensor) -> T:
            return read(functional_call(model, {**buffers, **parameters, **rates}, (features, present)), smoothing)

        stacked: T = vmap(one, randomness="same")(
            self.stack, self._rates(model), self.values["training.label_smoothing"]
        )
        return stacked

    def _rates(self, model: MultimodalModel) -> Stack:
        """The members' own dropout rates, under the names of the model's buffers: (P,) each."""
        keys = {"modality_dropout": "model.modality_dropout"}
        names = [name for name, _ in model.named_buffers() if name.endswith(".rate") or name in keys]
        feature = {n for n in names if n.startswith("inputs.")}
        return {
            n: self.values[keys.get(n, "model.feature_dropout" if n in feature else "model.dropout")] for n in names
        }

    def _loss(self, batch: Batch, logits: Logits, smoothing: Tensor) -> Tensor:
        """One member's loss (). It is linear in the label smoothing, so it is mixed from those without and with all of it."""
        sharp, flat = (o.of_batch(logits, batch) for o in self.ends)
        return sum(((1 - smoothing) * sharp[t] + smoothing * flat[t] for t in sharp), start=smoothing.new_zeros(()))

    @torch.no_grad()
    def _update(self, step: int, schedule: float) -> None:
        """One step of AdamW with each member's own rate and decay; decays what `build_optimizer` decays."""
        lr, weight_decay = self.values["training.lr"] * schedule, self.values["training.weight_decay"]
        correction1, correction2 = 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)
        for name, p in self.stack.items():
            assert p.grad is not None
            mean, square = self.moments[name]
            shape = (-1,) + (1,) * (p.ndim - 1)
            if p.ndim > 2:  # a matrix, and the members' axis
                p.mul_((1 - lr * weight_decay).view(shape))
            mean.lerp_(p.grad, 1 - BETA1)
            square.mul_(BETA2).addcmul_(p.grad, p.grad, value=1 - BETA2)
            denominator = square.sqrt().div_(correction2**0.5).add_(EPS)
            p.sub_(mean.div(denominator).mul_((lr / correction1).view(shape)))
            p.grad = None

    @torch.no_grad()
    def _validate(self) -> None:
        """Score all members on the val rows; keep the weights of those that are better than before."""
        model, table, rows, device = self.run.model.eval(), self.run.table, self.run.val_rows, self.run.world.device
        tallies: list[dict[str, np.ndarray]] = [{} for _ in self.members]
        for start in range(0, len(rows), 1024):
            chosen = rows[start : start + 1024]
            inputs = model_inputs(table, chosen, model.spec.modalities, device)
            for t, found in self._forward(model, *inputs, lambda logits, _: logits).items():
                labels = torch.from_numpy(table.labels[t][chosen]).to(device)
                for tally, values in zip(tallies, found, strict=True):
                    tally[t] = tally.get(t, 0) + tally_batch(values, labels).cpu().numpy()
        better = np.zeros(len(self.members), dtype=bool)
        for i, tally in enumerate(tallies):
            val = summarise(tally)
            if not np.isfinite(val["loss"]):
                self.scores[i] = np.nan
            elif self._still_runs(i) and self.objective(val) > self.scores[i]:
                better[i], self.val[i], self.scores[i], self.best_epoch[i] = True, val, self.objective(val), self.epoch
        changed = torch.from_numpy(np.flatnonzero(better)).to(device)
        for name, p in self.stack.items():
            self.best[name].index_copy_(0, changed, p.detach().index_select(0, changed))

    def _still_runs(self, member: int) -> bool:
        """False once `patience` epochs went by without a better score, where alone it would have stopped."""
        patience = self.config.training.patience
        return patience == 0 or self.best_epoch[member] == 0 or self.epoch - self.best_epoch[member] <= patience

    # --- choosing ----------------------------------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> Population:
        """These members alone, in this order."""
        chosen = object.__new__(Population)
        index = torch.tensor(list(members), device=self.run.world.device)
        chosen.__dict__ |= self.__dict__ | {
            "members": [self.members[i] for i in members],
            "val": [self.val[i] for i in members],
            "scores": self.scores[list(members)],
            "best_epoch": self.best_epoch[list(members)],
            "values": {key: v[index] for key, v in self.values.items()},
            "stack": {n: p.detach()[index] for n, p in self.stack.items()},
            "moments": {n: (m[index], s[index]) for n, (m, s) in self.moments.items()},
            "best": {n: p[index] for n, p in self.best.items()},
        }
        return chosen

    @staticmethod
    def merge(populations: Sequence[Population]) -> Population:
        """All members of populations of one architecture and seed that have trained equally long."""
        first = populations[0]
        if any(p.epoch != first.epoch or p.config != first.config for p in populations):
            raise ValueError("only populations of one config and epoch can be merged")
        merged = object.__new__(Population)
        merged.__dict__ |= first.__dict__ | {
            "members": [m for p in populations for m in p.members],
            "val": [v for p in populations for v in p.val],
            "scores": np.concatenate([p.scores for p in populations]),
            "best_epoch": np.concatenate([p.best_epoch for p in populations]),
            "values": {key: torch.cat([p.values[key] for p in populations]) for key in first.values},
            "stack": {n: torch.cat([p.stack[n].detach() for p in populations]) for n in first.stack},
            "moments": {
                n: tuple(torch.cat([p.moments[n][i] for p in populations]) for i in (0, 1)) for n in first.moments
            },
            "best": {n: torch.cat([p.best[n] for p in populations]) for n in first.best},
        }
        return merged

    def model(self, member: int) -> MultimodalModel:
        """One member by itself at its best epoch, in eval mode."""
        alone = MultimodalModel(spec_of(self.config.with_overrides(self.members[member]), self.run.table))
        alone.load_state_dict({**self.run.model.state_dict(), **{n: p[member] for n, p in self.best.items()}})
        return alone.eval()


def smoothing_ends(config: Config, run: Fitting) -> tuple[Objective, Objective]:
    """The run's objective without label smoothing, and with nothing but it."""
    ends = [build_objective(config, run.table, run.train_rows, run.world) for _ in range(2)]
    for objective, smoothing in zip(ends, (0.0, 1.0), strict=True):
        objective.label_smoothing = smoothing
    return ends[0], ends[1]


def _column(config: Config, members: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    """The members' values of a key (P,)."""
    section, name = key.split(".")
    default = getattr(getattr(config, section), name)
    return torch.tensor([float(member.get(key, default)) for member in members])


def check_stackable(config: Config, table: FeatureTable, members: Sequence[Mapping[str, Any]]) -> None:
    """Raises: ConfigError for members that differ in other keys, sparse features, and training that acts on gradients."""
    if unknown := {key for member in members for key in member} - MEMBER_KEYS:
        raise ConfigError(
            f"candidates of one population can't differ in {sorted(unknown)}; they can in {sorted(MEMBER_KEYS)}"
        )
    training = config.training
    refused = {
        "model.missing: expert": config.model.missing == "expert",
        "training.balance": training.balance is not None,
        "training.task_weighting": training.task_weighting != "sum",
        "training.transfer": bool(training.transfer.init or training.transfer.teachers),
        "training.augment": training.augment.noise > 0 or training.augment.mixup > 0,
    }
    for key, given in refused.items():
        if given:
            raise ConfigError(f"{key} can't be searched over in populations: leave it out of the search's config")
    for m in config.model_modalities:
        if not isinstance(table.features.get(m), np.ndarray):
            raise ConfigError(f"search stacks dense features, '{m}' is sparse: give modalities.{m} a reduce, e.g. svd")
    if not (table.split == "val").any():
        raise ConfigError("a search chooses by the val split, and there is none: set samples.split.val_frac above 0")
