"""One trial: an architecture and its candidates, from the draw to the part of the leaderboard. Knows no Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmkt_ray.config import Config, SearchConfig
from mmkt_ray.errors import UserError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.scoring.objective import Score, constant_scores
from mmkt_ray.search.halving import Halving, rungs_of
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.space import Overrides, Space
from mmkt_ray.training.population import Population

log = logging.getLogger(__name__)

PART_INTERVAL_S = 5.0  # a killed trial loses no more than its stack and this


@dataclass(frozen=True)
class SearchContext:
    """What every trial needs beside its architecture and the features."""

    space: Space
    search: SearchConfig
    leaderboard: Leaderboard
    num_stacks: int  # of each trial at the first rung
    started_at: float  # time.time() at which the search's clock was 0

    @property
    def candidates_per_trial(self) -> int:
        """How many a trial starts with."""
        return min(self.num_stacks * self.search.population, self.search.max_candidates) if self.space.members else 1


def search_score(space: Space, table: FeatureTable) -> Score:
    """What candidates are compared by, on val. Where tasks are searched over, a task that a candidate lacks counts as
    the constant prediction gets there, see `constant_scores`."""
    config = space.config
    objective = config.training.objective
    searched = "model.tasks" in space.architecture and objective.task is None
    return Score.of(objective, config.task_kinds, constant_by_task(space, table) if searched else None)


def constant_by_task(space: Space, table: FeatureTable) -> dict[str, float]:
    """Task -> what the constant prediction gets by the objective's metric, where val defines it."""
    metric, tasks = space.config.training.objective.metric, space.config.model_tasks
    rows = {s: {t: (table.split == s) & table.labels[t].labelled for t in tasks} for s in ("train", "val")}
    train, val = ({t: table.labels[t][found] for t, found in by_task.items()} for by_task in rows.values())
    return constant_scores(metric, train, val, {t: table.width(t) for t in tasks})


def stacks_per_trial(search: SearchConfig, num_architectures: int) -> int:
    """As many stacks as keep the later rungs full (a power of eta), if every architecture can still have a trial."""
    num: int = search.eta ** (search.rungs - 1)
    while num > 1 and search.max_candidates < num * search.population * num_architectures:
        num //= search.eta
    return num


class Trial:
    """One architecture's successive halving, written down as it goes."""

    def __init__(
        self,
        context: SearchContext,
        table: FeatureTable,
        number: int,
        architecture: Overrides,
        reference: str | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    ) -> None:
        """number: another one for each trial of a search; it decides the draws. reference: the name, if it is one."""
        self.context, self.table, self.device = context, table, device
        self.number, self.architecture, self.reference = number, architecture, reference
        space, search = context.space, context.search
        self.score = search_score(space, table)
        members = space.draw_members(architecture, context.candidates_per_trial, [space.config.seed, number])
        self.written_s = time.monotonic()
        self.config: Config | None = None
        try:
            self.config = space.configure(architecture)
        except UserError as error:  # spaces too large to be tried out before may hold what is impossible
            self.fault = error
        epochs = self.config.training.epochs if self.config else 1
        rungs = rungs_of(epochs, search.rungs, search.eta)
        self.halving = Halving(self.build, members, search.population, rungs, search.eta, self.clock)

    def build(self, members: Sequence[Mapping[str, Any]]) -> Population:
        """One stack, on this trial's device."""
        if self.config is None:
            raise self.fault
        return Population.start(self.config, self.table, members, self.device, self.score)

    def clock(self) -> float:
        """Seconds since the search began."""
        return time.time() - self.context.started_at

    def step(self) -> dict[str, Any]:
        """Run a rung. What an architecture raises is its own failure, written down with its candidates.

        Returns `score` (the best so far), `candidates`, `done`, and but for references `budget`, by which ASHA
        compares trials: what the winner is compared with is never stopped.
        """
        halving = self.halving
        try:
            halving.run_rung(self.write_sometimes)
        except Exception as error:  # whatever one architecture raises must cost only its own candidates
            log.warning("trial %d failed: %s", self.number, error)
            halving.fail(f"{type(error).__name__}: {error}")
        self.write()
        result = {
            "score": max(halving.best, self.score.worst),
            "candidates": len(halving.candidates),
            "done": halving.done,
        }
        return result if self.reference else {**result, "budget": self.context.search.eta ** max(0, halving.rung - 1)}

    def write_sometimes(self) -> None:
        """Write the part if the last time is a while ago."""
        if time.monotonic() - self.written_s > PART_INTERVAL_S:
            self.write()

    def write(self) -> None:
        """Write the part of this trial."""
        self.written_s = time.monotonic()
        candidates = self.halving.candidates
        self.context.leaderboard.write_part(self.number, self.reference, self.architecture, self.config, candidates)
