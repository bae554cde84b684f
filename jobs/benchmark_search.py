"""Candidates per hour and the best score against time: the search against what users would do instead.

Same features, same epochs, same time budget for each; the store of an extracted config is read once before.

- ours: `mmkt_ray.search`, populations and successive halving on all cores
- ours_all_epochs: the same without halving, so that every candidate is trained for as many epochs as the others' are
- tune: Ray Tune, one candidate per trial, function trainable, as its documentation shows
- random, tpe: random search and Optuna's TPE one by one in this process on all cores, without any of Tune's overhead
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
from matplotlib.figure import Figure
from ray import tune

from mmkt_ray import cluster
from mmkt_ray.config import Config, SearchConfig
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.search.insight import anytime_curve
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.search import check_search, explore, search_digest
from mmkt_ray.search.space import Space
from mmkt_ray.search.trial import objective_of
from mmkt_ray.search.tuner import suggest, value_of
from mmkt_ray.training.loop import fit

Point = tuple[float, float]  # seconds, score of a finished candidate


def search_contenders(config: Config, store: Store, budget_s: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> a run of `budget_s` seconds, from nothing; Ray is started before."""
    space, settings = check_search(config), config.search or SearchConfig()
    settings = settings.model_copy(update={"time_budget_s": budget_s})
    table = store.table(config.model_modalities, config.model_tasks)
    score = objective_of(settings.objective)
    one_by_one = {
        "random": lambda: optuna.samplers.RandomSampler(seed=config.seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=config.seed),
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    contenders = {
        "ours": lambda: ours(space, settings, table, store),
        "ours_all_epochs": lambda: ours(space, settings.model_copy(update={"rungs": 1}), table, store),
        "tune": lambda: one_per_trial(space, settings, table, score),
    }
    for name, sampler in one_by_one.items():
        contenders[name] = lambda sampler=sampler: told(
            list(in_process(space, settings, table, score, sampler())), budget_s
        )
    return contenders


def ours(space: Space, settings: SearchConfig, table: FeatureTable, store: Store) -> dict[str, Any]:
    """The product's search, without its finalists."""
    with tempfile.TemporaryDirectory(prefix="mmkt-benchmark-") as folder:
        leaderboard = Leaderboard(folder, space, search_digest(space, settings, store))
        started = time.perf_counter()
        explore(space, settings, leaderboard, table)
        wall, rows = time.perf_counter() - started, leaderboard.read()
    done = {"candidates": len(rows), "full_training": int((rows["status"] == "finished").sum())}
    return {**done, "per_hour": 3600 * len(rows) / wall, "wall_s": wall, "curve": anytime_curve(rows)}


def draw_curves(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """The best validation score of each contender against seconds, as PNG."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, found in figures.items():
        seconds, best = ([point[i] for point in found["curve"]] for i in (0, 1))
        label = f"{name.replace('_', ' ')} ({found['candidates']:,})"
        axes.step([*seconds, found["wall_s"]], [*best, *best[-1:]], where="post", label=label)
    best_of_all = max(f["curve"][-1][1] for f in figures.values() if f["curve"])
    axes.set(xlabel="seconds", ylabel="best validation score so far", ylim=(best_of_all - 0.1, best_of_all + 0.01))
    axes.legend(title="candidates", frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def told(points: list[Point], wall: float) -> dict[str, Any]:
    """The same figures of candidates that were trained one by one."""
    best = np.maximum.accumulate([score for _, score in points] or [0.0])
    curve = [[at, float(b), i + 1] for i, ((at, _), b) in enumerate(zip(points, best, strict=False))]
    done = {"candidates": len(points), "full_training": len(points)}
    return {**done, "per_hour": 3600 * len(points) / wall, "wall_s": wall, "curve": curve}


def in_process(space: Space, settings: SearchConfig, table: FeatureTable, score: Any, sampler: Any) -> Iterator[Point]:
    """Ask, fit, tell, until the time is up; a candidate that is not done by then does not count."""
    torch.set_num_threads(cluster.cores())
    study = optuna.create_study(direction="maximize", sampler=sampler)
    started = time.perf_counter()
    while True:
        trial = study.ask()
        value = fit_one(space, choose(space, trial), table, score)
        at = time.perf_counter() - started
        if at > (settings.time_budget_s or 0):
            return
        study.tell(trial, value)
        yield at, value


def choose(space: Space, trial: Any) -> dict[str, Any]:
    """A whole candidate, architecture and members, by Optuna's suggestions."""
    chosen: dict[str, Any] = {}
    for key, parameter in space.parameters.items():
        if space.applies(key, chosen):
            chosen[key] = value_of(parameter, suggest(trial, key, parameter))
    return chosen


def fit_one(space: Space, chosen: dict[str, Any], table: FeatureTable, score: Any) -> float:
    """The validation score of one candidate, trained alone; 0 if it diverges."""
    try:
        return float(score(fit(space.configure(chosen), table).val))
    except ValueError:  # the loss is no number
        return 0.0


def one_per_trial(space: Space, settings: SearchConfig, table: FeatureTable, score: Any) -> dict[str, Any]:
    """Ray Tune as its documentation shows: a function, a trial for each candidate, random values; one trial per core."""

    def objective(config: dict[str, Any], table: FeatureTable) -> dict[str, float]:
        torch.set_num_threads(1)
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config["seed"])).ask()
        return {"score": fit_one(space, choose(space, trial), table, score), "at": time.time()}

    started = time.time()
    with tempfile.TemporaryDirectory(prefix="mmkt-benchmark-") as folder:
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(objective, table=table), {"cpu": 1}),
            param_space={"seed": tune.randint(0, 2**31)},
            tune_config=tune.TuneConfig(
                num_samples=100_000,
                max_concurrent_trials=min(cluster.cores(), int(ray.cluster_resources()["CPU"])),
                time_budget_s=settings.time_budget_s,
            ),
            run_config=tune.RunConfig(name="tune", storage_path=folder, verbose=0),
        ).fit()
        points = sorted((r.metrics["at"] - started, r.metrics["score"]) for r in results if "at" in (r.metrics or {}))
    return told(points, settings.time_budget_s or 0)
