"""Scores against scikit-learn, with absent, unseen and missing labels."""

import json

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from mmkt_ray.kinds.class_metrics import classification_metrics
from mmkt_ray.kinds.multiclass import Binary, Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from tests.labels import MISSING, UNSEEN, labels_of

NAMES = ["a", "b", "c", "d", "e"]


def draw(num_rows: int = 200, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the first `classes` names only, and probabilities over all of them that lean to the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, num_rows)
    proba = rng.dirichlet(np.ones(len(NAMES)), num_rows)
    proba[np.arange(num_rows), labels] += rng.random(num_rows)
    return labels, (proba / proba.sum(axis=1, keepdims=True)).astype(np.float32)


def _exact(proba: np.ndarray) -> np.ndarray:
    """The same probabilities in float64, summing to one closely enough for scikit-learn."""
    return proba.astype(float) / proba.astype(float).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [4, 2, 1])
def test_scores_are_scikit_learns(classes):
    """Catches an average over classes that do not occur: macro-F1 of 4 of 5 classes would be 20 % too low."""
    labels, proba = draw(classes=classes)
    pred = proba.argmax(axis=1)
    found = classification_metrics(labels_of(labels), proba, NAMES)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, pred))
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([np.mean(pred[labels == c] == c) for c in np.unique(labels)])
    )
    for average in ("macro", "micro", "weighted"):
        expected = precision_recall_fscore_support(labels, pred, average=average, zero_division=0)[:3]
        assert [found[f"{average}_{n}"] for n in ("precision", "recall", "f1")] == pytest.approx(expected)
    assert found["confusion"] == confusion_matrix(labels, pred, labels=range(5)).tolist()
    assert found["log_loss"] == pytest.approx(log_loss(labels, _exact(proba), labels=range(5)), rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_balanced_accuracy_and_auroc_are_scikit_learns_where_it_has_them():
    """Catches ranks without ties halved, or the positive and negative counts swapped."""
    labels, proba = draw(classes=5)
    proba = proba.round(1)  # ties
    proba = proba + np.float32(0.001)
    proba /= proba.sum(axis=1, keepdims=True)
    found = classification_metrics(labels_of(labels), proba, NAMES)
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(labels == c, proba[:, c]) for c in range(5)]))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, proba.argmax(axis=1)))


def test_per_class_scores_carry_their_names():
    """Catches scores that slip by one class when a class is absent."""
    labels, proba = draw(classes=4)
    found = classification_metrics(labels_of(labels), proba, NAMES)["per_class"]
    expected = f1_score(labels, proba.argmax(axis=1), labels=range(5), average=None, zero_division=0)
    assert [found[n]["f1"] for n in NAMES] == pytest.approx(expected.tolist())
    assert found["e"] == {"precision": 0, "recall": None, "f1": 0, "support": 0}  # predicted, and no row has it
    assert sum(c["support"] for c in found.values()) == 200


def test_missing_labels_are_left_out_and_unseen_ones_are_wrong():
    """Catches -1 or -2 used as an index (the last classes), which would score rows that have no label."""
    labels, proba = draw()
    plain = classification_metrics(labels_of(labels), proba, NAMES)
    more = np.concatenate([labels, [MISSING] * 50, [UNSEEN] * 100])
    found = classification_metrics(labels_of(more), np.concatenate([proba, proba[:150]]), NAMES)
    assert (found["num_rows"], found["num_unseen"]) == (300, 100)
    assert found["accuracy"] == pytest.approx(plain["accuracy"] * 200 / 300)
    assert found["macro_recall"] < plain["macro_recall"]
    assert found["log_loss"] == pytest.approx(plain["log_loss"])
    assert np.sum(found["confusion"]) == 200


@pytest.mark.parametrize("labels", [[MISSING, MISSING], [UNSEEN, UNSEEN]])
def test_rows_without_a_usable_label_do_not_crash(labels):
    """Catches a division by zero on a task that the split does not label."""
    found = classification_metrics(labels_of(np.array(labels)), np.full((2, 5), 0.2), NAMES)
    assert found["num_rows"] == sum(x == UNSEEN for x in labels)
    assert found.get("accuracy", 0) == 0
    assert found.get("log_loss") is None


def test_probabilities_that_are_no_numbers_are_refused():
    """Catches a diverged model that scores as class 0 everywhere, because argmax of NaN is 0."""
    with pytest.raises(ValueError, match="no numbers"):
        classification_metrics(labels_of(np.array([0])), np.full((1, 5), np.nan), NAMES)
    with pytest.raises(ValueError, match="shape"):
        classification_metrics(labels_of(np.array([0, 1])), np.full((1, 5), 0.2), NAMES)


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_scores_are_the_slow_ones(seed):
    """Catches a second definition of macro-F1: the interval would lie around another number than the one shown."""
    labels, proba = draw(num_rows=60, classes=3, seed=seed)
    labels[:7] = UNSEEN
    slow = classification_metrics(labels_of(labels), proba, NAMES)
    fast = Multiclass().outcome(labels_of(labels), proba.argmax(axis=1), 5).scores(np.ones((1, 60)))
    assert fast["accuracy"][0] == pytest.approx(slow["accuracy"])
    assert fast["macro_f1"][0] == pytest.approx(slow["macro_f1"])


def test_calibration_error_of_a_boaster_and_of_an_honest_model():
    """Catches a calibration error that is one minus accuracy, or that rewards confidence."""
    labels = np.array([0, 1] * 50)
    boaster = np.tile([1.0, 0, 0, 0, 0], (100, 1))
    honest = np.tile([0.5, 0.5, 0, 0, 0], (100, 1))
    assert classification_metrics(labels_of(labels), boaster, NAMES)["calibration_error"] == pytest.approx(0.5)
    assert classification_metrics(labels_of(labels), honest, NAMES)["calibration_error"] == pytest.approx(0.0, abs=1e-6)


def test_the_most_confused_pairs_come_first_and_without_the_diagonal():
    """Catches label and prediction swapped, and right answers listed as confusions."""
    labels = np.array([0] * 10 + [1] * 5 + [2] * 3)
    proba = np.eye(5)[[1] * 10 + [2] * 5 + [2] * 3]
    assert classification_metrics(labels_of(labels), proba, NAMES)["most_confused"] == [["a", "b", 10], ["b", "c", 5]]


def test_undefined_scores_of_a_class_are_none():
    """Catches a recall of 0 told for a class that no row has, or a precision of 0 for one that nothing predicts."""
    labels = np.array([0, 0, 1, 1])
    found = classification_metrics(labels_of(labels), np.eye(5)[[0, 0, 0, 2]], NAMES)["per_class"]
    assert found["b"] == {"precision": None, "recall": 0, "f1": 0, "support": 2}
    assert found["c"] == {"precision": 0, "recall": None, "f1": 0, "support": 0}
    assert found["d"] == {"precision": None, "recall": None, "f1": None, "support": 0}


@pytest.mark.parametrize("seed", range(5))
def test_binary_scores_are_those_of_the_positive_class(seed):
    """Catches scores of the first class told for the positive one,
    and ties that an area under a curve counts whole."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 80)
    positive = (rng.random(80) * 0.6 + 0.4 * labels).round(1)
    labels[:5] = MISSING
    found = Binary().scores(labels_of(labels, "binary"), np.stack([1 - positive, positive], axis=1), ["ham", "spam"])
    labels, positive = labels[5:], positive[5:]
    pred = (positive > 0.5).astype(int)
    assert (found["kind"], found["positive"]) == ("binary", "spam")
    expected = precision_recall_fscore_support(labels, pred, average="binary")[:3]
    assert [found[n] for n in ("precision", "recall", "f1")] == pytest.approx(expected)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, positive))
    assert found["average_precision"] == pytest.approx(average_precision_score(labels, positive))


def test_binary_scores_without_a_positive_row_are_none():
    """Catches an average precision of 0 (and scikit-learn's warning) where there is nothing to rank."""
    found = Binary().scores(labels_of(np.zeros(4, int), "binary"), np.tile([0.8, 0.2], (4, 1)), ["ham", "spam"])
    assert [found[n] for n in ("average_precision", "auroc", "precision", "recall", "f1")] == [None] * 5
    assert found["accuracy"] == 1


def test_a_row_scores_right_or_wrong_or_the_f1_of_its_classes():
    """Catches an unseen label that counts as right, sets compared as wholes only,
    and a division by zero for empty ones."""
    assert Multiclass().row_scores(labels_of(np.array([0, 2, UNSEEN])), np.array([0, 1, 1])).tolist() == [1, 0, 0]
    labels, pred = (np.array(rows, np.int8) for rows in ([[1, 1, 0, 0], [0] * 4], [[1, 0, 1, 1], [0] * 4]))
    assert Multilabel().row_scores(labels_of(labels), pred) == pytest.approx([0.4, 1.0])
    assert Multilabel().row_scores(labels_of(labels), pred)[0] == pytest.approx(f1_score(labels[0], pred[0]))
