"""One metric of predicted classes in many resamples at once:
a number for each, computed from how often each row is drawn.

So one definition serves val, where every row counts once, and the bootstrap of the test rows. The definitions are
scikit-learn's, those of `TaskKind.scores`; a log loss is negated, so that higher is better. The precision of a class
that is never predicted is 0. NaN stands for what is undefined.

Axes: N rows, all labelled, C classes known to the model, R resamples.
"""

from __future__ import annotations

import numpy as np

from mmkt_ray.kinds.divide import divide_where
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.outcomes import ClassOutcome, macro_f1_from_counts
from mmkt_ray.kinds.probabilities import SMALLEST

OF_THE_POSITIVE = ("precision", "recall", "f1", "average_precision")  # of a binary task: the later class name
RANKING = ("auroc", "average_precision", "macro_average_precision", "micro_average_precision")
MAX_DRAWN = 2_000_000  # counts of a block of resamples: 16 MB


def class_metric_scores(
    metric: str, labels: Labels, proba: np.ndarray, outcome: ClassOutcome, drawn: np.ndarray
) -> np.ndarray:
    """A metric (R,) of classes. proba: (N, C); outcome: of each row; drawn: (R, N) how often each row is drawn."""
    if metric in OF_THE_POSITIVE and proba.shape[1] != 2:  # train has one class
        return np.full(len(drawn), np.nan)
    if metric == "log_loss":
        return -_log_loss(labels, proba, drawn)
    if metric in RANKING:
        return _ranking(metric, labels, proba, drawn)
    if metric == "accuracy":
        return np.asarray(outcome.scores(drawn)["accuracy"])
    average, _, name = metric.rpartition("_")
    if average == "samples":
        return _by_sample(name, outcome, drawn)
    totals = [np.asarray(drawn @ part) for part in (outcome.right, outcome.support, outcome.predicted)]
    if metric == "balanced_accuracy":
        return _mean_where(_ratio("recall", *totals), totals[1] > 0)
    if metric in OF_THE_POSITIVE:
        values = _ratio(name, *(total[:, 1] for total in totals))
        return np.where(totals[1][:, 1] + (totals[2][:, 1] if name != "recall" else 0) > 0, values, np.nan)
    return _averaged(average, name, totals)


def _averaged(average: str, name: str, totals: list[np.ndarray]) -> np.ndarray:
    """Over classes: totals (R, W) of true positives, labels and predictions."""
    if (average, name) == ("macro", "f1"):
        return macro_f1_from_counts(*totals)
    _, support, given = totals
    involved = support + given > 0
    if average == "macro":
        return _mean_where(_ratio(name, *totals), involved)
    if average == "micro":
        values = _ratio(name, *(total.sum(axis=1) for total in totals))
        return np.where(involved.any(axis=1), values, np.nan)
    weights = support.sum(axis=1)
    weighted = divide_where(weights > 0, (_ratio(name, *totals) * support).sum(axis=1), weights, 0.0)
    return np.where(involved.any(axis=1), weighted, np.nan)


def _ratio(name: str, right: np.ndarray, support: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Precision, recall or F1, 0 where nothing is to divide by."""
    below = {"precision": given, "recall": support, "f1": (support + given) / 2}[name]
    return divide_where(below > 0, right, below, 0.0)


def _mean_where(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is kept; NaN where nothing is."""
    num = kept.sum(axis=-1)
    return divide_where(num > 0, (values * kept).sum(axis=-1), num)


def _by_sample(name: str, outcome: ClassOutcome, counts: np.ndarray) -> np.ndarray:
    """Mean over the samples for which the score is defined."""
    sums = [np.asarray(p.sum(axis=1), float).ravel() for p in (outcome.right, outcome.support, outcome.predicted)]
    below = {"precision": sums[2], "recall": sums[1], "f1": sums[1] + sums[2]}[name]
    num = counts @ (below > 0)
    return divide_where(num > 0, counts @ _ratio(name, *sums), num)


def _log_loss(labels: Labels, proba: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the rows whose class is known, in nats; where a row has several forecasts, over these."""
    known, counts = labels[labels.known], counts[:, labels.known]
    of_label = labels.kind.label_probability(known, proba[labels.known]).reshape(len(known), -1 if len(known) else 1)
    losses, num = -np.log(of_label.clip(SMALLEST, 1)).mean(axis=1), counts.sum(axis=1)
    return divide_where(num > 0, counts @ losses, num)


def _ranking(metric: str, labels: Labels, proba: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve or average precision: the mean over classes where it is defined; `average_precision`
    is that of the positive class, `micro_average_precision` that of all forecasts together."""
    rows = labels.known
    proba, counts = proba[rows], counts[:, rows]
    truth = labels.kind.indicators(labels[rows], proba.shape[1]) == 1
    if metric == "micro_average_precision":
        size = max(1, MAX_DRAWN // max(1, proba.size))
        blocks = (np.repeat(counts[i : i + size], proba.shape[1], axis=1) for i in range(0, len(counts), size))
        return np.concatenate([_average_precision(truth.ravel(), proba.ravel(), block) for block in blocks])
    if metric == "average_precision":
        return _average_precision(truth[:, 1], proba[:, 1], counts)
    score = _auroc if metric == "auroc" else _average_precision
    by_class = np.stack([score(truth[:, c], proba[:, c], counts) for c in range(proba.shape[1])], axis=1)
    return _mean_where(np.nan_to_num(by_class), ~np.isnan(by_class))


def _thresholds(positive: np.ndarray, score: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many positive and negative rows there are at each distinct score, the highest first; (R, scores)."""
    order = np.argsort(-score, kind="stable")
    if not len(order):
        return np.zeros((len(counts), 1)), np.zeros((len(counts), 1))
    starts = np.append(0, np.flatnonzero(np.diff(score[order])) + 1)
    drawn = counts[:, order]
    hits, tried = (np.add.reduceat(part, starts, axis=1) for part in (drawn * positive[order], drawn))
    return hits, tried - hits


def _auroc(positive: np.ndarray, score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    hits, misses = _thresholds(positive, score, counts)
    below = misses.sum(axis=1, keepdims=True) - misses.cumsum(axis=1)
    pairs = hits.sum(axis=1) * misses.sum(axis=1)
    won = (hits * (below + misses / 2)).sum(axis=1)
    return divide_where(pairs > 0, won, pairs)


def _average_precision(positive: np.ndarray, score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    hits, misses = _thresholds(positive, score, counts)
    found, total = hits.cumsum(axis=1), hits.sum(axis=1)
    precision = found / np.maximum(found + misses.cumsum(axis=1), 1)
    return divide_where(total > 0, (hits * precision).sum(axis=1), total)
