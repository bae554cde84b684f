"""Scores of multilabel tasks against scikit-learn, with ties, empty classes and rows without a class."""

import json

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    hamming_loss,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from mmkt_ray.kinds.multilabel import Multilabel
from tests.labels import MISSING, labels_of

NAMES = ["a", "b", "c", "d"]


def draw(seed: int, num_rows: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities, rounded so that there are ties; class d occurs nowhere and is never predicted."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_rows, 4)) < [0.5, 0.2, 0.05, 0]).astype(np.int8)
    labels[0] = [0, 0, 1, 0]
    proba = (0.6 * rng.random((num_rows, 4)) + 0.4 * labels).round(1) * [1, 1, 1, 0.4]
    return labels, proba.astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_scikit_learns(seed):
    """Catches another threshold, an average over rows told as one over classes, or a tie taken for the other side."""
    labels, proba = draw(seed)
    pred, occurring = (proba >= 0.5).astype(int), [0, 1, 2]
    found = Multilabel().scores(labels_of(labels), proba, NAMES)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, pred))
    assert found["hamming_loss"] == pytest.approx(hamming_loss(labels, pred))
    assert found["micro_f1"] == pytest.approx(f1_score(labels, pred, average="micro"))
    for average in ("macro", "weighted"):
        expected = precision_recall_fscore_support(labels, pred, labels=occurring, average=average, zero_division=0)
        assert [found[f"{average}_{n}"] for n in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
    some = (labels.any(axis=1) | pred.any(axis=1)).astype(bool)
    assert not some.all()
    expected = f1_score(labels[some], pred[some], average="samples", zero_division=0)
    assert found["samples_f1"] == pytest.approx(expected)
    area = [average_precision_score(labels[:, c], proba[:, c]) for c in occurring]
    assert found["macro_average_precision"] == pytest.approx(np.mean(area))
    assert found["micro_average_precision"] == pytest.approx(average_precision_score(labels, proba, average="micro"))
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(labels[:, c], proba[:, c]) for c in occurring]))
    each = [log_loss(labels[:, c], proba[:, c].astype(float).clip(1e-7, 1 - 1e-7), labels=[0, 1]) for c in range(4)]
    assert found["log_loss"] == pytest.approx(np.mean(each), rel=1e-4)
    assert json.loads(json.dumps(found)) == found


def test_a_class_that_is_nowhere_is_undefined_not_zero():
    """Catches a class without rows that pulls the macro average down by a quarter."""
    labels, proba = draw(0)
    found = Multilabel().scores(labels_of(labels), proba, NAMES)
    undefined = dict.fromkeys(("precision", "recall", "f1", "average_precision", "auroc"))
    assert found["per_class"]["d"] == undefined | {"support": 0}
    without = Multilabel().scores(labels_of(labels[:, :3]), proba[:, :3], NAMES[:3])
    assert found["macro_f1"] == pytest.approx(without["macro_f1"])


def test_nothing_to_find_and_nothing_found():
    """Catches a crash, or scores of 0, on rows that all have no class."""
    found = Multilabel().scores(labels_of(np.zeros((5, 4), np.int8)), np.full((5, 4), 0.1), NAMES)
    assert (found["accuracy"], found["hamming_loss"]) == (1, 0)
    names = ("macro_f1", "micro_f1", "samples_f1", "auroc", "macro_average_precision", "micro_average_precision")
    assert [found[n] for n in names] == [None] * 6


def test_one_class_is_a_class_of_its_own():
    """Catches a single column that scikit-learn takes for a binary task, whose scores are of two classes."""
    labels, proba = draw(1)
    found = Multilabel().scores(labels_of(labels[:, :1]), proba[:, :1], NAMES[:1])
    expected = f1_score(labels[:, 0], proba[:, 0] >= 0.5)
    assert found["per_class"]["a"]["f1"] == found["macro_f1"] == pytest.approx(expected)


def test_rows_without_a_label_are_left_out():
    """Catches rows of MISSING counted as rows without any class."""
    labels, proba = draw(2)
    more = np.concatenate([labels, np.full((30, 4), MISSING, np.int8)])
    found = Multilabel().scores(labels_of(more), np.concatenate([proba, np.ones((30, 4))]), NAMES)
    assert found == Multilabel().scores(labels_of(labels), proba, NAMES)
    assert Multilabel().scores(labels_of(more[-3:]), np.ones((3, 4)), NAMES) == {"kind": "multilabel", "num_rows": 0}
