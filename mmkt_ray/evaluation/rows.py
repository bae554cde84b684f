"""The rows of a store that are scored, with labels in a model's own classes, and the file of their predictions.

Axes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.evaluation.metrics import predicted
from mmkt_ray.features.store import UNSEEN, FeatureTable, Store, encode_labels, label_type


@dataclass(frozen=True)
class Rows:
    """A feature table, and for each task its labels as they stand in the store: (N,) str, list of str, or None."""

    table: FeatureTable
    label_names: dict[str, np.ndarray]

    def readable(self, split: str) -> np.ndarray:
        """Indices of a split's rows that have at least one of the table's modalities."""
        return np.flatnonzero((self.table.split == split) & readable(self.table, list(self.table.present)))

    def unseen(self, task: str) -> np.ndarray:
        """(N,) bool: the label is a class that the train split does not have, or a list with such a class."""
        labels, known = self.table.labels[task], set(self.table.class_names[task])
        if labels.ndim == 1:
            return labels == UNSEEN
        return np.array([not known.issuperset(names or ()) for names in self.label_names[task]], dtype=bool)

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(self.table.take(rows), {t: names[rows] for t, names in self.label_names.items()})


def readable(table: FeatureTable, modalities: Sequence[str]) -> np.ndarray:
    """(N,) bool: the sample has at least one of the modalities."""
    return np.logical_or.reduce([table.present[m] for m in modalities])


def subsets(modalities: Sequence[str], sizes: Collection[int] | None = None) -> list[tuple[str, ...]]:
    """The sets of so many of the modalities (None: all 2^M, the empty one first), in the order of their numbers: that of
    number s has the modalities whose bit is set in s."""
    every = [tuple(m for i, m in enumerate(modalities) if s >> i & 1) for s in range(2 ** len(modalities))]
    return [subset for subset in every if sizes is None or len(subset) in sizes]


def presence_patterns(table: FeatureTable) -> dict[str, np.ndarray]:
    """The rows (N,) bool of each combination of modalities that occurs, e.g. "image+text"; the fullest first."""
    modalities = sorted(table.present)
    present = np.stack([table.present[m] for m in modalities], axis=1)
    return {
        "+".join(m for m, here in zip(modalities, pattern, strict=True) if here): (present == pattern).all(axis=1)
        for pattern in np.unique(present, axis=0)[::-1]
    }


def load_rows(
    store: Store, modalities: Sequence[str], tasks: Sequence[str], class_names: Mapping[str, list[str]] | None = None
) -> Rows:
    """All rows of a store. `class_names` are those of a model, which may come from another store; None: the store's."""
    table = store.table(modalities, tasks)
    columns = pa.concat_tables(store.read(list(tasks)))
    if class_names is not None:
        labels = {t: encode_labels(columns.column(t), class_names[t]) for t in tasks}
        table = replace(table, labels=labels, class_names={t: list(class_names[t]) for t in tasks})
    return Rows(table, {t: np.fromiter(columns.column(t).to_pylist(), dtype=object) for t in tasks})


def without_unreadable(
    proba: Mapping[str, np.ndarray], table: FeatureTable, inputs: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Probabilities, task -> (N, C), with NaN in rows that have none of the modalities that the task reads."""
    found = {}
    for task, values in proba.items():
        found[task] = values.copy()
        found[task][~readable(table, inputs[task])] = np.nan
    return found


def has_prediction(proba: np.ndarray) -> np.ndarray:
    """(N,) bool: the rows of probabilities (N, C) that are numbers."""
    return np.asarray(np.isfinite(proba).all(axis=1))


def prediction_columns(task: str, proba: np.ndarray, names: Sequence[str], kind: str) -> dict[str, pa.Array]:
    """Columns <task>_pred, string or list of strings, and <task>_proba, fixed-size list of C float32; null where NaN."""
    values = proba.astype(np.float32)
    known = has_prediction(values)
    best, classes = predicted(values, kind), np.array(names, dtype=object)
    told = [classes[row == 1].tolist() for row in best] if kind == "multilabel" else classes[best]
    flat = pa.array(values.ravel())
    return {
        f"{task}_pred": pa.array([v if k else None for v, k in zip(told, known, strict=True)], label_type(kind)),
        f"{task}_proba": pa.FixedSizeListArray.from_arrays(flat, len(names), mask=pa.array(~known)),
    }


def prediction_table(rows: Rows, modalities: Sequence[str], proba: Mapping[str, np.ndarray]) -> pa.Table:
    """What `predictions-<split>.parquet` holds.

    sample_id, split, missing (list of absent modalities) and per task of the rows: <task>_label (string, or list of
    strings for a multilabel task; null if there is none), <task>_pred of the same type and <task>_proba (fixed-size list
    of C float32). The last two are null where `proba`, task -> (N, C), is NaN or lacks the task.
    """
    table = rows.table
    columns = {
        "sample_id": pa.array(table.sample_id, pa.string()),
        "split": pa.array(table.split, pa.string()),
        "missing": missing_column(table, modalities),
    }
    for task, labels in rows.label_names.items():
        names, kind = table.class_names[task], table.kinds.get(task, "multiclass")
        values = proba.get(task, np.full((len(labels), len(names)), np.nan))
        columns[f"{task}_label"] = pa.array(labels.tolist(), label_type(kind))
        columns |= prediction_columns(task, values, names, kind)
    return pa.table(columns)


def read_predictions(
    uri: str, task: str, model: str | None = None, columns: Sequence[str] = ("label", "pred")
) -> pd.DataFrame:
    """The labelled and predicted rows of such a file by sample_id: label and pred (a class, or a sorted tuple of classes) and
    proba (C,), as `columns` has them. model: whose rows, of a file of several models."""
    names = {f"{task}_{c}": c for c in columns}
    filters = [("model", "==", model)] if model else None
    table = storage.read_table(uri, ["sample_id", *names], filters)
    frame = table.to_pandas().rename(columns=names).set_index("sample_id").dropna()
    for column in ("label", "pred"):
        frame[column] = [v if isinstance(v, str) else tuple(sorted(v)) for v in frame[column]]
    return frame


def missing_column(table: FeatureTable, modalities: Sequence[str]) -> pa.Array:
    """For each row the list of the modalities that it lacks."""
    absent = np.stack([~table.present[m] for m in modalities], axis=1)
    return pa.array(
        [[m for m, gone in zip(modalities, row, strict=True) if gone] for row in absent], pa.list_(pa.string())
    )
