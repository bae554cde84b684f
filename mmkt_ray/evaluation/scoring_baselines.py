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
from mmkt_ray.cluster.side_by_side import Call, run_here
from mmkt_ray.config import Config
from mmkt_ray.evaluation.evaluate import part_of
from mmkt_ray.evaluation.task_scores import ScoreSettings, heldout_record, scores_of_task
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.outputs import Proba
from mmkt_ray.inference.rows import Rows, load_rows, prediction_parts, write_parts
from mmkt_ray.scoring.heldout import make_folds
from mmkt_ray.scoring.metrics import BaselineMetrics, BaselinesFile, HeldOutScores
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
from mmkt_ray.training.fingerprint import is_trained, linear_place, training_fingerprint
from mmkt_ray.training.trainer import train


def logreg_calls(config: Config, store: Store, folder: str) -> dict[str, Call]:
    """Name -> the call that fits a logistic regression of the store and publishes it in the folder of the run's
    models, the widest first; without those that lie there."""
    data = load_rows(store, sorted(config.modalities), sorted(config.tasks))
    found = {n: (own, linear_place(own, store, folder)) for n, own in logreg_configs(config, data.table).items()}
    return {
        name: Call(_fit_logreg, (own, store.uri, uri))
        for name, (own, uri) in reversed(found.items())
        if not is_trained(uri, training_fingerprint(own, store, folder))
    }


def _fit_logreg(own: Config, store_uri: str, uri: str) -> None:
    train(own, store_uri, uri, run=run_here)


def evaluate_baselines(config: Config, store: Store, out_uri: str) -> BaselinesFile:
    """Score the baselines of a store on `test`; those that are not there yet are fitted on its train and val rows.

    Writes `<out_uri>/metrics.json`, without subsets and patterns, `<out_uri>/predictions-test.parquet` with one more
    column, `model`, and each logistic regression as a model folder. Returns what metrics.json holds. Raises:
    DataError if the split has no rows.
    """
    modalities, tasks = sorted(config.modalities), sorted(config.tasks)
    settings = ScoreSettings(config.evaluation, config.seed)
    torch.set_num_threads(cores())  # the same bits whether or not a model was trained in this process
    data = load_rows(store, modalities, tasks)
    part = part_of(data, store, "test")
    majorities = fit_majorities(config, data.table)
    run_uri = out_uri.rpartition("/baselines/")[0] or out_uri
    found, known = dict[str, Proba](), dict[str, UnscoredBaseline]()
    for name, model in fit_logregs(config, store, data.table, storage.join(run_uri, "models")).items():
        found[name], known[name] = model.predict(part.table), _logreg_record(name, model, data, run_uri)
        for m in model.modalities:
            for folder in store.manifest.modalities[m].folders:
                storage.copy_folder(
                    storage.join(run_uri, "encoders", folder), storage.join(model.uri, "encoders", folder)
                )
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


UnscoredBaseline = tuple[BaselineMetrics, dict[str, HeldOutScores | None]]  # of a baseline before it is scored; by task


def _logreg_record(name: str, model: Logreg, data: Rows, run_uri: str) -> UnscoredBaseline:
    """What is known of a logistic regression before it is scored."""
    record = BaselineMetrics(
        name=name,
        modalities=list(model.modalities),
        num_params=model.num_params,
        num_train_rows=max(model.path.num_rows.values()),
        training_s=model.seconds,
        l2=model.path.l2,
        folder_to_ship=model.uri.removeprefix(f"{run_uri}/"),
    )
    return record, _held_out_scores(*model.held_out(data.table), model.heldout.on)


def fit_boosted(config: Config, table: FeatureTable) -> dict[str, dict[str, Boosting]]:
    """`boosting:<modality>` -> task -> gradient boosting, of each table; see boosting.py."""
    found: dict[str, dict[str, Boosting]] = {}
    for task in sorted(table.labels):
        for modality in boosted_modalities(config, table, task):
            if (model := fit_boosting(config, table, task, modality)) is not None:
                found.setdefault(BOOSTING + modality, {})[task] = model
    return found


def _boosting_record(name: str, boosted: Mapping[str, Boosting], data: Rows) -> UnscoredBaseline:
    """What is known of gradient boosting before it is scored."""
    first = next(iter(boosted.values()))
    val: dict[str, HeldOutScores | None] = {}
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


def _majority_record(majorities: Mapping[str, Majority], data: Rows, seed: int) -> UnscoredBaseline:
    """What is known of the majority class before it is scored."""
    folds = make_folds(data.table, seed)
    held = data.table.take(np.flatnonzero(np.isin(folds.fold, range(folds.num_held))))
    num_rows = max(m.num_rows for m in majorities.values())
    record = BaselineMetrics(name=MAJORITY, modalities=[], num_params=0, num_train_rows=num_rows, training_s=0.0)
    return record, _held_out_scores(held, {t: m.predict(held) for t, m in majorities.items()}, folds.on)


def _held_out_scores(table: FeatureTable, proba: Proba, on: str) -> dict[str, HeldOutScores | None]:
    """Task -> scores of held-out rows, None without a labelled one; on: cv or val."""
    return {t: heldout_record(table, t, values, on) for t, values in proba.items()}
