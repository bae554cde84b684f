"""What any model must beat: the majority class, and logistic regression on the same features.

Axes: N samples, D features, C classes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from mmkt_ray.encoders.base import Features
from mmkt_ray.evaluation.calibration import usable
from mmkt_ray.evaluation.rows import readable
from mmkt_ray.features.store import FeatureTable

MAJORITY = "majority"
MAX_TRAIN_ROWS = 20_000
PREDICT_ROWS = 4096  # in memory at a time
MAX_SPARSE_COLUMNS = 200_000
MAX_ITERATIONS = 100


def baseline_name(modalities: Sequence[str]) -> str:
    """`logreg:image+text` for logistic regression on these modalities."""
    return "logreg:" + "+".join(modalities)


def fit_baselines(table: FeatureTable, task: str, seed: int = 0) -> dict[str, Baseline]:
    """All baselines of one task, fitted on its labelled train rows.

    Returns {"majority": .., "logreg:<modality>": .. for each modality, "logreg:<all joined by +>": ..}. A modality that
    no labelled train row has is left out; so is the concatenation of fewer than two. Empty without labelled train rows.
    """
    labels = table.labels[task]
    rows = np.flatnonzero((table.split == "train") & usable(labels))
    if len(rows) == 0:
        return {}
    there = [m for m in sorted(table.features) if table.present[m][rows].any()]
    sets = [(m,) for m in there] + ([tuple(there)] if len(there) > 1 else [])
    fitted: dict[str, Baseline] = {MAJORITY: Majority.fit(labels[rows], len(table.class_names[task]), there)}
    for modalities in sets:
        chosen = _drawn(rows[readable(table, modalities)[rows]], seed)
        fitted[baseline_name(modalities)] = Logreg.fit(table.take(chosen), task, modalities, seed)
    return fitted


@dataclass(frozen=True)
class Majority:
    """Predicts the train split's class frequencies, of a multilabel task each by itself, whatever the sample."""

    modalities: tuple[str, ...]  # those a sample must have one of, so that it is scored on the rows of the others
    frequency: np.ndarray  # (C,) float32
    num_rows: int  # that it was fitted on
    num_params: int = 0
    seconds: float = 0.0

    @classmethod
    def fit(cls, labels: np.ndarray, num_classes: int, modalities: Sequence[str]) -> Majority:
        """Count the labels, (N,) >= 0 or (N, C) of 0 and 1."""
        counts = np.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(axis=0)
        return cls(tuple(modalities), (counts / len(labels)).astype(np.float32), len(labels))

    def predict(self, table: FeatureTable) -> np.ndarray:
        """Probabilities (N, C) float32; NaN for rows without any of the modalities."""
        proba = np.tile(self.frequency, (len(table.sample_id), 1))
        proba[~readable(table, self.modalities)] = np.nan
        return proba


@dataclass(frozen=True)
class Logreg:
    """Logistic regression (L2) on one modality or on several side by side: multinomial; of a multilabel task one for
    each class.

    Dense features are standardised by the train rows that have them, sparse ones are taken as they are (see `_assemble`
    for both together); an absent modality is a row of zeros. To stay a matter of seconds it fits on at most
    MAX_TRAIN_ROWS rows (drawn by the seed), on the MAX_SPARSE_COLUMNS most frequent columns of a sparse modality, and for
    at most MAX_ITERATIONS steps of L-BFGS: far enough for the accuracy to stand still, not always for the solver to say
    "converged".
    """

    modalities: tuple[str, ...]
    inputs: dict[str, _Scaling | _Columns] = field(repr=False)
    model: LogisticRegression | OneVsRestClassifier | None  # None: `constant` says all
    classes: np.ndarray  # the classes that the model's columns are of
    constant: np.ndarray  # (C,) probabilities of the classes that need no model: each train row has them, or none
    num_rows: int  # that it was fitted on
    seconds: float

    @classmethod
    def fit(
        cls, train: FeatureTable, task: str, modalities: tuple[str, ...], seed: int = 0, inverse_l2: float = 1.0
    ) -> Logreg:
        """Fit on the labelled rows of `train` that have one of `modalities` (there must be some).

        inverse_l2: scikit-learn's C, the weight of the rows' losses against the penalty.
        """
        started = time.perf_counter()
        train = train.take(_drawn(np.flatnonzero(readable(train, modalities) & usable(train.labels[task])), seed))
        labels = train.labels[task]
        inputs = {m: _fit_input(train.features[m], train.present[m]) for m in modalities}
        num_classes = len(train.class_names[task])
        share = Majority.fit(labels, num_classes, modalities).frequency
        classes = np.flatnonzero((share > 0) & (share < 1))
        model = None
        if len(classes):
            model = LogisticRegression(C=inverse_l2, solver="lbfgs", max_iter=MAX_ITERATIONS, tol=1e-4)
            model = model if labels.ndim == 1 else OneVsRestClassifier(model)
            with warnings.catch_warnings():  # see above: near enough
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(_assemble(inputs, train), labels if labels.ndim == 1 else labels[:, classes])
        return cls(modalities, inputs, model, classes, np.floor(share), len(labels), time.perf_counter() - started)

    @property
    def num_params(self) -> int:
        """Weights and biases."""
        fitted = self.model.estimators_ if isinstance(self.model, OneVsRestClassifier) else [self.model]
        return sum(int(m.coef_.size + m.intercept_.size) for m in fitted if m is not None)

    def predict(self, table: FeatureTable) -> np.ndarray:
        """Probabilities (N, C) float32; NaN for rows without any of the modalities."""
        rows = np.flatnonzero(readable(table, self.modalities))
        proba = np.full((len(table.sample_id), len(self.constant)), np.nan, dtype=np.float32)
        proba[rows] = self.constant
        if self.model is None:
            return proba
        for start in range(0, len(rows), PREDICT_ROWS):
            some = rows[start : start + PREDICT_ROWS]
            found = self.model.predict_proba(_assemble(self.inputs, table.take(some)))
            proba[np.ix_(some, self.classes)] = found[:, -len(self.classes) :]
        return proba


def _drawn(rows: np.ndarray, seed: int) -> np.ndarray:
    """At most MAX_TRAIN_ROWS of the rows, in their order."""
    if len(rows) <= MAX_TRAIN_ROWS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, MAX_TRAIN_ROWS, replace=False))


Baseline: TypeAlias = Majority | Logreg


@dataclass(frozen=True)
class _Scaling:
    """Standardisation of a dense modality; absent rows stay zero, which is the mean."""

    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,)

    def apply(self, features: np.ndarray, present: np.ndarray) -> np.ndarray:
        return np.where(present[:, None], (features - self.mean) / self.scale, 0)


@dataclass(frozen=True)
class _Columns:
    """The columns of a sparse modality that take part."""

    index: np.ndarray

    def apply(self, features: sp.csr_matrix, present: np.ndarray) -> sp.csr_matrix:
        return features[:, self.index]


def _fit_input(features: Features, present: np.ndarray) -> _Scaling | _Columns:
    if not isinstance(features, np.ndarray):
        frequency = np.bincount(features.indices, minlength=features.shape[1])
        return _Columns(np.sort(np.argsort(-frequency, kind="stable")[:MAX_SPARSE_COLUMNS]))
    some = features[present].astype(np.float64)
    scale = some.std(axis=0)
    return _Scaling(some.mean(axis=0), np.where(scale > 0, scale, 1))


def _assemble(inputs: dict[str, _Scaling | _Columns], table: FeatureTable) -> Features:
    """The modalities side by side (N, sum of D). Beside sparse rows, which have a norm of about one, dense ones are scaled
    to the same norm: else the penalty on weights would all but silence the sparse modality."""
    blocks = [inputs[m].apply(table.features[m], table.present[m]) for m in inputs]
    if not any(sp.issparse(b) for b in blocks):
        return np.hstack(blocks)
    return sp.hstack([b if sp.issparse(b) else sp.csr_matrix(b / np.sqrt(b.shape[1])) for b in blocks], format="csr")
