"""Scores of class predictions. The definitions are scikit-learn's, those of its defaults with `zero_division=0`.

Axes: N samples, C classes known to the model.

Averages: macro is over the classes that occur among labels or predictions, balanced accuracy over those among labels.
A label of a class that the train split does not have can't be predicted: all such labels count as one more class that
is always wrong. A score that is undefined is None: the recall of a class without a row, the area under a curve
without a positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support

from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.probabilities import probability_scores
from mmkt_ray.kinds.ranking import auroc, mean_defined, none_if_nan

MAX_CONFUSION_CLASSES = 200  # above, only the most confused pairs are kept: a 1000 x 1000 matrix is 1e6 lines of JSON
NUM_CONFUSED_PAIRS = 20
_UNSEEN = -2  # stands for all classes that train lacks, within this file


def positive_scores(per_class: dict[str, Any], labels: Labels, proba: np.ndarray, positive: str) -> dict[str, Any]:
    """Scores of the positive class, the second one, by itself: `positive`, `precision`, `recall`, `f1`,
    `average_precision` and `auroc`. per_class: see `classification_metrics`."""
    has, score = labels.values[labels.known] == 1, proba[labels.known, 1]
    return {
        "positive": positive,
        **{name: per_class[positive][name] for name in ("precision", "recall", "f1")},
        "average_precision": float(average_precision_score(has, score)) if has.any() else None,
        "auroc": auroc(has, score),
    }


def check_outputs(labels: Labels, proba: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises: ValueError if shapes disagree, or a probability is no number."""
    if proba.shape != (len(labels), len(class_names)):
        raise ValueError(f"proba has shape {proba.shape}, expected {(len(labels), len(class_names))}")
    if not np.isfinite(proba[labels.labelled]).all():
        raise ValueError("some probabilities are no numbers (NaN or infinite)")


def classification_metrics(given: Labels, proba: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All scores of one task with one class per row, ready for JSON.

    Args:
        given: N labels; one of a class that train lacks counts as wrong.
        proba: (N, C) probabilities; the prediction is the most probable class, the first one of a tie.
        class_names: C names.

    Returns:
        `num_rows`, `num_unseen`, `accuracy`, `balanced_accuracy`, `{macro,micro,weighted}_{precision,recall,f1}`,
        `auroc` (one class against the rest, averaged), `log_loss` (nats), `calibration_error` (0..1) and
        `reliability`, `per_class` {name: {precision, recall, f1, support}}, `confusion` C x C counts
        [label][prediction] or None, `most_confused` [[label, prediction, count], ..].
        Only the first two if no row is labelled.

    Raises:
        ValueError: shapes disagree, or a probability is no number.
    """
    check_outputs(given, proba, class_names)
    given, proba = given[given.labelled], proba[given.labelled]
    labels = np.where(given.known, given.values, _UNSEEN)
    num_unseen = int((~given.known).sum())
    if len(labels) == 0:
        return {"num_rows": 0, "num_unseen": 0}
    pred = proba.argmax(axis=1)
    return {
        "num_rows": len(labels),
        "num_unseen": num_unseen,
        **_averages(labels, pred),
        "auroc": _macro_auroc(given, proba),
        **probability_scores(given, proba),
        **_by_class(labels, pred, class_names),
    }


def _averages(labels: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """Averages over classes; _UNSEEN, a code that nothing predicts, takes part as a class of its own."""
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
    seen = labels != _UNSEEN
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


def _macro_auroc(labels: Labels, proba: np.ndarray) -> float | None:
    """Mean over classes of the area under the ROC curve, one class against the rest, over rows of known class."""
    codes, proba = labels.values[labels.known], proba[labels.known]
    return mean_defined([auroc(codes == c, proba[:, c]) for c in range(proba.shape[1])])
