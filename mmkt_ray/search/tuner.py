"""Ray Tune over architectures: one trial is one architecture and a population of candidates.

Optuna's sampler proposes architectures and learns from the best score of each; ASHA stops poor ones early. Tune sees
a few numbers of each trial, whatever the size of its population: the candidates themselves go to Parquet parts.

Sources: TPE, Bergstra et al. 2011 (https://papers.nips.cc/paper/4443); ASHA, Li et al. 2020
(https://arxiv.org/abs/1810.05934).
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import optuna
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from mmkt_ray import cluster
from mmkt_ray.config import ParameterConfig, seed_32
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.search.leaderboard import Known, Leaderboard
from mmkt_ray.search.space import Overrides, Space, parameter_values, text_of
from mmkt_ray.search.trial import SearchContext, Trial

log = logging.getLogger(__name__)

LOG_INTERVAL_S = COUNT_INTERVAL_S = 10.0


class PopulationTrial(tune.Trainable):
    """A trial as Tune drives it; a step is a rung."""

    def setup(self, config: dict[str, Any], *, context: SearchContext, table: FeatureTable) -> None:
        """context, table: from the object store, shared by all trials of a node."""
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.context, self.table = context, table
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1 / context.search.trials_per_gpu)
        cluster.keep_freed_memory()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The actor takes the next trial."""
        architecture, reference = architecture_of(self.context.space, new_config), new_config["reference"]
        self.trial = Trial(self.context, self.table, new_config["number"], architecture, reference, self.device)
        return True

    def step(self) -> dict[str, Any]:
        """See Trial."""
        return self.trial.step()


Turn = str | Overrides | None  # a reference's name, an architecture, or whatever Optuna proposes


@dataclass
class Proposals:
    """Optuna's define-by-run space: called for each trial, in the driver. First come the trials of the plan."""

    space: Space
    numbers: Iterator[int]  # of trials beyond the plan
    planned: list[tuple[int, Turn]] = field(default_factory=list)

    def __call__(self, trial: optuna.Trial) -> dict[str, Any]:
        number, turn = self.planned.pop(0) if self.planned else (next(self.numbers), None)
        if isinstance(turn, str):
            return {"number": number, "reference": turn}  # else Optuna chooses: what the turn says, if it says anything
        chosen: Overrides = {}
        for key, parameter in self.space.architecture.items():
            if self.space.applies(key, chosen):
                chosen[key] = value_of(parameter, suggest(trial, key, parameter))
        return {"number": number, "reference": None}


def suggest(trial: optuna.Trial, key: str, parameter: ParameterConfig) -> Any:
    """Optuna's suggestion; choices as text, which is what it can keep."""
    distribution = distribution_of(parameter)
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(key, list(distribution.choices))
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high)
    return trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)


def distribution_of(parameter: ParameterConfig) -> Any:
    """A parameter as Optuna says it."""
    if parameter.choice is not None:
        return optuna.distributions.CategoricalDistribution([text_of(v) for v in parameter.choice])
    if parameter.int is not None:
        return optuna.distributions.IntDistribution(*parameter.int)
    low, high = parameter.loguniform or parameter.float or (0.0, 1.0)
    return optuna.distributions.FloatDistribution(low, high, log=parameter.loguniform is not None)


def value_of(parameter: ParameterConfig, suggested: Any) -> Any:
    """The value that Optuna's suggestion stands for."""
    if parameter.choice is None:
        return suggested
    return next(v for v in parameter_values(parameter) if text_of(v) == suggested)


def suggestion_of(parameter: ParameterConfig, value: Any) -> Any:
    """What Optuna would have suggested."""
    return value if parameter.choice is None else text_of(value)


def architecture_of(space: Space, proposal: Mapping[str, Any]) -> Overrides:
    """What a proposal, as Tune hands it to a trial, has chosen."""
    if proposal["reference"] is not None:
        return space.references()[proposal["reference"]]
    return {k: value_of(p, proposal[k]) for k, p in space.architecture.items() if k in proposal}


def planned_trials(space: Space, known: Sequence[Known], num_trials: int) -> list[tuple[int, Turn]]:
    """Number and turn of the trials that are settled beforehand: those whose process died, then the references, fused
    ones first, with an architecture after each, then the other architectures once, if there is time for them.

    A trial's number decides its candidates, so that a search that was killed draws those that it would have drawn.
    """
    references = list(space.references())
    room = max(0, sum(trial.ended for trial in known) + num_trials - len(references))
    others: list[Turn] = list(islice(space.architectures(), room + 1)) if space.countable else []
    if 0 < len(others) <= room:
        np.random.default_rng(space.config.seed).shuffle(others)
    else:
        others = [None] * min(room, len(references))
    planned: list[Turn] = []
    for i, name in enumerate(references):
        planned += [name, *others[i : i + 1]]
    planned += others[len(references) :]
    turns: dict[int, Turn] = {t.number: t.reference or t.architecture for t in known if not t.ended}
    there = [t.reference or t.architecture for t in known]
    taken = {t.number for t in known}
    free = count(max(taken | {len(planned) - 1}) + 1)
    for position, turn in enumerate(planned):
        if position not in taken and (turn is None or position < max(taken, default=-1)):
            turns[position] = turn  # one whose part was lost is the same again, whoever else chose it since
        elif turn is not None and turn not in there:
            turns[next(free) if position in taken else position] = turn
    return sorted(turns.items(), key=lambda item: item[0])


def build_sampler(context: SearchContext, num_trials: int) -> OptunaSearch:
    """Optuna's searcher, told of the trials that are on disk; first come those of the plan."""
    space = context.space
    known = context.leaderboard.trials()
    turns = planned_trials(space, known, num_trials)
    next_number = max([t.number for t in known] + [number for number, _ in turns], default=-1) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed_32(space.config.seed + next_number), multivariate=True, group=True, constant_liar=True
        )
    searcher = OptunaSearch(
        Proposals(space, count(next_number), list(turns)),
        metric="score",
        mode="max",
        sampler=sampler,
        points_to_evaluate=[
            {k: suggestion_of(space.architecture[k], v) for k, v in turn.items()} if isinstance(turn, dict) else {}
            for _, turn in turns  # a reference takes a turn without choosing anything
        ],
    )
    for trial in known:
        if trial.ended and trial.architecture:
            searcher._ot_study.add_trial(frozen_trial(space, trial.architecture, trial.score))
    return searcher


def frozen_trial(space: Space, chosen: Mapping[str, Any], score: float) -> optuna.trial.FrozenTrial:
    """A finished trial, for a study that did not run it."""
    parameters = {k: space.parameters[k] for k in chosen}
    return optuna.trial.create_trial(
        params={k: suggestion_of(p, chosen[k]) for k, p in parameters.items()},
        distributions={k: distribution_of(p) for k, p in parameters.items()},
        value=score,
    )


def run_trials(context: SearchContext, table: FeatureTable, num_trials: int, time_budget_s: float | None) -> int:
    """Search on with so many trials; all that they find is in the leaderboard's parts. Returns how many broke off:
    Tune gives up a trial whose worker dies while two calls to it are under way.

    An interrupt goes up at Tune's next step: parts are whole at any time.
    """
    resources = cluster.connect()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own way to end hides that the search was interrupted
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the parts are the record
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # a table of its own on stdout
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns that these loggers' files are not there
    search = context.search
    trials_per_gpu = search.trials_per_gpu if resources.num_gpus else None
    trainable = tune.with_resources(
        tune.with_parameters(PopulationTrial, context=context, table=table),
        {"cpu": 1, "gpu": 1 / trials_per_gpu if trials_per_gpu else 0},
    )
    scheduler = AsyncHyperBandScheduler(
        time_attr="budget",
        metric="score",
        mode="max",
        max_t=search.eta ** (search.rungs - 1),
        reduction_factor=search.eta,
        stop_last_trials=False,
    )
    searcher = build_sampler(context, num_trials)
    limiter = ConcurrencyLimiter(searcher, num_concurrent(resources, trials_per_gpu))
    watcher = Watcher(limiter, trials_per_gpu, context.leaderboard)
    with tempfile.TemporaryDirectory(prefix="mmkt-search-") as scratch, watcher.take_interrupts():
        results = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=limiter,
                scheduler=scheduler,
                num_samples=num_trials,
                reuse_actors=True,
                time_budget_s=time_budget_s,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if results.errors:
        log.warning("%d trials broke off, the first with: %s", len(results.errors), results.errors[0])
    return len(results.errors)


def num_concurrent(resources: cluster.Resources, trials_per_gpu: int | None) -> int:
    """Trials at a time: what the GPUs of all nodes take, else (null) one for each core of theirs.

    A Ray of our own counts more CPUs than there are. On a cluster one more waits, for which one that can grow does.
    """
    room = int(resources.num_gpus * trials_per_gpu if trials_per_gpu else resources.num_cpus)
    if os.environ.get("RAY_ADDRESS"):
        return room + 1
    return max(1, room if trials_per_gpu else min(room, cluster.cores()))


class Watcher(tune.Callback):
    """Every few seconds logs a line and counts how many trials there is room for, as nodes come and go.

    It turns an interrupt into KeyboardInterrupt where nothing can swallow it: Python raises it wherever the main
    thread happens to be, and inside a finalizer it is printed and lost.
    """

    def __init__(self, limiter: ConcurrencyLimiter, trials_per_gpu: int | None, leaderboard: Leaderboard) -> None:
        self.limiter, self.trials_per_gpu, self.leaderboard = limiter, trials_per_gpu, leaderboard
        self.num_candidates, self.best, self.interrupted = 0, -np.inf, 0  # the last: by which signal
        self.told_s = self.counted_s = time.monotonic()

    @contextmanager
    def take_interrupts(self) -> Iterator[None]:
        """Within it the first Ctrl-C or SIGTERM ends the search at Tune's next step, the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # no signal comes here
            return
        found = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        before = {signum: handler for signum, handler in found.items() if callable(handler)}

        def give_back() -> None:
            for signum, handler in before.items():
                signal.signal(signum, handler)

        def remember(signum: int, _: object) -> None:
            self.interrupted = signum
            give_back()

        for signum in before:
            signal.signal(signum, remember)
        try:
            yield
        finally:
            give_back()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """See Tune."""
        if self.interrupted:
            signal.raise_signal(self.interrupted)
        if time.monotonic() - self.counted_s > COUNT_INTERVAL_S:
            self.counted_s = time.monotonic()
            self.limiter.set_max_concurrency(num_concurrent(cluster.connect(), self.trials_per_gpu))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Tune."""
        if result["training_iteration"] == 1 and trial.config["reference"] is None:
            self.num_candidates += result["candidates"]
        self.best = max(self.best, result["score"])
        if time.monotonic() - self.told_s > LOG_INTERVAL_S:
            self.told_s = time.monotonic()
            log.info("%d candidates, best validation score %.4f", self.num_candidates, self.best)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Tune: it is at its end, or ASHA stopped it."""
        self.leaderboard.close_part(trial.config["number"])

    on_trial_error = on_trial_complete  # for the last time it was tried
