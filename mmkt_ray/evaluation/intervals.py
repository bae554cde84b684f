"""Bootstrap percentile intervals: how far a score on these test rows may lie from the score on new rows.

Rows are drawn with replacement. The scores depend only on how often each combination of label and prediction occurs,
so a resample is one multinomial draw over these combinations ("cells"): the same distribution as drawing N rows, at a
cost that does not grow with N.

Labels and predictions are (N,) class indices, or (N, C) of 0 and 1 for a multilabel task, whose accuracy is subset
accuracy: a row counts if every class of it is right.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
Axes: N samples, C classes, K distinct cells, R resamples.

Limits: the rows must be independent draws. Rows that share a text or an image (label-made pairs) are not, and their
intervals are too narrow. Macro-F1 over classes with a handful of rows is biased in small resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict

import numpy as np
import scipy.sparse as sp

from mmkt_ray.evaluation.metrics import as_codes, is_right, macro_f1_from_counts
from mmkt_ray.features.store import labelled

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
) -> dict[str, Interval | None]:
    """Accuracy and macro-F1 with intervals.

    Args:
        labels, pred: see above; labels may be MISSING (left out) or UNSEEN (always wrong).
        num_classes: C.
        num_resamples: R, at least some hundred for stable ends.
        confidence: share of repetitions of the whole study whose interval covers the true score.

    Returns:
        {"accuracy": {value, low, high}, "macro_f1": {...}}; empty if no row is labelled. Macro-F1 is None where no row
        has or gets any class.

    A bootstrap of rows that are all right (or all wrong) has no spread. Both metrics then take the exact bound of
    Clopper & Pearson (1934) for a share: 20 right of 20 gives [0.83, 1], not [1, 1].
    """
    rows = labelled(labels)
    if not rows.any():
        return {}
    draws = bootstrap_scores(labels[rows], pred[rows], num_classes, num_resamples, seed)
    found = {m: _percentiles(float(values[0]), values[1:], confidence) for m, values in draws.items()}
    bound = ((1 - confidence) / 2) ** (1 / int(rows.sum()))
    for interval in found.values():
        if interval is not None and interval["value"] in (0.0, 1.0):
            interval["low" if interval["value"] == 1.0 else "high"] = bound if interval["value"] == 1.0 else 1 - bound
    return found


def bootstrap_scores(
    labels: np.ndarray, pred: np.ndarray, num_classes: int, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> (1 + R,): the score of the labelled rows given, then those of the resamples; NaN where undefined."""
    (label, guess), counts = _cells(labels, pred, num_classes=num_classes)
    outcome = _Outcome.of(label, guess, num_classes)
    drawn = [outcome.scores(d) for d in chain([counts[None]], _resample(counts, num_resamples, seed))]
    return {m: np.concatenate([d[m] for d in drawn]) for m in METRICS}


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
    than two separate ones suggest. Some rows are labelled; `metric` is one of METRICS.

    Raises: ValueError for another metric, if no row is labelled, or if the metric is undefined on these rows.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got '{metric}'")
    rows = labelled(labels)
    if not rows.any():
        raise ValueError("no labelled row to compare on")
    values = difference_scores(labels[rows], pred_a[rows], pred_b[rows], metric, num_classes, num_resamples, seed)
    found = _percentiles(float(values[0]), values[1:], confidence)
    if found is None:
        raise ValueError(f"{metric} is undefined: no row has or gets any class")
    return found


def difference_scores(
    labels: np.ndarray,
    pred_a: np.ndarray,
    pred_b: np.ndarray,
    metric: str,
    num_classes: int,
    num_resamples: int,
    seed: int,
) -> np.ndarray:
    """(1 + R,): the difference a - b on the labelled rows given, then those of the resamples; NaN where undefined."""
    if metric == "accuracy":  # who is right is all that matters: four cells
        pred_a, pred_b = (np.where(is_right(as_codes(labels, num_classes), p), 0, 1) for p in (pred_a, pred_b))
        labels, num_classes = np.zeros(len(labels), int), 1
    (label, *preds), counts = _cells(labels, pred_a, pred_b, num_classes=num_classes)
    a, b = (_Outcome.of(label, p, num_classes) for p in preds)
    blocks = chain([counts[None]], _resample(counts, num_resamples, seed))
    return np.concatenate([a.scores(d)[metric] - b.scores(d)[metric] for d in blocks])


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


def _cells(labels: np.ndarray, *preds: np.ndarray, num_classes: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct combinations of label and predictions, each (K,) or (K, C), and how often each occurs (K,)."""
    columns = [as_codes(labels, num_classes), *preds]
    width = 1 if labels.ndim == 1 else labels.shape[1]
    flat = np.concatenate([c.reshape(len(c), width).astype(np.int32) for c in columns], axis=1)
    cells, counts = np.unique(flat, axis=0, return_counts=True)
    parts = np.split(cells, len(columns), axis=1)
    return [p[:, 0] if labels.ndim == 1 else p for p in parts], counts


@dataclass(frozen=True)
class _Outcome:
    """What a model's predictions come to in each of K cells. W = C, and one more for UNSEEN where a row has one class."""

    hit: np.ndarray  # (K,) the row is right
    right: sp.csr_matrix  # (K, W) true positives of each class
    support: sp.csr_matrix  # (K, W) labels
    predicted: sp.csr_matrix  # (K, W) predictions

    @classmethod
    def of(cls, label: np.ndarray, pred: np.ndarray, num_classes: int) -> _Outcome:
        """label, pred: (K,) codes, or (K, C) of 0 and 1."""
        hit = is_right(label, pred)
        if label.ndim == 1:
            each = [sp.csr_matrix(np.eye(num_classes + 1)[codes]) for codes in (label, pred)]
        else:
            each = [sp.csr_matrix(codes.astype(float)) for codes in (label, pred)]
        support, predicted = each
        return cls(hit, support.multiply(predicted).tocsr(), support, predicted)

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (R,) of counts (R, K)."""
        totals = [counts @ part for part in (self.right, self.support, self.predicted)]
        return {"accuracy": counts @ self.hit / counts.sum(axis=1), "macro_f1": macro_f1_from_counts(*totals)}


def _percentiles(value: float, drawn: np.ndarray, confidence: float) -> Interval | None:
    """None where the score is undefined; a resample that lacks what defines it is left out."""
    if np.isnan(value):
        return None
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": value, "low": float(low), "high": float(high)}
