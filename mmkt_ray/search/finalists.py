"""The best candidates trained anew, with several seeds each, and scored on the test split once.

Who wins is decided on validation: the mean over the seeds. The test split then says how the winner does, and by
paired differences what it gains over the other finalists, the best single modality and the best plain concatenation.
A difference whose interval holds 0, or that a test by rows does not show, is a tie.
Intervals draw both the test rows and the seeds anew.

Source: Efron & Tibshirani 1993, chapters 13 and 16 (the paired bootstrap).
Axes: S seeds, N test rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mmkt_ray import storage
from mmkt_ray.cluster.side_by_side import Call, run_here, side_by_side
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
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
from mmkt_ray.search.search_results import Finalist, Finals, JudgedInterval, PairedGains, RoleScores
from mmkt_ray.search.space import Overrides, Space
from mmkt_ray.training.fingerprint import training_fingerprint
from mmkt_ray.training.trainer import train

SINGLE, CONCAT = "best single modality", "best concat"


def choose_finalists(rows: pd.DataFrame, num: int) -> tuple[dict[str, pd.Series], dict[str, str]]:
    """Role -> leaderboard row: the best `num`, each of another architecture while there are any, and what these are
    to be compared with; and which role is the best single modality and which the best plain concatenation, if tried.

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


def score_finalists(
    space: Space,
    score: Score,
    folders: Mapping[str, list[str]],
    store: Store,
    ensemble: EnsembleModel | None = None,
) -> Finals:
    """Who wins on validation, and the test scores: the test split is read here and nowhere else in a search."""
    config = space.config
    table = store.table(config.model_modalities, config.model_tasks)
    test = table.take(table.rows("test"))
    finalists: dict[str, Finalist] = {}
    models: dict[str, _Predictions] = {}
    for role, uris in folders.items():
        loaded = [load_model(uri) for uri in uris]
        cards = [card for _, card in loaded]
        own = parse_config(cards[0].config)
        by_seed = [score(_val_of(card)) for card in cards]
        models[role] = _Predictions(own, score.extra, predict_seeds([model for model, _ in loaded], test))
        finalists[role] = Finalist(
            modalities=list(own.model_modalities),
            tasks=list(own.model_tasks),
            fusion=own.model.fusion.model_dump(mode="json", exclude_defaults=True) | {"name": own.model.fusion.name},
            sharing=own.model.sharing,
            val=float(np.mean(by_seed)),
            val_by_seed=by_seed,
            folders=list(uris),
            test=_scores(config, test, models[role]),
        )
    winner = max(finalists, key=lambda role: finalists[role].val) if finalists else None
    best = models[winner] if winner else None
    together = _Predictions(config, score.extra, predict_seeds([ensemble], test)) if ensemble is not None else None
    return Finals(
        winner=winner,
        finalists=finalists,
        versus={
            role: _gains(config, test, best, model) for role, model in models.items() if best and model is not best
        },
        confidence=config.evaluation.confidence,
        ensemble_test=_scores(config, test, together) if together else None,
        ensemble_versus_winner=_gains(config, test, together, best) if together and best else None,
    )


def _val_of(card: Card) -> dict[str, dict[str, float]]:
    """What the model scored on val, which a search has."""
    assert card.fit is not None
    assert card.fit.val is not None
    return card.fit.val.metrics


@dataclass(frozen=True)
class _Predictions:
    config: Config
    extra: str | None  # the metric beside accuracy and macro-F1
    by_task: dict[str, np.ndarray]  # see `predict_seeds`


def _scores(config: Config, test: FeatureTable, model: _Predictions) -> dict[str, RoleScores]:
    """One model's scores by task."""
    found = {}
    for task, rows in _common_rows(config, test, [model]):
        num_rows, bounds = int(rows.sum()), test.kinds[task].bounds
        intervals = {
            metric: percentiles(values[0], config.evaluation.confidence, num_rows, bounds.get(metric, SHARE))
            for metric, values in _drawn(config, test, task, rows, [model]).items()
        }
        found[task] = RoleScores(num_rows=num_rows, intervals=intervals)
    return found


def _gains(config: Config, test: FeatureTable, ours: _Predictions, theirs: _Predictions) -> dict[str, PairedGains]:
    """One model's scores minus another's, by task."""
    found, confidence = {}, config.evaluation.confidence
    for task, rows in _common_rows(config, test, [ours, theirs]):
        kind, num_rows, metrics = test.kinds[task], int(rows.sum()), {}
        preds = [np.stack([kind.predict(p) for p in m.by_task[task][:, rows]]) for m in (ours, theirs)]
        for metric, values in _drawn(config, test, task, rows, [ours, theirs]).items():
            interval = percentiles(values[0] - values[1], confidence, num_rows, difference_bounds(kind, metric))
            metrics[metric] = _judged(interval, metric, test.labels[task][rows], preds, confidence)
        found[task] = PairedGains(num_rows=num_rows, metrics=metrics)
    return found


def _common_rows(
    config: Config, test: FeatureTable, models: Sequence[_Predictions]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each task that all models have, and its labelled rows (N,) bool that all can read;
    tasks without such a row left out."""
    for task in config.model_tasks:
        if any(task not in model.by_task for model in models):
            continue
        rows = test.labels[task].labelled.copy()
        for model in models:
            rows &= readable(test, model.config.task_inputs(task))
        if rows.any():
            yield task, rows


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
) -> JudgedInterval | None:
    """The interval of a difference with its verdict, which needs a test by rows too.
    preds: of two models, (S, N, ..)."""
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
