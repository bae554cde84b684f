"""Which rows a rank reads at which step, and what becomes of them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.training.batches import EpochBatches, Worker, complete_rows, feature_statistics, narrow, usable_rows


@given(
    num_rows=st.integers(1, 500), batch_size=st.integers(1, 300), num_ranks=st.integers(1, 4), epoch=st.integers(1, 5)
)
def test_every_row_is_read_and_every_rank_steps_equally_often(num_rows, batch_size, num_ranks, epoch):
    """A dropped rest, a rank with a step more (DDP then hangs), a batch above the size asked for,
    many rows read twice."""
    rows = np.arange(100, 100 + num_rows)
    batches = EpochBatches(None, rows, batch_size, 0, Worker(0, num_ranks))
    order = batches.order(epoch)
    assert order.shape == (batches.num_steps, num_ranks, batches.batch_size)
    assert batches.batch_size <= batch_size
    assert set(order.ravel()) == set(rows)
    assert order.size - num_rows < batches.num_steps * num_ranks
    assert np.ptp(np.bincount(order.ravel() - 100)) <= 1


def test_the_order_changes_with_the_epoch_and_the_seed_only():
    """The same order in each epoch; ranks that shuffle differently and so read rows twice."""
    rows = np.arange(50)
    order = {
        (s, e, r): EpochBatches(None, rows, 8, s, Worker(r, 2)).order(e).tolist()
        for s in (0, 1)
        for e in (1, 2)
        for r in (0, 1)
    }
    assert order[0, 1, 0] == order[0, 1, 1]
    assert order[0, 1, 0] != order[0, 2, 0]
    assert order[0, 1, 0] != order[1, 1, 0]


def test_a_batch_holds_the_rows_features_presence_and_labels(table):
    """Labels of other rows than the features; sparse rows cut at the wrong place; another rank's rows."""
    rows = usable_rows(table, "train")
    for rank in (0, 1):
        batches = EpochBatches(table, rows, 32, 0, Worker(rank, 2))
        for step, batch in zip(batches.order(3), batches.epoch(3), strict=True):
            mine = step[rank]
            assert np.array_equal(batch.features["image"], table.features["image"][mine])
            x = batch.features["text"]
            dense = torch.zeros(len(mine), table.features["text"].shape[1])
            dense[torch.repeat_interleave(torch.arange(len(mine)), x.offsets.diff()), x.indices] = x.values
            assert np.array_equal(dense, table.features["text"][mine].toarray())
            for m, t in (("image", "topic"), ("text", "mood")):
                assert np.array_equal(batch.present[m], table.present[m][mine])
                assert np.array_equal(batch.step_present[m], table.present[m][step.ravel()])
                assert batch.labels[t].same_as(table.labels[t][mine])
                assert batch.step_labels[t].same_as(table.labels[t][step.ravel()])


def test_rows_without_a_modality_or_without_a_label_are_left_out(table):
    """Rows that teach the bias only, as those of another corpus would in a model of one modality."""
    one = narrow(table, ["image"], ["topic"])
    expected = (table.split == "val") & table.present["image"] & table.labels["topic"].labelled
    assert np.array_equal(usable_rows(one, "val"), np.flatnonzero(expected))


def test_statistics_are_over_present_rows_only(table):
    """Zeros of absent rows in the mean, or a centred sparse matrix."""
    features, present = table.features["image"], table.present["image"] & (table.split == "train")
    mean, std = feature_statistics(features, present)
    np.testing.assert_allclose(mean, features[present].mean(0), atol=1e-6)
    np.testing.assert_allclose(std, features[present].std(0), atol=1e-6)
    mean, rms = feature_statistics(table.features["text"], table.present["text"])
    dense = table.features["text"].toarray()
    assert mean == 0
    assert rms == pytest.approx(np.sqrt((dense[dense != 0] ** 2).mean()), rel=1e-5)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_statistics_of_no_row_change_nothing(table, modality):
    """NaN statistics where the train split has no row with the modality."""
    mean, std = feature_statistics(table.features[modality], np.zeros(len(table.sample_id), dtype=bool))
    assert not mean.any()
    assert (std == 1).all()


def test_a_column_that_the_store_lacks_is_named(table):
    """A KeyError in place of the nearest name."""
    with pytest.raises(ConfigError, match=r"modality 'imag'.*'image'"):
        narrow(table, ["imag"], ["topic"])


def test_weighted_rows_come_up_by_their_weights_and_the_epoch_stays_as_long():
    """Catches weights of other rows, ranks that draw on their own, and an epoch of another length."""
    rows, weights = np.array([5, 7, 9]), np.array([0.0, 1.0, 3.0])
    batches = [EpochBatches(None, np.tile(rows, 400), 50, 0, Worker(r, 2), np.tile(weights, 400)) for r in (0, 1)]
    assert np.array_equal(batches[0].order(3), batches[1].order(3))
    assert not np.array_equal(batches[0].order(3), batches[0].order(4))
    drawn = batches[0].order(1)
    assert drawn.shape == EpochBatches(None, np.tile(rows, 400), 50, 0, Worker(0, 2)).order(1).shape
    assert (drawn != 5).all()
    assert (drawn == 9).mean() == pytest.approx(0.75, abs=0.05)


def test_complete_rows_have_every_modality_and_none_is_an_error(table):
    """Catches a training on rows that lack something under missing: drop, or an empty one that goes on."""
    rows = usable_rows(table, "train")
    expected = rows[table.present["image"][rows] & table.present["text"][rows]]
    assert np.array_equal(complete_rows(table, rows), expected)
    alone = dataclasses.replace(table, present={"image": table.present["image"], "text": ~table.present["image"]})
    with pytest.raises(DataError, match=r"none of the \d+ labelled train rows has all of image, text"):
        complete_rows(alone, rows)


def test_teachers_targets_follow_their_rows(table):
    """Catches targets of other rows, and a synthetic row (behind the first N) that gets one."""
    rows, num_rows = usable_rows(table, "train"), len(table.split)
    targets = np.random.default_rng(0).random((num_rows - 20, 3)).astype(np.float32)
    targets[:9] = np.nan
    for rank in (0, 1):
        batches = EpochBatches(table, rows, 40, 0, Worker(rank, 2), targets={"topic": targets})
        for step, batch in zip(batches.order(1), batches.epoch(1), strict=True):
            padded = np.concatenate([targets, np.full((20, 3), np.nan, np.float32)])
            np.testing.assert_array_equal(batch.targets["topic"], padded[step[rank]])
            assert batch.num_targets["topic"] == (~np.isnan(padded[step.ravel(), 0])).sum()
