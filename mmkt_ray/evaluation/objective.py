"""The number by which epochs, candidates and finalists are compared: a metric of one task or of several, higher is better.

A metric is computed from labels, probabilities, and how often each row is drawn. So one definition serves val, where every
row counts once, and the bootstrap of the test rows. The definitions are scikit-learn's, those of `task_metrics`; a log loss
is negated. The precision of a class that is never predicted is 0. NaN stands for what is undefined.

Axes: N rows, C classes known to the model, R resamples. Labels are (N,) codes, MISSING in no row, or (N, C) of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmkt_ray.config import ObjectiveConfig
from mmkt_ray.evaluation.calibration import usable
from mmkt_ray.evaluation.intervals import Outcome
from mmkt_ray.evaluation.metrics import as_codes, macro_f1_from_counts, predicted

COUNTED = ("accuracy", "macro_f1")  # what validation always counts; all else takes the probabilities of every row
OF_THE_POSITIVE = ("precision", "recall", "f1", "average_precision")  # of a binary task: the later class name
RANKING = ("auroc", "average_precision", "macro_average_precision", "micro_average_precision")
MAX_DRAWN = 2_000_000  # counts of a block of resamples: 16 MB
_SMALLEST = 1e-7  # as the log loss of `calibration`


@dataclass(frozen=True)
class Score:
    """One number from validation scores (see training.validation): higher is better, NaN where it is undefined.

    Over several tasks it is their mean, or the worst of them. A task of `floors` that a model does not have counts as what
    the constant prediction gets there: so no candidate gains by leaving out a hard task.
    """

    metric: str = "macro_f1"
    task: str | None = None  # None: all tasks
    over: str = "mean"  # mean | worst
    floors: Mapping[str, float] = field(default_factory=dict)  # task -> score of the constant prediction

    @classmethod
    def of(cls, objective: ObjectiveConfig, tasks: Collection[str], floors: Mapping[str, float] | None = None) -> Score:
        """What a config asks for, of a model with these tasks; the default of one that lacks the objective's task."""
        if objective.task is not None and objective.task not in tasks:
            return cls()
        return cls(objective.metric, objective.task, objective.over, floors or {})

    @property
    def worst(self) -> float:
        """Stands for no score at all where a number is needed; as bad as scores get."""
        return -100.0 if self.metric == "log_loss" else 0.0

    @property
    def extra(self) -> str | None:
        """The metric that validation has to compute beside COUNTED."""
        return None if self.metric in COUNTED else self.metric

    def __call__(self, val: Mapping[str, Any]) -> float:
        """val: metric -> task -> value."""
        by_task = val[self.metric]
        if self.task is not None:
            return float(by_task.get(self.task, np.nan))
        values = list({**self.floors, **by_task}.values())
        if not values and self.metric == "macro_f1":
            values = list(val["accuracy"].values())
        if not values:
            return float("nan")
        return float(min(values) if self.over == "worst" else np.mean(values))


def constant_scores(
    metric: str, kinds: Mapping[str, str], train: Mapping[str, np.ndarray], val: Mapping[str, np.ndarray], num: Mapping
) -> dict[str, float]:
    """Task -> what the shares of the classes among the train labels, predicted for every row, get on the val labels.

    kinds, train, val, num: by task its kind, labels of labelled rows, and C. Tasks for which it is undefined are left out.
    """
    found = {}
    for task, kind in kinds.items():
        known = train[task][usable(train[task])]
        if not len(known) or not len(val[task]):
            continue
        counts = known.sum(axis=0) if known.ndim == 2 else np.bincount(known, minlength=num[task])
        proba = np.broadcast_to((counts / len(known)).astype(np.float32), (len(val[task]), num[task]))
        value = float(metric_scores(metric, kind, val[task], proba)[0])
        if not np.isnan(value):
            found[task] = value
    return found


def metric_scores(
    metric: str, kind: str, labels: np.ndarray, proba: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """A metric of METRICS_BY_KIND (R,). All rows are labelled; proba: (N, C); counts: (R, N) how often each row is drawn,
    None: each once."""
    drawn = np.ones((1, len(labels))) if counts is None else counts
    if metric in OF_THE_POSITIVE and proba.shape[1] != 2:  # train has one class
        return np.full(len(drawn), np.nan)
    if metric == "log_loss":
        return -_log_loss(labels, proba, drawn)
    if metric in RANKING:
        return _ranking(metric, labels, proba, drawn)
    codes, pred = as_codes(labels, proba.shape[1]), predicted(proba, kind)
    outcome = Outcome.of(codes, pred, proba.shape[1])
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
    weighted = np.divide((_ratio(name, *totals) * support).sum(axis=1), weights, where=weights > 0, out=0.0 * weights)
    return np.where(involved.any(axis=1), weighted, np.nan)


def _ratio(name: str, right: np.ndarray, support: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Precision, recall or F1, 0 where nothing is to divide by."""
    below = {"precision": given, "recall": support, "f1": (support + given) / 2}[name]
    return np.divide(right, below, out=np.zeros(np.shape(right)), where=below > 0)


def _mean_where(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is kept; NaN where nothing is."""
    num = kept.sum(axis=-1)
    return np.divide((values * kept).sum(axis=-1), num, out=np.full(num.shape, np.nan), where=num > 0)


def _by_sample(name: str, outcome: Outcome, counts: np.ndarray) -> np.ndarray:
    """Mean over the samples for which the score is defined."""
    sums = [np.asarray(p.sum(axis=1), float).ravel() for p in (outcome.right, outcome.support, outcome.predicted)]
    below = {"precision": sums[2], "recall": sums[1], "f1": sums[1] + sums[2]}[name]
    num = counts @ (below > 0)
    return np.divide(counts @ _ratio(name, *sums), num, out=np.full(len(num), np.nan), where=num > 0)


def _log_loss(labels: np.ndarray, proba: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the rows whose class is known, in nats; of a multilabel task over every class's own forecast."""
    rows = usable(labels)
    if labels.ndim == 2:
        of_label = np.where(labels[rows] == 1, proba[rows], 1.0 - proba[rows].astype(np.float64))
    else:
        of_label = proba[rows, labels[rows]].astype(np.float64)[:, None]
    losses, num = -np.log(of_label.clip(_SMALLEST, 1)).mean(axis=1), counts[:, rows].sum(axis=1)
    return np.divide(counts[:, rows] @ losses, num, out=np.full(len(num), np.nan), where=num > 0)


def _ranking(metric: str, labels: np.ndarray, proba: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve or average precision: the mean over classes where it is defined; `average_precision` is that
    of the positive class, `micro_average_precision` that of all forecasts together."""
    rows = usable(labels)
    labels, proba, counts = labels[rows], proba[rows], counts[:, rows]
    truth = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(proba.shape[1])
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
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _average_precision(positive: np.ndarray, score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    hits, misses = _thresholds(positive, score, counts)
    found, total = hits.cumsum(axis=1), hits.sum(axis=1)
    precision = found / np.maximum(found + misses.cumsum(axis=1), 1)
    return np.divide((hits * precision).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
