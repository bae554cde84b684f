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
from itertools import islice

import pandas as pd

from mmkt_ray import storage
from mmkt_ray.cluster import MAX_FAILURES
from mmkt_ray.config import Config, SearchConfig, fingerprint
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import save_model
from mmkt_ray.locks import locked
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.objective import Score
from mmkt_ray.scoring.tables import metric_name, metric_text, score_text
from mmkt_ray.search.ensemble_selection import build_ensemble
from mmkt_ray.search.finalists import choose_finalists, fit_finalists, score_finalists
from mmkt_ray.search.leaderboard import Leaderboard, overrides_of
from mmkt_ray.search.search_results import ChosenBy, Finalist, NumTried, SearchResult
from mmkt_ray.search.space import Space, build_space, label_of, parameter_values
from mmkt_ray.search.study import write_study
from mmkt_ray.search.summary import summarise_search
from mmkt_ray.search.trial import SearchContext, constant_by_task, search_score, stacks_per_trial
from mmkt_ray.search.tuner import run_trials
from mmkt_ray.training.auto import usual_settings, with_settings
from mmkt_ray.training.methods.imbalance import read_excluded
from mmkt_ray.training.population import check_stackable

log = logging.getLogger(__name__)


def check_search(config: Config) -> Space:
    """The config's search space. Raises: ConfigError if it, or the objective, is impossible; before any work."""
    # a search chooses by itself, by epochs
    settled = with_settings(config, usual_settings(config) | {"training.steps": None})
    space = build_space(settled)
    task, own = space.config.training.objective.task, space.architecture.get("model.tasks")
    without = [v for v in parameter_values(own) if v is not None and task not in v] if own and task is not None else []
    if without or (task is not None and task not in space.config.model_tasks):
        raise ConfigError(
            f"search.objective.task: candidates are chosen by '{task}', which {without or 'model.tasks'} leaves out: "
            "add it there, or choose by all tasks (task: null), of which one that a candidate lacks counts as a "
            "constant prediction"
        )
    return space


def search(config: Config, store: Store, run_uri: str) -> SearchResult:
    """Search as the config's `search` says. There is no winner where the time was up before any candidate was tried.

    Raises: ConfigError for an impossible search, DataError if no candidate has, or could have, a score.
    """
    if config.training.exclude:  # trials have another current folder
        config = config.with_overrides({"training.exclude": storage.absolute(config.training.exclude)})
    space, settings = check_search(config), config.search or SearchConfig()
    table = store.table(config.model_modalities, config.model_tasks)
    check_searchable(space, table)
    with locked(run_uri):
        return _search(space, settings, store, table, run_uri)


def _search(space: Space, settings: SearchConfig, store: Store, table: FeatureTable, run_uri: str) -> SearchResult:
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
    finals = score_finalists(space, search_score(space, table), folders, store, ensemble)
    tried, objective = count_tried(rows), space.config.training.objective
    result = SearchResult(
        notes=notes_of(space, settings, tried),
        tried=tried,
        seconds=float(rows["finished_at"].max()) if len(rows) else 0.0,
        objective=ChosenBy(
            task=objective.task,
            metric=Score.of(objective, space.config.task_kinds).name,
            over=objective.over,
            split=objective.split,
        ),
        overrides=chosen,
        compared_with=compared,
        ensemble=about,
        about=provenance.about(run_uri, (), [store.manifest.fingerprint]),
        winner=finals.winner,
        finalists=finals.finalists,
        versus=finals.versus,
        confidence=finals.confidence,
        ensemble_test=finals.ensemble_test,
        ensemble_versus_winner=finals.ensemble_versus_winner,
    )
    if result.winner is not None:
        publish_winner(result.finalists[result.winner], store, run_uri)
    if ensemble is not None and about is not None:
        uri_of_it = storage.join(run_uri, "models", "search_ensemble")
        alone = space.config.with_overrides({"model.experts": False})  # an ensemble has none beside it
        save_model(uri_of_it, ensemble, alone, store.manifest, about)
        store.copy_encoders(ensemble.spec.modalities, run_uri, uri_of_it)
    summarise_search(space, rows).write(storage.join(uri, "report.json"))
    write_study(uri, space, rows)
    result.write(storage.join(uri, "result.json"))
    return result


def count_tried(rows: pd.DataFrame) -> NumTried:
    """Of the rows of a leaderboard."""
    own = rows[rows["reference"].isna()]
    fused = rows["score"].notna() & rows["modalities"].str.contains("+", regex=False, na=False)
    return NumTried(
        candidates=len(own),
        references=len(rows) - len(own),
        fused=int(fused.sum()),
        by_status={str(status): int(n) for status, n in own["status"].value_counts().items()},
    )


def notes_of(space: Space, settings: SearchConfig, tried: NumTried) -> list[str]:
    """Sentences that come before any result of a search that did not get far enough."""
    budget, num = settings.time_budget_s, tried.candidates
    cut = budget is not None and num < settings.max_candidates
    again = "Set search.time_budget_s higher and give the same command again: it goes on from here."
    if num + tried.references == 0:
        return [
            f"The time budget of {budget or 0:g} s ended before any candidate was tried, so there is no winner. "
            f"{again}"
        ]
    if not tried.fused and len(space.config.model_modalities) > 1:
        what = "so what follows compares single modalities and says nothing about fusion."
        if cut:
            return [f"The time budget of {budget:g} s ended before any fused candidate had a score, {what} {again}"]
        return [f"No fused candidate has a score, {what} The leaderboard tells the reason of each."]
    if cut:
        return [
            f"The time budget of {budget:g} s ended the search after {num} of {settings.max_candidates} candidates."
        ]
    return []


def check_searchable(space: Space, table: FeatureTable) -> None:
    """Raises: ConfigError if an architecture can't be trained in stacks on these features, DataError if no val row
    has a label to choose by."""
    for overrides in [{}, *space.some_architectures()]:
        try:
            check_stackable(space.configure(overrides), table, [{}])
        except ConfigError as error:
            raise ConfigError(f"{label_of(overrides)}: {error}" if overrides else str(error)) from None
    objective = space.config.training.objective
    tasks = [objective.task] if objective.task is not None else space.config.model_tasks
    if not any((table.labels[t].labelled & (table.split == "val")).any() for t in tasks):
        raise DataError(
            f"a search chooses by the val rows' labels of {', '.join(tasks)}, and there are none: check the sources' "
            "splits, or set search.objective.task to another task"
        )
    if not constant_by_task(space, table).keys() & set(tasks):
        raise DataError(
            f"a search chooses by {objective.metric or 'a score'} on val, which is undefined for {', '.join(tasks)} "
            "there: too few classes have a val row; set search.objective.metric to another metric, or "
            "samples.split.val_frac higher"
        )


def explore(space: Space, settings: SearchConfig, leaderboard: Leaderboard, table: FeatureTable) -> None:
    """Run trials until there are enough candidates or the time is up; those that broke off are made up for. The
    leaderboard is there however it ends."""
    num_architectures = sum(1 for _ in islice(space.architectures(), settings.max_candidates))
    stacks = stacks_per_trial(settings, num_architectures)
    try:
        for attempt in range(1 + MAX_FAILURES):
            num_done, elapsed = leaderboard.progress()
            context = SearchContext(space, settings, leaderboard, stacks, started_at=time.time() - elapsed)
            ended = {trial.reference for trial in leaderboard.trials() if trial.ended}
            num_trials = max(0, math.ceil((settings.max_candidates - num_done) / context.candidates_per_trial))
            num_trials += len(space.references().keys() - ended)  # which come on top
            budget = None if settings.time_budget_s is None else settings.time_budget_s - elapsed
            if num_done and not attempt:
                log.info("%d candidates are there from before", num_done)
            if num_trials == 0 or (budget is not None and budget <= 0):
                break
            if not run_trials(context, table, num_trials, budget):
                break
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
        "store": store.manifest.fingerprint,
        "space": {key: p.model_dump(mode="json") for key, p in space.parameters.items()},
        "base": base,
        "widths": {m: config.modalities[m].hidden_dim for m in config.model_modalities},
        "search": settings.model_dump(mode="json", include={"eta", "rungs"}),
    }
    return fingerprint(parts)


def publish_winner(winner: Finalist, store: Store, run_uri: str) -> None:
    """The winner's best seed as `<run>/models/search_winner`, with the encoders that its features came from."""
    best = winner.folders[winner.val_by_seed.index(max(winner.val_by_seed))]
    uri = storage.join(run_uri, "models", "search_winner")
    storage.remove(storage.join(uri, "config.json"))  # a card never stands beside another model's weights
    for name in ("model.safetensors", "config.json"):
        storage.write_bytes(storage.join(uri, name), storage.read_bytes(storage.join(best, name)))
    store.copy_encoders(winner.modalities, run_uri, uri)


def result_table(result: SearchResult) -> str:
    """The result as text; what must be read first stands first."""
    tried, metric = result.tried, result.objective.metric
    counts = ", ".join(f"{n} {status}" for status, n in tried.by_status.items())
    lines = [*result.notes, f"{tried.candidates} candidates tried in {result.seconds:.0f} s ({counts or 'none'})"]
    lines[-1] += f", and {tried.references} of references to compare with" if tried.references else ""
    for role, finalist in sorted(result.finalists.items(), key=lambda item: -item[1].val):
        mark = (" (winner)" if tried.fused else " (best so far)") if role == result.winner else ""
        what = f"{'+'.join(finalist.modalities)}, {finalist.fusion['name']}, sharing {finalist.sharing}"
        lines.append(f"{role}{mark}: {what}; val {metric_name(metric)} {score_text(metric, finalist.val)}")
        for task, scores in finalist.test.items():
            text = ", ".join(f"{metric_name(m)} {metric_text(m, found)}" for m, found in scores.intervals.items())
            versus = result.versus.get(role, {}).get(task)
            found = next(((m, g) for m in (metric, "accuracy") if versus and (g := versus.metrics.get(m))), None)
            gain = f"; winner minus this {metric_text(*found)} {found[1]['verdict']}" if found else ""
            lines.append(f"  {task}: test {text}{gain}")
    return "\n".join(lines)
