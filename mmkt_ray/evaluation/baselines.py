"""The baselines of a run scored as its models are.

Axes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import numpy as np
import torch

from mmkt_ray import storage
from mmkt_ray.cluster import cores
from mmkt_ray.cluster.side_by_side import Call
from mmkt_ray.config import Config
from mmkt_ray.evaluation.evaluate import Proba, ScoreSettings, heldout_record, part_of, scores_of_task
from mmkt_ray.features.store import FeatureTable, Store, open_store
from mmkt_ray.inference.rows import Rows, load_rows, prediction_parts, write_parts
from mmkt_ray.scoring.heldout import make_folds, pattern_name
from mmkt_ray.scoring.metrics import BaselineMetrics, BaselinesFile, HeldOut
from mmkt_ray.training.baselines import (
    BOOSTING,
    MAJORITY,
    Logreg,
    Majority,
    fit_logregs,
    fit_majorities,
    logreg_configs,
)
from mmkt_ray.training.boosting import Boosting, boosted_modalities, fit_boosting
from mmkt_ray.training.linear import fit_linear


def logreg_calls(config: Config, store: Store) -> dict[str, Call]:
    """Name -> the call that fits a logistic regression of the store, which returns a `Logreg`; the widest come first."""
    modalities, tasks = sorted(config.modalities), sorted(config.tasks)
    found = logreg_configs(config, load_rows(store, modalities, tasks).table)
    return {name: Call(_fit_logreg, (own, store.uri, modalities, tasks)) for name, own in reversed(found.items())}


def _fit_logreg(own: Config, store_uri: str, modalities: list[str], tasks: list[str]) -> Logreg:
    return Logreg(own, fit_linear(own, load_rows(open_store(store_uri), modalities, tasks).table))


def evaluate_baselines(config: Config, store: Store, out_uri: str, fitted: Mapping[str, Logreg] | None = None) -> BaselinesFile:
    """Fit the baselines on a store's train and val rows and score them on `test`. fitted: of `logreg_calls`; else they are
    fitted here.

    Writes `<out_uri>/metrics.json`, without subsets and patterns, `<out_uri>/predictions-test.parquet` with one more column,
    `model`, and each logistic regression as a model folder. Returns what metrics.json holds. Raises: DataError if the split
    has no rows.
    """
    modalities, tasks = sorted(config.modalities), sorted(config.tasks)
    settings = ScoreSettings(config.evaluation, config.seed)
    torch.set_num_threads(cores())  # the same bits whether or not a model was trained in this process
    data = load_rows(store, modalities, tasks)
    part = part_of(data, store, "test")
    majorities = fit_majorities(config, data.table)
    if fitted is None:
        fitted = fit_logregs(config, data.table)
    run_uri = out_uri.rpartition("/baselines/")[0] or out_uri
    found: dict[str, Proba] = {name: model.predict(part.table) for name, model in fitted.items()}
    known = {name: _logreg_record(name, model, store, data, run_uri) for name, model in fitted.items()}
    if majorities:
        found = {MAJORITY: {t: m.predict(part.table) for t, m in majorities.items()}, **found}
        known = {MAJORITY: _majority_record(majorities, data, config.seed), **known}
    for name, boosted in fit_boosted(config, data.table).items():
        found[name] = {t: model.predict(part.table) for t, model in boosted.items()}
        known[name] = _boosting_record(name, boosted, data)
    parts = []
    for name, (record, val) in known.items():
        record.tasks = {t: scores_of_task(part, t, p, settings) for t, p in found[name].items()}
        for t, scores in record.tasks.items():
            scores.val = val[t]
        parts.append(prediction_parts(part, modalities, found[name], name))
    result = BaselinesFile(
        split="test",
        store=store.manifest.fingerprint,
        num_rows=len(part.table.sample_id),
        confidence=config.evaluation.confidence,
        bootstrap_samples=config.evaluation.bootstrap_samples,
        models={name: record for name, (record, _) in known.items()},
    )
    write_parts(storage.join(out_uri, "predictions-test.parquet"), chain.from_iterable(parts))
    result.write(storage.join(out_uri, "metrics.json"))
    return result


Known = tuple[BaselineMetrics, dict[str, HeldOut | None]]  # of a baseline before it is scored; task -> scores of held-out rows


def _logreg_record(name: str, model: Logreg, store: Store, data: Rows, run_uri: str) -> Known:
    """What is known of a logistic regression before it is scored; publishes it."""
    folder = f"models/.linear/{store.manifest.fingerprint}/{pattern_name(model.modalities)}"
    model.save(storage.join(run_uri, folder), store, storage.join(run_uri, "encoders"))
    record = BaselineMetrics(
        name=name,
        modalities=list(model.modalities),
        num_params=model.num_params,
        num_train_rows=max(model.fit.num_rows.values()),
        training_s=model.fit.seconds,
        l2=model.fit.l2,
        folder_to_ship=folder,
    )
    return record, _held_out_scores(*model.held_out(data.table), model.fit.heldout.on)


def fit_boosted(config: Config, table: FeatureTable) -> dict[str, dict[str, Boosting]]:
    """`boosting:<modality>` -> task -> gradient boosting, of each table; see boosting.py."""
    found: dict[str, dict[str, Boosting]] = {}
    for task in sorted(table.labels):
        for modality in boosted_modalities(config, table, task):
            if (model := fit_boosting(config, table, task, modality)) is not None:
                found.setdefault(BOOSTING + modality, {})[task] = model
    return found


def _boosting_record(name: str, boosted: Mapping[str, Boosting], data: Rows) -> Known:
    """What is known of gradient boosting before it is scored."""
    first = next(iter(boosted.values()))
    val: dict[str, HeldOut | None] = {}
    for task, model in boosted.items():
        val |= _held_out_scores(data.table.take(model.heldout), {task: model.outputs}, model.on)
    record = BaselineMetrics(
        name=name,
        modalities=[first.modality],
        num_params=None,
        num_train_rows=max(m.num_rows for m in boosted.values()),
        training_s=sum(m.seconds for m in boosted.values()),
    )
    return record, val


def _majority_record(majorities: Mapping[str, Majority], data: Rows, seed: int) -> Known:
    """What is known of the majority class before it is scored."""
    folds = make_folds(data.table, seed)
    held = data.table.take(np.flatnonzero(np.isin(folds.fold, range(folds.num_held))))
    num_rows = max(m.num_rows for m in majorities.values())
    record = BaselineMetrics(name=MAJORITY, modalities=[], num_params=0, num_train_rows=num_rows, training_s=0.0)
    return record, _held_out_scores(held, {t: m.predict(held) for t, m in majorities.items()}, folds.on)


def _held_out_scores(table: FeatureTable, proba: Proba, on: str) -> dict[str, HeldOut | None]:
    """Task -> scores of held-out rows, None without a labelled one; on: cv or val."""
    return {t: heldout_record(table, t, values, on) for t, values in proba.items()}
