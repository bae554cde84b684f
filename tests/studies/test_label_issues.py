"""Suspect rows: planted faults come first, and rows that nothing is known against are left alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.features.audit import Audit, LabelIssueCounts
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.studies import label_issues
from mmkt_ray.studies.label_issues import OutOfFold, divergence, find_label_issues, predict_out_of_fold
from tests.configs import build_config, raw_config
from tests.labels import MISSING, codes_of, labels_of

NONE = LabelIssueCounts(label=0, modalities=0)
CLASSES = ["bird", "boat", "car", "cat"]


class TableStore:
    """A store whose rows are already in memory."""

    def __init__(self, uri: Path, table: FeatureTable) -> None:
        self.uri, self.rows, self.manifest = str(uri), table, SimpleNamespace(fingerprint="s1")

    def table(self, modalities: list[str], tasks: list[str]) -> FeatureTable:
        return self.rows


def make_config(**task: Any) -> Config:
    return build_config(raw_config({"thing": "multiclass"}) | {"tasks": {"thing": task}})


def make_table(
    labels: np.ndarray, kind: str = "multiclass", truth: np.ndarray | None = None, **shown: np.ndarray
) -> FeatureTable:
    """Train rows whose features say `truth` (by default the labels), or per modality what `shown` says."""
    rng = np.random.default_rng(1)
    features, truth = {}, labels if truth is None else truth
    for modality, dim in (("image", 12), ("text", 20)):
        said = shown.get(modality, truth)
        features[modality] = rng.normal(size=(len(labels), dim)).astype(np.float32)
        features[modality][:, : len(CLASSES)] += 3 * (said if said.ndim == 2 else np.eye(len(CLASSES))[said])
    ids = np.array([f"s{i}" for i in range(len(labels))], dtype=object)
    split = np.array(["train"] * len(labels), dtype=object)
    present = {m: np.ones(len(labels), dtype=bool) for m in features}
    return FeatureTable(ids, split, features, present, {"thing": labels_of(labels, kind)}, {"thing": CLASSES})


def rows_of(frame: pd.DataFrame, kind: str) -> np.ndarray:
    """Row numbers of the suspects of one kind, most suspect first."""
    return frame[frame.kind == kind].sample_id.str.removeprefix("s").astype(int).to_numpy()


@pytest.fixture
def planted() -> tuple[FeatureTable, np.ndarray]:
    """1,200 rows, 3 % of them with another class's label; and which they are."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 1200)
    wrong = rng.permutation(1200)[:36]
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + rng.integers(1, 4, 36)) % 4
    return make_table(labels, truth=truth), wrong


def test_planted_wrong_labels_come_first(tmp_path, planted):
    """Catches in-sample predictions, which agree with the wrong labels, and a ranking upside down."""
    table, wrong = planted
    result = find_label_issues(TableStore(tmp_path, table), make_config(), str(tmp_path / "suspects.parquet"))
    frame = pd.read_parquet(tmp_path / "suspects.parquet")
    found = rows_of(frame, "label")
    assert np.isin(found[:36], wrong).mean() > 0.85  # 0.03 by chance
    assert len(found) < 60
    assert frame.score.is_monotonic_decreasing
    first = frame.iloc[0]
    assert (first.label, first.predicted) == (
        CLASSES[table.labels["thing"].values[int(first.sample_id[1:])]],
        first.predicted,
    )
    assert first.image_confidence < 0.2
    assert Audit.read(str(tmp_path / "audit.json")).suspects == result
    assert result.num_suspects["thing"].label == len(found)
    assert len(result.top) == 20


def test_the_audit_is_extended_not_replaced(tmp_path, planted):
    """Catches suspects that wipe out the duplicates found before, and a second run that adds them twice."""
    storage.write_json(str(tmp_path / "audit.json"), {"num_rows": 7})
    for _ in range(2):
        find_label_issues(TableStore(tmp_path, planted[0]), make_config(), str(tmp_path / "suspects.parquet"))
    audit = storage.read_json(str(tmp_path / "audit.json"))
    assert sorted(audit) == ["num_rows", "suspects"]
    assert audit["num_rows"] == 7


def test_modalities_that_contradict_each_other(tmp_path):
    """Catches swapped captions that pass as long as one modality agrees with the label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1200)
    swapped, said = rng.permutation(1200)[:30], labels.copy()
    said[swapped] = (labels[swapped] + 1) % 4
    find_label_issues(
        TableStore(tmp_path, make_table(labels, text=said)), make_config(), str(tmp_path / "suspects.parquet")
    )
    frame = pd.read_parquet(tmp_path / "suspects.parquet")
    found = rows_of(frame, "modalities")
    assert np.isin(found[:15], swapped).mean() > 0.8  # 0.025 by chance
    assert np.isin(swapped, found).mean() > 0.6
    assert len(found) < 60
    top = frame[frame.kind == "modalities"].iloc[0]
    row = int(top.sample_id[1:])
    assert top.predicted == f"image: {CLASSES[labels[row]]}; text: {CLASSES[said[row]]}"


def test_multilabel(tmp_path):
    """Catches a multilabel task that is skipped, or whose missing labels are taken for classes."""
    rng = np.random.default_rng(0)
    truth = (rng.random((1200, 4)) < 0.4).astype(np.int8)
    labels, wrong = truth.copy(), rng.permutation(1200)[:36]
    labels[wrong] = 1 - truth[wrong]
    labels[np.setdiff1d(np.arange(20), wrong)] = MISSING
    table = make_table(labels, "multilabel", truth=truth)
    find_label_issues(TableStore(tmp_path, table), make_config(kind="multilabel"), str(tmp_path / "suspects.parquet"))
    frame = pd.read_parquet(tmp_path / "suspects.parquet")
    assert np.isin(rows_of(frame, "label")[:30], wrong).mean() > 0.85
    row = int(frame.iloc[0].sample_id[1:])
    assert frame.iloc[0].label == "|".join(np.array(CLASSES)[labels[row] == 1])


def test_only_labelled_train_rows_of_common_classes_are_judged(tmp_path, planted):
    """Catches suspects in the test split, and the single sample of a class held for wrong as no fold has learnt
    it."""
    table, wrong = planted
    table.split[wrong[:18]] = "test"
    labels = codes_of(table.labels["thing"])
    labels[wrong[18:22]] = MISSING
    labels[labels == 3] = 2
    labels[wrong[22:25]] = 3  # three rows: fewer than folds
    table.labels["thing"] = labels_of(labels)
    result = find_label_issues(TableStore(tmp_path, table), make_config(), str(tmp_path / "suspects.parquet"))
    found = pd.read_parquet(tmp_path / "suspects.parquet").sample_id
    assert not set(found) & {f"s{i}" for i in wrong[:25]}
    assert result.num_rows == {"thing": 1200 - 25}


def test_missing_modalities_and_sparse_features(tmp_path, planted):
    """Catches rows without a modality judged by zeros, and sparse features that the fit cannot read."""
    table, wrong = planted
    table.features["text"] = sp.csr_matrix(np.maximum(table.features["text"], 0))
    table.present["image"][:400] = False
    table.features["image"][:400] = 0
    find_label_issues(TableStore(tmp_path, table), make_config(), str(tmp_path / "suspects.parquet"))
    frame = pd.read_parquet(tmp_path / "suspects.parquet")
    found = rows_of(frame, "label")
    assert np.isin(found[:30], wrong).mean() > 0.8
    assert (
        frame.set_index("sample_id")
        .image_confidence.isna()
        .equals(
            frame.set_index("sample_id").index.str.removeprefix("s").astype(int).to_series(index=frame.sample_id) < 400
        )
    )
    assert not np.isin(rows_of(frame, "modalities"), np.arange(400)).any()


def test_a_modality_that_tells_nothing_has_no_say(planted):
    """Catches noise that is averaged in, or that contradicts the good modality in every row."""
    table, _ = planted
    table.features["image"] = np.random.default_rng(5).normal(size=(1200, 200)).astype(np.float32)
    predicted = predict_out_of_fold(table, "thing", make_config())
    assert predicted is not None
    assert predicted.bits["image"] == 0 < predicted.bits["text"]
    assert np.allclose(predicted.combined(), predicted.proba["text"], atol=1e-4)
    assert (divergence(predicted) == 0).all()


def test_inputs_of_the_task(planted):
    """Catches a modality heard that the task may not read."""
    predicted = predict_out_of_fold(planted[0], "thing", make_config(inputs=["text"]))
    assert predicted is not None
    assert list(predicted.proba) == ["text"]


def test_too_few_rows_give_no_suspects(tmp_path, planted):
    """Catches a crash of the cross-validation on a small train split."""
    few = planted[0].take(np.arange(8))
    result = find_label_issues(TableStore(tmp_path, few), make_config(), str(tmp_path / "suspects.parquet"))
    assert (result.num_rows, result.num_suspects["thing"], result.top) == ({"thing": 0}, NONE, [])
    assert pd.read_parquet(tmp_path / "suspects.parquet").sample_id.empty


def test_divergence_equals_the_formula(planted):
    """Catches logarithms of another base, and absent modalities that count as agreeing ones."""
    from scipy.spatial.distance import jensenshannon

    table = planted[0].take(np.arange(3))
    image = np.array([[0.7, 0.1, 0.1, 0.1], [1, 0, 0, 0], [np.nan] * 4])
    text = np.array([[0.1, 0.6, 0.2, 0.1], [0, 1, 0, 0], [0.25] * 4])
    predicted = OutOfFold(table, "thing", {"image": image, "text": text}, {"image": 1.0, "text": 1.0})
    expected = [jensenshannon(image[0], text[0], base=2) ** 2, 1.0, 0.0]
    assert divergence(predicted) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_modalities_that_tell_nothing_give_no_suspects(tmp_path: Path, kind: str) -> None:
    """A run that ends in `min() arg is an empty sequence` after all its work,
    as no modality tells anything of a task."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, (200, 4)) if kind == "multilabel" else rng.integers(0, 4, 200)
    table = make_table(labels, kind)
    for features in table.features.values():
        features[:] = 1.0
    config = make_config(kind=kind)
    predicted = predict_out_of_fold(table, "thing", config)
    assert predicted is not None
    assert predicted.telling() == {}
    found = find_label_issues(TableStore(tmp_path, table), config, str(tmp_path / "s.parquet"))
    assert found.num_suspects == {"thing": NONE}


@pytest.mark.parametrize("sparse", [False, True])
def test_no_train_rows_and_one_class_give_no_suspects(tmp_path: Path, sparse: bool) -> None:
    """Libraries that are handed none, or one class: scikit-learn's `Found array with 0 sample(s)`."""
    for num_rows in (0, 1, 60):
        table = make_table(np.zeros(num_rows, dtype=np.int64))
        if sparse:
            wide = {m: sp.random(num_rows, 300, 0.1, "csr", np.float32, 0) for m in table.features}
            table.features.update(wide)
        found = find_label_issues(TableStore(tmp_path, table), make_config(), str(tmp_path / "s.parquet"))
        assert found.num_suspects == {"thing": NONE}


def test_a_seed_of_more_than_32_bits(tmp_path: Path, planted: tuple[FeatureTable, np.ndarray]) -> None:
    """scikit-learn's traceback after training where the seed is a time, such as 20241129184300."""
    table, _ = planted
    config = make_config().with_overrides({"seed": 20241129184300})
    assert (
        find_label_issues(TableStore(tmp_path, table), config, str(tmp_path / "s.parquet")).num_suspects["thing"].label
    )
    wide = sp.random(50, 300, 0.1, "csr", np.float32, 0)
    assert label_issues._dense(wide, config.seed).shape == (50, min(label_issues.SPARSE_DIM, 50))
