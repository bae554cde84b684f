"""The rows of a store that are scored, with labels in a model's own classes, and the file of their predictions.

Axes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from mmkt_ray.features.store import FeatureTable, Store, encode_labels


@dataclass(frozen=True)
class Rows:
    """A feature table, and for each task the names of its labels as they stand in the store: (N,) str or None."""

    table: FeatureTable
    label_names: dict[str, np.ndarray]

    def readable(self, split: str) -> np.ndarray:
        """Indices of a split's rows that have at least one of the table's modalities."""
        return np.flatnonzero((self.table.split == split) & readable(self.table, list(self.table.present)))

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(self.table.take(rows), {t: names[rows] for t, names in self.label_names.items()})


def readable(table: FeatureTable, modalities: Sequence[str]) -> np.ndarray:
    """(N,) bool: the sample has at least one of the modalities."""
    return np.logical_or.reduce([table.present[m] for m in modalities])


def load_rows(
    store: Store, modalities: Sequence[str], tasks: Sequence[str], class_names: Mapping[str, list[str]] | None = None
) -> Rows:
    """All rows of a store. `class_names` are those of a model, which may come from another store; None: the store's."""
    table = store.table(modalities, tasks)
    columns = pa.concat_tables(store.read(list(tasks)))
    if class_names is not None:
        labels = {t: encode_labels(columns.column(t), class_names[t]) for t in tasks}
        table = replace(table, labels=labels, class_names={t: list(class_names[t]) for t in tasks})
    return Rows(table, {t: np.array(columns.column(t).to_pylist(), dtype=object) for t in tasks})


def prediction_table(rows: Rows, modalities: Sequence[str], proba: Mapping[str, np.ndarray]) -> pa.Table:
    """What `predictions-<split>.parquet` holds.

    sample_id, split, missing (list of absent modalities) and per task of the rows: <task>_label (string, null if there
    is none), <task>_pred (string) and <task>_proba (fixed-size list of C float32). The last two are null where `proba`,
    task -> (N, C), is NaN or lacks the task.
    """
    table = rows.table
    absent = np.stack([~table.present[m] for m in modalities], axis=1)
    missing = [[m for m, gone in zip(modalities, row, strict=True) if gone] for row in absent]
    columns = {
        "sample_id": pa.array(table.sample_id, pa.string()),
        "split": pa.array(table.split, pa.string()),
        "missing": pa.array(missing, pa.list_(pa.string())),
    }
    for task, labels in rows.label_names.items():
        names = table.class_names[task]
        values = proba.get(task, np.full((len(labels), len(names)), np.nan)).astype(np.float32)
        known = np.isfinite(values).all(axis=1)
        best = np.array(names, dtype=object)[values.argmax(axis=1)]
        columns[f"{task}_label"] = pa.array(labels, pa.string())
        columns[f"{task}_pred"] = pa.array(best, pa.string(), mask=~known)
        columns[f"{task}_proba"] = pa.FixedSizeListArray.from_arrays(
            pa.array(values.ravel()), len(names), mask=pa.array(~known)
        )
    return pa.table(columns)
