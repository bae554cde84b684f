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

from mmkt_ray.evaluation.calibration import probability_scores, usable
from mmkt_ray.evaluation.ranking import auroc, mean_defined, none_if_nan

NAMES = ("precision", "recall", "f1")


def multilabel_metrics(labels: np.ndarray, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All scores of one multilabel task over its labelled rows, ready for JSON; only `num_rows` where there is none.

    Args:
        labels: (N, C) of 0 and 1; a row of MISSING is left out.
        proba: (N, C), each class by itself.

    Returns:
        `num_rows`, `accuracy` (subset accuracy: the share of rows with every class right), `hamming_loss` (the share of
        wrong decisions), `{macro,micro,weighted,samples}_{precision,recall,f1}`, `macro_` and `micro_average_precision`,
        `auroc` (mean over classes), `log_loss`, `calibration_error`, `reliability`, and `per_class` {name: {precision,
        recall, f1, average_precision, auroc, support}}. What is undefined is None, e.g. the recall of a class that no row
        has. `balanced_accuracy` and `confusion` are None, `most_confused` is empty: they have no meaning here.
    """
    rows = usable(labels)
    labels, proba = labels[rows], proba[rows]
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
        **probability_scores(labels, proba),
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
