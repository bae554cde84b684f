"""What predictions of classes come to, in a form in which the scores of many resamples are a few products of
matrices.

Axes: N rows, K distinct cells of label and predictions, C classes, R resamples. Labels and predictions are (K,)
codes, or (K, C) of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from mmkt_ray.kinds.divide import divide_where


@dataclass(frozen=True)
class ClassOutcome:
    """What predictions come to in each of K cells (or rows). W = C, and one more for a class that train lacks where a
    row has one class."""

    hit: np.ndarray  # (K,) the row is right
    right: sp.csr_matrix  # (K, W) true positives of each class
    support: sp.csr_matrix  # (K, W) labels
    predicted: sp.csr_matrix  # (K, W) predictions

    @classmethod
    def of_codes(cls, label: np.ndarray, pred: np.ndarray, num_classes: int) -> ClassOutcome:
        """label, pred: (K,) codes up to `num_classes`. A negative prediction, of a class that is not among them,
        is wrong."""
        support, predicted = (_members(values, num_classes) for values in (label, pred))
        return cls(label == pred, support.multiply(predicted).tocsr(), support, predicted)

    @classmethod
    def of_sets(cls, label: np.ndarray, pred: np.ndarray) -> ClassOutcome:
        """label, pred: (K, C) of 0 and 1. A row is right if all of its classes are."""
        support, predicted = (sp.csr_matrix(values.astype(float)) for values in (label, pred))
        return cls((label == pred).all(axis=1), support.multiply(predicted).tocsr(), support, predicted)

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (R,) of how often each cell is drawn, (R, K)."""
        totals = [counts @ part for part in (self.right, self.support, self.predicted)]
        return {"accuracy": counts @ self.hit / counts.sum(axis=1), "macro_f1": macro_f1_from_counts(*totals)}


def _members(values: np.ndarray, num_classes: int) -> sp.csr_matrix:
    """Codes (K,) -> (K, C + 1): 1 where the row has the class; nothing in the row of a negative code."""
    rows = np.flatnonzero(values >= 0)
    return sp.csr_matrix((np.ones(len(rows)), (rows, values[rows])), shape=(len(values), num_classes + 1))


def cells(columns: Sequence[np.ndarray], width: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct combinations of labels and predictions, each (K, width), and how often each occurs (K,)."""
    flat = np.concatenate([c.reshape(len(c), width).astype(np.int32) for c in columns], axis=1)
    distinct, counts = np.unique(flat, axis=0, return_counts=True)
    return np.split(distinct, len(columns), axis=1), counts


def macro_f1_from_counts(right: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Macro-F1 (R,) of many resamples at once, what scikit-learn gives for each; NaN where no class occurs.

    right, support, predicted: (R, C) true positives, labels and predictions of each class in each resample.
    """
    involved = support + predicted
    f1 = divide_where(involved > 0, 2.0 * right, involved, 0.0)
    num = (involved > 0).sum(axis=1)
    return divide_where(num > 0, f1.sum(axis=1), num)
