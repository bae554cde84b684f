"""Bootstrap percentile intervals: how far a score on these test rows may lie from the score on new rows.

Rows are drawn with replacement. The scores depend only on how often each combination of label and predictions occurs,
so a resample is one multinomial draw over these combinations ("cells"): the same distribution as drawing N rows, at a
cost that does not grow with N. Scores of several predictions are drawn jointly: what makes a row hard for all of them
cancels out of their differences. Models of several seeds: seeds.py.

Labels and predictions are (N,) class indices, or (N, C) of 0 and 1 for a multilabel task, whose accuracy is subset
accuracy: a row counts if every class of it is right.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
Axes: N samples, C classes, K distinct cells, P predictions of the same rows, R resamples.

Limits: the rows must be independent draws. Rows that share a text or an image (label-made pairs) are not, and their
intervals are too narrow. Macro-F1 over classes with a handful of rows is biased in small resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict

import numpy as np
import scipy.sparse as sp

from mmkt_ray.evaluation.metrics import as_codes, is_right, macro_f1_from_counts
from mmkt_ray.features.store import labelled

METRICS = ("accuracy", "macro_f1")
_MAX_COUNTS = 2_000_000  # drawn at once: 16 MB


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
    drawn = resampled_scores(labels[rows], [pred[rows]], num_classes, num_resamples, seed)
    found = {m: percentiles(scores[0], confidence) for m, scores in drawn.items()}
    bound = ((1 - confidence) / 2) ** (1 / int(rows.sum()))
    for interval in found.values():
        if interval is not None and interval["value"] in (0.0, 1.0):
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
) -> Interval | None:
    """Score of `pred_a` minus score of `pred_b` on the same rows, resampled jointly; None where it is undefined.

    Both predictions of a row stay together, so the interval is narrower than two separate ones suggest. Some rows are
    labelled; `metric` is one of METRICS.

    Raises: ValueError for another metric, or if no row is labelled.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got '{metric}'")
    rows = labelled(labels)
    if not rows.any():
        raise ValueError("no labelled row to compare on")
    labels, preds = labels[rows], [pred_a[rows], pred_b[rows]]
    if metric == "accuracy":  # who is right is all that matters: four cells
        codes = as_codes(labels, num_classes)
        preds = [np.where(is_right(codes, p), 0, 1) for p in preds]
        labels, num_classes = np.zeros(len(labels), int), 1
    a, b = resampled_scores(labels, preds, num_classes, num_resamples, seed)[metric]
    return percentiles(a - b, confidence)


def resampled_scores(
    labels: np.ndarray, preds: Sequence[np.ndarray], num_classes: int, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> (P, 1 + R): the score of each prediction on the labelled rows given, then on the resamples, which are the
    same for all; NaN where undefined."""
    (label, *guesses), counts = _cells(labels, preds, num_classes)
    outcomes = [Outcome.of(label, guess, num_classes) for guess in guesses]
    blocks = chain([counts[None]], draw_counts(counts, num_resamples, np.random.default_rng(seed)))
    drawn = [[outcome.scores(block) for outcome in outcomes] for block in blocks]
    return {m: np.concatenate([[s[m] for s in scores] for scores in drawn], axis=1) for m in METRICS}


def percentiles(scores: np.ndarray, confidence: float) -> Interval | None:
    """Scores (1 + R,) -> the first one between percentiles of the others; None where it is undefined (NaN). Resamples that
    lack what defines it are left out."""
    if np.isnan(scores[0]):
        return None
    low, high = np.nanquantile(scores[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": float(scores[0]), "low": float(low), "high": float(high)}


def verdict(difference: Interval, neither: str = "no difference shown") -> str:
    """What a paired difference shows: better, worse or `neither`."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else neither


@dataclass(frozen=True)
class Outcome:
    """What predictions come to in each of K cells (or rows), so that the scores of many resamples are a few products of
    matrices. W = C, and one more for UNSEEN where a row has one class."""

    hit: np.ndarray  # (K,) the row is right
    right: sp.csr_matrix  # (K, W) true positives of each class
    support: sp.csr_matrix  # (K, W) labels
    predicted: sp.csr_matrix  # (K, W) predictions

    @classmethod
    def of(cls, label: np.ndarray, pred: np.ndarray, num_classes: int) -> Outcome:
        """label, pred: (K,) codes up to `num_classes` (see `as_codes`), or (K, C) of 0 and 1. A negative prediction, of a
        class that is not among the C, is wrong."""
        support, predicted = (_members(values, num_classes) for values in (label, pred))
        return cls(is_right(label, pred), support.multiply(predicted).tocsr(), support, predicted)

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (R,) of how often each cell is drawn, (R, K)."""
        totals = [counts @ part for part in (self.right, self.support, self.predicted)]
        return {"accuracy": counts @ self.hit / counts.sum(axis=1), "macro_f1": macro_f1_from_counts(*totals)}


def draw_counts(counts: np.ndarray, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Counts (K,) of the rows -> blocks (r, K) of counts in resamples of as many rows, `num_resamples` in all."""
    total = int(counts.sum())
    block = max(1, _MAX_COUNTS // len(counts))
    for start in range(0, num_resamples, block):
        yield rng.multinomial(total, counts / total, size=min(block, num_resamples - start))


def _members(values: np.ndarray, num_classes: int) -> sp.csr_matrix:
    """(K, C) as they are, of codes (K, C + 1): 1 where the row has the class; nothing in the row of a negative code."""
    if values.ndim == 2:
        return sp.csr_matrix(values.astype(float))
    rows = np.flatnonzero(values >= 0)
    return sp.csr_matrix((np.ones(len(rows)), (rows, values[rows])), shape=(len(values), num_classes + 1))


def _cells(labels: np.ndarray, preds: Sequence[np.ndarray], num_classes: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct combinations of label and predictions, each (K,) or (K, C), and how often each occurs (K,)."""
    columns = [as_codes(labels, num_classes), *preds]
    width = 1 if labels.ndim == 1 else labels.shape[1]
    flat = np.concatenate([c.reshape(len(c), width).astype(np.int32) for c in columns], axis=1)
    cells, counts = np.unique(flat, axis=0, return_counts=True)
    parts = np.split(cells, len(columns), axis=1)
    return [p[:, 0] if labels.ndim == 1 else p for p in parts], counts
