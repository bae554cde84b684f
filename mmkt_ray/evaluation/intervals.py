"""Bootstrap percentile intervals: how far a score on these test rows may lie from the score on new rows.

Rows are drawn with replacement. The scores depend only on how often each combination of label and prediction occurs,
so a resample is one multinomial draw over these combinations ("cells"): the same distribution as drawing N rows, at a
cost that does not grow with N.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
Axes: N samples, C classes, K distinct cells, R resamples.

Limits: the rows must be independent draws. Rows that share a text or an image (label-made pairs) are not, and their
intervals are too narrow. Macro-F1 over classes with a handful of rows is biased in small resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import scipy.sparse as sp

from mmkt_ray.evaluation.metrics import as_codes, scores_from_counts
from mmkt_ray.features.store import MISSING

METRICS = ("accuracy", "macro_f1")
_MAX_CELLS_AT_ONCE = 20_000_000  # of R x K counts: 160 MB


class Interval(TypedDict):
    """A score and the interval around it, or a difference of two scores."""

    value: float
    low: float
    high: float


def bootstrap_intervals(
    labels: np.ndarray,
    pred: np.ndarray,
    num_classes: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Accuracy and macro-F1 with intervals.

    Args:
        labels, pred: (N,) class indices; labels may be MISSING (left out) or UNSEEN (always wrong).
        num_classes: C.
        num_resamples: R, at least some hundred for stable ends.
        confidence: share of repetitions of the whole study whose interval covers the true score.

    Returns:
        {"accuracy": {value, low, high}, "macro_f1": {...}}; empty if no row is labelled.

    A bootstrap of rows that are all right (or all wrong) has no spread. Both metrics then take the exact bound of
    Clopper & Pearson (1934) for a share: 20 right of 20 gives [0.83, 1], not [1, 1].
    """
    labels, pred = labels[labels != MISSING], pred[labels != MISSING]
    if len(labels) == 0:
        return {}
    cells, counts = np.unique(np.stack([as_codes(labels, num_classes), pred], axis=1), axis=0, return_counts=True)
    value = _scores(cells, counts[None], num_classes)
    draws = [_scores(cells, drawn, num_classes) for drawn in _resample(counts, num_resamples, seed)]
    found = {m: _percentiles(float(value[m][0]), np.concatenate([d[m] for d in draws]), confidence) for m in METRICS}
    if found["accuracy"]["value"] in (0.0, 1.0):
        bound = ((1 - confidence) / 2) ** (1 / len(labels))
        for interval in found.values():
            interval["low" if interval["value"] == 1.0 else "high"] = bound if interval["value"] == 1.0 else 1 - bound
    return found


def paired_difference(
    labels: np.ndarray,
    pred_a: np.ndarray,
    pred_b: np.ndarray,
    metric: str = "accuracy",
    *,
    num_classes: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Score of `pred_a` minus score of `pred_b` on the same rows, resampled jointly.

    Both predictions of a row stay together, so what makes a row hard for both cancels out and the interval is narrower
    than two separate ones suggest. labels, pred_a, pred_b: (N,), some of them labelled; `metric` is one of METRICS.

    Raises: ValueError for another metric or if no row is labelled.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got '{metric}'")
    known = labels != MISSING
    if not known.any():
        raise ValueError("no labelled row to compare on")
    columns = [as_codes(labels[known], num_classes), pred_a[known], pred_b[known]]
    if metric == "accuracy":  # who is right is all that matters: four cells
        columns = [np.zeros(len(columns[0]), int), *(np.where(p == columns[0], 0, 1) for p in columns[1:])]
        num_classes = 1
    cells, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)

    def difference(drawn: np.ndarray) -> np.ndarray:
        a, b = (_scores(cells[:, [0, i]], drawn, num_classes)[metric] for i in (1, 2))
        return a - b

    drawn = np.concatenate([difference(d) for d in _resample(counts, num_resamples, seed)])
    return _percentiles(float(difference(counts[None])[0]), drawn, confidence)


def verdict(difference: Interval) -> str:
    """What a paired difference shows, in words."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "no difference shown"


def _resample(counts: np.ndarray, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Counts (K,) of the rows -> blocks (r, K) of counts in resamples of as many rows, `num_resamples` in all."""
    rng = np.random.default_rng(seed)
    total = int(counts.sum())
    block = max(1, _MAX_CELLS_AT_ONCE // len(counts))
    for start in range(0, num_resamples, block):
        yield rng.multinomial(total, counts / total, size=min(block, num_resamples - start))


def _scores(cells: np.ndarray, counts: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Scores (R,) of counts (R, K), where cells (K, 2) says label and prediction of each cell."""
    label, pred = cells.T
    width = num_classes + 1  # one more for UNSEEN
    support, predicted = (counts @ sp.csr_matrix(np.eye(width)[codes]) for codes in (label, pred))
    right = (counts * (label == pred)) @ sp.csr_matrix(np.eye(width)[label])
    return scores_from_counts(right, support, predicted)


def _percentiles(value: float, drawn: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": value, "low": float(low), "high": float(high)}
