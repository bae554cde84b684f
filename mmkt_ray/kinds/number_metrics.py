"""Scores of predicted numbers, also of many resamples at once.

They are scikit-learn's `r2_score`, `root_mean_squared_error` and `mean_absolute_error`, and SciPy's `spearmanr`, of
rows that are repeated as often as they are drawn. Axes: N rows, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkt_ray.kinds.divide import divide_where

REPORTED = ("r2", "spearman", "rmse", "mae")
# told as they are, not in percent; the first two from 0 up
IN_UNITS = ("rmse", "mae", "median_absolute_error", "mean_error")
NUM_POINTS = 500  # pairs of label and prediction that are kept for a plot


@dataclass(frozen=True)
class NumberOutcome:
    """Labels and predictions (N,) of one model."""

    labels: np.ndarray
    predictions: np.ndarray

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (R,) of how often each row is drawn, (R, N); NaN where it is undefined."""
        return {metric: self.score(metric, counts) for metric in REPORTED}

    def score(self, metric: str, counts: np.ndarray) -> np.ndarray:
        """One of them."""
        total, error = counts.sum(axis=1), self.predictions - self.labels
        if metric == "spearman":
            return correlation(weighted_ranks(self.labels, counts), weighted_ranks(self.predictions, counts), counts)
        if metric == "mae":
            return np.asarray(counts @ np.abs(error) / total)
        squared = counts @ error**2 / total
        if metric == "rmse":
            return np.asarray(np.sqrt(squared))
        y = self.labels - self.labels.mean()
        variance = counts @ y**2 / total - (counts @ y / total) ** 2
        defined = variance > 1e-12 * max(float(y.var()), 1e-300)
        return np.where(defined, 1 - squared / np.where(defined, variance, 1.0), np.nan)


def weighted_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R, N) the mean rank of each row's value (N,) among rows that are drawn so often, (R, N)."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(sizes) - sizes
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    return (drawn.cumsum(axis=1) - (drawn - 1) / 2)[:, group]


def correlation(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) Pearson correlation of a and b (R, N), each row counting so often; NaN where one of them is constant."""
    total = counts.sum(axis=1, keepdims=True)
    a = a - (counts * a).sum(axis=1, keepdims=True) / total
    b = b - (counts * b).sum(axis=1, keepdims=True) / total
    together, own = (counts * a * b).sum(axis=1), (counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1)
    return divide_where(own > 1e-12, together, np.sqrt(own))


def number_scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """All scores of labelled rows, ready for JSON; null where undefined.
    `points`: some pairs of label and prediction."""
    found: dict[str, Any] = {"num_rows": len(labels)}
    if not len(labels):
        return found | dict.fromkeys((*REPORTED, "median_absolute_error", "mean_error")) | {"points": []}
    drawn = NumberOutcome(labels, predictions).scores(np.ones((1, len(labels))))
    found |= {metric: float(v[0]) if np.isfinite(v[0]) else None for metric, v in drawn.items()}
    error = predictions - labels
    found |= {"median_absolute_error": float(np.median(np.abs(error))), "mean_error": float(error.mean())}
    some = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), NUM_POINTS)).astype(int))
    return found | {"points": np.stack([labels[some], predictions[some]], axis=1).tolist()}
