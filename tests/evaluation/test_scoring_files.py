"""Scores of new labelled files, from the predictions beside the labels."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

from mmkt_ray.cli import main
from mmkt_ray.evaluation.scoring_files import score_task, scores_text
from mmkt_ray.inference.rows import prediction_columns
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.metrics import FilesMetrics
from tests.evaluation.runs import KINDS, make_config

NAMES = {"thing": ["bird", "boat", "car"], "warm": ["no", "yes"], "tags": ["animal", "flies"]}
NUM_ROWS = 90


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, tasks=KINDS)


def rows_of(task):
    """Rows of predictions.parquet: some without a label, one of an unknown class, one that the model can't read."""
    rng, names = np.random.default_rng(0), NAMES[task]
    codes = rng.integers(0, len(names), NUM_ROWS)
    proba = rng.dirichlet(np.ones(len(names)), NUM_ROWS) + np.eye(len(names))[codes] / 2
    proba = (proba / proba.sum(axis=1, keepdims=True)).astype(np.float32)
    proba[3] = np.nan
    label = [names[c] for c in codes]
    if KINDS[task] == "multilabel":
        label = [[name] if i % 3 else [] for i, name in enumerate(label)]
    label[5] = None
    if task == "thing":
        label[7] = "unicorn"
    missing = [["text"] if i % 2 else [] for i in range(NUM_ROWS)]
    columns = {"missing": pa.array(missing, pa.list_(pa.string())), f"{task}_label": pa.array(label)}
    table = pa.table(columns | prediction_columns(task, proba, names, task_kind(KINDS[task])))
    return table, label, proba


def test_the_scores_of_a_file_are_scikit_learns(config):
    """Catches labels beside another row's prediction, an unknown class that is left out,
    and a missing label that counts."""
    table, label, proba = rows_of("thing")
    found = score_task(table, "thing", task_kind("multiclass"), NAMES["thing"], config)
    kept = [i for i in range(NUM_ROWS) if i not in (3, 5)]
    truth, pred = np.array(label, object)[kept].astype(str), np.array(NAMES["thing"])[proba[kept].argmax(axis=1)]
    assert (found.num_rows, found.num_unseen, found.num_unreadable, found.unseen) == (88, 1, 1, {"unicorn": 1})
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, pred))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, pred, average="macro"))
    classes = dict(zip(NAMES["thing"], recall_score(truth, pred, average=None, labels=NAMES["thing"]), strict=True))
    assert {name: c["recall"] for name, c in found.per_class.items()} == pytest.approx(classes)
    known = [i for i in kept if i != 7]
    expected = log_loss([label[i] for i in known], proba[known].astype(float), labels=NAMES["thing"])
    interval = found.intervals["log_loss"]
    assert interval["value"] == pytest.approx(expected, abs=1e-5)
    assert 0 < interval["low"] < interval["value"] < interval["high"]
    half = [i for i in kept if i % 2 == 0]
    assert list(found.patterns) == ["image+text", "image"]
    assert found.patterns["image+text"].num_rows == len(half)
    right = np.array([label[i] == NAMES["thing"][proba[i].argmax()] for i in half])
    assert found.patterns["image+text"]["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize("task", KINDS)
def test_a_file_of_any_kind_of_task_is_told(config, task):
    """Catches a kind of task, or a file without a usable row, that has no table."""
    table, _, _ = rows_of(task)
    none = table.filter(pa.array([i == 5 for i in range(NUM_ROWS)]))
    for rows, num in ((table, 88), (none, 0)):
        found = score_task(rows, task, task_kind(KINDS[task]), NAMES[task], config)
        about = {"model": "m", "inputs": [], "predictions": "p", "confidence": 0.95, "bootstrap_samples": 9}
        text = scores_text(FilesMetrics(num_rows=len(rows), tasks={task: found}, **about))
        assert f"{task} ({KINDS[task]}): {num} labelled rows" in text
        assert ("accuracy " in text) == (num > 0)
        assert all((name in text) == (num > 0) for name in NAMES[task])
        assert ("count as wrong ('unicorn' 1)" in text) == (task == "thing" and num > 0)


@pytest.mark.parametrize("given", [[], ["--model", "m"], ["c.yaml", "--model", "m", "--data", "x", "--out", "o"]])
def test_evaluate_wants_a_config_or_a_model_with_files(given, capsys):
    """Catches a config or a file that is dropped without a word."""
    assert main(["evaluate", *given]) == 2
    assert "takes either CONFIG" in capsys.readouterr().err
