"""Rows left out, labels kept, rows drawn more often, rows made up."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.training.batches import usable_rows
from mmkt_ray.training.methods.imbalance import (
    GROWTH,
    add_synthetic,
    keep_labels,
    leave_out,
    read_excluded,
    sampling_weights,
)
from tests.labels import MISSING, coded, codes_of

CLASSES = {"shape": ["big", "mid", "small", "tiny"], "tags": ["a", "b", "c"]}


def skewed_table(num_rows=260):
    """Classes of 200, 45, 14 and 1 rows; dense and sparse features, each missing somewhere;
    tags on half of the rows."""
    rng = np.random.default_rng(1)
    shape = np.repeat([0, 1, 2, 3], [200, 45, 14, 1])[rng.permutation(num_rows)]
    tags = (rng.random((num_rows, 3)) < [0.5, 0.1, 0.01]).astype(np.int8)
    tags[0] = [1, 1, 1]
    tags[rng.random(num_rows) < 0.5] = MISSING
    tags[0] = [1, 1, 1]
    present = {m: rng.random(num_rows) < 0.8 for m in ("image", "text")}
    present["image"] |= ~present["text"]
    image = rng.normal(size=(num_rows, 4)) * present["image"][:, None]
    text = rng.random((num_rows, 50)) * (rng.random((num_rows, 50)) < 0.1) * present["text"][:, None]
    return FeatureTable(
        np.array([f"s{i}" for i in range(num_rows)], dtype=object),
        np.full(num_rows, "train", dtype=object),
        {"image": image.astype(np.float32), "text": sp.csr_matrix(text, dtype=np.float32)},
        present,
        coded({"shape": shape, "tags": tags}),
        CLASSES,
    )


def dense(features):
    return features.toarray() if sp.issparse(features) else features


def test_labels_kept_are_nested_and_every_class_keeps_its_share():
    """Catches a 1 % that is no part of the 10 %, a class that loses all its labels,
    and labels of other rows changed."""
    table = skewed_table()
    rows = np.arange(10, 260)
    kept = {f: keep_labels(table, rows, dict.fromkeys(table.labels, f), seed=3).labels for f in (0.01, 0.1, 0.5, 1.0)}
    for small, large in ((0.01, 0.1), (0.1, 0.5), (0.5, 1.0)):
        for t in CLASSES:
            assert (kept[large][t].labelled | ~kept[small][t].labelled).all()
    for t, values in kept[0.1].items():
        mask = values.labelled
        assert values[mask].same_as(table.labels[t][mask])
        assert values[:10].same_as(table.labels[t][:10])
    before = np.bincount(table.labels["shape"].values[rows])
    after = np.bincount(kept[0.1]["shape"].values[rows][kept[0.1]["shape"].known[rows]])
    assert after.tolist() == [max(1, round(0.1 * n)) for n in before]
    everyone = (codes_of(table.labels["tags"])[rows] == 1).any(axis=0)
    assert ((codes_of(kept[0.01]["tags"])[rows] == 1).any(axis=0) == everyone).all()
    assert kept[0.1]["tags"].labelled[rows].mean() < 0.1
    assert kept[1.0]["tags"].same_as(table.labels["tags"])


def test_which_labels_are_kept_depends_on_the_seed_and_not_on_the_other_tasks():
    """Catches models of a comparison that learn from different labels because one has a task more."""
    table, rows = skewed_table(), np.arange(260)
    alone = dataclasses.replace(table, labels={"shape": table.labels["shape"]})
    both = keep_labels(table, rows, dict.fromkeys(table.labels, 0.2), seed=0).labels["shape"]
    assert both.same_as(keep_labels(alone, rows, dict.fromkeys(alone.labels, 0.2), seed=0).labels["shape"])
    assert not both.same_as(keep_labels(table, rows, dict.fromkeys(table.labels, 0.2), seed=1).labels["shape"])


def test_named_train_rows_are_left_out(tmp_path):
    """Catches test rows taken out with the suspects, a file of another run that goes unnoticed,
    a file without the column."""
    table = skewed_table()
    table.split[5] = "test"
    uri = str(tmp_path / "suspects.parquet")
    storage.write_table(uri, pa.table({"sample_id": ["s3", "s5", "elsewhere"], "score": [1.0, 2.0, 3.0]}))
    assert np.flatnonzero(leave_out(table, read_excluded(uri)).split != table.split).tolist() == [3]
    storage.write_table(uri, pa.table({"sample_id": ["x", "y"]}))
    with pytest.raises(DataError, match="none of the 2 sample_ids"):
        leave_out(table, read_excluded(uri))
    storage.write_table(uri, pa.table({"id": ["s3"]}))
    with pytest.raises(DataError, match="column sample_id"):
        read_excluded(uri)
    with pytest.raises(DataError, match="nowhere"):
        read_excluded(str(tmp_path / "nowhere.parquet"))


def test_chances_are_those_of_a_plain_loop_and_even_out_one_task():
    """Catches an unlabelled task that lowers a row's chance, and classes that still come up by their size."""
    table, rows = skewed_table(), np.arange(20, 260)
    expected = []
    shape, tags = (codes_of(table.labels[t])[rows] for t in ("shape", "tags"))
    for s, row in zip(shape, tags, strict=True):
        parts = [1 / (shape == s).sum()]
        if row[0] != MISSING:
            positive = np.flatnonzero(row)
            none = ((tags == 0).all(axis=1)).sum()
            parts.append(np.mean([1 / (tags[:, c] == 1).sum() for c in positive]) if len(positive) else 1 / none)
        expected.append(np.mean(parts))
    np.testing.assert_allclose(sampling_weights(table, rows), expected)
    alone = dataclasses.replace(table, labels={"shape": table.labels["shape"]})
    chances = sampling_weights(alone, np.arange(260))
    np.testing.assert_allclose(np.bincount(table.labels["shape"].values, chances), 1.0)


@pytest.mark.parametrize("method", ["smote", "mixup"])
def test_synthetic_rows_lie_between_two_rows_of_their_class_and_pattern(method):
    """Catches neighbours of another class or pattern, modalities of a row from different pairs, features scaled and
    not scaled back, dense text, and labels made up for other tasks."""
    table, rows = skewed_table(), np.arange(260)
    grown, train = add_synthetic(table, rows, method, seed=0)
    new = np.arange(260, len(grown.split))
    assert np.array_equal(train, np.arange(len(grown.split)))
    assert sp.issparse(grown.features["text"])
    assert (grown.features["image"].dtype, grown.features["text"].dtype) == (np.float32, np.float32)
    assert not grown.labels["tags"].labelled[new].any()
    assert len(set(grown.sample_id)) == len(grown.sample_id)
    both = np.hstack([dense(grown.features[m]) for m in ("image", "text")])
    pattern = np.stack([grown.present[m] for m in ("image", "text")], axis=1)
    for row in new:
        same = (table.labels["shape"].values == grown.labels["shape"].values[row]) & (
            pattern[:260] == pattern[row]
        ).all(axis=1)
        assert distance_to_segments(both[row], both[:260][same]) < 1e-4
    assert len(np.unique(both[new], axis=0)) > 0.9 * (len(new) - GROWTH)  # the class of one row is repeated


def distance_to_segments(point, ends):
    """From a point to the nearest of the segments between all pairs of `ends`."""
    a, b = ends[:, None], ends[None, :]
    length = np.square(b - a).sum(axis=2)
    along = np.divide(((point - a) * (b - a)).sum(axis=2), length, out=np.zeros(length.shape), where=length > 0)
    nearest = a + along.clip(0, 1)[:, :, None] * (b - a)
    return np.sqrt(np.square(point - nearest).sum(axis=2)).min()


def test_classes_grow_to_the_largest_or_to_their_limit():
    """Catches a class of a few rows blown up to thousands, a class that shrinks, patterns that change their share."""
    table = skewed_table()
    grown, _ = add_synthetic(table, np.arange(260), "smote", seed=0)
    counts = np.bincount(grown.labels["shape"].values[grown.labels["shape"].known])
    expected = np.minimum(200, GROWTH * np.array([200, 45, 14, 1]))
    assert np.abs(counts - expected).max() <= 2, "rounded in each of the three patterns"
    for m in ("image", "text"):
        before = table.present[m][codes_of(table.labels["shape"]) == 1].mean()
        assert grown.present[m][codes_of(grown.labels["shape"]) == 1].mean() == pytest.approx(before, abs=0.02)


def test_synthetic_rows_repeat_with_the_seed_and_come_from_the_given_rows_only():
    """Catches val rows in the mix, and ranks that make up different rows."""
    table = skewed_table()
    table.split[::4] = "val"
    rows = usable_rows(table, "train")
    first, again = (add_synthetic(table, rows, "smote", seed=5)[0] for _ in range(2))
    for m in table.features:
        assert np.array_equal(dense(first.features[m]), dense(again.features[m]))
    spoilt = dataclasses.replace(table, features={**table.features, "image": table.features["image"].copy()})
    spoilt.features["image"][table.split == "val"] = 1e6
    grown, _ = add_synthetic(spoilt, rows, "smote", seed=5)
    assert np.array_equal(grown.features["image"][260:], first.features["image"][260:])


def test_generation_for_multilabel_tasks_alone_is_refused():
    """Catches a run that says it generates and does not."""
    table = skewed_table()
    with pytest.raises(ConfigError, match=r"training\.resample"):
        add_synthetic(dataclasses.replace(table, labels={"tags": table.labels["tags"]}), np.arange(260), "smote", 0)
