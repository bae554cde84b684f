"""Scores of models of several seeds on the same rows, with intervals over rows and seeds.

A resample draws the rows anew, jointly for all models, and for each model its seeds: what makes a row hard for all of them
cancels out of a difference, and how much a score hangs on the seed is part of its interval.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 16.
Axes: S seeds, N rows, C classes, P models, R resamples. Labels are (N,) codes or (N, C) of 0 and 1; predictions have S in
front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmkt_ray.evaluation.intervals import METRICS, Interval, Outcome, draw_counts, percentiles
from mmkt_ray.evaluation.metrics import as_codes, predicted
from mmkt_ray.evaluation.objective import metric_scores

MULTILABEL_METRICS = ("micro_f1", "samples_f1", "macro_average_precision")  # what is told of such a task beside METRICS


def seed_scores(
    labels: np.ndarray, predictions: Sequence[np.ndarray], num_classes: int, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> (P, 1 + R): the mean over seeds on the rows as they are, then in the resamples. All rows are labelled."""
    codes = as_codes(labels, num_classes)

    def scorer(pred: np.ndarray) -> _Scorer:
        outcomes = [Outcome.of(codes, p, num_classes) for p in pred]

        def scores(counts: np.ndarray) -> np.ndarray:
            by_seed = [outcome.scores(counts) for outcome in outcomes]
            return np.array([[s[m] for s in by_seed] for m in METRICS])

        return scores

    drawn = _resample([scorer(pred) for pred in predictions], len(labels), num_resamples, seed)
    return dict(zip(METRICS, drawn.swapaxes(0, 1), strict=True))


def multilabel_seed_scores(
    labels: np.ndarray, probabilities: Sequence[np.ndarray], num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """The same for MULTILABEL_METRICS: labels (N, C), probabilities (S, N, C) of each model. As `multilabel_metrics` has them:
    averages are over samples and classes for which the score is defined."""

    def scorer(proba: np.ndarray) -> _Scorer:
        parts = [(Outcome.of(labels, predicted(p, "multilabel"), labels.shape[1]), p) for p in proba]

        def scores(counts: np.ndarray) -> np.ndarray:
            by_seed = [(*_pooled_f1(outcome, counts), _average_precision(labels, p, counts)) for outcome, p in parts]
            return np.array(by_seed).swapaxes(0, 1)

        return scores

    drawn = _resample([scorer(proba) for proba in probabilities], len(labels), num_resamples, seed)
    return dict(zip(MULTILABEL_METRICS, drawn.swapaxes(0, 1), strict=True))


def metric_seed_scores(
    metric: str, kind: str, labels: np.ndarray, probabilities: Sequence[np.ndarray], num_resamples: int, seed: int
) -> np.ndarray:
    """The same for any metric of the task's kind, see `metric_scores`: (P, 1 + R). probabilities: (S, N, C) of each model."""

    def scorer(proba: np.ndarray) -> _Scorer:
        return lambda counts: np.stack([metric_scores(metric, kind, labels, p, counts) for p in proba])[None]

    return _resample([scorer(proba) for proba in probabilities], len(labels), num_resamples, seed)[:, 0]


def _pooled_f1(outcome: Outcome, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 over all decisions, and the mean of the samples' F1; each (r,) for counts (r, N)."""
    right, involved = (
        np.asarray(part.sum(axis=1), float).ravel() for part in (outcome.right, outcome.support + outcome.predicted)
    )
    by_row = np.divide(2 * right, involved, out=np.zeros(len(right)), where=involved > 0)
    with np.errstate(invalid="ignore"):  # no class anywhere: undefined
        return 2 * (counts @ right) / (counts @ involved), counts @ by_row / (counts @ (involved > 0))


def _average_precision(labels: np.ndarray, proba: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over classes of the average precision, (r,): the sum over thresholds of precision times the gain in recall."""
    found = np.full((labels.shape[1], len(counts)), np.nan)
    for c, (label, score) in enumerate(zip(labels.T, proba.T, strict=True)):
        order = np.argsort(-score, kind="stable")
        thresholds = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
        drawn = counts[:, order]
        hits, tried = ((drawn * part).cumsum(axis=1)[:, thresholds] for part in (label[order] == 1, 1))
        gained = np.diff(hits, axis=1, prepend=0)
        total = hits[:, -1]
        precision = (gained * hits / np.maximum(tried, 1)).sum(axis=1)
        found[c] = np.divide(precision, total, out=found[c], where=total > 0)
    defined = ~np.isnan(found)
    return np.divide(
        np.nansum(found, axis=0), defined.sum(axis=0), where=defined.any(axis=0), out=np.full(len(counts), np.nan)
    )


def mean_interval(scores: np.ndarray, num_resamples: int, confidence: float, seed: int) -> Interval:
    """Mean of scores (S, N), or of differences of scores seed by seed, between percentiles; all lie in -1..1, N > 0."""
    num_rows = scores.shape[1]
    drawn = _resample([lambda counts: scores[None] @ counts.T / num_rows], num_rows, num_resamples, seed)
    found = percentiles(drawn[0, 0], confidence, num_rows, least=-1.0)
    assert found is not None
    return found


_Scorer = Callable[[np.ndarray], np.ndarray]  # how often each row is drawn (r, N) -> scores (metrics, S, r)


def _resample(scorers: Sequence[_Scorer], num_rows: int, num_resamples: int, seed: int) -> np.ndarray:
    """(P, metrics, 1 + R) means over seeds: on the rows as they are, then in resamples of rows and seeds."""
    rng = np.random.default_rng(seed)
    every = np.ones(num_rows, int)
    means = [np.stack([scores(every[None]).mean(axis=1) for scores in scorers])]
    for counts in draw_counts(every, num_resamples, rng):
        drawn = []
        for scores in scorers:
            by_seed = scores(counts)
            choice = rng.integers(by_seed.shape[1], size=by_seed.shape[1:])
            drawn.append(np.take_along_axis(by_seed, choice[None], axis=1).mean(axis=1))
        means.append(np.stack(drawn))
    return np.concatenate(means, axis=2)
