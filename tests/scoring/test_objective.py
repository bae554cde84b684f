"""Any metric as an objective: scikit-learn's value, on rows as they are and as a resample draws them."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.preprocessing import label_binarize

from mmkt_ray.config import ObjectiveConfig
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.tasks import TASK_KINDS
from mmkt_ray.scoring.objective import Score, constant_scores
from tests.labels import UNSEEN, labels_of

NAMES = {"multiclass": ["a", "b", "c", "d"], "binary": ["no", "yes"], "multilabel": ["a", "b", "c"]}
CASES = [(name, metric) for name in NAMES for metric in TASK_KINDS[name].metrics]


def metric_scores(metric, kind, labels, proba, counts=None):
    counts = np.ones((1, len(labels))) if counts is None else counts
    return TASK_KINDS[kind]().metric_scores(metric, labels_of(labels, kind), proba, counts)


def draw(kind, num_rows=200):
    rng, width = np.random.default_rng(1), len(NAMES[kind])
    if kind == "multilabel":
        labels = (rng.random((num_rows, width)) < [0.5, 0.3, 0.05]).astype(np.int8)
        proba = np.round(0.6 * rng.random((num_rows, width)) + 0.3 * labels, 2)
    else:
        labels = rng.integers(0, width, num_rows)
        proba = np.round(rng.dirichlet(np.ones(width), num_rows) + np.eye(width)[labels] / 2, 2)  # with ties
        proba /= proba.sum(axis=1, keepdims=True)
    return labels, proba.astype(np.float32)


@pytest.mark.parametrize("kind", NAMES)
def test_a_metric_is_the_one_that_evaluation_tells(kind):
    """Catches candidates chosen by another number than metrics.json has under the name."""
    labels, proba = draw(kind)
    told = TASK_KINDS[kind]().scores(labels_of(labels, kind), proba, NAMES[kind])
    if kind != "multilabel":
        truth = np.eye(len(NAMES[kind]))[labels]
        told["macro_average_precision"] = average_precision_score(truth, proba, average="macro")
    told["log_loss"] *= -1
    found = {m: float(metric_scores(m, kind, labels, proba)[0]) for m in TASK_KINDS[kind].metrics}
    assert found == pytest.approx({m: told[m] for m in found}, abs=1e-6)


@pytest.mark.parametrize(("kind", "metric"), CASES)
def test_a_resample_has_the_metric_of_its_rows(kind, metric):
    """Catches counts that weigh rows wrongly: an interval of another score than its value."""
    labels, proba = draw(kind)
    if kind == "multiclass":
        labels = np.where(np.arange(len(labels)) % 40 == 0, UNSEEN, labels)
    counts = np.random.default_rng(2).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=3)
    drawn = metric_scores(metric, kind, labels, proba, counts)
    for count, value in zip(counts, drawn, strict=True):
        rows = np.repeat(np.arange(len(labels)), count)
        assert value == pytest.approx(metric_scores(metric, kind, labels[rows], proba[rows])[0])


def test_the_default_of_several_kinds_is_each_ones_own():
    """Catches a price whose R2 no epoch is chosen by, and a metric of one kind that is asked of all."""
    price = TASK_KINDS["regression"]()
    score = Score.of(ObjectiveConfig(), {"kind": Multiclass(), "price": price})
    assert score({"macro_f1": {"kind": 0.4}, "accuracy": {"kind": 0.9}, "r2": {"price": 0.8}}) == pytest.approx(0.6)
    assert Score.of(ObjectiveConfig(), {"price": price}).name == "r2"
    assert Score.of(ObjectiveConfig(), {"price": price}).worst < -1


def test_ranking_metrics_and_log_loss_are_scikit_learns():
    """Catches a ranking that treats ties as scikit-learn does not, and a log loss of another base."""
    labels, proba = draw("multiclass")
    auroc = roc_auc_score(label_binarize(labels, classes=range(4)), proba, average="macro")
    assert metric_scores("auroc", "multiclass", labels, proba)[0] == pytest.approx(auroc)
    expected = log_loss(labels, proba.astype(float) / proba.astype(float).sum(axis=1, keepdims=True))
    assert metric_scores("log_loss", "multiclass", labels, proba)[0] == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("metric", ["auroc", "recall", "average_precision"])
def test_a_score_without_a_positive_row_is_undefined(metric):
    """Catches a 0 that looks like a score where there is nothing to find."""
    proba = np.tile([0.7, 0.3], (5, 1))
    assert np.isnan(metric_scores(metric, "binary", np.zeros(5, int), proba)).all()


def test_a_score_is_a_task_the_mean_or_the_worst():
    """Catches candidates chosen by another task or another average than asked for."""
    val = {"accuracy": {"a": 0.2, "b": 0.6}, "macro_f1": {"a": 0.1, "b": 0.3}}
    assert Score()(val) == pytest.approx(0.2)
    assert Score("accuracy", over="worst")(val) == 0.2
    assert Score("accuracy", "b")(val) == 0.6
    assert np.isnan(Score("accuracy", "c")(val))
    assert Score()({"macro_f1": {}, "accuracy": {"a": 0.5}}) == 0.5
    assert Score.of(ObjectiveConfig(task="b", metric="accuracy"), {"a": Multiclass()}) == Score()


def test_leaving_out_a_hard_task_never_helps():
    """Catches a search over tasks won by the candidate that dropped the task it would lose on."""
    floors = {"easy": 0.3, "hard": 0.2}
    score, worst = Score("accuracy", floors=floors), Score("accuracy", over="worst", floors=floors)
    both, easy = {"accuracy": {"easy": 0.9, "hard": 0.5}}, {"accuracy": {"easy": 0.9}}
    assert (score(both), score(easy)) == (pytest.approx(0.7), pytest.approx(0.55))
    assert (worst(both), worst(easy)) == (0.5, 0.2)


def test_the_floor_is_what_the_class_shares_get():
    """Catches a floor from the val labels, which no model has seen, or one that is no prediction."""
    train, val = labels_of(np.array([0, 0, 1, UNSEEN])), labels_of(np.array([1, 1, 0, 2, UNSEEN]))
    floor = {m: constant_scores(m, {"t": train}, {"t": val}, {"t": 3}) for m in ("accuracy", "auroc")}
    assert floor == {"accuracy": {"t": pytest.approx(1 / 5)}, "auroc": {"t": pytest.approx(0.5)}}
    tags = labels_of(np.array([[1, 0], [1, 1]], np.int8))
    found = constant_scores("micro_f1", {"t": tags}, {"t": tags[:1]}, {"t": 2})
    assert found == {"t": pytest.approx(2 / 3)}  # both classes are predicted: their shares are 1 and one half
