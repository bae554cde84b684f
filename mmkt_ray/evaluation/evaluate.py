"""Score a trained model, or the baselines, on a split of a feature store, and leave the result files beside them.

Which rows count: all labelled rows of the split that have at least one modality the model reads. When only a subset of
its modalities is given, the rows that have at least one of the subset.

Axes: N rows of the split that the model can read, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, EvaluationConfig, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.baselines import fit_baselines, readable
from mmkt_ray.evaluation.compare import compare, comparison_table
from mmkt_ray.evaluation.gallery import write_gallery
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.intervals import Interval, bootstrap_intervals
from mmkt_ray.evaluation.metrics import classification_metrics
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.features.store import MISSING, FeatureTable, Store, encode_labels

__all__ = ["compare", "comparison_table", "evaluate_baselines", "evaluate_model", "write_gallery"]

MAX_MODALITIES_FOR_ALL_SUBSETS = 4
Predict = Callable[[FeatureTable, Sequence[str]], Mapping[str, np.ndarray]]  # (table, dropped) -> task -> (N, C)


def evaluate_model(model_uri: str, store: Store, split: str = "test") -> dict[str, Any]:
    """Score a model folder on a split; also its accuracy on `val`, by which models are chosen.

    Writes `metrics.json` (`metrics-<split>.json` for another split than test) and `predictions-<split>.parquet` into the
    folder. Returns what metrics.json holds:

        name, split, store (fingerprint), modalities, num_params, training_s, confidence, num_rows, seconds
        tasks: {task: {metrics of `classification_metrics`,
                       intervals: {accuracy, macro_f1: {value, low, high}},
                       subsets: {"image+text": {modalities, num_modalities, num_rows, accuracy, macro_f1 (intervals),
                                                all: {accuracy, macro_f1} of all modalities on the same rows}},
                       patterns: {"image+text": {num_rows, accuracy}} by the modalities a row has,
                       val: {num_rows, accuracy, macro_f1} or None}}

    Raises: DataError if there is no such model, the store lacks what it reads, or the split has no rows for it.
    """
    started = time.perf_counter()
    model, card = load_model(model_uri)
    config = parse_config(card["config"])
    data = _load(store, config.model_modalities, config.model_tasks, card["class_names"])

    def predict(table: FeatureTable, drop: Sequence[str]) -> Mapping[str, np.ndarray]:
        return predict_table(model, table, drop=drop)

    rows = data.readable_rows(split)
    if len(rows) == 0:
        raise DataError(f"'{store.uri}' has no '{split}' rows with any of {list(config.model_modalities)}: nothing to evaluate on")
    part, proba = data.take(rows), None
    settings = _Settings(config.evaluation, config.seed)
    tasks: dict[str, Any] = {t: {"subsets": {}} for t in config.model_tasks}
    for subset in modality_subsets(config.model_modalities):  # the full set comes first
        found = predict(part.table, [m for m in config.model_modalities if m not in subset])
        proba = proba or _checked(found, model_uri)
        for task in tasks:
            tasks[task]["subsets"]["+".join(subset)] = _subset_scores(part.table, task, subset, found[task], proba[task], settings)
    val = _val_scores(data, split, predict)
    for task, record in tasks.items():
        record |= _task_scores(part.table, task, proba[task], settings)
        record |= {"patterns": _patterns(part.table, task, proba[task]), "val": val.get(task)}
    record = {
        **_identity(store, split, config.evaluation, len(rows)),
        "name": model_uri.rstrip("/").rpartition("/")[2],
        "modalities": list(config.model_modalities),
        "num_params": sum(p.numel() for p in model.parameters()),
        "training_s": card.get("training", {}).get("seconds"),
        "tasks": tasks,
        "seconds": time.perf_counter() - started,
    }
    storage.write_table(storage.join(model_uri, f"predictions-{split}.parquet"), _prediction_table(part, config.model_modalities, proba))
    storage.write_json(storage.join(model_uri, "metrics.json" if split == "test" else f"metrics-{split}.json"), record)
    return record


def evaluate_baselines(config: Config, store: Store, out_uri: str) -> dict[str, Any]:
    """Fit the baselines on a store's train split and score them on `test`.

    Writes `<out_uri>/metrics.json`, {split, store, .., models: {name: record as of `evaluate_model`, without subsets and
    patterns}}, and `<out_uri>/predictions-test.parquet` with one more column, `model`. Returns the former.
    Raises: DataError if the split has no rows.
    """
    modalities, tasks = sorted(config.modalities), sorted(config.tasks)
    data = _load(store, modalities, tasks, None)
    rows = data.readable_rows("test")
    if len(rows) == 0:
        raise DataError(f"'{store.uri}' has no 'test' rows: nothing to evaluate on")
    fitted = {task: fit_baselines(data.table, task, config.seed) for task in tasks}
    names = list(dict.fromkeys(name for by_name in fitted.values() for name in by_name))
    settings, part = _Settings(config.evaluation, config.seed), data.take(rows)
    records, tables = {}, []
    for name in names:
        models = {t: by_name[name] for t, by_name in fitted.items() if name in by_name}

        def predict(table: FeatureTable, drop: Sequence[str], models: dict = models) -> Mapping[str, np.ndarray]:
            return {t: m.predict(table) for t, m in models.items()}

        proba, val = predict(part.table, ()), _val_scores(data, "test", predict)
        records[name] = {
            "name": name,
            "modalities": [] if name == "majority" else sorted({m for b in models.values() for m in b.modalities}),
            "num_params": sum(m.num_params for m in models.values()),
            "training_s": sum(m.seconds for m in models.values()),
            "tasks": {t: {**_task_scores(part.table, t, p, settings), "val": val.get(t)} for t, p in proba.items()},
        }
        table = _prediction_table(part, modalities, proba, tasks)
        tables.append(table.append_column("model", pa.array([name] * len(table), pa.string())))
    result = {**_identity(store, "test", config.evaluation, len(rows)), "models": records}
    storage.write_table(storage.join(out_uri, "predictions-test.parquet"), pa.concat_tables(tables))
    storage.write_json(storage.join(out_uri, "metrics.json"), result)
    return result


def modality_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty subsets, largest first; of more than four modalities only: all, all but one, each alone."""
    sizes = range(len(modalities), 0, -1)
    if len(modalities) > MAX_MODALITIES_FOR_ALL_SUBSETS:
        sizes = (len(modalities), len(modalities) - 1, 1)
    return [subset for size in sizes for subset in combinations(sorted(modalities), size)]


# --- the rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """A feature table whose labels are in a model's own classes, and the labels' names (N,) as they stand in the store."""

    table: FeatureTable
    label_names: dict[str, np.ndarray]

    def readable_rows(self, split: str) -> np.ndarray:
        """Indices of a split's rows that have at least one modality."""
        return np.flatnonzero((self.table.split == split) & readable(self.table, list(self.table.present)))

    def take(self, rows: np.ndarray) -> _Data:
        return _Data(self.table.take(rows), {t: names[rows] for t, names in self.label_names.items()})


def _load(store: Store, modalities: Sequence[str], tasks: Sequence[str], class_names: Mapping[str, list[str]] | None) -> _Data:
    """The store's rows; `class_names` are the model's, which may have been trained on another store. None: the store's."""
    table = store.table(modalities, tasks)
    columns = pa.concat_tables(store.read(list(tasks)))
    if class_names is not None:
        labels = {t: encode_labels(columns.column(t), class_names[t]) for t in tasks}
        table = replace(table, labels=labels, class_names={t: list(class_names[t]) for t in tasks})
    return _Data(table, {t: np.array(columns.column(t).to_pylist(), dtype=object) for t in tasks})


def _prediction_table(data: _Data, modalities: Sequence[str], proba: Mapping[str, np.ndarray], tasks: Sequence[str] = ()) -> pa.Table:
    """The predictions file: sample_id, split, missing (absent modalities), <task>_label, _pred, _proba (null where NaN)."""
    table = data.table
    absent = np.stack([~table.present[m] for m in modalities], axis=1)
    columns = {
        "sample_id": pa.array(table.sample_id, pa.string()),
        "split": pa.array(table.split, pa.string()),
        "missing": pa.array([[m for m, gone in zip(modalities, row, strict=True) if gone] for row in absent], pa.list_(pa.string())),
    }
    for task in tasks or proba:
        names = table.class_names[task]
        values = proba.get(task, np.full((len(table.sample_id), len(names)), np.nan, dtype=np.float32))
        known = np.isfinite(values).all(axis=1)
        pred = np.where(known, np.array([*names, None], dtype=object)[np.where(known, values.argmax(axis=1), len(names))], None)
        columns[f"{task}_label"] = pa.array(data.label_names[task], pa.string())
        columns[f"{task}_pred"] = pa.array(pred, pa.string())
        flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
        columns[f"{task}_proba"] = pa.FixedSizeListArray.from_arrays(flat, len(names), mask=pa.array(~known))
    return pa.table(columns)


# --- the scores --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """How intervals are drawn."""

    evaluation: EvaluationConfig
    seed: int

    def intervals(self, labels: np.ndarray, proba: np.ndarray) -> dict[str, Interval]:
        """Of accuracy and macro-F1; empty without labelled rows."""
        options = {"num_resamples": self.evaluation.bootstrap_samples, "confidence": self.evaluation.confidence}
        return bootstrap_intervals(labels, proba.argmax(axis=1), proba.shape[1], seed=self.seed, **options)


def _identity(store: Store, split: str, evaluation: EvaluationConfig, num_rows: int) -> dict[str, Any]:
    return {
        "split": split,
        "store": store.manifest.get("fingerprint"),
        "num_rows": num_rows,
        "confidence": evaluation.confidence,
        "bootstrap_samples": evaluation.bootstrap_samples,
    }


def _checked(proba: Mapping[str, np.ndarray], model_uri: str) -> Mapping[str, np.ndarray]:
    for task, values in proba.items():
        if not np.isfinite(values).all():
            raise DataError(f"'{model_uri}' predicts NaN for task '{task}': its training diverged; lower training.lr and train again")
    return proba


def _task_scores(table: FeatureTable, task: str, proba: np.ndarray, settings: _Settings) -> dict[str, Any]:
    """Metrics and intervals of one task over the rows that are labelled and have a prediction."""
    rows = np.isfinite(proba).all(axis=1)
    labels, proba = table.labels[task][rows], proba[rows]
    metrics = classification_metrics(labels, proba, table.class_names[task])
    return {**metrics, "class_names": table.class_names[task], "intervals": settings.intervals(labels, proba)}


def _subset_scores(
    table: FeatureTable, task: str, subset: Sequence[str], proba: np.ndarray, proba_all: np.ndarray, settings: _Settings
) -> dict[str, Any]:
    """What the model knows from a subset of its modalities, and from all of them on the same rows."""
    rows = readable(table, subset) & (table.labels[task] != MISSING)
    labels = table.labels[task][rows]
    every = _point_scores(labels, proba_all[rows], table.class_names[task])
    sizes = {"num_modalities": len(subset), "num_rows": len(labels)}
    return {"modalities": list(subset), **sizes, **settings.intervals(labels, proba[rows]), "all": every}


def _point_scores(labels: np.ndarray, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    metrics = classification_metrics(labels, proba, class_names)
    return {name: metrics.get(name) for name in ("num_rows", "accuracy", "macro_f1")}


def _patterns(table: FeatureTable, task: str, proba: np.ndarray) -> dict[str, Any]:
    """Labelled rows by the modalities they have, with the accuracy on each kind."""
    modalities = sorted(table.present)
    present = np.stack([table.present[m] for m in modalities], axis=1)
    labelled = table.labels[task] != MISSING
    right = proba.argmax(axis=1) == table.labels[task]
    found = {}
    for pattern in np.unique(present[labelled], axis=0)[::-1]:
        rows = labelled & (present == pattern).all(axis=1)
        name = "+".join(m for m, here in zip(modalities, pattern, strict=True) if here)
        found[name] = {"num_rows": int(rows.sum()), "accuracy": float(right[rows].mean())}
    return found


def _val_scores(data: _Data, split: str, predict: Predict) -> dict[str, Any]:
    """Accuracy and macro-F1 on `val` by task; empty if that is the evaluated split or has no rows, tasks without labels left out."""
    rows = data.readable_rows("val") if split != "val" else np.array([], dtype=int)
    if len(rows) == 0:
        return {}
    table = data.table.take(rows)
    scores = {}
    for task, proba in predict(table, ()).items():
        known = np.isfinite(proba).all(axis=1)
        scores[task] = _point_scores(table.labels[task][known], proba[known], table.class_names[task])
    return {task: s for task, s in scores.items() if s["num_rows"]}
