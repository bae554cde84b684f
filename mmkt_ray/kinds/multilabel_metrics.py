"""Scores of a task where a sample has any number of classes. The definitions are scikit-learn's.

Axes: N samples, C classes known to the model.

A class is predicted where its probability is at least one half. Averages over classes are over those that occur among
labels or predictions, as for the other kinds of task; averages over samples leave out samples for which the score is
undefined (nothing to find and nothing found).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from mmkt_ray.kinds.divide import divide_where
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.outcomes import ClassOutcome
from mmkt_ray.kinds.probabilities import probability_scores
from mmkt_ray.kinds.ranking import auroc, mean_defined, none_if_nan

NAMES = ("precision", "recall", "f1")


def multilabel_metrics(given: Labels, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All scores of one multilabel task over its labelled rows, ready for JSON; only `num_rows` where there is none.

    Args:
        given: N labels.
        proba: (N, C), each class by itself.

    Returns:
        `num_rows`, `accuracy` (subset accuracy: the share of rows with every class right), `hamming_loss` (the share
        of wrong decisions), `{macro,micro,weighted,samples}_{precision,recall,f1}`, `macro_` and
        `micro_average_precision`, `auroc` (mean over classes), `log_loss`, `calibration_error`, `reliability`, and
        `per_class` {name: {precision, recall, f1, average_precision, auroc, support}}. What is undefined is None,
        e.g. the recall of a class that no row has. `balanced_accuracy` and `confusion` are None, `most_confused` is
        empty: they have no meaning here.
    """
    given, proba = given[given.known], proba[given.known]
    labels = given.values
    if len(labels) == 0:
        return {"num_rows": 0}
    pred = (proba >= 0.5).astype(np.int8)
    per_class = _per_class(labels, pred, proba, class_names)
    defined = labels.any()
    return {
        "num_rows": len(labels),
        "accuracy": float((labels == pred).all(axis=1).mean()),
        "balanced_accuracy": None,
        "hamming_loss": float((labels != pred).mean()),
        **_averages(labels, pred),
        "macro_average_precision": mean_defined([c["average_precision"] for c in per_class.values()]),
        "micro_average_precision": float(average_precision_score(labels.ravel(), proba.ravel())) if defined else None,
        "auroc": mean_defined([c["auroc"] for c in per_class.values()]),
        **probability_scores(given, proba),
        "per_class": per_class,
        "confusion": None,
        "most_confused": [],
    }


def _averages(labels: np.ndarray, pred: np.ndarray) -> dict[str, float | None]:
    occurring = np.flatnonzero(labels.any(axis=0) | pred.any(axis=0))
    scores: dict[str, float | None] = {}
    for average in ("macro", "micro", "weighted", "samples"):
        values = [np.nan] * 3
        if len(occurring):
            empty = np.nan if average == "samples" else 0
            options = {"labels": occurring, "average": average, "zero_division": empty}
            values = precision_recall_fscore_support(_wide(labels), _wide(pred), **options)[:3]
        scores |= {f"{average}_{n}": none_if_nan(v) for n, v in zip(NAMES, values, strict=True)}
    return scores


def _per_class(
    labels: np.ndarray, pred: np.ndarray, proba: np.ndarray, class_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    codes = range(len(class_names))
    columns = precision_recall_fscore_support(_wide(labels), _wide(pred), labels=codes, zero_division=np.nan)
    found = {}
    for code, (name, *values, support) in enumerate(zip(class_names, *columns, strict=True)):
        has = labels[:, code] == 1
        found[name] = {
            **{n: none_if_nan(v) for n, v in zip(NAMES, values, strict=True)},
            "average_precision": float(average_precision_score(has, proba[:, code])) if has.any() else None,
            "auroc": auroc(has, proba[:, code]),
            "support": int(support),
        }
    return found


def _wide(indicators: np.ndarray) -> np.ndarray:
    """(N, C) with one more, empty class: scikit-learn takes a single column for a binary task."""
    return np.pad(indicators, ((0, 0), (0, 1)))


# --- of many resamples at once --------------------------------------------------------------------------------------


def pooled_f1(outcome: ClassOutcome, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 over all decisions, and the mean of the samples' F1; each (r,) for counts (r, N)."""
    right, involved = (
        np.asarray(part.sum(axis=1), float).ravel() for part in (outcome.right, outcome.support + outcome.predicted)
    )
    by_row = divide_where(involved > 0, 2 * right, involved, 0.0)
    with np.errstate(invalid="ignore"):  # no class anywhere: undefined
        return 2 * (counts @ right) / (counts @ involved), counts @ by_row / (counts @ (involved > 0))


def resampled_average_precision(labels: np.ndarray, proba: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over classes of the average precision, (r,): the sum over thresholds of precision times the gain in
    recall."""
    found = np.full((labels.shape[1], len(counts)), np.nan)
    for c, (label, score) in enumerate(zip(labels.T, proba.T, strict=True)):
        order = np.argsort(-score, kind="stable")
        thresholds = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
        drawn = counts[:, order]
        hits, tried = ((drawn * part).cumsum(axis=1)[:, thresholds] for part in (label[order] == 1, 1))
        gained = np.diff(hits, axis=1, prepend=0)
        total = hits[:, -1]
        precision = (gained * hits / np.maximum(tried, 1)).sum(axis=1)
        found[c] = divide_where(total > 0, precision, total)
    defined = ~np.isnan(found)
    return divide_where(defined.any(axis=0), np.nansum(found, axis=0), defined.sum(axis=0))
