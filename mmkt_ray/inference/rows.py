"""The rows of a store that are scored, with labels in a model's own classes, and the file of their predictions.

Axes: N rows, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import LABEL_PARTS, FeatureTable, Growing
from mmkt_ray.features.store import Store
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.spelling import spelled_as
from mmkt_ray.kinds.task_kind import TaskKind

MAX_UNSEEN = 20  # classes that train lacks and that are named
ROW_GROUP = 10_000  # rows of a file of predictions that are in memory at a time, or those of one part of the store


@dataclass(frozen=True)
class Rows:
    """Rows of a store as a table."""

    table: FeatureTable
    unseen: dict[
        str, np.ndarray
    ]  # task -> (N,) bool: the label is a class that train lacks, or a list with such a class
    store: Store
    index: np.ndarray  # (N,) where they stand in the store, ascending

    def readable(self, split: str) -> np.ndarray:
        """Indices of a split's rows that have at least one of the table's modalities."""
        return np.flatnonzero((self.table.split == split) & readable(self.table, list(self.table.present)))

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows, in their order."""
        unseen = {t: outside[rows] for t, outside in self.unseen.items()}
        return Rows(self.table.take(rows), unseen, self.store, self.index[rows])


def unseen_classes(data: Rows, task: str, rows: np.ndarray) -> dict[str, int]:
    """Classes that train lacks -> how many of some rows (N,) bool have them, the most frequent first,
    at most MAX_UNSEEN."""
    wanted = data.index[rows & data.unseen[task]]
    if not len(wanted):
        return {}
    labels = pa.concat_tables(list(data.store.read([task]))).column(0).take(pa.array(wanted))
    return classes_outside(labels, data.table.kinds[task], data.table.class_names[task])


def classes_outside(labels: pa.ChunkedArray, kind: TaskKind, class_names: Collection[str]) -> dict[str, int]:
    """Classes of some labels that are in no spelling in `class_names`, as `unseen_classes` counts them."""
    found = Counter(name for name in kind.members(labels)[1].to_pylist() if name is not None)
    known = set(class_names)
    spelled = zip(found, spelled_as(list(found), sorted(known)), strict=True)
    return dict(Counter({name: found[name] for name, own in spelled if own not in known}).most_common(MAX_UNSEEN))


def readable(table: FeatureTable, modalities: Collection[str]) -> np.ndarray:
    """(N,) bool: the sample has at least one of the modalities."""
    return np.asarray(np.logical_or.reduce([table.present[m] for m in modalities]))


def subsets(modalities: Sequence[str], sizes: Collection[int] | None = None) -> list[tuple[str, ...]]:
    """The sets of so many of the modalities (None: all 2^M, the empty one first), in the order of their numbers: that
    of number s has the modalities whose bit is set in s."""
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
    store: Store,
    modalities: Sequence[str],
    tasks: Sequence[str],
    class_names: Mapping[str, list[str]] | None = None,
    kinds: Mapping[str, TaskKind] | None = None,
) -> Rows:
    """All rows of a store. `class_names` and `kinds` are those of a model, which may come from another store; None:
    the store's."""
    table = store.table(modalities, tasks)
    names = {t: list((class_names or table.class_names)[t]) for t in tasks}
    known = dict(kinds or table.kinds)
    grown, unseen = {(t, part): Growing() for t in tasks for part in LABEL_PARTS}, {t: Growing() for t in tasks}
    for piece in store.read(list(tasks)) if tasks else ():
        for t in tasks:
            encoded = known[t].encode(piece.column(t), names[t])
            for part in LABEL_PARTS:
                grown[t, part].add(getattr(encoded, part))
            unseen[t].add(known[t].outside(piece.column(t), names[t]))
    labels = {t: Labels(known[t], *(grown[t, part].array() for part in LABEL_PARTS)) for t in tasks}
    table = replace(table, labels=labels, class_names=names)
    return Rows(table, {t: u.array() for t, u in unseen.items()}, store, np.arange(len(table.split)))


def without_unreadable(
    proba: Mapping[str, np.ndarray], table: FeatureTable, inputs: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Probabilities, task -> (N, C), with NaN in rows that have none of the modalities that the task reads."""
    found = dict(proba)
    for task, values in proba.items():
        blind = np.broadcast_to(~readable(table, inputs[task]), len(values))
        if blind.any():
            found[task] = np.where(blind[:, None], np.float32(np.nan), values)
    return found


def chosen(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows (N,) bool of values (N, ..): the values themselves where that is all of them."""
    return values if rows.all() else values[rows]


def has_prediction(proba: np.ndarray) -> np.ndarray:
    """(N,) bool: the rows of probabilities (N, C) that are numbers."""
    return np.asarray(np.isfinite(proba).all(axis=1))


def prediction_columns(
    task: str, outputs: np.ndarray, names: Sequence[str], kind: TaskKind, margin: np.ndarray | None = None
) -> dict[str, pa.Array]:
    """Columns <task>_pred, as labels of the kind, and those of `TaskKind.further_columns`: of classes <task>_proba,
    fixed-size list of K float32, of numbers <task>_low and _high where margins (N,) are known; null where NaN."""
    values = outputs.astype(np.float32)
    known = has_prediction(values)
    predicted = kind.decode(kind.predict(values), names)
    further = kind.further_columns(values, margin)
    return {
        f"{task}_pred": pa.array([v if k else None for v, k in zip(predicted, known, strict=True)], kind.arrow_type),
        **{f"{task}_{end}": column for end, column in further.items()},
    }


def prediction_parts(
    rows: Rows,
    modalities: Sequence[str],
    proba: Mapping[str, np.ndarray],
    model: str | None = None,
    margins: Mapping[str, np.ndarray] | None = None,
) -> Iterator[pa.Table]:
    """What `predictions-<split>.parquet` holds, part by part of the store.

    sample_id, split, missing (list of absent modalities) and per task of the rows: <task>_label (string, or list of
    strings for a multilabel task; null if there is none), <task>_pred of the same type and <task>_proba (fixed-size
    list of C float32). The last two are null where `proba`, task -> (N, C), is NaN or lacks the task. With `model`
    one more column says so.
    """
    table, missing = rows.table, missing_column(rows.table, modalities)
    tasks, start = list(rows.unseen), 0
    for part in rows.store.read(["sample_id", "split", *tasks]):
        here = slice(*np.searchsorted(rows.index, [start, start + len(part)]).tolist())
        part, start = part.take(pa.array(rows.index[here] - start)), start + len(part)
        columns = {n: part.column(n) for n in ("sample_id", "split")} | {"missing": missing[here]}
        for task in tasks:
            names, kind = table.class_names[task], table.kinds[task]
            values = proba[task][here] if task in proba else np.full((len(part), kind.width(names)), np.nan)
            columns[f"{task}_label"] = part.column(task).cast(kind.arrow_type)
            margin = (margins or {}).get(task)
            columns |= prediction_columns(task, values, names, kind, None if margin is None else margin[here])
        yield pa.table(columns | ({"model": pa.array([model] * len(part), pa.string())} if model else {}))


def write_parts(uri: str, parts: Iterable[pa.Table], metadata: Mapping[str, str] | None = None) -> None:
    """Tables of the same columns (at least one) as one Parquet file, atomically; about ROW_GROUP rows are held.
    metadata: of the file, such as fingerprints."""
    with storage.atomic(uri) as (fs, temporary):
        writer: pq.ParquetWriter | None = None
        held: list[pa.Table] = []
        for part in parts:
            part = part.replace_schema_metadata(metadata)
            if writer is None:
                strings = [f.name for f in part.schema if pa.types.is_string(f.type)]
                options = {"compression": "zstd", "compression_level": 1, "use_dictionary": strings}
                writer = pq.ParquetWriter(temporary, part.schema, filesystem=fs, **options)
            held.append(part)
            if sum(map(len, held)) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        assert writer is not None
        if held:
            writer.write_table(pa.concat_tables(held))
        writer.close()


def read_parts(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Such a file, ROW_GROUP rows at a time. Raises: DataError for a column of an extension type."""
    fs, path = storage.resolve(uri)
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        if any(storage.extension_in(file.schema_arrow.field(name).type) for name in columns):
            raise DataError(f"'{uri}' has columns of an extension type, which mmkt never writes: evaluate again")
        yield from (pa.table(batch) for batch in file.iter_batches(ROW_GROUP, columns=list(columns)))


def read_predictions(
    uri: str, task: str, kind: TaskKind, model: str | None = None, columns: Sequence[str] = ("label", "pred")
) -> pd.DataFrame:
    """The labelled and predicted rows of such a file by sample_id: label and pred (see `TaskKind.value`) and proba
    (K,), as `columns` has them. model: whose rows, of a file of several models."""
    names = {f"{task}_{c}": c for c in columns}
    filters = [("model", "==", model)] if model else None
    table = storage.read_table(uri, ["sample_id", *names], filters)
    frame = table.to_pandas().rename(columns=names).set_index("sample_id").dropna()
    for column in ("label", "pred"):
        frame[column] = [kind.value(v) for v in frame[column]]
    return frame


@dataclass(frozen=True)
class LabelledPredictions:
    """The labelled and predicted rows of one task of such a file, in its order: 16 bytes for each."""

    ids: np.ndarray  # (N,) uint64 hashes of the sample ids
    label: np.ndarray  # (N,) int32 into `values`
    pred: np.ndarray  # (N,) int32 into `values`
    values: list[Any]  # the distinct labels and predictions, see `TaskKind.value`
    kind: TaskKind

    def encoded(self, rows: np.ndarray, names: Sequence[str]) -> tuple[Labels, np.ndarray]:
        """Labels and predictions of some rows."""
        cells = pa.chunked_array([pa.array(self.values, self.kind.arrow_type)])
        labels, predictions = self.kind.encode(cells, names), self.kind.encode_predictions(cells, names)
        return labels[self.label[rows]], predictions[self.pred[rows]]

    def right(self) -> np.ndarray:
        """(N,) 1 for a right row and 0 for a wrong one; of numbers the row's score."""
        if self.kind.classes:
            return np.asarray((self.label == self.pred).astype(float))
        pairs = zip(self.label.tolist(), self.pred.tolist(), strict=True)
        return np.array([self.kind.score_pair(self.values[y], self.values[p]) for y, p in pairs], float)

    def same_labels(self, other: LabelledPredictions) -> tuple[np.ndarray, np.ndarray]:
        """Rows of both files that are of one sample and have the same label."""
        if np.array_equal(self.ids, other.ids):
            ours = theirs = np.arange(len(self.ids))
        else:
            _, ours, theirs = np.intersect1d(self.ids, other.ids, assume_unique=True, return_indices=True)
        index = {value: i for i, value in enumerate(self.values)}
        translated = np.array([index.get(value, -1) for value in other.values], np.int32)
        same = self.label[ours] == translated[other.label[theirs]]
        return ours[same], theirs[same]


def read_outcomes(uri: str, task: str, kind: TaskKind, model: str | None = None) -> LabelledPredictions:
    """What `read_predictions` reads, a batch at a time. Two ids may have the same hash by chance:
    one pair in 10^19."""
    names = ["sample_id", f"{task}_label", f"{task}_pred", *(["model"] if model else [])]
    index: dict[Any, int] = {}
    ids, label, pred = Growing(), Growing(), Growing()
    for rows in read_parts(uri, names):
        rows = rows.filter(pc.equal(rows.column("model"), model)) if model else rows
        rows = rows.filter(pc.and_(rows.column(names[1]).is_valid(), rows.column(names[2]).is_valid()))
        ids.add(pd.util.hash_array(rows.column("sample_id").to_numpy(), categorize=False))
        for grown, name in ((label, names[1]), (pred, names[2])):
            values = map(kind.value, rows.column(name).to_pylist())
            grown.add(np.fromiter((index.setdefault(v, len(index)) for v in values), np.int32, len(rows)))
    return LabelledPredictions(ids.array(), label.array(), pred.array(), list(index), kind)


def missing_column(table: FeatureTable, modalities: Sequence[str]) -> pa.Array:
    """For each row the list of the modalities that it lacks."""
    absent = np.stack([~table.present[m] for m in modalities], axis=1)
    ends = np.append(0, absent.sum(axis=1).cumsum()).astype(np.int32)
    names = pa.array(list(modalities), pa.string()).take(pa.array(np.nonzero(absent)[1]))
    return pa.ListArray.from_arrays(pa.array(ends), names)
