"""Candidates of one architecture and one seed, trained as one stack on the same minibatches, with each one's scores.

Members differ in learning rate, weight decay, label smoothing and dropout rates; see `model_stack`.

Axes: P members, N trained numbers of each, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import model_inputs
from mmkt_ray.inference.training_record import ValScores
from mmkt_ray.models import MultimodalModel
from mmkt_ray.scoring.objective import Score
from mmkt_ray.training.loop import is_better, seed_of
from mmkt_ray.training.model_stack import MEMBER_KEYS, ModelStack
from mmkt_ray.training.optimizer import lr_factor
from mmkt_ray.training.validation import summarise, task_scores


@dataclass
class Population:
    """P candidates between two epochs."""

    stack: ModelStack
    score: Score  # what a member's epochs are compared by
    members: list[dict[str, Any]]  # overrides of some of MEMBER_KEYS each
    best: Tensor  # (P, N) weights of each one's best epoch
    val: list[ValScores | None]  # scores of each one's best epoch
    scores: np.ndarray  # (P,) of their best epochs; -inf before the first, NaN of a diverged one
    best_epoch: np.ndarray  # (P,) from 1; 0 before the first
    tops: np.ndarray  # (P,) highest scores so far, see `is_better`
    epoch: int = 0

    @classmethod
    def start(
        cls,
        config: Config,
        table: FeatureTable,
        members: Sequence[Mapping[str, Any]],
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
        score: Score | None = None,
    ) -> Population:
        """members: overrides of some of MEMBER_KEYS each; what they leave out is the config's.
        score: None for the config's.

        Raises: ConfigError, DataError as `fit`, and for what can't be stacked.
        """
        check_stackable(config, table, members)
        size, stack = len(members), ModelStack.start(config, table, members, device)
        return cls(
            stack,
            score or Score.of(config.training.objective, config.task_kinds),
            [dict(member) for member in members],
            best=stack.weights.clone(),
            val=[None] * size,
            scores=np.full(size, -np.inf),
            best_epoch=np.zeros(size, dtype=int),
            tops=np.full(size, -np.inf),
        )

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self, until_epoch: int) -> None:
        """Train until so many epochs are done, validating after each. A diverged member's score becomes NaN."""
        for epoch in range(self.epoch + 1, until_epoch + 1):
            self._train_epoch(epoch)
            self.epoch = epoch
            self._validate()

    def _train_epoch(self, epoch: int) -> None:
        stack, run, config = self.stack, self.stack.run, self.stack.config
        model, batches = run.model.train(), run.batches
        num_steps = config.training.epochs * batches.num_steps
        torch.manual_seed(seed_of(config.training_seed, epoch, 0))
        parameters, criterion = stack.trainable(), stack.criterion
        for step, batch in enumerate(batches.epoch(epoch), start=(epoch - 1) * batches.num_steps):
            losses = criterion.of_batch(stack.forward(model, parameters, batch.features, batch.present), batch)
            total = torch.stack(list(losses.values())).sum()
            stack.update(torch.autograd.grad(total, list(parameters.values())), step, lr_factor(step, num_steps))

    @torch.no_grad()
    def _validate(self) -> None:
        """Score all members on the val rows; keep the weights of those that are better than before."""
        stack, run = self.stack, self.stack.run
        model, table, rows, device = run.model.eval(), run.table, run.val_rows, run.worker.device
        parameters = stack.views(stack.weights)
        tallies: list[dict[str, np.ndarray]] = [{} for _ in self.members]
        metric, kept = self.score.extra, dict[str, list[Tensor]]()
        for start in range(0, len(rows), 1024):
            chosen = rows[start : start + 1024]
            inputs = model_inputs(table, chosen, model.spec.modalities, device)
            for t, found in stack.forward(model, parameters, *inputs).items():
                if metric:
                    kept.setdefault(t, []).append(found)
                labels = table.labels[t][chosen].tensors(device)
                for tally, values in zip(tallies, labels.kind.tally(found, labels).cpu().numpy(), strict=True):
                    tally[t] = tally.get(t, 0) + values
        logits = {t: torch.cat(parts, dim=1) for t, parts in kept.items()}  # (P, rows, C)
        for i, tally in enumerate(tallies):
            val = summarise(tally, model.spec.kinds)
            if not np.isfinite(val.loss):
                self.scores[i] = np.nan
                continue
            if metric:
                further = task_scores(metric, table, rows, {t: values[i] for t, values in logits.items()})
                val = val.replaced(**{metric: further})
            if self._still_runs(i):
                score, best = self.score(val.metrics), self.val[i]
                if best is None or is_better(val, best, float(self.tops[i]), len(rows), self.score):
                    self.val[i], self.scores[i], self.best_epoch[i] = val, score, self.epoch
                    self.best[i].copy_(stack.weights[i])
                self.tops[i] = np.fmax(self.tops[i], score)

    def _still_runs(self, member: int) -> bool:
        """False once `patience` epochs have passed without a better score: alone, the member would have stopped."""
        patience, best = self.stack.config.training.patience, int(self.best_epoch[member])
        return patience == 0 or best == 0 or self.epoch - best <= patience

    # --- choosing ---------------------------------------------------------------------------------------------------

    def select(self, members: Sequence[int]) -> Population:
        """These members alone, in this order."""
        chosen = list(members)
        return replace(
            self,
            stack=self.stack.select(chosen),
            members=[self.members[i] for i in chosen],
            best=self.best[torch.tensor(chosen, dtype=torch.long, device=self.best.device)],
            val=[self.val[i] for i in chosen],
            scores=self.scores[chosen],
            best_epoch=self.best_epoch[chosen],
            tops=self.tops[chosen],
        )

    @staticmethod
    def merge(populations: Sequence[Population]) -> Population:
        """All members of populations of one architecture and seed. Raises: ValueError if some have trained longer."""
        first = populations[0]
        if any(p.epoch != first.epoch for p in populations):
            raise ValueError("only populations of one epoch can be merged")
        return replace(
            first,
            stack=ModelStack.merge([p.stack for p in populations]),
            members=[m for p in populations for m in p.members],
            best=torch.cat([p.best for p in populations]),
            val=[v for p in populations for v in p.val],
            scores=np.concatenate([p.scores for p in populations]),
            best_epoch=np.concatenate([p.best_epoch for p in populations]),
            tops=np.concatenate([p.tops for p in populations]),
        )

    def model(self, member: int) -> MultimodalModel:
        """One member by itself at its best epoch, in eval mode."""
        return self.stack.alone(self.stack.config.with_overrides(self.members[member]), self.best, member)


def check_stackable(config: Config, table: FeatureTable, members: Sequence[Mapping[str, Any]]) -> None:
    """Raises: ConfigError for members that differ in other keys, sparse features,
    and training that acts on gradients."""
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
