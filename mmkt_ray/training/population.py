"""Candidates of one architecture and one seed, trained as one stacked model on the same minibatches.

Members differ in learning rate, weight decay, label smoothing and dropout rates. All of their parameters lie in tensors
with one more axis in front, so a step is a handful of wide products instead of P small ones. The members start from the
same weights, read the same batches and draw the same random numbers (a dropout mask is where the number falls below the
member's own rate), just as each would alone with that seed: so a member's result is that of `fit` with its config.

Axes: P members, B rows of a batch, C classes of one task.

Source: horizontally fused training, Wang et al. 2021 (https://arxiv.org/abs/2102.02344); the layers are those of `models.layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.store import FeatureTable
from mmkt_ray.inference.outputs import model_inputs
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models import Features, MultimodalModel
from mmkt_ray.scoring.objective import Score
from mmkt_ray.training.batches import World
from mmkt_ray.training.learner import Logits
from mmkt_ray.training.loop import Fitting, build_objective, is_better, seed_of, spec_of
from mmkt_ray.training.objective import Objective
from mmkt_ray.training.optimizer import rate
from mmkt_ray.training.validation import summarise, task_scores

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
FLAT = ("weights", "mean", "square", "best")  # a population's (P, N) tensors, N trained numbers each
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # as torch.optim.AdamW

Stack = dict[str, Tensor]  # parameter name -> (P, ..)


class Population:
    """P candidates between two epochs: their stacked parameters and optimiser state, and what is known of each."""

    def __init__(
        self,
        config: Config,
        table: FeatureTable,
        members: Sequence[Mapping[str, Any]],
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
        objective: Score | None = None,
    ) -> None:
        """members: overrides of some of MEMBER_KEYS each; what they leave out is the config's. objective: what a member's
        epochs are compared by; None: the config's.

        Raises: ConfigError, DataError as `fit`, and for what can't be stacked.
        """
        check_stackable(config, table, members)
        self.config = config
        self.objective = objective or Score.of(config.training.objective, config.task_kinds)
        self.members = [dict(member) for member in members]
        self.values = {key: _column(config, members, key).to(device) for key in MEMBER_KEYS}  # key -> (P,)
        self.run = Fitting(config, table, World(device=device))  # rows, batches and the weights that all start from
        run = self.run
        self.stacked_objective = StackedObjective.of(build_objective(config, run.table, run.train_rows, run.world))
        size = len(members)
        self._read_layout()
        start = torch.cat([p.detach().flatten() for _, p in self.layout])
        self.weights = start.expand(size, -1).clone()  # (P, N)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.best = self.weights.clone()
        self.val: list[dict[str, Any] | None] = [None] * size
        self.scores, self.best_epoch = np.full(size, -np.inf), np.zeros(size, dtype=int)
        self.tops = np.full(size, -np.inf)  # highest scores so far, see `is_better`
        self.epoch = 0

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, until_epoch: int) -> None:
        """Train on until so many epochs are done, validating after each. A diverged member's score becomes NaN."""
        for epoch in range(self.epoch + 1, until_epoch + 1):
            self._train_epoch(epoch)
            self.epoch = epoch
            self._validate()

    def _train_epoch(self, epoch: int) -> None:
        model, batches, num_epochs = self.run.model.train(), self.run.batches, self.config.training.epochs
        torch.manual_seed(seed_of(self.config.training_seed, epoch, 0))
        stack = {name: p.requires_grad_() for name, p in self._views(self.weights).items()}
        objective = self.stacked_objective.with_smoothing(self.values["training.label_smoothing"])
        for step, batch in enumerate(batches.epoch(epoch), start=(epoch - 1) * batches.num_steps):
            losses = objective.of_batch(self._forward(model, stack, batch.features, batch.present), batch)
            total = torch.stack(list(losses.values())).sum()
            self._update(torch.autograd.grad(total, list(stack.values())), step, rate(step, num_epochs * batches.num_steps))

    def _read_layout(self) -> None:
        """Look once at what every step needs to know of the model: walking through its modules is slow."""
        model = self.run.model
        # the parameters in the order of the columns of `weights`: matrices, which decay, come first
        self.layout: list[tuple[str, nn.Parameter]] = sorted(model.named_parameters(), key=lambda item: item[1].ndim < 2)
        self.rate_keys = {n: f"model.{field}" for n, field in model.dropout_rates().items()}  # buffer -> of MEMBER_KEYS

    def _views(self, flat: Tensor) -> Stack:
        """(P, N) as parameter name -> (P, ..)."""
        columns = flat.detach().split([p.numel() for _, p in self.layout], dim=1)
        return {name: part.view(-1, *p.shape) for (name, p), part in zip(self.layout, columns, strict=True)}

    def _forward(
        self,
        model: MultimodalModel,
        stack: Stack,
        features: dict[str, Features],
        present: dict[str, Tensor],
    ) -> Logits:
        """Each member's logits, task -> (P, B, C)."""
        tensors = {**stack, **self._rates()}
        found: Logits = functional_call(model, tensors, (features, present), tie_weights=False)  # a model ties none
        return found

    def _rates(self) -> Stack:
        """The members' own dropout rates, under the names of the model's buffers: (P,), or () where all are equal."""
        rates = {key: self.values[key] for key in set(self.rate_keys.values())}
        rates = {key: v[0] if bool((v == v[0]).all()) else v for key, v in rates.items()}
        return {name: rates[key] for name, key in self.rate_keys.items()}

    @torch.no_grad()
    def _update(self, gradients: Sequence[Tensor], step: int, schedule: float | Tensor) -> None:
        """One step of AdamW with each member's own rate and decay; decays what `build_optimizer` decays.

        gradients: (P, ..) of each parameter in the order of `layout`; schedule: factor of the rates, or one for each (P,).
        """
        if self.weights.device.type != "cpu":
            return self._update_at_once(gradients, step, schedule)
        rates = (self.values["training.lr"] * schedule).tolist()
        decays = self.values["training.weight_decay"].tolist()
        num_matrices = sum(p.ndim >= 2 for _, p in self.layout)
        count = torch.tensor(float(step + 1), device=self.weights.device)
        flat = (self._views(self.weights).values(), gradients, self._views(self.mean).values(), self._views(self.square).values())
        columns = [[part.unbind() for part in parts] for parts in flat]  # each: by parameter, then by member
        alike = dict[tuple[float, float], list[int]]()  # members of one rate and decay go together
        for i, settings in enumerate(zip(rates, decays, strict=True)):
            alike.setdefault(settings, []).append(i)
        for (lr, weight_decay), members in alike.items():
            for part, decay in ((slice(num_matrices), weight_decay), (slice(num_matrices, None), 0.0)):
                p, grad, mean, square = ([by_member[i] for by_member in c[part] for i in members] for c in columns)
                torch._fused_adamw_(
                    p, grad, mean, square, [], [count] * len(p),
                    lr=lr, weight_decay=decay, beta1=BETA1, beta2=BETA2, eps=EPS, amsgrad=False, maximize=False,
                )  # fmt: skip

    def _update_at_once(self, gradients: Sequence[Tensor], step: int, schedule: float | Tensor) -> None:
        """The same in a few operations over all members, for a GPU, where a small operation takes as long as a wide one. On a
        CPU these would go through memory several times."""
        gradient = torch.cat([part.flatten(1) for part in gradients], dim=1)  # (P, N)
        rates = (self.values["training.lr"] * schedule)[:, None]
        num_decaying = sum(p.numel() for _, p in self.layout if p.ndim >= 2)
        self.weights[:, :num_decaying].mul_(1 - rates * self.values["training.weight_decay"][:, None])
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        change = gradient.copy_(self.square).div_(1 - BETA2 ** (step + 1)).sqrt_().add_(EPS).reciprocal_().mul_(self.mean)
        self.weights.sub_(change.mul_(rates / (1 - BETA1 ** (step + 1))))

    @torch.no_grad()
    def _validate(self) -> None:
        """Score all members on the val rows; keep the weights of those that are better than before."""
        model, table, rows, device = self.run.model.eval(), self.run.table, self.run.val_rows, self.run.world.device
        stack = self._views(self.weights)
        tallies: list[dict[str, np.ndarray]] = [{} for _ in self.members]
        metric, kept = self.objective.extra, dict[str, list[Tensor]]()
        for start in range(0, len(rows), 1024):
            chosen = rows[start : start + 1024]
            inputs = model_inputs(table, chosen, model.spec.modalities, device)
            for t, found in self._forward(model, stack, *inputs).items():
                if metric:
                    kept.setdefault(t, []).append(found)
                labels = table.labels[t][chosen].tensors(device)
                for tally, values in zip(tallies, labels.kind.tally(found, labels).cpu().numpy(), strict=True):
                    tally[t] = tally.get(t, 0) + values
        logits = {t: torch.cat(parts, dim=1) for t, parts in kept.items()}  # (P, N, C)
        for i, tally in enumerate(tallies):
            val = summarise(tally, model.spec.kinds)
            if metric and np.isfinite(val["loss"]):
                val[metric] = task_scores(metric, table, rows, {t: values[i] for t, values in logits.items()})
            if not np.isfinite(val["loss"]):
                self.scores[i] = np.nan
            elif self._still_runs(i):
                score, best = self.objective(val), self.val[i]
                if best is None or is_better(val, best, float(self.tops[i]), len(rows), self.objective):
                    self.val[i], self.scores[i], self.best_epoch[i] = val, score, self.epoch
                    self.best[i].copy_(self.weights[i])
                self.tops[i] = np.fmax(self.tops[i], score)

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
            "tops": self.tops[list(members)],
            "best_epoch": self.best_epoch[list(members)],
            "values": {key: v[index] for key, v in self.values.items()},
            **{name: getattr(self, name)[index] for name in FLAT},
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
            "tops": np.concatenate([p.tops for p in populations]),
            "best_epoch": np.concatenate([p.best_epoch for p in populations]),
            "values": {key: torch.cat([p.values[key] for p in populations]) for key in first.values},
            **{name: torch.cat([getattr(p, name) for p in populations]) for name in FLAT},
        }
        return merged

    def model(self, member: int) -> MultimodalModel:
        """One member by itself at its best epoch, in eval mode."""
        alone = MultimodalModel(spec_of(self.config.with_overrides(self.members[member]), self.run.table))
        alone.load_state_dict(
            {**self.run.model.state_dict(), **{n: p[member] for n, p in self._views(self.best).items()}}
        )
        return alone.eval()


class StackedObjective(Objective):
    """Objective of logits (P, B, C): each member's losses with its own label smoothing (P,)."""

    smoothing: Tensor

    @classmethod
    def of(cls, objective: Objective) -> StackedObjective:
        """The same but for label smoothing."""
        stacked = cls.__new__(cls)
        stacked.__dict__ |= objective.__dict__
        return stacked

    def with_smoothing(self, smoothing: Tensor) -> StackedObjective:
        """smoothing: (P,)."""
        changed = StackedObjective.of(self)
        changed.smoothing = smoothing
        return changed

    def _row_losses(self, task: str, logits: Tensor, labels: Labels) -> Tensor:
        """See Objective: (P, B)."""
        return labels.kind.stacked_losses(logits + self.shifts[task], labels, self.weights[task], self.smoothing)


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
