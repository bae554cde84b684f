"""Scores of models of several seeds on the same rows, with intervals over rows and seeds.

A resample draws the rows anew, jointly for all models, and for each model its seeds: what makes a row hard for all of
them cancels out of a difference, and how much a score hangs on the seed is part of its interval.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 16.
Axes: S seeds, N rows, K outputs, P models, R resamples. Predictions have S in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmkt_ray.kinds.labels import Labels
from mmkt_ray.scoring.intervals import ANY, DIFFERENCE, Interval, draw_counts, percentiles


def seed_scores(
    labels: Labels, predictions: Sequence[np.ndarray], width: int, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metric that the kind reports -> (P, 1 + R): the mean over seeds on the rows as they are, then in the resamples.
    All rows are labelled."""
    metrics = labels.kind.reported

    def scorer(pred: np.ndarray) -> _Scorer:
        outcomes, _ = labels.kind.outcomes(labels, list(pred), width, by_row=True)

        def scores(counts: np.ndarray) -> np.ndarray:
            by_seed = [outcome.scores(counts) for outcome in outcomes]
            return np.array([[s[m] for s in by_seed] for m in metrics])

        return scores

    drawn = _resample([scorer(pred) for pred in predictions], len(labels), num_resamples, seed)
    return dict(zip(metrics, drawn.swapaxes(0, 1), strict=True))


def further_seed_scores(
    labels: Labels, outputs: Sequence[np.ndarray], num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """The same for the kind's `seed_metrics`, of which there are some. outputs: (S, N, K) of each model."""

    def scorer(own: np.ndarray) -> _Scorer:
        return lambda counts: labels.kind.seed_scores(labels, own, counts)

    drawn = _resample([scorer(own) for own in outputs], len(labels), num_resamples, seed)
    return dict(zip(labels.kind.seed_metrics, drawn.swapaxes(0, 1), strict=True))


def metric_seed_scores(
    metric: str, labels: Labels, outputs: Sequence[np.ndarray], num_resamples: int, seed: int
) -> np.ndarray:
    """The same for any metric of the task's kind: (P, 1 + R). outputs: (S, N, K) of each model."""

    def scorer(own: np.ndarray) -> _Scorer:
        return lambda counts: np.stack([labels.kind.metric_scores(metric, labels, o, counts) for o in own])[None]

    return _resample([scorer(own) for own in outputs], len(labels), num_resamples, seed)[:, 0]


def mean_interval(scores: np.ndarray, num_resamples: int, confidence: float, seed: int) -> Interval:
    """Mean of scores (S, N), or of differences of scores seed by seed, between percentiles; N > 0."""
    num_rows = scores.shape[1]
    drawn = _resample([lambda counts: scores[None] @ counts.T / num_rows], num_rows, num_resamples, seed)
    found = percentiles(drawn[0, 0], confidence, num_rows, DIFFERENCE if np.abs(scores).max() <= 1 else ANY)
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
