"""A search from features to a winner: trials, leaderboard, finalists, result; the same command goes on after a kill.

<run>/search/leaderboard.parquet   every candidate (see leaderboard.py)
<run>/search/result.json           what won, on what evidence
<run>/search/report.json           heat maps, anytime curve, importance and slices, as data
<run>/models/search_winner         the winner as a model folder
<run>/models/search_ensemble       the ensemble, if `search.ensemble` asks for one
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

from mmkt_ray import storage
from mmkt_ray.config import Config, SearchConfig, fingerprint
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.evaluation import provenance
from mmkt_ray.evaluation.model_folder import save_model
from mmkt_ray.features.store import FeatureTable, Store, labelled
from mmkt_ray.search.ensemble import build_ensemble
from mmkt_ray.search.finalists import choose_finalists, fit_finalists, tell
from mmkt_ray.search.insight import search_insight
from mmkt_ray.search.leaderboard import Leaderboard, overrides_of
from mmkt_ray.search.space import Space, build_space, label_of
from mmkt_ray.search.trial import Job, stacks_per_trial
from mmkt_ray.search.tuner import run_trials
from mmkt_ray.training.imbalance import read_excluded
from mmkt_ray.training.population import check_stackable

log = logging.getLogger(__name__)


def check_search(config: Config) -> Space:
    """The config's search space. Raises: ConfigError if it, or the objective, is impossible; before any work."""
    search = config.search or SearchConfig()
    task = search.objective.task
    if task is not None and task not in config.model_tasks:
        raise ConfigError(f"search.objective.task: unknown task '{task}': {nearest(task, config.model_tasks)}")
    return build_space(config)


def search(config: Config, store: Store, run_uri: str) -> dict[str, Any]:
    """Search as the config's `search` says, and tell the winner; returns what `<run>/search/result.json` holds:

    `tried` (candidates by status), `seconds`, `objective`, `overrides` {role: what the finalist has chosen},
    `compared_with` {best single modality, best concat: role}, `ensemble` (see `build_ensemble`, or None), and
    all of `finalists.tell`.

    Raises: ConfigError for an impossible search, DataError if no candidate has, or could have, a score.
    """
    if config.training.exclude:  # trials have another current folder
        config = config.with_overrides({"training.exclude": storage.absolute(config.training.exclude)})
    space, settings = check_search(config), config.search or SearchConfig()
    table = store.table(config.model_modalities, config.model_tasks)
    check_features(space, settings, table)
    uri = storage.join(run_uri, "search")
    leaderboard = Leaderboard(uri, space, search_digest(space, settings, store))
    storage.make_dir(uri)
    explore(space, settings, leaderboard, table)
    rows = leaderboard.read()
    finalists, compared = choose_finalists(rows, settings.finalists)
    chosen = {role: overrides_of(row) for role, row in finalists.items()}
    log.info("%d candidates tried; %d finalists, %d seeds each", len(rows), len(chosen), settings.seeds)
    folders = fit_finalists(space, chosen, settings.seeds, store, storage.join(uri, "finalists"))
    ensemble, about = build_ensemble(space, settings, rows, table) if settings.ensemble else (None, None)
    told = tell(space, settings, folders, store, ensemble)
    result = {
        "tried": {"candidates": len(rows), **rows["status"].value_counts().to_dict()},
        "seconds": float(rows["finished_at"].max()),
        "objective": settings.objective.model_dump(mode="json"),
        "overrides": chosen,
        "compared_with": compared,
        "ensemble": about,
        "about": provenance.about(run_uri, (), [store.manifest["fingerprint"]]),
        **told,
    }
    publish_winner(told, store, run_uri)
    if ensemble is not None:
        uri_of_it = storage.join(run_uri, "models", "search_ensemble")
        alone = space.config.with_overrides({"model.experts": False})  # an ensemble has none beside it
        save_model(uri_of_it, ensemble, alone, store.manifest, {"training": about})
        copy_encoders(ensemble.spec.modalities, store, run_uri, uri_of_it)
    storage.write_json(storage.join(uri, "report.json"), search_insight(space, rows))
    storage.write_json(storage.join(uri, "result.json"), result)
    return result


def check_features(space: Space, settings: SearchConfig, table: FeatureTable) -> None:
    """Raises: ConfigError if an architecture can't be trained in stacks on these features, DataError if no val row has a
    label to choose by."""
    for overrides in [{}, *space.some_architectures()]:
        try:
            check_stackable(space.configure(overrides), table, [{}])
        except ConfigError as error:
            raise ConfigError(f"{label_of(overrides)}: {error}" if overrides else str(error)) from None
    tasks = [settings.objective.task] if settings.objective.task is not None else space.config.model_tasks
    if not any((labelled(table.labels[t]) & (table.split == "val")).any() for t in tasks):
        raise DataError(
            f"a search chooses by the val rows' labels of {', '.join(tasks)}, and there are none: check the sources' splits, "
            "or set search.objective.task to another task"
        )


def explore(space: Space, settings: SearchConfig, leaderboard: Leaderboard, table: FeatureTable) -> None:
    """Run trials until there are enough candidates or the time is up; the leaderboard is there however it ends."""
    num_architectures = sum(1 for _ in islice(space.architectures(), settings.max_candidates))
    num_done, elapsed = leaderboard.progress()
    job = Job(
        space, settings, leaderboard, stacks_per_trial(settings, num_architectures), started_at=time.time() - elapsed
    )
    num_trials = math.ceil((settings.max_candidates - num_done) / job.candidates_per_trial)
    budget = None if settings.time_budget_s is None else settings.time_budget_s - elapsed
    if num_done:
        log.info("%d candidates are there from before", num_done)
    try:
        if num_trials > 0 and (budget is None or budget > 0):
            run_trials(job, table, num_trials, budget)
    finally:
        leaderboard.publish()


def search_digest(space: Space, settings: SearchConfig, store: Store) -> str:
    """Digest of all that decides a candidate's result; how long to search is no part of it.

    Raises: DataError if `training.exclude` names no file.
    """
    config = space.config
    base = config.model_dump(mode="json", include={"model", "training", "tasks", "seed"})
    if config.training.exclude:  # what the file says, wherever it lies
        base["training"]["exclude"] = read_excluded(config.training.exclude).tolist()
    parts = {
        "store": store.manifest["fingerprint"],
        "space": {key: p.model_dump(mode="json") for key, p in space.parameters.items()},
        "base": base,
        "widths": {m: config.modalities[m].hidden_dim for m in config.model_modalities},
        "search": settings.model_dump(mode="json", include={"objective", "eta", "rungs"}),
    }
    return fingerprint(parts)


def publish_winner(told: dict[str, Any], store: Store, run_uri: str) -> None:
    """The winner's best seed as `<run>/models/search_winner`, with the encoders that its features came from."""
    finalist = told["finalists"][told["winner"]]
    best = finalist["folders"][finalist["val_by_seed"].index(max(finalist["val_by_seed"]))]
    uri = storage.join(run_uri, "models", "search_winner")
    storage.remove(storage.join(uri, "config.json"))  # a card never stands beside another model's weights
    for name in ("model.safetensors", "config.json"):
        storage.write_bytes(storage.join(uri, name), storage.read_bytes(storage.join(best, name)))
    copy_encoders(finalist["modalities"], store, run_uri, uri)


def copy_encoders(modalities: Iterable[str], store: Store, run_uri: str, uri: str) -> None:
    """Put the encoders that these modalities' features came from into a model folder."""
    for modality in modalities:
        for folder in store.manifest["modalities"][modality]["folders"]:
            storage.copy_folder(storage.join(run_uri, "encoders", folder), storage.join(uri, "encoders", folder))


def result_table(result: dict[str, Any]) -> str:
    """The result as text."""
    tried = result["tried"]
    counts = ", ".join(f"{n} {status}" for status, n in tried.items() if status != "candidates")
    lines = [f"{tried['candidates']} candidates tried in {result['seconds']:.0f} s ({counts})"]
    for role, finalist in sorted(result["finalists"].items(), key=lambda item: -item[1]["val"]):
        mark = " (winner)" if role == result["winner"] else ""
        what = f"{'+'.join(finalist['modalities'])}, {finalist['fusion']['name']}, sharing {finalist['sharing']}"
        lines.append(f"{role}{mark}: {what}; val {100 * finalist['val']:.1f}")
        for task, scores in finalist["test"].items():
            told = f"accuracy {_told(scores['accuracy'])}, macro-F1 {_told(scores['macro_f1'])}"
            versus = result["versus"].get(role, {}).get(task, {}).get("accuracy")
            gain = f"; winner minus this {_told(versus)} {versus['verdict']}" if versus else ""
            lines.append(f"  {task}: test {told}{gain}")
    return "\n".join(lines)


def _told(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "undefined"
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
