"""Scores of class predictions. The definitions are scikit-learn's, those of its defaults with `zero_division=0`.

Axes: N samples, C classes known to the model, R resamples.

Averages: macro is over the classes that occur among labels or predictions, balanced accuracy over those among labels.
A label of a class that the train split does not have (UNSEEN) can't be predicted: all such labels count as one more
class that is always wrong. A score that is undefined is None: the recall of a class without a row, the area under a
curve without a positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support

from mmkt_ray.evaluation.calibration import probability_scores, usable
from mmkt_ray.evaluation.multilabel import multilabel_metrics
from mmkt_ray.evaluation.ranking import auroc, mean_defined, none_if_nan
from mmkt_ray.features.store import MISSING, UNSEEN, labelled

MAX_CONFUSION_CLASSES = 200  # above, only the most confused pairs are kept: a 1000 x 1000 matrix is 1e6 lines of JSON
NUM_CONFUSED_PAIRS = 20


def predicted(proba: np.ndarray, kind: str) -> np.ndarray:
    """(N,) the most probable class, the first one of a tie; of a multilabel task (N, C) int8, 1 from one half on."""
    return (proba >= 0.5).astype(np.int8) if kind == "multilabel" else proba.argmax(axis=1)


def is_right(labels: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """(N,) bool: the prediction is the label; of a multilabel task, every class of the row is right."""
    same = labels == pred
    return same if same.ndim == 1 else same.all(axis=1)


def row_scores(labels: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """(N,) score in [0, 1] of each row: right or wrong; of a multilabel task the F1 of its classes, 1 where there are none."""
    if labels.ndim == 1:
        return is_right(labels, pred).astype(float)
    real, found = labels == 1, pred == 1
    total = real.sum(axis=1) + found.sum(axis=1)
    return np.where(total > 0, 2 * (real & found).sum(axis=1) / np.maximum(total, 1), 1.0)


def task_metrics(kind: str, labels: np.ndarray, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All scores of one task of any kind, with its `kind`; see `classification_metrics` and `multilabel_metrics`.

    A binary task has the scores of two classes, and of the positive one (the later name) by itself: `positive`,
    `precision`, `recall`, `f1`, `average_precision`, and `auroc`. Raises: ValueError as `classification_metrics`.
    """
    _check(labels, proba, class_names)
    if kind == "multilabel":
        return {"kind": kind, **multilabel_metrics(labels, proba, class_names)}
    scores = classification_metrics(labels, proba, class_names)
    if kind == "binary" and scores["num_rows"] and len(class_names) == 2:
        scores |= _positive_scores(scores["per_class"], labels, proba, class_names[1])
    return {"kind": kind, **scores}


def _positive_scores(per_class: dict[str, Any], labels: np.ndarray, proba: np.ndarray, positive: str) -> dict[str, Any]:
    rows = usable(labels)
    has, score = labels[rows] == 1, proba[rows, 1]
    return {
        "positive": positive,
        **{name: per_class[positive][name] for name in ("precision", "recall", "f1")},
        "average_precision": float(average_precision_score(has, score)) if has.any() else None,
        "auroc": auroc(has, score),
    }


def _check(labels: np.ndarray, proba: np.ndarray, class_names: Sequence[str]) -> None:
    if proba.shape != (len(labels), len(class_names)):
        raise ValueError(f"proba has shape {proba.shape}, expected {(len(labels), len(class_names))}")
    if not np.isfinite(proba[labelled(labels)]).all():
        raise ValueError("some probabilities are no numbers (NaN or infinite)")


def classification_metrics(labels: np.ndarray, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All scores of one task with one class per row, ready for JSON.

    Args:
        labels: (N,) int, index into `class_names`, MISSING (row left out) or UNSEEN (row counts as wrong).
        proba: (N, C) probabilities; the prediction is the most probable class, the first one of a tie.
        class_names: C names.

    Returns:
        `num_rows`, `num_unseen`, `accuracy`, `balanced_accuracy`, `{macro,micro,weighted}_{precision,recall,f1}`,
        `auroc` (one class against the rest, averaged), `log_loss` (nats), `calibration_error` (0..1) and `reliability`,
        `per_class` {name: {precision, recall, f1, support}}, `confusion` C x C counts [label][prediction] or None,
        `most_confused` [[label, prediction, count], ..]. Only the first two if no row is labelled.

    Raises:
        ValueError: shapes disagree, or a probability is no number.
    """
    _check(labels, proba, class_names)
    labels, proba = labels[labels != MISSING], proba[labels != MISSING]
    num_unseen = int((labels == UNSEEN).sum())
    if len(labels) == 0:
        return {"num_rows": 0, "num_unseen": 0}
    pred = proba.argmax(axis=1)
    return {
        "num_rows": len(labels),
        "num_unseen": num_unseen,
        **_averages(labels, pred),
        "auroc": _macro_auroc(labels, proba),
        **probability_scores(labels, proba),
        **_by_class(labels, pred, class_names),
    }


def as_codes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels (N,) with UNSEEN replaced by one more class, `num_classes`; labels (N, C) as they are."""
    return labels if labels.ndim == 2 else np.where(labels == UNSEEN, num_classes, labels)


def macro_f1_from_counts(right: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Macro-F1 (R,) of many resamples at once, what scikit-learn gives for each; NaN where no class occurs.

    right, support, predicted: (R, C) true positives, labels and predictions of each class in each resample.
    """
    involved = support + predicted
    f1 = np.divide(2.0 * right, involved, out=np.zeros(involved.shape), where=involved > 0)
    num = (involved > 0).sum(axis=1)
    return np.divide(f1.sum(axis=1), num, out=np.full(len(num), np.nan), where=num > 0)


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
    columns = precision_recall_fscore_support(labels, pred, labels=codes, zero_division=np.nan)
    seen = labels != UNSEEN
    matrix = (
        confusion_matrix(labels[seen], pred[seen], labels=codes) if seen.any() else np.zeros((len(codes),) * 2, int)
    )
    return {
        "per_class": {
            name: {"precision": none_if_nan(p), "recall": none_if_nan(r), "f1": none_if_nan(f), "support": int(s)}
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


def _macro_auroc(labels: np.ndarray, proba: np.ndarray) -> float | None:
    """Mean over classes of the area under the ROC curve, one class against the rest, over rows of known class."""
    rows = usable(labels)
    return mean_defined([auroc(labels[rows] == c, proba[rows, c]) for c in range(proba.shape[1])])
