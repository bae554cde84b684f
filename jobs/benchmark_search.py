"""Candidates per hour and the best score against time: the search against what users would do instead.

Same features, same epochs, same time budget for each; the store of an extracted config is read once before.

- ours: `mmkt_ray.search`, populations and successive halving on all cores
- ours_all_epochs: the same without halving, so that every candidate is trained for as many epochs as the others' are
- tune: Ray Tune, one candidate per trial, function trainable, as its documentation shows
- random, tpe: random search and Optuna's TPE one by one in this process on all cores, without any of Tune's overhead

    python jobs/benchmark_search.py --config jobs/configs/openmoji_search.yaml --out scaling.json

What grows with the number of candidates and with the size of a population, and what does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
from matplotlib.figure import Figure
from ray import tune

from mmkt_ray import cluster
from mmkt_ray.config import Config, SearchConfig, load_config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.search import check_search, explore, search_digest
from mmkt_ray.search.space import Space
from mmkt_ray.search.summary import anytime_curve
from mmkt_ray.search.trial import search_score
from mmkt_ray.search.tuner import suggest, value_of
from mmkt_ray.stages import hardware, read_commit
from mmkt_ray.steps import extract_step
from mmkt_ray.training.loop import fit

Point = tuple[float, float]  # seconds, score of a finished candidate

NUM_CANDIDATES = (640, 2_560, 10_240)  # in populations of 64
POPULATIONS = (256, 16, 64)  # the largest first: memory that is freed does not all go back
NUM_TRIALS = 20  # of each of these populations
SCALING = {"training.epochs": 3}  # one architecture, no halving: every candidate costs the same


def search_contenders(config: Config, store: Store, budget_s: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> a run of `budget_s` seconds, from nothing; Ray is started before."""
    space, settings = check_search(config), config.search or SearchConfig()
    settings = settings.model_copy(update={"time_budget_s": budget_s})
    table = store.table(config.model_modalities, config.model_tasks)
    score = search_score(space, table)
    one_by_one = {
        "random": lambda: optuna.samplers.RandomSampler(seed=config.seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=config.seed),
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def sampled(sampler: Callable[[], optuna.samplers.BaseSampler]) -> dict[str, Any]:
        return told(list(in_process(space, settings, table, score, sampler())), budget_s)

    contenders = {
        "ours": lambda: ours(space, settings, table, store),
        "ours_all_epochs": lambda: ours(space, settings.model_copy(update={"rungs": 1}), table, store),
        "tune": lambda: one_per_trial(space, settings, table, score),
    }
    for name, sampler in one_by_one.items():
        contenders[name] = partial(sampled, sampler)
    return contenders


def ours(space: Space, settings: SearchConfig, table: FeatureTable, store: Store) -> dict[str, Any]:
    """The product's search, without its finalists.

    `per_hour` counts start-up, and not the stacks that were under way when the time was up, which are many where a
    stack takes a good part of the time; `per_hour_of_stacks` is the rate of finished stacks, on all cores.
    """
    with tempfile.TemporaryDirectory(prefix="mmkt-benchmark-") as folder:
        leaderboard = Leaderboard(folder, space, search_digest(space, settings, store))
        started = time.perf_counter()
        explore(space, settings, leaderboard, table)
        wall, rows = time.perf_counter() - started, leaderboard.read()
    done = {"candidates": len(rows), "full_training": int((rows["status"] == "finished").sum())}
    cores = min(cluster.cores(), int(ray.cluster_resources()["CPU"]))
    of_stacks = 3600 * len(rows) * cores / rows["seconds"].sum()
    rates = {"per_hour": 3600 * len(rows) / wall, "per_hour_of_stacks": of_stacks}
    return {**done, **rates, "wall_s": wall, "curve": anytime_curve(rows)}


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
        val = fit(space.configure(chosen), table).val
        assert val is not None, "a search takes val rows"
        return float(score(val.metrics))
    except ValueError:  # the loss is no number
        return 0.0


def one_per_trial(space: Space, settings: SearchConfig, table: FeatureTable, score: Any) -> dict[str, Any]:
    """Ray Tune as its documentation shows: a function, a trial for each candidate, random values;
    one trial per core."""

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


# --- what grows -----------------------------------------------------------------------------------------------------


def measure_scaling(config: Config, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Seconds against the number of candidates; this process's memory and Tune's files against the size of a
    population."""
    found = check_search(config)
    space = Space(found.config.with_overrides(SCALING), {}, found.members)
    table = store.table(config.model_modalities, config.model_tasks)

    def measure(num: int, population: int) -> dict[str, Any]:
        return explore_so_many(space, num, population, table, store)

    measure(POPULATIONS[0], POPULATIONS[0])  # Ray's workers start, libraries are imported
    populations = [measure(NUM_TRIALS * population, population) for population in POPULATIONS]
    return {"candidates": [measure(num, 64) for num in NUM_CANDIDATES], "populations": populations}


def explore_so_many(space: Space, num: int, population: int, table: FeatureTable, store: Store) -> dict[str, Any]:
    """A search over so many candidates, without halving."""
    settings = SearchConfig(population=population, max_candidates=num, rungs=1, time_budget_s=None)
    with tempfile.TemporaryDirectory(prefix="mmkt-benchmark-") as folder, watch_files("mmkt-search-*") as most:
        leaderboard = Leaderboard(folder, space, search_digest(space, settings, store))
        before, started = resident_bytes(), time.perf_counter()
        explore(space, settings, leaderboard, table)
        wall, rows = time.perf_counter() - started, leaderboard.read()
    figures = {
        "candidates": len(rows),
        "population": population,
        "wall_s": wall,
        "ms_per_candidate": 1000 * wall / len(rows),
        "training_ms_per_candidate": 1000 * float(rows["seconds"].mean()),
        "driver_bytes": resident_bytes(),
        "driver_grew_bytes": resident_bytes() - before,
        "tune_bytes": most[0],
    }
    print(figures, file=sys.stderr)
    return figures


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextmanager
def watch_files(pattern: str) -> Iterator[list[int]]:
    """Most bytes that were seen in the temporary folders of this pattern: [bytes]."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            sizes = (size_of(p) for f in Path(tempfile.gettempdir()).glob(pattern) for p in f.rglob("*"))
            most[0] = max(most[0], sum(sizes))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if it is gone by now, or a folder."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="jobs/configs/openmoji_search.yaml")
    parser.add_argument("--out", default=None, help="write the JSON here as well")
    args = parser.parse_args()
    cluster.connect()
    config = load_config(args.config)
    store = extract_step(config.model_copy(update={"variants": {}}))["model"]
    report = {**measure_scaling(config, store), "hardware": hardware(), "commit": read_commit()}
    print(text := json.dumps(report, indent=2))
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
