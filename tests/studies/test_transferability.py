"""Scores of features before training: against slow formulas, scikit-learn, and what they are for."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.covariance import LedoitWolf, ledoit_wolf_shrinkage

from mmkt_ray.studies import scores, transferability
from mmkt_ray.studies.scores_results import FeatureSet, TrainedScore, Transferability, scores_table
from mmkt_ray.studies.transferability import Moments, h_score, leep, linear_cka, logme
from tests.evaluation.runs import draw_samples, write_store


def draw(num_rows: int = 120, dim: int = 9, num_classes: int = 4, signal: float = 1.0, seed: int = 0):
    """Features (N, D) off centre that know the class as well as `signal` says, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_rows)
    centres = rng.normal(size=(num_classes, dim))
    return rng.normal(size=(num_rows, dim)) + signal * centres[labels] + 2.0, labels


def moments_of(x, labels, num_classes: int = 4) -> Moments:
    return Moments.partial(x, labels[:, None] == np.arange(num_classes))


def slow_logme(x: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """The evidence by its definition, log N(y | 0, I / beta + X X' / alpha), at its maximum over a fine grid."""
    best = []
    for k in range(num_classes):
        y = (labels == k).astype(float)
        found = []
        for alpha in np.geomspace(1e-2, 1e6, 60):
            for beta in np.geomspace(1, 1e3, 60):
                cov = np.eye(len(y)) / beta + x @ x.T / alpha
                logdet = np.linalg.slogdet(2 * np.pi * cov)[1]
                found.append(-0.5 * (logdet + y @ np.linalg.solve(cov, y)))
        best.append(max(found) / len(y))
    return float(np.mean(best))


@pytest.mark.parametrize("dim", [5, 40])
def test_logme_is_the_maximum_of_the_evidence(dim):
    """Catches a wrong term of the evidence, a fixed point that is none, and D > N, where eigenvalues are zero."""
    x, labels = draw(num_rows=24, dim=dim, num_classes=2)
    assert logme(moments_of(x, labels, 2), slice(None)) == pytest.approx(slow_logme(x, labels, 2), abs=0.01)


def test_h_score_is_the_formula():
    """Catches another shrinkage, covariance or between-class covariance than the paper's."""
    x, labels = draw()
    centred = x - x.mean(axis=0)
    fitted = LedoitWolf().fit(x)
    means = np.stack([centred[labels == k].mean(axis=0) for k in range(4)])[labels]
    expected = np.trace(np.linalg.pinv(fitted.covariance_) @ (means.T @ means / len(x))) * (1 - fitted.shrinkage_)
    found = moments_of(x, labels)
    assert transferability.ledoit_wolf_shrinkage(found) == pytest.approx(ledoit_wolf_shrinkage(x))
    assert h_score(found, slice(None)) == pytest.approx(expected)


def test_h_score_of_sets_of_classes_is_the_mean_of_one_against_the_rest():
    """Catches multilabel columns scored as if they excluded each other."""
    x, labels = draw()
    targets = np.stack([labels == 0, labels < 2, np.arange(len(labels)) % 3 == 0], axis=1)
    each = [h_score(moments_of(x, column.astype(int), 2), slice(None)) for column in targets.T]
    assert h_score(Moments.partial(x, targets), slice(None), exclusive=False) == pytest.approx(np.mean(each))


def test_linear_cka_is_the_formula_over_kernels():
    """Catches features that are not centred, or blocks of the Gram matrix mixed up."""
    x, labels = draw(dim=5)
    y = np.random.default_rng(1).normal(size=(len(x), 3)) + x[:, :3]
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(moments_of(np.hstack([x, y]), labels), 5) == pytest.approx(expected)
    rotated = x @ np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    assert linear_cka(moments_of(np.hstack([x, 3 * rotated + 1]), labels), 5) == pytest.approx(1)
    assert linear_cka(moments_of(np.hstack([x, np.ones((len(x), 2))]), labels), 5) is None


def test_leep_is_the_formula():
    """Catches P(y | z) normalised over the wrong axis; and a perfect source must give 0."""
    rng = np.random.default_rng(0)
    source, labels = rng.dirichlet(np.ones(3), size=50), rng.integers(4, size=50)
    joint = np.array([[np.sum(source[labels == y, z]) / 50 for z in range(3)] for y in range(4)])
    given = joint / joint.sum(axis=0)
    expected = np.mean([np.log(sum(given[y, z] * p[z] for z in range(3))) for p, y in zip(source, labels, strict=True)])
    assert leep(source, labels, 4) == pytest.approx(expected)
    assert leep(np.eye(4)[labels], labels, 4) == pytest.approx(0)


def test_parts_in_any_tree_give_what_the_whole_gives():
    """Catches statistics that do not merge: scores would depend on how the store is cut into parts."""
    x, labels = draw()
    x[np.random.default_rng(3).random(x.shape) < 0.8] = 0
    cuts = [moments_of(sp.csr_matrix(x[rows]), labels[rows]) for rows in np.array_split(np.arange(len(x)), 5)]
    merged = Moments.merge([Moments.merge(cuts[:2]), Moments.merge([cuts[4], cuts[2]]), cuts[3]])
    whole = moments_of(x, labels)
    for score in (logme, h_score):
        assert score(merged, slice(None)) == pytest.approx(score(whole, slice(None)))
    assert linear_cka(merged, 4) == pytest.approx(linear_cka(whole, 4))


@pytest.mark.parametrize("score", [logme, h_score])
def test_more_signal_scores_higher(score):
    """Catches a score with the wrong sign."""
    found = [score(moments_of(*draw(num_rows=400, signal=s)), slice(None)) for s in (0.0, 0.5, 2.0)]
    assert found[0] < found[1] < found[2]


@pytest.fixture
def store(tmp_path):
    return write_store(str(tmp_path / "run" / "features" / "union"), draw_samples(500))


def test_a_store_is_scored_before_anything_is_trained(store, tmp_path):
    """Catches modalities mixed up, unlabelled or test rows that count,
    and a run folder that must be finished first."""
    run = str(tmp_path / "run")
    found = scores.transferability(run, {"a": store, "b": store})
    assert Transferability.read(run + "/transferability.json") == found
    table = store.table()
    for task in ("colour", "thing"):
        rows = {tuple(s.modalities): s for s in found.tasks[task].sets}
        assert list(rows) == [("image",), ("text",), ("image", "text")]
        wanted = (table.split == "train") & table.labels[task].known & table.present["image"] & table.present["text"]
        assert rows["image", "text"].num_rows == wanted.sum()
        assert rows["image",].trained is None
    colour = {tuple(s.modalities): s for s in found.tasks["colour"].sets}
    # the text knows nothing of it
    assert all(getattr(colour["image",], s) > getattr(colour["text",], s) for s in scores.SCORES)
    rows = (table.split == "train") & table.labels["thing"].known & table.present["image"]
    image, labels = table.features["image"][rows], table.labels["thing"].values[rows]
    score = next(s.h_score for s in found.tasks["thing"].sets if s.modalities == ["image"])
    assert score == pytest.approx(h_score(moments_of(image, labels), slice(None)), rel=1e-4)
    assert [c.num_rows for c in found.cka] == [
        int(((table.split == "train") & table.present["image"] & table.present["text"]).sum())
    ]
    assert "LogME" in scores_table(found)


def test_features_that_are_too_wide_are_left_out_with_the_reason(store, tmp_path, monkeypatch):
    """Catches a D x D matrix of a bag of words that takes all memory."""
    monkeypatch.setattr(scores, "MAX_WIDTH", 20)
    found = scores.transferability(str(tmp_path / "run"), {"a": store})
    assert [s.modalities for s in found.skipped] == [["text"], ["image", "text"]]
    assert "reduce" in found.skipped[0].reason
    assert {len(t.sets) for t in found.tasks.values()} == {1}


def test_the_rank_correlation_is_told_only_where_there_is_an_order():
    """Catches a correlation of two points sold as evidence, and NaN in a JSON file."""

    def sets(*pairs):
        about = {"store": "s", "modalities": [], "encoders": {}, "num_rows": 1, "dim": 1, "h_score": 0.0}
        return [
            FeatureSet(logme=s, trained=TrainedScore(model="m", accuracy=a) if a else None, **about) for s, a in pairs
        ]

    assert scores._rank_correlation(sets((1, 0.5), (2, 0.6), (3, None)), "logme") is None
    assert scores._rank_correlation(sets((1, 0.5), (2, 0.5), (3, 0.5)), "logme") is None
    found = scores._rank_correlation(sets((1, 0.5), (2, 0.6), (3, 0.9)), "logme")
    assert (found.num, found.spearman, found.weighted_kendall) == pytest.approx((3, 1, 1))
