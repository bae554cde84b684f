"""What each modality contributes, and the plain answers: against slow definitions, the axioms,
and a run by the real code."""

import math
import shutil
from itertools import combinations, permutations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mmkt_ray import storage
from mmkt_ray.evaluation.answers import paired_test
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.sentences import answer_sentence
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import read_card, write_card
from mmkt_ray.inference.rows import subsets
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.scoring.intervals import holm
from mmkt_ray.scoring.results import Answer
from mmkt_ray.studies.contribution import contributions, insights, shapley_weights
from tests.evaluation.runs import VARIANTS, draw_samples, make_config, write_run
from tests.labels import MISSING, UNSEEN, labels_of

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_shapley_values_are_the_mean_gain_over_all_orders(num):
    """Catches a wrong weight, or bits of a subset's number read in another order."""
    values = RNG.normal(size=2**num)
    expected = np.zeros(num)
    for order in permutations(range(num)):
        inside = 0
        for player in order:
            expected[player] += (values[inside | 1 << player] - values[inside]) / math.factorial(num)
            inside |= 1 << player
    np.testing.assert_allclose(shapley_weights(num) @ values, expected, atol=1e-12)


def draw_predictions(num_modalities: int, multilabel: bool = False):
    """Labels and one prediction per subset, right the more often the larger the subset."""
    num_rows, num_classes = 200, 4
    shape = (num_rows, num_classes) if multilabel else (num_rows,)
    labels = RNG.integers(2 if multilabel else num_classes, size=shape)
    predictions = []
    for s in range(2**num_modalities):
        other = RNG.integers(2 if multilabel else num_classes, size=shape)
        predictions.append(np.where(RNG.random(shape) < 0.2 + 0.2 * s.bit_count(), labels, other))
    return labels, predictions, num_classes


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_scores_are_scikit_learns_and_the_shares_add_up(multilabel):
    """Catches a score that is not the one the metrics tell, and shares that do not sum to what fusing gains."""
    names = ("audio", "image", "text")
    labels, predictions, num_classes = draw_predictions(3, multilabel)
    if not multilabel:
        labels[:9] = UNSEEN
    found = contributions(labels_of(labels), predictions, names, num_classes, num_resamples=100)
    codes = labels if multilabel else np.where(labels == UNSEEN, num_classes, labels)
    right = [(p == codes).all(axis=1) if multilabel else p == codes for p in predictions]
    slow = {
        "accuracy": [r.mean() for r in right],
        "macro_f1": [f1_score(codes, p, average="macro", zero_division=0) for p in predictions],
    }
    for metric, values in slow.items():
        share = found[metric]
        assert share.empty == pytest.approx(values[0])
        assert list(share.subsets.values()) == pytest.approx(values[1:])
        total = sum(v["value"] for v in share.values.values())
        assert total == pytest.approx(share.full - share.empty)
        assert all(v["low"] < v["value"] < v["high"] for v in share.values.values())
    assert found["accuracy"].subsets["audio+text"] == pytest.approx(right[0b101].mean())


def test_equal_modalities_share_equally_and_one_without_effect_has_nothing():
    """Catches a share that depends on the order of the modalities,
    or noise given to a modality that changes nothing."""
    labels, (nothing, one, *_), num_classes = draw_predictions(2)
    both = labels.copy()
    found = contributions(labels_of(labels), [nothing, one, one, both], ("a", "b"), num_classes, num_resamples=100)
    for metric in ("accuracy", "macro_f1"):
        assert found[metric].values["a"] == pytest.approx(found[metric].values["b"])
    found = contributions(labels_of(labels), [nothing, one, nothing, one], ("a", "b"), num_classes, num_resamples=100)
    room = 1 - 0.025 ** (1 / 200)  # what 200 rows without effect leave open
    assert list(found["accuracy"].values["b"].values()) == pytest.approx([0, -room, room], abs=1e-12)


def test_the_interval_covers_the_true_share_about_as_often_as_it_says():
    """Catches subsets that are resampled apart, whose intervals would be far too wide, and too narrow ones."""
    rng, hits, widths = np.random.default_rng(1), 0, []
    for seed in range(60):
        hard = rng.random(150)
        right = [hard < level for level in (0.2, 0.5, 0.6, 0.9)]  # the share of the first modality is 0.3
        predictions = [np.where(r, 0, 1) for r in right]
        found = contributions(labels_of(np.zeros(150, int)), predictions, ("a", "b"), 2, num_resamples=200, seed=seed)
        interval = found["accuracy"].values["a"]
        hits += interval["low"] <= 0.3 <= interval["high"]
        widths.append(interval["high"] - interval["low"])
    assert hits >= 52
    assert np.mean(widths) < 0.2


def test_knowing_nothing_is_the_most_frequent_class():
    """Catches missing or unseen labels counted, and sets of classes that take only the most frequent one."""
    labels = labels_of(np.array([MISSING, MISSING, MISSING, 2, 2, 1, UNSEEN]))
    assert labels.kind.constant(labels, 3) == 2
    sets = labels_of(np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [MISSING] * 3], dtype=np.int8))
    assert sets.kind.constant(sets, 3).tolist() == [1, 1, 0]


def test_subsets_are_numbered_by_their_bits():
    """Catches predictions that belong to another subset."""
    assert subsets(["a", "b"]) == [(), ("a",), ("b",), ("a", "b")]
    assert subsets(["a", "b"], sizes=(1,)) == [("a",), ("b",)]


# --- answers --------------------------------------------------------------------------------------------------------


def test_holm_is_the_step_down():
    """Catches P values multiplied in the wrong order, not made monotone, or given back sorted."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_paired_test_is_mcnemars_for_right_or_wrong():
    """Catches an unpaired test: the rows on which both agree must not blur the difference."""
    ours, theirs = np.ones(1000), np.ones(1000)
    ours[:500] = theirs[:500] = 0
    theirs[500:512], ours[0:2], theirs[0:2] = 0, 0, 1
    found = paired_test(ours, theirs, 0.95, 500)
    assert found["value"] == pytest.approx(0.01)
    tail = sum(math.comb(14, k) for k in range(3)) / 2**14
    assert found["p"] == pytest.approx(2 * tail)
    assert 0 < found["low"] < found["high"] < 0.025
    assert paired_test(ours, ours, 0.95, 500)["p"] == 1.0


def test_sets_of_classes_are_scored_by_their_f1():
    """Catches sets compared as wholes only, and a division by zero where both are empty."""
    found = np.array(
        [Multilabel().score_pair(*pair) for pair in ((("a", "b"), ("a", "c", "d")), ((), ()), (("a",), ("b",)))]
    )
    assert found.tolist() == pytest.approx([0.4, 1.0, 0.0])
    compared = paired_test(found, np.array([0.2, 0.9, 0.1]), 0.95, 200)
    assert compared["value"] == pytest.approx((0.2 + 0.1 - 0.1) / 3)
    assert 0 < compared["p"] < 1


def answer(kind: str, **changes) -> Answer:
    about = {
        "modalities": ["image"],
        "metric": "accuracy",
        "rest_modalities": ["text"],
        "fused": "both",
        "rest": "words",
        "scores": {"fused": 0.871, "rest": 0.83},
        "num_rows": 1204,
    }
    about |= {"kind": kind, "value": 0.041, "low": 0.029, "high": 0.053, "differs": {}}
    return Answer(**about | {"p": 0.01, "p_holm": 0.01, "source": "trained"} | changes)


def test_the_sentence_says_it_plainly():
    """Catches a sentence with the sign, the modality or the caveat missing."""
    assert (
        answer_sentence("Y", answer("adds"))
        == "image adds 4.1 points [2.9, 5.3] to text for Y (both 87.1 %, words 83.0 %; 1,204 samples)."
    )
    hurts = answer_sentence("Z", answer("hurts", value=-0.02, low=-0.03, high=-0.01))
    assert hurts.startswith("Fusing by both hurts Z: adding image to text costs 2.0 points [1.0, 3.0]")
    enough = answer_sentence("X", answer("suffices", value=-0.001, low=-0.008, high=0.006))
    assert enough.startswith("text alone suffices for X: adding image changes −0.1 points [−0.8, +0.6]")
    assert "not shown" in answer_sentence("X", answer("unclear"))
    assert "in both, which is not shown of sum" in answer_sentence("X", answer("depends", best_fused="sum"))
    assert "nor does any of the 3 other fused models" in answer_sentence("X", answer("suffices", num_fused=4))
    assert "(mean F1 of a sample's classes: both 87.1 %" in answer_sentence("X", answer("adds", metric="f1_samples"))
    assert "Their training differs: epochs 3 and 9." in answer_sentence("Y", answer("adds", differs={"epochs": [3, 9]}))


# --- a run by the real code -----------------------------------------------------------------------------------------


def stores_of(run: str) -> dict:
    return {
        name: open_store(f"{run}/{v['store']}") for name, v in storage.read_json(run + "/run.json")["variants"].items()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder, make_config(folder, VARIANTS), draw_samples(500))


@pytest.fixture(scope="module")
def insight(run) -> dict:
    return insights(run, stores_of(run))


def test_a_run_is_told_what_each_modality_knows(run, insight):
    """Catches modalities swapped, answers on other rows than both models read, and shares of another model."""
    assert storage.read_json(run + "/insight.json") == insight.to_dict()
    colour = insight.tasks["colour"]  # the text knows nothing of the colour
    kinds = {a.modalities[0]: a.kind for a in colour.answers}
    assert kinds["image"] == "adds"
    assert kinds["text"] != "adds"
    shares = {m: v["value"] for m, v in colour.shapley.shares["accuracy"].values.items()}
    assert shares["image"] > 5 * abs(shares["text"])
    record = storage.read_json(run + "/models/concat/metrics.json")["tasks"]["colour"]
    assert colour.shapley.shares["accuracy"].full == pytest.approx(record["accuracy"])
    assert colour.shapley.num_rows == record["num_rows"]
    for found in insight.tasks.values():
        assert all(not a.differs and a.source == "trained" for a in found.answers)
    results = storage.read_json(run + "/report/results.json")
    for task, found in insight.tasks.items():
        versus = {r["model"]: r["versus"] for r in results["tasks"][task]["rows"]}
        for same in found.answers:
            against = versus[same.fused]
            if same.rest != against["model"]:
                continue
            assert [same.value, same.low, same.high] == pytest.approx(
                [against["accuracy"][k] for k in ("value", "low", "high")]
            )


def test_disagreement_counts_the_rows_that_both_read(run, insight):
    """Catches rows without one of the modalities counted as disagreement, and shares that do not fit together."""
    found = insight.tasks["thing"].disagreement
    patterns = storage.read_json(run + "/models/concat/metrics.json")["tasks"]["thing"]["patterns"]
    assert found.num_rows == patterns["image+text"]["num_rows"]
    assert found.models == {"image": "image", "text": "text"}
    assert sum(found.right_when_differ.values()) + found.none_right_frac == pytest.approx(1)
    for example in found.examples:
        assert len({p.pred for p in example.predictions.values()}) == 2


def test_without_unimodal_variants_the_baselines_answer_and_say_so(run, tmp_path):
    """Catches a run of fused models only that is told nothing, or is told so without where it comes from."""
    copy = str(shutil.copytree(run, tmp_path / "run"))
    for name in ("image", "text"):
        shutil.rmtree(f"{copy}/models/{name}")
    compare(copy)
    found = insights(copy, stores_of(run))
    assert any("logistic regression" in note for note in found.notes)
    for task in found.tasks.values():
        assert {a.source for a in task.answers} == {"baseline"}
        assert {a.fused for a in task.answers} == {"logreg:image+text"}
        assert task.disagreement.models == {"image": "logreg:image", "text": "logreg:text"}


def test_unequal_training_is_told(run, tmp_path):
    """Catches a gain of more epochs sold as a gain of a modality, and a caveat where there is none."""
    copy = str(shutil.copytree(run, tmp_path / "run"))
    card = read_card(copy + "/models/text")
    card.config["training"]["epochs"] = 2
    write_card(copy + "/models/text", card)
    answers = insights(copy, stores_of(run)).tasks["colour"].answers
    differs = {a.rest: a.differs for a in answers}
    assert differs.pop("text") == {"epochs": [6, 2]}
    assert set(map(str, differs.values())) == {"{}"}
    assert ["Their training differs" in a.sentence for a in answers] == [bool(a.differs) for a in answers]


def test_every_subset_of_three_is_asked_once():
    """Catches modalities beyond the second left out of the numbering."""
    expected = {tuple(c) for size in range(4) for c in combinations("abc", size)}
    assert set(subsets("abc")) == expected
