"""Score a trained model, or the baselines, on a split of a feature store, and leave the result files beside them.

Which rows count for a task: all labelled rows of the split that have at least one modality that the model reads for it.
When only a subset of its modalities is given, the rows that have at least one of the subset.

Axes: N rows of the split that the model can read, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config, EvaluationConfig, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.baselines import MAJORITY, Logreg, Majority, fit_baselines
from mmkt_ray.evaluation.calibration import chosen, fit_temperatures, probability_scores
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.gallery import write_gallery
from mmkt_ray.evaluation.inference import predict_logits, predict_table, probabilities
from mmkt_ray.evaluation.intervals import Interval, bootstrap_intervals
from mmkt_ray.evaluation.metrics import is_right, predicted, task_metrics
from mmkt_ray.evaluation.missing import missing_curves
from mmkt_ray.evaluation.model_folder import load_model, save_temperatures
from mmkt_ray.evaluation.rows import (
    Rows,
    has_prediction,
    load_rows,
    prediction_parts,
    presence_patterns,
    subsets,
    without_unreadable,
    write_parts,
)
from mmkt_ray.evaluation.tables import comparison_table, missing_table
from mmkt_ray.features.store import FeatureTable, Store, labelled
from mmkt_ray.models import Predictor
from mmkt_ray.training.heldout import make_folds, pattern_name

__all__ = [
    "compare",
    "comparison_table",
    "evaluate_baselines",
    "evaluate_model",
    "missing_curves",
    "missing_table",
    "write_gallery",
]

MAX_MODALITIES_FOR_ALL_SUBSETS = 4
Proba: TypeAlias = Mapping[str, np.ndarray]  # task -> (N, C) probabilities


def evaluate_model(
    model_uri: str, store: Store, split: str = "test", evaluation: EvaluationConfig | None = None
) -> dict[str, Any]:
    """Score a model folder on a split; also its accuracy on `val`, by which models are chosen.

    evaluation: how; null: as when the model was trained. With `calibrate`, one temperature per task is fitted on `val` and
    kept in the model's card, so that prediction uses it too; without, the card's temperatures are taken back.

    Writes `metrics.json` (`metrics-<split>.json` for other splits) and `predictions-<split>.parquet` into the folder.
    Returns what metrics.json holds:

        name, split, store (fingerprint), modalities, num_params, training_s, confidence, num_rows, seconds
        tasks: {task: {metrics of `task_metrics`,
                       intervals: {accuracy, macro_f1: {value, low, high} (None: undefined)},
                       calibration: {temperature, num_val_rows, note, before, after: {log_loss, calibration_error,
                                     reliability}}, if asked for
                       subsets: {"image+text": {modalities, num_modalities, num_rows, accuracy, macro_f1 (intervals),
                                                metrics: those of `task_metrics` from these modalities alone,
                                                all: {accuracy, macro_f1} of all modalities on the same rows}},
                       patterns: {"image+text": {num_rows, accuracy}} by the modalities a row has,
                       val: {num_rows, accuracy, macro_f1} or None}}

    Raises: DataError if there is no such model, the store lacks what it reads, or the split has no rows for it.
    """
    started = time.perf_counter()
    model, card = load_model(model_uri)
    config = parse_config(card["config"])
    settings = _Settings(evaluation or config.evaluation, config.seed)
    data = load_rows(store, config.model_modalities, config.model_tasks, card["class_names"])
    calibration = _calibrate(model, data) if settings.evaluation.calibrate else {}
    model.temperatures = {t: record["temperature"] for t, record in calibration.items()}
    save_temperatures(model_uri, model.temperatures)

    def predict(table: FeatureTable, subset: Sequence[str] = config.model_modalities) -> Proba:
        proba = predict_table(model, table, drop=[m for m in config.model_modalities if m not in subset])
        inputs = {t: [m for m in config.task_inputs(t) if m in subset] for t in proba}
        return without_unreadable(_checked(proba, model_uri), table, inputs)

    part = _part(data, store, split)
    proba = predict(part.table)
    tasks: dict[str, Any] = {t: _task_scores(part, t, proba[t], settings) | {"subsets": {}} for t in config.model_tasks}
    for subset in modality_subsets(config.model_modalities):
        found = predict(part.table, subset)
        for t, scores in tasks.items():
            if set(subset) & set(config.task_inputs(t)):
                name = "+".join(subset)
                scores["subsets"][name] = _subset_scores(part.table, t, subset, found[t], proba[t], settings)
    if calibration:
        raw = probabilities(model, predict_logits(model, part.table), temperatures={})
        raw = without_unreadable(raw, part.table, {t: config.task_inputs(t) for t in raw})
        for t, record in calibration.items():
            both = {"before": raw[t], "after": proba[t]}
            tasks[t]["calibration"] = record | {k: _calibration_scores(part.table, t, p) for k, p in both.items()}
    val = _val_scores(_val_rows(data, split), predict)
    for t, scores in tasks.items():
        scores |= {"patterns": _patterns(part.table, t, proba[t]), "val": val.get(t)}
    record = {
        **_identity(store, split, settings.evaluation, part),
        "name": model_uri.rstrip("/").rpartition("/")[2],
        "modalities": list(config.model_modalities),
        "num_params": sum(p.numel() for p in model.parameters()),
        "training_s": card.get("training", {}).get("seconds"),
        "tasks": tasks,
        "seconds": time.perf_counter() - started,
    }
    parts = prediction_parts(part, config.model_modalities, proba)
    write_parts(storage.join(model_uri, f"predictions-{split}.parquet"), parts)
    storage.write_json(storage.join(model_uri, "metrics.json" if split == "test" else f"metrics-{split}.json"), record)
    return record


def _calibrate(model: Predictor, data: Rows) -> dict[str, dict[str, Any]]:
    """A temperature for each task from the val rows; see `fit_temperatures`."""
    table = data.table.take(data.readable("val"))
    logits = without_unreadable(predict_logits(model, table), table, model.spec.inputs)
    known = {t: has_prediction(values) for t, values in logits.items()}
    return fit_temperatures(
        {t: values[known[t]] for t, values in logits.items()}, {t: table.labels[t][known[t]] for t in logits}
    )


def _calibration_scores(table: FeatureTable, task: str, proba: np.ndarray) -> dict[str, Any]:
    known = has_prediction(proba)
    return probability_scores(table.labels[task][known], proba[known])


def evaluate_baselines(config: Config, store: Store, out_uri: str) -> dict[str, Any]:
    """Fit the baselines on a store's train and val rows and score them on `test`.

    Writes `<out_uri>/metrics.json`, {split, store, .., models: {name: record as of `evaluate_model`, without subsets
    and patterns; `val` is of held-out rows, see heldout.py, and says which in `on`}}, `<out_uri>/predictions-test.parquet`
    with one more column, `model`, and each logistic regression as a model folder, of which its record tells
    `folder_to_ship` in the run. Returns the former. Raises: DataError if the split has no rows.
    """
    modalities, tasks = sorted(config.modalities), sorted(config.tasks)
    settings = _Settings(config.evaluation, config.seed)
    data = load_rows(store, modalities, tasks)
    part = _part(data, store, "test")
    majorities, fitted = fit_baselines(config, data.table)
    run_uri = out_uri.rpartition("/baselines/")[0] or out_uri
    found: dict[str, Proba] = {name: model.predict(part.table) for name, model in fitted.items()}
    records = {name: _logreg_record(model, store, data, run_uri) for name, model in fitted.items()}
    if majorities:
        found = {MAJORITY: {t: m.predict(part.table) for t, m in majorities.items()}, **found}
        records = {MAJORITY: _majority_record(majorities, data, config.seed), **records}
    parts = []
    for name, record in records.items():
        val = record.pop("val")
        record |= {"name": name, "tasks": {t: _task_scores(part, t, p, settings) for t, p in found[name].items()}}
        for t, scores in record["tasks"].items():
            scores["val"] = val[t]
        parts.append(prediction_parts(part, modalities, found[name], name))
    result = {**_identity(store, "test", config.evaluation, part), "models": records}
    write_parts(storage.join(out_uri, "predictions-test.parquet"), chain.from_iterable(parts))
    storage.write_json(storage.join(out_uri, "metrics.json"), result)
    return result


def _logreg_record(model: Logreg, store: Store, data: Rows, run_uri: str) -> dict[str, Any]:
    """What is known of a logistic regression before it is scored; publishes it."""
    folder = f"models/.linear/{store.manifest['fingerprint']}/{pattern_name(model.modalities)}"
    model.save(storage.join(run_uri, folder), store, storage.join(run_uri, "encoders"))
    return {
        "modalities": list(model.modalities),
        "num_params": model.num_params,
        "num_train_rows": max(model.fit.num_rows.values()),
        "training_s": model.fit.seconds,
        "l2": model.fit.l2,
        "folder_to_ship": folder,
        "val": _held_out_scores(*model.held_out(data.table), model.fit.heldout.on),
    }


def _majority_record(majorities: Mapping[str, Majority], data: Rows, seed: int) -> dict[str, Any]:
    """What is known of the majority class before it is scored."""
    folds = make_folds(data.table, seed)
    held = data.table.take(np.flatnonzero(np.isin(folds.fold, range(folds.num_held))))
    return {
        "modalities": [],
        "num_params": 0,
        "num_train_rows": max(m.num_rows for m in majorities.values()),
        "training_s": 0.0,
        "val": _held_out_scores(held, {t: m.predict(held) for t, m in majorities.items()}, folds.on),
    }


def _held_out_scores(table: FeatureTable, proba: Proba, on: str) -> dict[str, Any]:
    """Task -> scores of held-out rows, None without a labelled one; on: cv or val."""
    scores = {t: _point_scores(table, t, has_prediction(values), values) for t, values in proba.items()}
    return {t: s | {"on": on} if s["num_rows"] else None for t, s in scores.items()}


def modality_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The subsets that are scored, largest first: all; of more than four modalities only all, all but one, each alone."""
    num = len(modalities)
    sizes = range(1, num + 1) if num <= MAX_MODALITIES_FOR_ALL_SUBSETS else (1, num - 1, num)
    return sorted(subsets(sorted(modalities), sizes), key=len, reverse=True)


def _part(data: Rows, store: Store, split: str) -> Rows:
    """The readable rows of a split. Raises: DataError if there are none."""
    rows = data.readable(split)
    if len(rows) == 0:
        known = sorted(set(data.table.split))
        raise DataError(
            f"'{store.uri}' has no '{split}' rows with any of {sorted(data.table.present)}; its splits: {known}"
        )
    return data.take(rows)


@dataclass(frozen=True)
class _Settings:
    """How intervals are drawn."""

    evaluation: EvaluationConfig
    seed: int

    def intervals(self, labels: np.ndarray, pred: np.ndarray, num_classes: int) -> dict[str, Interval | None]:
        """Of accuracy and macro-F1; empty without labelled rows."""
        num, confidence = self.evaluation.bootstrap_samples, self.evaluation.confidence
        return bootstrap_intervals(labels, pred, num_classes, num_resamples=num, confidence=confidence, seed=self.seed)


def _identity(store: Store, split: str, evaluation: EvaluationConfig, part: Rows) -> dict[str, Any]:
    return {
        "split": split,
        "store": store.manifest.get("fingerprint"),
        "num_rows": len(part.table.sample_id),
        "confidence": evaluation.confidence,
        "bootstrap_samples": evaluation.bootstrap_samples,
    }


def _checked(proba: Proba, model_uri: str) -> Proba:
    for task, values in proba.items():
        if not np.isfinite(values).all():
            raise DataError(f"'{model_uri}' predicts NaN for task '{task}': its training diverged; lower training.lr")
    return proba


def _task_scores(part: Rows, task: str, proba: np.ndarray, settings: _Settings) -> dict[str, Any]:
    """Metrics and intervals of one task over the rows that are labelled and have a prediction."""
    table, rows = part.table, has_prediction(proba)
    labels, proba, names = table.labels[task][rows], chosen(proba, rows), table.class_names[task]
    kind = table.kinds.get(task, "multiclass")
    return {
        **task_metrics(kind, labels, proba, names),
        "num_unseen": int(part.unseen[task][rows].sum()),
        "class_names": names,
        "intervals": settings.intervals(labels, predicted(proba, kind), len(names)),
    }


def _subset_scores(
    table: FeatureTable, task: str, subset: Sequence[str], proba: np.ndarray, proba_all: np.ndarray, settings: _Settings
) -> dict[str, Any]:
    """What the model knows from a subset of its modalities, and from all of them on the same rows."""
    rows = has_prediction(proba) & labelled(table.labels[task])
    labels, proba, names = table.labels[task][rows], chosen(proba, rows), table.class_names[task]
    kind = table.kinds.get(task, "multiclass")
    return {
        "modalities": list(subset),
        "num_modalities": len(subset),
        "num_rows": len(labels),
        **settings.intervals(labels, predicted(proba, kind), len(names)),
        "metrics": task_metrics(kind, labels, proba, names),
        "all": _point_scores(table, task, rows, proba_all),
    }


def _point_scores(table: FeatureTable, task: str, rows: np.ndarray, proba: np.ndarray) -> dict[str, Any]:
    kind = table.kinds.get(task, "multiclass")
    metrics = task_metrics(kind, table.labels[task][rows], chosen(proba, rows), table.class_names[task])
    return {name: metrics.get(name) for name in ("num_rows", "accuracy", "macro_f1")}


def _patterns(table: FeatureTable, task: str, proba: np.ndarray) -> dict[str, Any]:
    """Labelled and readable rows by the modalities they have, with the accuracy on each kind."""
    rows = labelled(table.labels[task]) & has_prediction(proba)
    right = is_right(table.labels[task], predicted(proba, table.kinds.get(task, "multiclass")))
    found = {}
    for name, here in presence_patterns(table).items():
        scored = rows & here
        if scored.any():
            found[name] = {"num_rows": int(scored.sum()), "accuracy": float(right[scored].mean())}
    return found


def _val_rows(data: Rows, split: str) -> FeatureTable | None:
    """The readable rows of `val`; None if there are none, or if `val` is what is scored."""
    rows = data.readable("val") if split != "val" else np.array([], dtype=int)
    return data.table.take(rows) if len(rows) else None


def _val_scores(table: FeatureTable | None, predict: Callable[[FeatureTable], Proba]) -> dict[str, Any]:
    """Accuracy and macro-F1 on rows of `val`, for tasks with labels there."""
    if table is None:
        return {}
    scores = {}
    for task, proba in predict(table).items():
        scores[task] = _point_scores(table, task, has_prediction(proba), proba)
    return {task: s for task, s in scores.items() if s["num_rows"]}
