"""The best candidates trained anew, with several seeds each, and told on the test split once.

Who wins is decided on validation: the mean over the seeds. The test split then says how the winner does, and by paired
differences what it gains over the other finalists, the best single modality and the best plain concatenation. A difference
whose interval holds 0, or that a test by rows does not show, is a tie. Intervals draw both the test rows and the seeds anew.

Source: Efron & Tibshirani 1993, chapters 13 and 16 (the paired bootstrap).
Axes: S seeds, N test rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmkt_ray import storage
from mmkt_ray.cluster.side_by_side import Call, run_here, side_by_side
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.inference.model_card import Card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import readable
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models import Predictor
from mmkt_ray.models.ensemble import EnsembleModel
from mmkt_ray.scoring.intervals import SHARE, Interval, agreeing, difference_bounds, paired_p, percentiles, verdict
from mmkt_ray.scoring.objective import Score
from mmkt_ray.scoring.seeds import metric_seed_scores, seed_scores
from mmkt_ray.search.space import Overrides, Space
from mmkt_ray.training.trainer import train, training_fingerprint

SINGLE, CONCAT = "best single modality", "best concat"


def choose_finalists(rows: pd.DataFrame, num: int) -> tuple[dict[str, pd.Series], dict[str, str]]:
    """Role -> leaderboard row: the best `num`, each of another architecture while there are any, and what these are to be
    compared with; and which role is the best single modality and which the best plain concatenation, if tried.

    Both are empty if no candidate was tried. Raises: DataError if candidates were, and none has a score.
    """
    if rows.empty:
        return {}, {}
    scored = rows[rows["score"].notna()].sort_values("score", ascending=False, kind="stable")
    if scored.empty:
        raise DataError(
            f"no candidate of the search has a score; why: {rows['reason'].value_counts().index[:3].tolist()}"
        )
    distinct = scored.drop_duplicates("architecture")
    chosen = pd.concat([distinct, scored.drop(distinct.index)])[:num]
    found = {f"candidate {i}": row for i, (_, row) in enumerate(chosen.iterrows(), start=1)}
    fused = scored["modalities"].str.contains("+", regex=False)
    compared = {}
    for name, part in ((SINGLE, scored[~fused]), (CONCAT, scored[fused & (scored["fusion"] == "concat")])):
        if len(part):
            best = part.iloc[0]
            same = [role for role, row in found.items() if row["candidate"] == best["candidate"]]
            compared[name] = same[0] if same else name
            found.setdefault(compared[name], best)
    return found, compared


def fit_finalists(
    space: Space, chosen: Mapping[str, Overrides], seeds: int, store: Store, folder: str
) -> dict[str, list[str]]:
    """Role -> model folders, one for each seed, fitted as Ray tasks; those that are there are not fitted again."""
    folders: dict[str, list[str]] = {}
    calls = dict[str, Call]()
    for role, overrides in chosen.items():
        configs = seeded(space.configure(overrides), seeds)
        folders[role] = [storage.join(folder, f"{training_fingerprint(c, store, folder)}") for c in configs]
        calls |= {uri: Call(_fit_one, (c, store.uri, uri)) for c, uri in zip(configs, folders[role], strict=True)}
    side_by_side(calls, num_bytes=store.table_bytes())
    return folders


def seeded(config: Config, seeds: int) -> list[Config]:
    """The finalist once for each seed."""
    return [config.reseeded(i) for i in range(seeds)]


def _fit_one(config: Config, store_uri: str, uri: str) -> None:
    """Fit one model, with its experts, and publish it as a model folder."""
    train(config, store_uri, uri, run=run_here)


def tell(
    space: Space,
    score: Score,
    folders: Mapping[str, list[str]],
    store: Store,
    ensemble: EnsembleModel | None = None,
) -> dict[str, Any]:
    """Who wins on validation, and the test scores: the test split is read here and nowhere else in a search.

    Returns: `winner` (role), `finalists` {role: {modalities, fusion, sharing, val (mean over seeds), val_by_seed, folders,
    tasks, test: {task: {metric: interval or None}}}}, `versus` {role: {task: {num_rows, metric: {value, low, high, verdict}}}}:
    the winner minus each other finalist on the rows that both can read, of the tasks that both have; `ensemble_test`,
    `ensemble_versus_winner` likewise, if there is one; `confidence`. Metrics are accuracy, macro_f1 and the objective's; a
    log loss is negated. `winner` is None where there is no finalist.
    """
    config = space.config
    table = store.table(config.model_modalities, config.model_tasks)
    test = table.take(table.rows("test"))
    finalists: dict[str, dict[str, Any]] = {}
    models, mean_val = {}, {}
    for role, uris in folders.items():
        loaded = [load_model(uri) for uri in uris]
        cards = [card for _, card in loaded]
        own = parse_config(cards[0].config)
        by_seed = [score(_val_of(card)) for card in cards]
        mean_val[role] = float(np.mean(by_seed))
        models[role] = _Predictions(own, score.extra, predict_seeds([model for model, _ in loaded], test))
        finalists[role] = {
            "modalities": list(own.model_modalities),
            "tasks": list(own.model_tasks),
            "fusion": own.model.fusion.model_dump(mode="json", exclude_defaults=True) | {"name": own.model.fusion.name},
            "sharing": own.model.sharing,
            "val": mean_val[role],
            "val_by_seed": by_seed,
            "folders": list(uris),
        }
    winner = max(mean_val, key=mean_val.__getitem__) if mean_val else ""
    for role, finalist in finalists.items():
        finalist["test"] = _compare(config, test, [models[role]])
    others = {role: model for role, model in models.items() if role != winner}
    versus = {role: _compare(config, test, [models[winner], model]) for role, model in others.items()}
    told = {"winner": winner or None, "finalists": finalists, "versus": versus, "confidence": config.evaluation.confidence}
    if ensemble is not None:
        together = _Predictions(config, score.extra, predict_seeds([ensemble], test))
        told["ensemble_test"] = _compare(config, test, [together])
        told["ensemble_versus_winner"] = _compare(config, test, [together, models[winner]])
    return told


def _val_of(card: Card) -> dict[str, Any]:
    """What the model scored on val, which a search has."""
    assert card.fit is not None
    assert card.fit.val is not None
    return card.fit.val.to_dict()


@dataclass(frozen=True)
class _Predictions:
    config: Config
    extra: str | None  # the metric beside accuracy and macro-F1
    by_task: dict[str, np.ndarray]  # see `predict_seeds`


def _compare(config: Config, test: FeatureTable, models: Sequence[_Predictions]) -> dict[str, Any]:
    """By task: the scores of one model, or the differences of the first to the second, on the rows that all can read."""
    found: dict[str, Any] = {}
    for task in config.model_tasks:
        if any(task not in model.by_task for model in models):
            continue
        rows = test.labels[task].labelled.copy()
        for model in models:
            rows &= readable(test, model.config.task_inputs(task))
        if not rows.any():
            continue
        num_rows, confidence = int(rows.sum()), config.evaluation.confidence
        found[task] = {"num_rows": num_rows}
        kind = test.kinds[task]
        for metric, values in _drawn(config, test, task, rows, models).items():
            if len(models) == 1:
                found[task][metric] = percentiles(values[0], confidence, num_rows, kind.bounds.get(metric, SHARE))
                continue
            interval = percentiles(values[0] - values[1], confidence, num_rows, difference_bounds(kind, metric))
            preds = [np.stack([kind.predict(p) for p in m.by_task[task][:, rows]]) for m in models]
            found[task][metric] = _judged(interval, metric, test.labels[task][rows], preds, confidence)
    return found


def _drawn(
    config: Config, test: FeatureTable, task: str, rows: np.ndarray, models: Sequence[_Predictions]
) -> dict[str, np.ndarray]:
    """Metric -> (models, 1 + R), see `seed_scores`."""
    labels, kind = test.labels[task][rows], test.kinds[task]
    proba = [model.by_task[task][:, rows] for model in models]
    pred = [np.stack([kind.predict(p) for p in each]) for each in proba]
    how = (config.evaluation.bootstrap_samples, config.seed)
    drawn = seed_scores(labels, pred, proba[0].shape[-1], *how)
    extra = models[0].extra
    if extra in kind.metrics:
        drawn[extra] = metric_seed_scores(extra, labels, proba, *how)
    return drawn


def _judged(
    interval: Interval | None, metric: str, labels: Labels, preds: Sequence[np.ndarray], confidence: float
) -> dict[str, Any] | None:
    """The interval of a difference with its verdict, which needs a test by rows too. preds: of two models, (S, N, ..)."""
    if interval is None:
        return None
    ours, theirs = (np.mean([labels.kind.main_by_row(labels, p) for p in pred], axis=0) for pred in preds)
    p = paired_p(ours - theirs)
    if metric != labels.kind.main:  # the least P that exchanging the models in random rows could give
        differ = (preds[0][:1] != preds[1][:1]) if len(preds[0]) != len(preds[1]) else preds[0] != preds[1]
        p = 2.0 ** (1 - int(differ.any(axis=0).reshape(len(labels), -1).any(axis=1).sum()))
    interval = agreeing(interval, min(p, 1.0), confidence)
    return {**interval, "verdict": verdict(interval, "tie")}


def predict_seeds(models: Iterable[Predictor], table: FeatureTable) -> dict[str, np.ndarray]:
    """Task -> probabilities (S, N, C) of the models of several seeds."""
    found: dict[str, list[np.ndarray]] = {}
    for model in models:
        for task, proba in predict_table(model, table).items():
            found.setdefault(task, []).append(proba)
    return {task: np.stack(values) for task, values in found.items()}
