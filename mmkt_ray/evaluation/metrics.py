"""Scores of class predictions. The definitions are scikit-learn's, those of its defaults with `zero_division=0`.

Axes: N samples, C classes known to the model, R resamples.

Averages: macro is over the classes that occur among labels or predictions, balanced accuracy over those among labels.
A label of a class that the train split does not have (UNSEEN) can't be predicted: all such labels count as one more
class that is always wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from mmkt_ray.features.store import MISSING, UNSEEN

MAX_CONFUSION_CLASSES = 200  # above, only the most confused pairs are kept: a 1000 x 1000 matrix is 1e6 lines of JSON
NUM_CONFUSED_PAIRS = 20
NUM_CALIBRATION_BINS = 15
_SMALLEST = 1e-7  # probabilities are float32: smaller ones are noise to the logarithm


def classification_metrics(labels: np.ndarray, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All scores of one task, ready for JSON.

    Args:
        labels: (N,) int, index into `class_names`, MISSING (row left out) or UNSEEN (row counts as wrong).
        proba: (N, C) probabilities; the prediction is the most probable class, the first one of a tie.
        class_names: C names.

    Returns:
        `num_rows`, `num_unseen`, `accuracy`, `balanced_accuracy`, `{macro,micro,weighted}_{precision,recall,f1}`,
        `log_loss` (nats), `auroc` (one class against the rest, averaged) and `calibration_error` (0..1),
        `per_class` {name: {precision, recall, f1, support}}, `confusion` C x C counts [label][prediction] or None,
        `most_confused` [[label, prediction, count], ..]. Only the first two if no row is labelled.

    Raises:
        ValueError: shapes disagree, or a probability is no number.
    """
    if proba.shape != (len(labels), len(class_names)):
        raise ValueError(f"proba has shape {proba.shape}, expected {(len(labels), len(class_names))}")
    labels, proba = labels[labels != MISSING], proba[labels != MISSING]
    if not np.isfinite(proba).all():
        raise ValueError("some probabilities are no numbers (NaN or infinite)")
    num_unseen = int((labels == UNSEEN).sum())
    if len(labels) == 0:
        return {"num_rows": 0, "num_unseen": 0}
    pred = proba.argmax(axis=1)
    return {
        "num_rows": len(labels),
        "num_unseen": num_unseen,
        **_averages(labels, pred),
        **_probability_scores(labels, proba),
        **_by_class(labels, pred, class_names),
    }


def as_codes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels (N,) with UNSEEN replaced by one more class, `num_classes`."""
    return np.where(labels == UNSEEN, num_classes, labels)


def scores_from_counts(right: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy and macro-F1 of many resamples at once: what `_averages` gives for each, without scikit-learn.

    Args:
        right, support, predicted: (R, C) true positives, labels and predictions of each class in each resample.

    Returns:
        `accuracy` and `macro_f1`, each (R,).
    """
    involved = support + predicted
    f1 = np.divide(2.0 * right, involved, out=np.zeros(involved.shape), where=involved > 0)
    return {
        "accuracy": right.sum(axis=1) / support.sum(axis=1),
        "macro_f1": f1.sum(axis=1) / (involved > 0).sum(axis=1),
    }


def _averages(labels: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """Averages over classes; UNSEEN (a code that nothing predicts) takes part as a class of its own."""
    scores: dict[str, float] = {"accuracy": float((labels == pred).mean())}
    recall = precision_recall_fscore_support(labels, pred, labels=np.unique(labels), zero_division=0)[1]
    scores["balanced_accuracy"] = float(recall.mean())
    for average in ("macro", "micro", "weighted"):
        values = precision_recall_fscore_support(labels, pred, average=average, zero_division=0)
        scores |= {f"{average}_{n}": float(v) for n, v in zip(("precision", "recall", "f1"), values, strict=False)}
    return scores


def _by_class(labels: np.ndarray, pred: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    codes = np.arange(len(class_names))
    columns = precision_recall_fscore_support(labels, pred, labels=codes, zero_division=0)
    seen = labels != UNSEEN
    matrix = (
        confusion_matrix(labels[seen], pred[seen], labels=codes) if seen.any() else np.zeros((len(codes),) * 2, int)
    )
    return {
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(class_names, *columns, strict=True)
        },
        "confusion": matrix.tolist() if len(class_names) <= MAX_CONFUSION_CLASSES else None,
        "most_confused": _most_confused(matrix, class_names),
    }


def _most_confused(matrix: np.ndarray, class_names: Sequence[str]) -> list[list[Any]]:
    """The largest cells off the diagonal, as [label, prediction, count], largest first."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:NUM_CONFUSED_PAIRS]
    cells = [np.unravel_index(i, wrong.shape) for i in order]
    return [[class_names[t], class_names[p], int(wrong[t, p])] for t, p in cells if wrong[t, p] > 0]


def _probability_scores(labels: np.ndarray, proba: np.ndarray) -> dict[str, float | None]:
    """Scores of the probabilities themselves, over rows of known class; None where there is no such row."""
    seen = labels != UNSEEN
    labels, proba = labels[seen], proba[seen].astype(np.float64)
    if len(labels) == 0:
        return {"log_loss": None, "auroc": None, "calibration_error": None}
    of_label = proba[np.arange(len(labels)), labels]
    return {
        "log_loss": float(-np.log(of_label.clip(_SMALLEST, 1)).mean()),
        "auroc": _auroc(labels, proba),
        "calibration_error": _calibration_error(proba.max(axis=1), proba.argmax(axis=1) == labels),
    }


def _auroc(labels: np.ndarray, proba: np.ndarray) -> float | None:
    """Mean over classes of the area under the ROC curve, one class against the rest (the Mann-Whitney statistic).

    Classes without a positive or without a negative row have no such area and are left out; None if all are.
    """
    areas = []
    for code, column in enumerate(proba.T):  # one class at a time: N x C ranks of many classes would not fit in memory
        positive = labels == code
        num_positive = int(positive.sum())
        if num_pairs := num_positive * (len(labels) - num_positive):
            areas.append((rankdata(column)[positive].sum() - num_positive * (num_positive + 1) / 2) / num_pairs)
    return float(np.mean(areas)) if areas else None


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over equal-width bins, weighted by rows.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
    """
    bins = np.minimum((confidence * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=right - confidence, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(right))
