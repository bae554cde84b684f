"""Scores of models of several seeds on the same rows, and their differences, with intervals over rows and seeds.

A resample draws the rows anew, jointly for all models, and for each model its seeds: what makes a row hard for all of them
cancels out of a difference, and how much a score hangs on the seed is part of its interval.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 16.
Axes: S seeds, N rows, C classes, R resamples. Labels are (N,) codes or (N, C) of 0 and 1; predictions have S in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sp

from mmkt_ray.evaluation.intervals import METRICS, Interval
from mmkt_ray.evaluation.metrics import as_codes, is_right, macro_f1_from_counts

_MAX_DRAWN = 20_000_000  # row weights at once: 160 MB


def draw_scores(
    labels: np.ndarray, predictions: Sequence[np.ndarray], num_classes: int, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> (models, 1 + R): the mean over seeds on the rows as they are, then in the resamples. All rows are labelled."""
    codes = as_codes(labels, num_classes)
    outcomes = [[_Outcome(codes, pred, num_classes) for pred in seeds] for seeds in predictions]
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    for weights in _row_weights(len(labels), num_resamples, rng):
        drawn = [rng.integers(len(seeds), size=(len(seeds), len(weights))) for seeds in outcomes]
        for metric in METRICS:
            scores = []
            for seeds, choice in zip(outcomes, drawn, strict=True):
                by_seed = np.stack([outcome.scores(weights)[metric] for outcome in seeds])  # (S, r)
                whole = len(found[metric]) == 0  # the first block is the rows as they are
                scores.append((by_seed if whole else np.take_along_axis(by_seed, choice, axis=0)).mean(axis=0))
            found[metric].append(np.stack(scores))
    return {metric: np.concatenate(blocks, axis=1) for metric, blocks in found.items()}


def interval_of(values: np.ndarray, confidence: float) -> Interval | None:
    """The first value, between percentiles of the others; None where it is undefined."""
    if np.isnan(values[0]):
        return None
    low, high = np.nanquantile(values[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _row_weights(num_rows: int, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks (r, N) of how often each row is drawn; the first is ones (1, N)."""
    yield np.ones((1, num_rows))
    block = max(1, _MAX_DRAWN // num_rows)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        yield rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=size).astype(float)


class _Outcome:
    """One model's predictions, so that scores of many resamples are a few products of matrices."""

    def __init__(self, labels: np.ndarray, pred: np.ndarray, num_classes: int) -> None:
        """labels: codes up to `num_classes`, or (N, C) of 0 and 1."""
        self.hit = is_right(labels, pred).astype(float)
        each = labels, pred
        if labels.ndim == 1:
            each = tuple(np.eye(num_classes + 1)[codes] for codes in each)
        self.support, self.predicted = (sp.csr_matrix(values.astype(float)) for values in each)
        self.right = self.support.multiply(self.predicted).tocsr()

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (r,) of weights (r, N)."""
        totals = [weights @ part for part in (self.right, self.support, self.predicted)]
        return {"accuracy": weights @ self.hit / weights.sum(axis=1), "macro_f1": macro_f1_from_counts(*totals)}
