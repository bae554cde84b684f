"""Intervals over rows and seeds."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from mmkt_ray.scoring.intervals import percentiles, verdict
from mmkt_ray.scoring.seeds import mean_interval, seed_scores
from tests.labels import UNSEEN, labels_of

RNG = np.random.default_rng(0)


def noisy(labels, num_classes, right, num_seeds=3):
    """Predictions (S, N) that are right with this chance."""
    guess = RNG.integers(0, num_classes, (num_seeds, len(labels)))
    return np.where(RNG.random(guess.shape) < right, labels, guess)


def test_the_value_is_the_mean_of_scikit_learns_scores_over_the_seeds():
    """Catches scores that differ from those told elsewhere, and a point estimate that is resampled too."""
    labels = RNG.integers(0, 4, 200)
    labels[:5] = UNSEEN
    pred = noisy(labels.clip(0), 4, 0.6)
    drawn = seed_scores(labels_of(labels), [pred], 4, 50, seed=0)
    assert drawn["accuracy"].shape == (1, 51)
    codes = np.where(labels < 0, 4, labels)
    assert drawn["accuracy"][0, 0] == pytest.approx(np.mean([accuracy_score(codes, p) for p in pred]))
    assert drawn["macro_f1"][0, 0] == pytest.approx(np.mean([f1_score(codes, p, average="macro") for p in pred]))


def test_multilabel_scores_are_scikit_learns():
    """Catches a multilabel task scored as if a row had one class."""
    labels = (RNG.random((150, 5)) < 0.3).astype(np.int8)
    pred = np.where(RNG.random((2, 150, 5)) < 0.8, labels, 1 - labels).astype(np.int8)
    drawn = seed_scores(labels_of(labels), [pred], 5, 10, seed=0)
    expected = np.mean([f1_score(labels, p, average="macro", zero_division=0) for p in pred])
    assert drawn["macro_f1"][0, 0] == pytest.approx(expected)
    assert drawn["accuracy"][0, 0] == pytest.approx(np.mean([accuracy_score(labels, p) for p in pred]))


def test_a_model_against_itself_has_no_difference_on_rows_and_one_only_by_its_seeds():
    """Catches rows that are drawn separately for the two models."""
    labels = RNG.integers(0, 3, 300)
    pred = noisy(labels, 3, 0.5, num_seeds=1)
    drawn = seed_scores(labels_of(labels), [pred, pred], 3, 100, seed=0)
    assert np.abs(drawn["accuracy"][0] - drawn["accuracy"][1]).max() == 0
    assert np.abs(drawn["macro_f1"][0] - drawn["macro_f1"][1]).max() == 0


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Catches intervals that leave out the spread over rows: then they would miss far more often than one in ten."""
    covered = 0
    for trial in range(100):
        labels = RNG.integers(0, 3, 150)
        a, b = noisy(labels, 3, 0.7), noisy(labels, 3, 0.55)
        values = seed_scores(labels_of(labels), [a, b], 3, 200, seed=trial)["accuracy"]
        interval = percentiles(values[0] - values[1], 0.9)
        covered += interval["low"] <= 0.15 * 2 / 3 <= interval["high"]
    assert 80 <= covered <= 99


def test_seeds_that_disagree_widen_the_interval():
    """Catches a lucky seed that passes for a sure gain."""
    labels = np.zeros(400, int)
    steady = np.resize([0, 0, 0, 1], (3, 400))
    lucky = np.stack([np.zeros(400, int), np.resize([0, 1], 400), np.resize([0, 0, 0, 1], 400)])
    width = {}
    for name, pred in (("steady", steady), ("lucky", lucky)):
        interval = percentiles(seed_scores(labels_of(labels), [pred], 2, 300, seed=0)["accuracy"][0], 0.95)
        assert interval["value"] == pytest.approx(0.75)
        width[name] = interval["high"] - interval["low"]
    assert width["lucky"] > 2 * width["steady"]


def test_the_interval_covers_both_seeds_and_rows():
    """Catches an interval from the rows alone: two seeds that disagree by a lot must make it wide."""
    rng = np.random.default_rng(0)
    agreeing = rng.normal(0.1, 0.3, (4, 400))
    disagreeing = agreeing + np.array([[0.2], [-0.2], [0.2], [-0.2]])
    narrow, wide = (mean_interval(d, 500, 0.95, 0) for d in (agreeing, disagreeing))
    assert narrow["value"] == pytest.approx(agreeing.mean())
    assert narrow["low"] < narrow["value"] < narrow["high"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_the_mean_of_right_and_wrong_is_the_accuracy_with_the_same_interval():
    """Catches two mechanisms that draw rows or seeds in different ways."""
    labels = RNG.integers(0, 3, 250)
    pred = noisy(labels, 3, 0.6)
    interval = percentiles(seed_scores(labels_of(labels), [pred], 3, 300, seed=5)["accuracy"][0], 0.95)
    assert mean_interval((pred == labels).astype(float), 300, 0.95, seed=5) == pytest.approx(interval)


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0.01, 0.1, "better"), (-0.1, -0.01, "worse"), (-0.1, 0.1, "tie"), (0.0, 0.1, "tie")]
)
def test_a_tie_is_called_a_tie(low, high, told):
    """Catches a winner by a difference that the test rows do not show."""
    assert verdict({"value": (low + high) / 2, "low": low, "high": high}, "tie") == told
