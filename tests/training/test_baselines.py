"""Baselines: what they read, what they leave out, and that they equal scikit-learn where both can be asked."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.training.baselines import Logreg, fit_majorities, logreg_configs
from mmkt_ray.training.linear import linear_result
from tests.configs import build_config, raw_config
from tests.labels import MISSING, UNSEEN, coded, codes_of

CONFIG = build_config(raw_config({"t": "multiclass"}))


def logregs(config, table):
    """Name -> logistic regression on a table, without a folder."""
    found = {}
    for name, own in logreg_configs(config, table).items():
        result, heldout, path = linear_result(own, table)
        found[name] = Logreg(own, "", result.model, heldout, path, result.seconds)
    return found


def baselines(table):
    """name -> what tells probabilities of a table."""
    majorities, fitted = fit_majorities(CONFIG, table), logregs(CONFIG, table)
    found = {"majority": majorities["t"].predict} if majorities else {}
    return found | {name: lambda part, model=model: model.predict(part)["t"] for name, model in fitted.items()}


@pytest.fixture
def table() -> FeatureTable:
    """400 rows, 3 classes; image dense and telling, text sparse and telling in another way; a tenth lacks each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    image = (rng.normal(size=(400, 6)) * [1, 1, 1, 50, 1, 1] + 1.5 * np.eye(6)[labels]).astype(np.float32)
    text = sp.csr_matrix(
        ((rng.random((400, 9)) < 0.1) | ((np.arange(9) % 3 == labels[:, None]) & (rng.random((400, 9)) < 0.3))).astype(
            np.float32
        )
    )
    present = {"image": np.arange(400) % 10 != 0, "text": np.arange(400) % 10 != 5}
    features = {
        "image": np.where(present["image"][:, None], image, 0),
        "text": sp.csr_matrix(sp.diags(present["text"].astype(np.float32)) @ text),
    }
    split = np.array(["train", "train", "train", "test"], dtype=object)[np.arange(400) // 2 % 4]
    ids = np.array([f"s{i}" for i in range(400)], dtype=object)
    return FeatureTable(ids, split, features, present, coded({"t": labels}), {"t": ["a", "b", "c"]})


def test_every_baseline_has_its_standard_name(table):
    """Catches a modality alone left out: the best single modality is what fusion is compared with."""
    assert list(baselines(table)) == ["majority", "logreg:image", "logreg:text", "logreg:image+text"]


def test_a_modality_alone_is_scikit_learns_answer_on_the_rows_that_have_it(table):
    """Catches absent rows (zeros) in the fit or in the scaling, test rows in the training,
    and rows left out of it."""
    train = table.take(table.rows("train"))
    rows = train.present["image"]
    scaler = StandardScaler().fit(train.features["image"][rows].astype(float))
    fitted = logregs(CONFIG, table)["logreg:image"]
    assert fitted.path.num_rows == {"t": rows.sum()}
    width = train.features["image"].shape[1]  # the mean squared length of a standardised row
    model = LogisticRegression(C=1 / fitted.path.l2["t"], tol=1e-8, max_iter=1000).fit(
        scaler.transform(train.features["image"][rows].astype(float)) / np.sqrt(width),
        codes_of(train.labels["t"])[rows],
    )
    test = table.take(table.rows("test"))
    here = test.present["image"]
    found = fitted.predict(test)["t"]
    expected = model.predict_proba(scaler.transform(test.features["image"][here].astype(float)) / np.sqrt(width))
    assert found.shape == (len(test.sample_id), 3)
    assert found[here] == pytest.approx(expected, abs=1e-3)
    assert np.isnan(found[~here]).all()


def test_labels_of_the_test_split_do_not_matter(table):
    """Catches a leak: with other test labels the predictions must be the same bits."""
    other = replace(
        table, labels=coded({"t": (codes_of(table.labels["t"]) + (table.split == "test")) % 3})
    )
    test, again = table.take(table.rows("test")), baselines(other)
    for name, predict in baselines(table).items():
        np.testing.assert_array_equal(predict(test), again[name](test))


def test_the_concatenation_reads_every_row_and_beats_each_modality(table):
    """Catches features of one modality joined to another's rows: together they would be no better than alone."""
    test = table.take(table.rows("test"))
    score = {}
    for name, predict in baselines(table).items():
        proba = predict(test)
        known = np.isfinite(proba).all(axis=1)
        score[name] = (proba[known].argmax(axis=1) == codes_of(test.labels["t"])[known]).mean()
        assert proba[known].sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert np.isfinite(proba).all()
    assert score["logreg:image+text"] > max(score["logreg:image"], score["logreg:text"]) > score["majority"]


def test_majority_predicts_the_train_frequencies(table):
    """Catches frequencies counted over all splits, or over rows without a label."""
    labels = np.where(table.split == "test", 2, np.where(np.arange(400) % 4 == 0, 1, 0))
    labels[(np.arange(400) % 8 == 1) & (table.split == "train")] = MISSING
    proba = baselines(replace(table, labels=coded({"t": labels})))["majority"](table)
    known = labels[(table.split == "train") & (labels >= 0)]
    assert proba[0] == pytest.approx(np.bincount(known, minlength=3) / len(known))


def test_a_task_that_only_one_modality_labels_has_no_concatenation(table):
    """Catches a "fused" baseline on unpaired corpora that is one modality under another name."""
    labels = np.where(table.present["image"] & ~table.present["text"], codes_of(table.labels["t"]), MISSING)
    assert list(baselines(replace(table, labels=coded({"t": labels})))) == ["majority", "logreg:image"]


def test_few_classes_in_train_still_give_all_columns(table):
    """Catches columns of the classes that occur taken for those of the task: every later class would slip."""
    only = replace(
        table, labels=coded({"t": np.where(codes_of(table.labels["t"]) == 1, MISSING, codes_of(table.labels["t"]))})
    )
    test = table.take(table.rows("test"))
    proba = baselines(only)["logreg:image+text"](test)
    assert (proba[:, 1] < 0.01).all()
    truth = codes_of(test.labels["t"])
    assert (proba.argmax(axis=1) == truth)[truth != 1].mean() > 0.8
    one = replace(table, labels=coded({"t": np.where(codes_of(table.labels["t"]) == 2, 2, MISSING)}))
    assert list(baselines(one)) == ["majority"]  # nothing to learn
    nothing = replace(table, labels=coded({"t": np.where(table.split == "train", MISSING, UNSEEN)}))
    assert baselines(nothing) == {}
