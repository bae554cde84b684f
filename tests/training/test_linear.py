"""Models without towers: scikit-learn's logistic regression, its penalty chosen as a loop over scikit-learn would."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import predict_logits, predict_table
from mmkt_ray.scoring.heldout import make_folds
from mmkt_ray.training.linear import fit_linear, is_linear, linear_result
from mmkt_ray.training.logistic import Problem, make_block, minimise
from tests.configs import IMAGE_AND_TEXT, build_config, raw_config
from tests.labels import MISSING, UNSEEN, coded, codes_of

KINDS = {"three": "multiclass", "two": "binary", "tags": "multilabel"}
SPARSE = {"image": False, "text": True, "wide": False}


def config_of(modalities=("image", "text", "wide"), tasks=tuple(KINDS), **overrides):
    read = {m: IMAGE_AND_TEXT["text" if s else "image"] for m, s in SPARSE.items()}
    model = {"num_levels": 0, "modalities": list(modalities), "tasks": list(tasks), "experts": False}
    raw = raw_config(KINDS, {c: c for c in (*SPARSE, *KINDS)}, modalities=read, model=model, training={"l2": 0.5})
    return build_config(raw, **overrides)


@pytest.fixture(scope="module")
def table():
    """300 rows: 10 dense numbers of unlike scale, 60 sparse ones, and 400 dense ones, more than rows;
    each lacks a tenth."""
    rng, num = np.random.default_rng(0), 300
    hidden = rng.normal(size=(num, 6))
    image = hidden @ rng.normal(size=(6, 10)) * np.geomspace(0.1, 50, 10) + rng.normal(size=(num, 10))
    text = np.where(rng.random((num, 60)) < 0.1, np.exp(hidden @ rng.normal(size=(6, 60)) / 2), 0)
    wide = hidden @ rng.normal(size=(6, 400)) + 3 * rng.normal(size=(num, 400)) + 7
    present = {m: np.arange(num) % 10 != i for i, m in enumerate(SPARSE)}
    features = {"image": image, "text": text, "wide": wide}
    features = {m: (f * present[m][:, None]).astype(np.float32) for m, f in features.items()}
    features["text"] = sp.csr_matrix(features["text"])
    three = (hidden[:, :3] + rng.gumbel(size=(num, 3))).argmax(axis=1)
    tags = (hidden[:, 2:6] + rng.normal(size=(num, 4)) > 0.5).astype(np.int8)
    labels = {"three": three, "two": (hidden[:, 4] > rng.normal(size=num)).astype(np.int64), "tags": tags}
    labels["three"][7::31], labels["three"][9::31], labels["tags"][::23] = MISSING, UNSEEN, MISSING
    split = np.resize(["train", "train", "val", "train", "test"], num).astype(object)
    names = {"three": ["a", "b", "c"], "two": ["no", "yes"], "tags": ["p", "q", "r", "s"]}
    return FeatureTable(np.array([f"s{i}" for i in range(num)]), split, features, present, coded(labels, KINDS), names)


def scaled(table, modality, rows):
    """A modality as scikit-learn is to see it: standardised by `rows`, absent rows zero, mean squared row norm 1."""
    x, there = table.features[modality], table.present[modality]
    if sp.issparse(x):
        x = x.toarray().astype(float)
    else:
        own = x[rows & there].astype(float)
        x = np.where(there[:, None], (x - own.mean(axis=0)) / own.std(axis=0), 0)
    return x / np.sqrt((x[rows & there] ** 2).sum(axis=1).mean())


def scikit_learn(x, y, rows, l2, class_weight=None):
    """Probabilities (N, C) of scikit-learn's optimum fitted to some rows."""

    def fit(target):
        model = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=20_000, class_weight=class_weight)
        return model.fit(x[rows], target[rows]).predict_proba(x)

    return fit(y) if y.ndim == 1 else np.stack([fit(column)[:, 1] for column in y.T], axis=1)


def learnt(table):
    return np.isin(table.split, ["train", "val"]) & np.any(list(table.present.values()), axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("class_weights", [None, "balanced"])
@pytest.mark.parametrize("modalities", [("image",), ("text",), ("wide",), ("image", "text", "wide")])
@pytest.mark.parametrize("l2", [0.05, 5.0])
def test_weights_are_scikit_learns_at_the_same_penalty(table, modalities, class_weights, l2):
    """Catches a fit that stops short of the optimum, a penalty on the bias, a rotation that is not undone, absent
    rows in the statistics, rows without a label in the loss."""
    weights = {"training__class_weights": class_weights} if class_weights else {}
    tasks = ("three", "two") if class_weights else tuple(KINDS)  # one-vs-rest "balanced" is another weighting
    found = predict_table(fit_linear(config_of(modalities, tasks, training__l2=l2, **weights), table).model, table)
    rows = learnt(table) & np.any([table.present[m] for m in modalities], axis=0)
    x = np.hstack([scaled(table, m, rows) for m in modalities])
    for t in tasks:
        y = codes_of(table.labels[t])
        known = rows & ((y if y.ndim == 1 else y[:, 0]) >= 0)
        expected = scikit_learn(x, y, known, l2, class_weights)
        np.testing.assert_allclose(found[t][known], expected[known], atol=1e-3)
        np.testing.assert_allclose(found[t], expected, atol=5e-3)  # of new rows with words that hardly occur


def test_the_penalty_is_the_one_a_loop_over_scikit_learn_chooses(table):
    """Catches a choice by train loss, by rows that the model has seen, or of the last penalty of the path."""
    config = config_of(("image", "text"), ("three",), training__l2=None)
    found = fit_linear(config, table)
    folds, y = make_folds(table, config.seed), codes_of(table.labels["three"])
    rows = learnt(table) & (table.present["image"] | table.present["text"])
    x, known = np.hstack([scaled(table, m, rows) for m in ("image", "text")]), rows & (y >= 0)
    losses = []
    for record in found.path:
        proba = np.zeros((len(y), 3))
        for part in range(2):
            held = known & folds.held(part)
            proba[held] = scikit_learn(x, y, known & ~folds.held(part), record["l2"])[held]
        held = known & np.isin(folds.fold, [0, 1])
        losses.append(log_loss(y[held], proba[held]))
    assert [r["log_loss"] for r in found.path] == pytest.approx(losses, abs=3e-3)
    assert found.l2["three"] == found.path[int(np.argmin(losses))]["l2"] == found.path[-2]["l2"]
    assert len(found.path) > 3
    assert losses[-1] > losses[-2] < losses[0]


def test_held_out_logits_are_of_models_that_have_not_seen_the_row(table):
    """Catches logits of the final model among them, and a subset's that another modality has told something."""
    config = config_of(("image", "text"), ("three", "tags"))
    found = fit_linear(config, table)
    folds, heldout = make_folds(table, config.seed), found.heldout
    assert set(heldout.logits) == {"image", "text", "image+text"}
    assert (np.diff(heldout.rows) > 0).all()
    rows = learnt(table) & (table.present["image"] | table.present["text"])
    assert set(heldout.rows) == set(np.flatnonzero(rows & np.isin(folds.fold, range(folds.num_held))))
    x, y = np.hstack([scaled(table, m, rows) for m in ("image", "text")]), codes_of(table.labels["three"])
    own = folds.held(1)[heldout.rows]
    expected = scikit_learn(x, y, rows & (y >= 0) & ~folds.held(1), 0.5)[heldout.rows][own]
    z = np.exp(heldout.logits["image+text"]["three"][own])
    np.testing.assert_allclose(z / z.sum(axis=1, keepdims=True), expected, atol=5e-3)
    hidden = replace(table, present=table.present | {"text": np.zeros(len(y), bool)})
    again = fit_linear(config, table).heldout.logits["image"]["three"]
    np.testing.assert_array_equal(again, heldout.logits["image"]["three"])  # and the same bits again
    lacks = ~table.present["text"][heldout.rows]
    both = heldout.logits["image+text"]["three"]
    np.testing.assert_allclose(both[lacks], again[lacks], atol=1e-5)
    assert np.isfinite(predict_logits(found.model, hidden)["three"]).all()


@pytest.mark.slow
def test_absent_and_constant_classes_get_finite_unlikely_logits(table):
    """Catches a bias that runs off to infinity: a class that a fold lacks, a class that no row or every row has."""
    three, tags = (codes_of(table.labels[t]) for t in ("three", "tags"))
    first = np.flatnonzero(make_folds(table, 0).held(0) & (three == 2))
    three = np.where(three == 2, 0, three)
    three[first] = 2  # only there
    tags = np.where(tags < 0, tags, tags * [1, 1, 0, 1])
    tags[tags[:, 0] >= 0, 3] = 1
    labels = {"three": three, "two": codes_of(table.labels["two"]), "tags": tags.astype(np.int8)}
    found = fit_linear(config_of(training__l2=None), replace(table, labels=coded(labels)))
    proba = predict_table(found.model, table)
    assert (proba["tags"][:, 2] < 0.01).all()
    assert (proba["tags"][:, 3] > 0.99).all()
    for by_task in found.heldout.logits.values():
        assert all(np.isfinite(z).all() and np.abs(z).max() < 100 for z in by_task.values())
    own = make_folds(table, 0).held(0)[found.heldout.rows]
    z = found.heldout.logits["image+text+wide"]["three"][own]
    assert (z.argmax(axis=1) != 2).all()
    without = replace(table, labels=coded({**labels, "three": np.where(three == 2, MISSING, three)}))
    assert (predict_table(fit_linear(config_of(tasks=["three"]), without).model, table)["three"][:, 2] < 0.05).all()


@pytest.mark.slow
def test_labels_of_test_rows_do_not_matter_and_one_class_is_refused(table):
    """Catches a leak from test, and a task with nothing to learn that is fitted all the same."""
    test = table.split == "test"
    codes = {t: codes_of(y) for t, y in table.labels.items()}
    other = {t: np.where(test if y.ndim == 1 else test[:, None], 0, y) for t, y in codes.items()}
    a, b = (fit_linear(config_of(), t).model.state_dict() for t in (table, replace(table, labels=coded(other, KINDS))))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    with pytest.raises(DataError, match="are of class 'a'"):
        fit_linear(
            config_of(tasks=["three"]), replace(table, labels=table.labels | coded({"three": np.zeros(300, np.int64)}))
        )


@pytest.mark.slow
def test_the_result_reads_like_any_fit(table):
    """Catches val scores of rows that were learnt from: there they would be much better."""
    result, heldout, extra = linear_result(config_of(training__l2=None), table)
    y, z = codes_of(table.labels["three"])[heldout.rows], heldout.logits["image+text+wide"]["three"]
    scored = y != MISSING
    assert result.val.metrics["accuracy"]["three"] == pytest.approx((z.argmax(axis=1) == y)[scored].mean())
    assert result.best_epoch == 1
    assert result.epochs[0].val == result.val
    assert set(extra.l2) == set(KINDS)
    assert sum(result.model.num_parameters_by_part().values()) == sum(p.numel() for p in result.model.parameters())


def test_what_is_linear():
    """Catches a setting that changes the problem and is passed over in silence."""
    assert is_linear(config_of())
    assert is_linear(config_of(model__missing="drop", training__class_weights="balanced"))
    for key, value in {
        "model.num_levels": 1,
        "model.fusion": "sum",
        "model.missing": "token",
        "training.resample": "balanced",
        "training.generate": "smote",
        "training.balance": "ogm_ge",
        "training.task_weighting": "uncertainty",
        "training.label_smoothing": 0.1,
        "training.augment.noise": 0.1,
        "training.transfer.teachers": ["x/y"],
    }.items():
        assert not is_linear(config_of().with_overrides({key: value})), key


@pytest.mark.slow
def test_fits_side_by_side_are_each_fit_alone():
    """Catches step lengths or pairs of L-BFGS that leak from one fold, or one class, into another."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 30)).astype(np.float32)
    tags = (x[:, :3] + rng.normal(size=(200, 3)) > 1).astype(np.int8)
    used = rng.random((200, 3)) < 0.7
    blocks = [make_block(x)]
    several = tags.sum(axis=1).astype(np.int64)
    for labels, *how in ((tags, np.ones(3), False), (several, np.ones(several.max() + 1), True)):
        every = Problem(blocks, labels, used, *how)
        together = minimise(every, 0.3)
        for k in range(3):
            alone = Problem(blocks, labels, used[:, [k]], *how)
            ours, theirs = every.original(together, k), alone.original(minimise(alone, 0.3), 0)
            np.testing.assert_allclose(ours[0][0], theirs[0][0], atol=2e-3)
            np.testing.assert_allclose(ours[1], theirs[1], atol=2e-3)
