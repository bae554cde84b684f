"""Successive halving of one architecture's candidates in stacks that stay full.

At each rung every stack trains on and keeps its best 1/eta; what eta stacks keep makes one full stack for the next
rung. So a trial of eta stacks of P candidates at the first rung goes on as one stack of P, then P / eta.

Source: successive halving, Jamieson & Talwalkar 2016 (https://arxiv.org/abs/1502.07943).
Axes: P members of a stack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmkt_ray.inference.training_record import ValScores
from mmkt_ray.training.population import Population

Build = Callable[[Sequence[Mapping[str, Any]]], Population]


@dataclass
class SearchCandidate:
    """One member and what became of it."""

    member: dict[str, Any]
    status: str = "running"  # running | stopped | finished | diverged | failed | out_of_memory
    reason: str = ""
    score: float = float("nan")  # its best so far
    first_score: float = float("nan")  # after the first rung, where all candidates have trained equally long
    val: ValScores | None = None  # scores of its best epoch, see training.validation
    epochs: int = 0
    best_epoch: int = 0
    seconds: float = 0.0  # its share of its stacks' training
    finished_at: float = 0.0  # when it was trained last, by the trial's clock


@dataclass
class Stack:
    """Candidates that train together; the population is made when they first do."""

    candidates: list[SearchCandidate]
    population: Population | None = field(default=None, repr=False)


class Halving:
    """All candidates of a trial, between two rungs."""

    def __init__(
        self,
        build: Build,
        members: Sequence[Mapping[str, Any]],
        size: int,
        rungs: Sequence[int],
        eta: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """size: P at most; rungs: epochs at which candidates are compared, the last one ends it."""
        self.build, self.rungs, self.eta, self.clock = build, rungs, eta, clock
        self.candidates = [SearchCandidate(dict(member)) for member in members]
        self.stacks = [Stack(part) for part in _chunks(self.candidates, size)]
        self.rung = 0

    @property
    def done(self) -> bool:
        """Nobody is left to train."""
        return self.rung == len(self.rungs) or not self.stacks

    @property
    def best(self) -> float:
        """The best score so far; -inf if there is none."""
        return max((c.score for c in self.candidates if np.isfinite(c.score)), default=-np.inf)

    def run_rung(self, progress: Callable[[], None] = lambda: None) -> None:
        """Train all who are left to the next rung and keep the best; `progress` is called after each stack."""
        waiting, self.stacks = self.stacks, []
        until, last = self.rungs[self.rung], self.rung + 1 == len(self.rungs)
        for group in _chunks(waiting, self.eta):
            kept = []
            while group:
                for stack in self._train(group.pop(0), until):
                    if survivors := [] if last else self._cut(stack, until):
                        kept.append(_select(stack, survivors))
                    stack.population = None  # the next stack needs the memory
                    progress()
            if kept:
                self.stacks.append(_merge(kept))
        self.rung += 1

    def fail(self, reason: str) -> None:
        """Whoever is still in the race has failed."""
        for candidate in self.candidates:
            if candidate.status == "running":
                candidate.status, candidate.reason = "failed", reason
        self.stacks = []

    def _train(self, stack: Stack, until: int) -> list[Stack]:
        """The stack trained; as two or more if it was too large for the memory."""
        started = time.perf_counter()
        try:
            if stack.population is None:
                stack.population = self.build([c.member for c in stack.candidates])
            stack.population.train(until)
        except (MemoryError, torch.OutOfMemoryError):
            stack.population = None  # a half-done step leaves nothing to go on from
        if stack.population is not None:
            self._note(stack, until, time.perf_counter() - started)
            return [stack]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(stack.candidates) == 1:
            (candidate,) = stack.candidates
            candidate.status, candidate.reason = "out_of_memory", "too large for the memory even by itself"
            return []
        halves = _chunks(stack.candidates, (len(stack.candidates) + 1) // 2)
        return [trained for half in halves for trained in self._train(Stack(half), until)]

    def _note(self, stack: Stack, until: int, seconds: float) -> None:
        """Write down how each candidate of a trained stack does."""
        population, now = stack.population, self.clock()
        assert population is not None
        for i, candidate in enumerate(stack.candidates):
            candidate.epochs, candidate.finished_at = until, now
            candidate.seconds += seconds / len(stack.candidates)
            candidate.score, candidate.val = float(population.scores[i]), population.val[i]
            if self.rung == 0:
                candidate.first_score = candidate.score
            candidate.best_epoch = int(population.best_epoch[i])
            if not np.isfinite(candidate.score):
                candidate.status, candidate.reason = "diverged", f"its loss is no number by epoch {until}"
            elif until == self.rungs[-1]:
                candidate.status = "finished"

    def _cut(self, stack: Stack, until: int) -> list[int]:
        """Indices of those that train on: the best 1/eta, at least one, of those that have a score."""
        scores = np.array([c.score for c in stack.candidates])
        order = [int(i) for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])]
        num_kept = max(1, len(order) // self.eta)
        for i in order[num_kept:]:
            stack.candidates[i].status = "stopped"
            stack.candidates[i].reason = f"not among the best 1/{self.eta} of its stack after epoch {until}"
        return order[:num_kept]


def rungs_of(num_epochs: int, num_rungs: int, eta: int) -> list[int]:
    """Epochs at which candidates are compared: .., epochs / eta^2, epochs / eta, epochs; fewer if epochs are few."""
    return sorted({max(1, round(num_epochs / eta**i)) for i in range(num_rungs)})


def _chunks(items: list[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _select(stack: Stack, members: list[int]) -> Stack:
    assert stack.population is not None
    return Stack([stack.candidates[i] for i in members], stack.population.select(members))


def _merge(stacks: list[Stack]) -> Stack:
    populations = [stack.population for stack in stacks if stack.population is not None]
    return Stack([c for stack in stacks for c in stack.candidates], Population.merge(populations))
