"""Bootstrap intervals: do they cover, and are paired ones narrow where they should be."""

import time

import numpy as np
import pytest
from scipy.stats import beta, multinomial, permutation_test
from sklearn.metrics import accuracy_score, f1_score

from mmkt_ray.kinds.class_metrics import classification_metrics
from mmkt_ray.kinds.outcomes import ClassOutcome
from mmkt_ray.scoring.intervals import (
    bootstrap_intervals,
    exact_p,
    paired_difference,
    paired_p,
    percentiles,
    share_difference,
    share_interval,
    verdict,
)
from tests.labels import MISSING, UNSEEN, labels_of

METRICS = ("accuracy", "macro_f1")


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth_about_95_percent_of_the_time():
    """Catches wrong percentiles (90 % for 95 %) and resamples of the wrong size: coverage leaves 90 to 99 %."""
    joint = np.array([[0.30, 0.06, 0.04], [0.05, 0.22, 0.03], [0.05, 0.05, 0.20]])  # P(label, prediction)
    truth = ClassOutcome.of_codes(*np.divmod(np.arange(9), 3), 3).scores(joint.reshape(1, 9))
    rng = np.random.default_rng(0)
    covered = dict.fromkeys(METRICS, 0)
    num_studies = 300
    for study in range(num_studies):
        labels, pred = np.divmod(rng.choice(9, size=250, p=joint.ravel()), 3)
        found = bootstrap_intervals(labels_of(labels), pred, 3, num_resamples=300, seed=study)
        for m in METRICS:
            covered[m] += found[m]["low"] <= truth[m][0] <= found[m]["high"]
    for m in METRICS:
        assert 0.90 <= covered[m] / num_studies <= 0.99, m


@pytest.mark.slow
def test_resampled_counts_are_a_bootstrap_of_rows():
    """Catches a multinomial over the wrong cells: the spread must be that of drawing rows with replacement."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 300)
    pred = np.where(rng.random(300) < 0.7, labels, rng.integers(0, 4, 300))
    rows = rng.integers(0, 300, (2000, 300))
    drawn = [
        classification_metrics(labels_of(labels[r]), np.eye(4)[pred[r]], list("abcd"))["macro_f1"] for r in rows[:200]
    ]
    found = bootstrap_intervals(labels_of(labels), pred, 4, num_resamples=2000)
    spread = (found["macro_f1"]["high"] - found["macro_f1"]["low"]) / (2 * 1.96)
    assert 0.85 < spread / np.std(drawn) < 1.3  # it reaches over the bias of the resamples too
    right = (labels == pred)[rows].mean(axis=1)
    assert [found["accuracy"]["low"], found["accuracy"]["high"]] == pytest.approx(
        np.quantile(right, [0.025, 0.975]), abs=0.01
    )


def test_the_value_is_the_metric_and_the_seed_decides_the_ends():
    """Catches an interval around the bootstrap mean in place of the score,
    and results that change from run to run."""
    rng = np.random.default_rng(2)
    labels = np.concatenate([rng.integers(0, 3, 100), [MISSING] * 20, [UNSEEN] * 10])
    pred = rng.integers(0, 3, 130)
    found = bootstrap_intervals(labels_of(labels), pred, 3)
    exact = classification_metrics(labels_of(labels), np.eye(3)[pred], list("abc"))
    assert {m: found[m]["value"] for m in METRICS} == pytest.approx({m: exact[m] for m in METRICS})
    assert found == bootstrap_intervals(labels_of(labels), pred, 3)
    assert found != bootstrap_intervals(labels_of(labels), pred, 3, seed=1)


def test_a_perfect_score_on_few_rows_is_no_certainty():
    """Catches [100 %, 100 %] for 20 right of 20; Clopper and Pearson's bound is 0.025 ** (1 / 20) = 83.2 %."""
    labels = np.arange(20) % 2
    found = bootstrap_intervals(labels_of(labels), labels, 2)
    assert found["accuracy"] == pytest.approx({"value": 1.0, "low": 0.8316, "high": 1.0}, abs=1e-4)
    none = bootstrap_intervals(labels_of(labels), 1 - labels, 2)
    assert none["accuracy"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.1684}, abs=1e-4)


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (3, 10), (10, 10), (900, 1000)])
def test_the_interval_of_a_share_is_clopper_and_pearsons(right, rows):
    """Catches a bootstrap of few rows, whose interval is too narrow, or [0, 0] where no row is right."""
    found = share_interval(right, rows, 0.95)
    low = beta.ppf(0.025, right, rows - right + 1) if right else 0.0
    high = beta.ppf(0.975, right + 1, rows - right) if right < rows else 1.0
    assert [found[k] for k in ("value", "low", "high")] == pytest.approx([right / rows, low, high])
    labels = np.zeros(rows, int)
    assert bootstrap_intervals(labels_of(labels), (np.arange(rows) >= right).astype(int), 2)["accuracy"] == found


@pytest.mark.parametrize("num_rows", [1, 2, 7, 20])
def test_the_interval_of_a_difference_covers_the_truth_also_of_few_rows(num_rows):
    """Catches "suffices, [0.0, 0.0]" from one row. The coverage is summed over all outcomes,
    so nothing is left to luck."""
    outcomes = [(b, w) for b in range(num_rows + 1) for w in range(num_rows + 1 - b)]
    found = {o: share_difference(*o, num_rows, 0.95) for o in outcomes}
    assert all(i["high"] - i["low"] > 0.1 and i["low"] <= i["value"] <= i["high"] for i in found.values())
    coverage = []
    for better, worse in ((0.0, 0.0), (0.02, 0.0), (0.05, 0.05), (0.2, 0.05), (0.3, 0.3), (0.1, 0.6), (0.9, 0.05)):
        drawn = multinomial(num_rows, [better, worse, 1 - better - worse])
        truth, slack = better - worse, 1e-9
        covered = [o for o, i in found.items() if i["low"] - slack <= truth <= i["high"] + slack]
        coverage.append(sum(drawn.pmf([b, w, num_rows - b - w]) for b, w in covered))
    assert min(coverage) > 0.89
    assert np.mean(coverage) > 0.95


def test_four_rows_to_none_are_no_verdict():
    """Catches "better" from 4 : 0 discordant pairs, which happens to equal models one time in eight."""
    labels, few, none = np.zeros(60, int), np.zeros(60, int), np.zeros(60, int)
    none[:4] = 1
    found = paired_difference(labels_of(labels), (few, none), width=2)
    assert exact_p(4, 0) == pytest.approx(2 * 0.5**4)
    assert found["value"] == pytest.approx(4 / 60)
    assert found["low"] == 0
    assert verdict(found) == "no difference shown"
    none[:6] = 1  # 2 / 64
    assert verdict(paired_difference(labels_of(labels), (few, none), width=2)) == "better"


def test_random_signs_are_scipys_permutation_test():
    """Catches signs that are drawn per model in place of per row, and a one-sided P."""
    rng = np.random.default_rng(0)
    gain = rng.choice([-1, -0.5, 0, 0.25, 0.5, 1], 12)
    exact = permutation_test((gain,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert paired_p(gain) == pytest.approx(exact, abs=0.02)
    assert paired_p(-gain) == paired_p(gain)
    right = rng.choice([-1.0, 0.0, 1.0], 40)
    assert paired_p(right) == exact_p(int((right > 0).sum()), int((right < 0).sum()))
    assert paired_p(np.zeros(5)) == paired_p(np.ones(1)) == 1.0


def test_macro_f1_of_a_thousand_classes_of_few_rows_lies_in_its_interval():
    """Catches resamples without a third of the classes taken for the score's spread: an interval below its own score.
    Over test sets of one size, intervals must cover the mean score of such sets."""
    rng = np.random.default_rng(0)
    for num_classes, num_rows, num_sets in ((1000, 1000, 1), (1000, 5000, 1), (60, 120, 60)):
        values, found = [], []
        for seed in range(num_sets):
            labels = np.resize(np.arange(num_classes), num_rows)
            if num_sets > 1:
                labels = rng.integers(0, num_classes, num_rows)
            pred = np.where(rng.random(num_rows) < 0.7, labels, rng.integers(0, num_classes, num_rows))
            found.append(
                bootstrap_intervals(labels_of(labels), pred, num_classes, num_resamples=100, seed=seed)["macro_f1"]
            )
            values.append(f1_score(labels, pred, average="macro"))
        assert all(i["low"] < v < i["high"] for i, v in zip(found, values, strict=True))
        assert np.mean([i["low"] <= np.mean(values) <= i["high"] for i in found]) >= 0.9


def test_scores_without_spread_still_have_an_interval():
    """Catches zero width where all rows are of one kind: 20 such rows leave room for a share of 16.8 % of another
    kind."""
    same = np.full(101, 0.5)
    room = 1 - 0.025 ** (1 / 20)
    assert percentiles(same, 0.95, 20) == pytest.approx({"value": 0.5, "low": 0.5 - room / 2, "high": 0.5 + room / 2})
    found = percentiles(np.zeros(101), 0.95, 20, (-1.0, 1.0))
    assert found == pytest.approx({"value": 0.0, "low": -room, "high": room})


def test_no_labelled_row_gives_no_interval():
    """Catches a division by zero, or a made-up interval, where nothing is known."""
    assert bootstrap_intervals(labels_of(np.array([MISSING])), np.array([0]), 2) == {}
    with pytest.raises(ValueError, match="no labelled row"):
        paired_difference(labels_of(np.array([MISSING])), (np.array([0]), np.array([1])), width=2)


@pytest.mark.parametrize("metric", METRICS)
def test_a_real_difference_is_shown_though_the_separate_intervals_overlap(metric):
    """Catches rows resampled separately for each model: their shared difficulty would hide a real gain."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 400)
    worse = np.where(rng.random(400) < 0.70, labels, (labels + 1) % 3)
    better = np.where(rng.random(400) < 0.12, labels, worse)  # the same mistakes, some of them mended
    apart = [bootstrap_intervals(labels_of(labels), p, 3)[metric] for p in (worse, better)]
    assert apart[1]["low"] < apart[0]["high"]
    difference = paired_difference(labels_of(labels), (better, worse), metric, width=3)
    assert difference["low"] > 0
    assert verdict(difference) == "better"
    assert verdict(paired_difference(labels_of(labels), (worse, better), metric, width=3)) == "worse"


@pytest.mark.parametrize("metric", METRICS)
def test_equally_good_models_are_rarely_told_apart(metric):
    """Catches intervals that are too narrow: of 100 pairs of equal models about 5 may look different, not 12."""
    rng = np.random.default_rng(4)
    false_alarms = 0
    for study in range(100):
        labels = rng.integers(0, 3, 300)
        a, b = (np.where(rng.random(300) < 0.7, labels, rng.integers(0, 3, 300)) for _ in range(2))
        shown = verdict(paired_difference(labels_of(labels), (a, b), metric, width=3, num_resamples=300, seed=study))
        false_alarms += shown != "no difference shown"
    assert false_alarms <= 11


def test_the_difference_is_that_of_the_scores_unseen_labels_included():
    """Catches a sign or a class lost on the way through the cells."""
    rng = np.random.default_rng(5)
    labels, a, b = (rng.integers(0, 4, 200) for _ in range(3))
    labels[:20], labels[20:40] = UNSEEN, MISSING
    for metric in METRICS:
        scores = [classification_metrics(labels_of(labels), np.eye(4)[p], list("abcd"))[metric] for p in (a, b)]
        assert paired_difference(labels_of(labels), (a, b), metric, width=4)["value"] == pytest.approx(
            scores[0] - scores[1]
        )
    with pytest.raises(ValueError, match="metric must be one of"):
        paired_difference(labels_of(labels), (a, b), "f2", width=4)


def test_a_prediction_of_a_class_that_the_labels_do_not_know_is_wrong():
    """Catches its code, a negative number, taken for an index:
    it would count as a prediction of one of the last classes."""
    found = bootstrap_intervals(labels_of(np.array([0, 0, 1, 2, UNSEEN])), np.array([0, UNSEEN, 1, 2, UNSEEN]), 3)
    assert found["accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["macro_f1"]["value"] == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)


def test_a_thousand_resamples_of_ten_thousand_rows_are_quick():
    """Catches resampling row by row (10^7 draws and their F1): 0.1 s becomes tens of seconds."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 20, 10_000)
    pred = np.where(rng.random(10_000) < 0.8, labels, rng.integers(0, 20, 10_000))
    started = time.process_time()
    bootstrap_intervals(labels_of(labels), pred, 20, num_resamples=1000)
    assert time.process_time() - started < 3.0


def draw_multilabel(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, 3) and two predictions, the first of them the better one."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_rows, 3)) < [0.5, 0.3, 0.1]).astype(np.int8)
    worse = np.where(rng.random((num_rows, 3)) < 0.2, 1 - labels, labels)
    better = np.where(rng.random((num_rows, 3)) < 0.5, labels, worse)
    return labels, better, worse


@pytest.mark.slow
def test_multilabel_intervals_are_a_bootstrap_of_rows():
    """Catches decisions resampled one by one: a row's classes go together, and the interval would be too narrow."""
    labels, pred, _ = draw_multilabel(200, seed=0)
    found = bootstrap_intervals(labels_of(labels), pred, 3, num_resamples=2000)
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(labels, pred))
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(labels, pred, average="macro"))
    rows = np.random.default_rng(1).integers(0, 200, (400, 200))
    for name, drawn in (
        ("accuracy", [accuracy_score(labels[r], pred[r]) for r in rows]),
        ("macro_f1", [f1_score(labels[r], pred[r], average="macro") for r in rows]),
    ):
        assert (found[name]["high"] - found[name]["low"]) / (2 * 1.96) == pytest.approx(np.std(drawn), rel=0.15)


@pytest.mark.parametrize("metric", METRICS)
def test_a_multilabel_difference_is_that_of_the_scores_and_rows_without_a_label_are_left_out(metric):
    """Catches rows of MISSING scored as wrong, and two models' predictions mixed up in the cells."""
    labels, better, worse = draw_multilabel(300, seed=2)
    scores = [bootstrap_intervals(labels_of(labels[:250]), p[:250], 3)[metric]["value"] for p in (better, worse)]
    labels[250:] = MISSING
    found = paired_difference(labels_of(labels), (better, worse), metric, width=3)
    assert found["value"] == pytest.approx(scores[0] - scores[1])
    assert verdict(found) == "better"


def test_an_undefined_macro_f1_has_no_interval():
    """Catches a macro-F1 of 0 (or NaN in the JSON) where no row has a class and none is predicted."""
    nothing = np.zeros((20, 3), np.int8)
    found = bootstrap_intervals(labels_of(nothing), nothing, 3)
    assert found["macro_f1"] is None
    assert found["accuracy"]["value"] == 1
    assert paired_difference(labels_of(nothing), (nothing, nothing), "macro_f1", width=3) is None


def test_many_classes_do_not_overflow_the_labels():
    """Catches int8 labels that a class number above 127 does not fit into."""
    labels = np.zeros((10, 200), np.int8)
    labels[:, 150] = 1
    assert bootstrap_intervals(labels_of(labels), labels, 200)["macro_f1"]["value"] == 1
