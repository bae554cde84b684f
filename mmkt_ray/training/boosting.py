"""Gradient boosting on the features of one table: what many would try first.

A baseline that is reported but cannot be shipped, since it cannot be saved without pickle. It is scikit-learn's
HistGradientBoosting with its defaults and early stopping, fitted on the train and val rows that have the table.
Numbers are fitted on the scale of their kind. Held-out rows are predicted by models of the other folds.

Source: Ke et al. 2017, LightGBM. Axes: N rows, D features, K outputs of the task.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from mmkt_ray.config import Config, seed_32
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.scoring.heldout import Folds, make_folds

log = logging.getLogger(__name__)

MAX_ROWS = 50_000  # that a model is fitted on
MAX_SPLITS = 10_000  # features that are searched for splits, times the trees of a round: one for each class


@dataclass(frozen=True)
class Boosting:
    """Gradient boosting of one task on one modality."""

    task: str
    modality: str
    model: Any
    heldout: np.ndarray  # (N,) the rows that were held out
    outputs: np.ndarray  # (held-out, K) float32, of models that were fitted without these rows
    on: str  # cv | val
    num_rows: int
    seconds: float

    def predict(self, table: FeatureTable) -> np.ndarray:
        """(N, K) float32; NaN for rows without the modality."""
        return _outputs(self.model, table, self.task, self.modality)


def boosted_modalities(config: Config, table: FeatureTable, task: str) -> list[str]:
    """The tables that a task reads; those for which boosting would take minutes are left out, as the log says."""
    kind = table.kinds[task]
    if not (kind.exclusive or not kind.classes):
        return []
    read = config.tasks[task].inputs or sorted(table.features)
    found, num_trees = [], table.width(task)
    for m in (m for m in read if m in table.features and config.modalities[m].kind.is_table):
        width = table.features[m].shape[1]
        if width * num_trees <= MAX_SPLITS:
            found.append(m)
        else:
            log.info("no gradient boosting of %s for %s: %d features for each of %d outputs", m, task, width, num_trees)
    return found


def fit_boosting(config: Config, table: FeatureTable, task: str, modality: str) -> Boosting | None:
    """None where too few rows have the modality and a label, or all have the same one."""
    started = time.perf_counter()
    labels, folds = table.labels[task], make_folds(table, config.seed)
    able = np.isin(table.split, ("train", "val")) & labels.known & table.present[modality]
    rows = np.flatnonzero(able)
    if len(rows) < 20 or len(np.unique(labels.values[rows])) < 2:
        return None
    seed = seed_32(config.seed)
    held, outputs = _hold_out(table, task, modality, folds, able, seed)
    model = _fit(table.features[modality], labels, rows, seed)
    return Boosting(task, modality, model, held, outputs, folds.on, len(rows), time.perf_counter() - started)


def _hold_out(
    table: FeatureTable, task: str, modality: str, folds: Folds, able: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out rows, ascending, and their outputs."""
    labels = table.labels[task]
    held, outputs = [np.zeros(0, int)], []
    for part in range(folds.num_held):
        own = np.flatnonzero(folds.held(part))
        rest = np.flatnonzero(able & ~folds.held(part))
        if not len(own) or len(np.unique(labels.values[rest])) < 2:
            continue
        held.append(own)
        outputs.append(_outputs(_fit(table.features[modality], labels, rest, seed), table.take(own), task, modality))
    rows = np.concatenate(held)
    order = np.argsort(rows)
    return rows[order], np.concatenate(outputs)[order] if outputs else np.zeros((0, 1), np.float32)


def _fit(features: Features, labels: Labels, rows: np.ndarray, seed: int) -> Any:
    """A model of some rows, at most MAX_ROWS of them."""
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_ROWS])
    values = labels.values[rows]
    if labels.kind.classes:
        few = np.bincount(values).min(initial=2, where=np.bincount(values) > 0) < 2
        return HistGradientBoostingClassifier(random_state=seed, early_stopping=not few).fit(
            _dense(features, rows), values
        )
    import torch

    z = labels.kind.logits(torch.from_numpy(values)[:, None])[:, 0].numpy()
    return HistGradientBoostingRegressor(random_state=seed, early_stopping=True).fit(_dense(features, rows), z)


def _outputs(model: Any, table: FeatureTable, task: str, modality: str) -> np.ndarray:
    """(N, K) float32 outputs of the task's kind; NaN without the modality."""
    kind = table.kinds[task]
    x = _dense(table.features[modality], np.arange(len(table.split)))
    if kind.classes:
        found = np.zeros((len(x), table.width(task)), np.float32)
        found[:, model.classes_] = model.predict_proba(x)
    else:
        found = kind.outputs_of(model.predict(x)[:, None]).astype(np.float32)
    return np.where(table.present[modality][:, None], found, np.float32(np.nan))


def _dense(features: Features, rows: np.ndarray) -> np.ndarray:
    part = features[rows]
    return np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), np.float32)
