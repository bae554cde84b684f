"""Which train rows and labels a model learns from, and what balances rare classes: resampling, or synthetic rows.

Axes: N rows of a table, C classes of one task, D features of all modalities of a presence pattern side by side.
A presence pattern is the set of modalities that a row has.

Sources: SMOTE, Chawla et al. 2002 (https://arxiv.org/abs/1106.1813), by imbalanced-learn; convex combinations within
a class after mixup, Zhang et al. 2018 (https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.kinds.labels import concat_labels

GROWTH = 5  # a class becomes at most so many times as large, and never larger than the largest one
NUM_NEIGHBOURS = 5
MAX_SOURCES = 10_000  # rows of a class and pattern that SMOTE takes; its time grows with their square

# --- which rows, which labels ---------------------------------------------------------------------------------------


def read_excluded(uri: str) -> np.ndarray:
    """The distinct sample_ids in a Parquet file, (N,) str. Raises: DataError if the file or its column is missing."""
    try:
        column = storage.read_table(uri, ["sample_id"]).column("sample_id")
    except (FileNotFoundError, DataError) as error:
        raise DataError(f"training.exclude needs a Parquet file with a column sample_id: '{uri}': {error}") from None
    return np.unique(column.to_numpy(zero_copy_only=False).astype(str))


def leave_out(table: FeatureTable, sample_ids: np.ndarray) -> FeatureTable:
    """The table with these train rows in no split at all. Raises: DataError if none of them is a train row."""
    found = np.isin(table.sample_id.astype(str), sample_ids) & (table.split == "train")
    if len(sample_ids) and not found.any():
        raise DataError(
            f"none of the {len(sample_ids)} sample_ids of training.exclude is a train row: does the file belong to "
            "this run?"
        )
    return replace(table, split=np.where(found, "excluded", table.split))


def keep_labels(table: FeatureTable, rows: np.ndarray, fracs: Mapping[str, float], seed: int) -> FeatureTable:
    """The table with a share of each task's labels of `rows`, the same share of each stratum (see `TaskKind.strata`),
    at least one; the other labels are removed.

    With the same seed, a smaller share is a subset of a larger one. A row of each class is kept too.
    """
    labels = {}
    for task, given in table.labels.items():
        own = np.random.default_rng([seed, zlib.crc32(task.encode())])  # independent of the other tasks
        order = own.permutation(len(given))[rows].argsort()
        shuffled = rows[order]
        kept = np.ones(len(given), dtype=bool)
        kept[rows] = False
        for stratum in given.kind.strata(given[shuffled]):
            kept[shuffled[stratum[: max(1, round(fracs[task] * len(stratum)))]]] = True
        kept[shuffled[given.kind.one_of_each(given[shuffled])]] = True
        labels[task] = given.keep(kept)
    return replace(table, labels=labels)


# --- resampling -----------------------------------------------------------------------------------------------------


def sampling_weights(table: FeatureTable, rows: np.ndarray) -> np.ndarray:
    """Sampling weights of the rows: (len(rows),).

    The mean over each row's labelled tasks, see `TaskKind.draw_weights`. With one task, every class is drawn equally
    often; with several, this is a compromise.
    """
    total, num_tasks = np.zeros(len(rows)), np.zeros(len(rows))
    for labels in table.labels.values():
        total += labels.kind.draw_weights(labels[rows])
        num_tasks += labels.known[rows]
    return total / np.maximum(num_tasks, 1)


# --- synthetic rows -------------------------------------------------------------------------------------------------


def add_synthetic(table: FeatureTable, rows: np.ndarray, method: str, seed: int) -> tuple[FeatureTable, np.ndarray]:
    """The table with synthetic train rows appended for the rare classes of each task among `rows`,
    and all rows to train on.

    A class grows up to the size of its task's largest one or `GROWTH` times its own, whichever is less, in each
    presence pattern by the same share. `smote` places a row on the segment between a row and one of its nearest
    neighbours of the same class and pattern, over the modalities side by side, each scaled to a mean square of 1;
    `mixup` between any two of them. Where a class has a single row of a pattern, that row is repeated. A synthetic
    row has the label of that task only. Sparse features stay sparse. Only tasks of classes that exclude each other
    get any: a mean of two label sets is none.

    Raises: ConfigError if no task has classes that exclude each other.
    """
    tasks = [t for t, y in table.labels.items() if y.kind.exclusive]
    if not tasks:
        others = " or ".join(sorted({y.kind.name for y in table.labels.values()}))
        raise ConfigError(
            f"training.generate: {method} makes rows of one class, and all tasks are {others}: use training.resample "
            "or training.class_weights"
        )
    rng = np.random.default_rng(seed)
    patterns = rows_by_pattern(table, rows)
    pieces = [table]
    for task in tasks:
        labels = table.labels[task]
        counts = labels.kind.count(labels[rows], table.width(task))
        extra = missing_rows(counts)
        for modalities, members in patterns:
            for code in np.flatnonzero(extra).tolist():
                group = members[labels.known[members] & (labels.values[members] == code)]
                num_rows = round(extra[code] * len(group) / counts[code])
                if num_rows:
                    made = make_rows(table, group, modalities, num_rows, method, rng)
                    pieces.append(synthetic_table(table, made, task, code, sum(len(p.split) for p in pieces)))
    grown = append_rows(pieces)
    return grown, np.concatenate([rows, np.arange(len(table.split), len(grown.split))])


def missing_rows(counts: np.ndarray) -> np.ndarray:
    """Number of synthetic rows for each class (C,)."""
    return np.asarray(np.minimum(counts.max(), GROWTH * counts) - counts)


def rows_by_pattern(table: FeatureTable, rows: np.ndarray) -> list[tuple[list[str], np.ndarray]]:
    """For each presence pattern among the rows: its modalities, and its rows."""
    modalities = list(table.present)
    mask = np.stack([table.present[m][rows] for m in modalities], axis=1)
    patterns, which = np.unique(mask, axis=0, return_inverse=True)
    return [
        ([m for m, there in zip(modalities, pattern, strict=True) if there], rows[which.ravel() == number])
        for number, pattern in enumerate(patterns)
    ]


def make_rows(
    table: FeatureTable, group: np.ndarray, modalities: list[str], num_rows: int, method: str, rng: np.random.Generator
) -> dict[str, Features]:
    """Synthetic features of rows like those of `group`, all of one class and pattern: modality -> (num_rows, D_m)."""
    if method == "smote" and len(group) > 1:
        return smote_rows(table, rng.permutation(group)[:MAX_SOURCES], modalities, num_rows, rng)
    first, second, share = rng.choice(group, num_rows), rng.choice(group, num_rows), rng.random(num_rows)
    made: dict[str, Features] = {}
    for m in modalities:
        x = table.features[m]
        made[m] = scale(x[first], share) + scale(x[second], 1 - share)
    return made


def smote_rows(
    table: FeatureTable, group: np.ndarray, modalities: list[str], num_rows: int, rng: np.random.Generator
) -> dict[str, Features]:
    """SMOTE of at least two rows of one class over all their modalities at once: modality -> (num_rows, D_m)."""
    from imblearn.over_sampling import SMOTE  # takes seconds, and few runs need it

    parts = [table.features[m][group] for m in modalities]
    norms = [np.sqrt(mean_square(x)) or 1.0 for x in parts]
    sparse = any(sp.issparse(x) for x in parts)
    stack = sp.hstack if sparse else np.hstack
    scaled = stack([x / n for x, n in zip(parts, norms, strict=True)])
    x = sp.csr_matrix(scaled) if sparse else scaled
    # imbalanced-learn wants two classes: the first row once more, as one that does not grow
    x, classes = (sp.vstack if sparse else np.vstack)([x, x[:1]]), np.append(np.ones(len(group), int), 0)
    smote = SMOTE(
        sampling_strategy={1: len(group) + num_rows},
        k_neighbors=min(NUM_NEIGHBOURS, len(group) - 1),
        random_state=int(rng.integers(2**31)),
    )
    made = smote.fit_resample(x, classes)[0][len(classes) :]
    ends = np.cumsum([part.shape[1] for part in parts])
    found: dict[str, Features] = {}
    for m, part, norm, end in zip(modalities, parts, norms, ends, strict=True):
        own = made[:, end - part.shape[1] : end] * norm
        found[m] = own.astype(np.float32) if sp.issparse(part) or not sparse else own.toarray().astype(np.float32)
    return found


def mean_square(x: Features) -> float:
    """Mean over rows of the squared length."""
    values = x.data if sp.issparse(x) else x
    return float(np.square(values, dtype=np.float64).sum() / x.shape[0])


def scale(x: Features, factors: np.ndarray) -> Features:
    """Each row of (N, D) times its factor, float32."""
    if sp.issparse(x):
        return sp.csr_matrix(sp.diags(factors) @ x, dtype=np.float32)
    return (x * factors[:, None]).astype(np.float32)


def synthetic_table(table: FeatureTable, made: dict[str, Features], task: str, code: int, start: int) -> FeatureTable:
    """Synthetic features as train rows with one label, named from number `start` on."""
    num_rows = next(iter(made.values())).shape[0]
    features: dict[str, Features] = {}
    for m, x in table.features.items():
        empty = sp.csr_matrix if sp.issparse(x) else np.zeros
        features[m] = made[m] if m in made else empty((num_rows, x.shape[1]), dtype=np.float32)
    labels = {t: y.kind.unlabelled(num_rows, y) for t, y in table.labels.items()}
    labels[task] = table.kinds[task].filled(num_rows, code, table.labels[task])
    return replace(
        table,
        sample_id=np.array([f"synthetic-{start + i}" for i in range(num_rows)], dtype=object),
        split=np.full(num_rows, "train", dtype=object),
        features=features,
        present={m: np.full(num_rows, m in made) for m in table.present},
        labels=labels,
    )


def append_rows(tables: list[FeatureTable]) -> FeatureTable:
    """One table of the rows of several with the same columns."""
    first = tables[0]
    features: dict[str, Features] = {}
    for m, x in first.features.items():
        parts = [t.features[m] for t in tables]
        features[m] = sp.vstack(parts, format="csr") if sp.issparse(x) else np.concatenate(parts)
    return replace(
        first,
        sample_id=np.concatenate([t.sample_id for t in tables]),
        split=np.concatenate([t.split for t in tables]),
        features=features,
        present={m: np.concatenate([t.present[m] for t in tables]) for m in first.present},
        labels={name: concat_labels(t.labels[name] for t in tables) for name in first.labels},
    )
