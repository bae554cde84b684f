"""Splits: as given or by a hash that neither order nor growth of the corpus changes."""

from __future__ import annotations

from collections import Counter

import pytest

from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.splits import assign_split, normalise_split, split_in_name

SOURCE = {"reader": "parquet", "path": "a", "columns": {"text": "text", "label": "label"}}
IDS = [f"a.parquet#{i}" for i in range(4000)]


def test_fractions_are_met(make_config):
    """Catches a hash that is not uniform, or thresholds that overlap."""
    config = make_config("d", SOURCE, samples={"split": {"val_frac": 0.1, "test_frac": 0.2}})
    counts = Counter(assign_split(i, None, None, ReadingPlan.of(config), config.samples.sources[0]) for i in IDS)
    assert abs(counts["val"] / len(IDS) - 0.1) < 0.02
    assert abs(counts["test"] / len(IDS) - 0.2) < 0.02
    assert set(counts) == {"train", "val", "test"}


def test_known_draws_never_change(make_config):
    """Catches a changed or salted hash: rows would wander between train and test across versions."""
    config = make_config("d", SOURCE)
    drawn = [assign_split(i, None, None, ReadingPlan.of(config), config.samples.sources[0]) for i in IDS[:12]]
    assert " ".join(drawn) == "train val test val train train train train test train train train"


def test_another_draw_is_another_split(make_config):
    """Catches draws that are the first one shifted: rows of one test split would be more or less likely in the
    next."""
    splits = []
    for draw in (0, 1, 2):
        config = make_config("d", SOURCE, samples={"split": {"val_frac": 0.1, "test_frac": 0.2, "draw": draw}})
        plan = ReadingPlan.of(config)
        splits.append([assign_split(i, None, None, plan, config.samples.sources[0]) for i in IDS])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = sum(a == b == "test" for a, b in zip(splits[one], splits[other], strict=True))
        assert abs(both / len(IDS) - 0.04) < 0.01


def test_val_is_taken_from_given_train_rows(make_config):
    """Catches train-and-test data that leaves nothing to choose the best epoch by, or touches test."""
    config = make_config("d", {**SOURCE, "split": "train"}, {**SOURCE, "path": "b", "split": "test"})
    train, test = config.samples.sources
    counts = Counter(assign_split(i, None, None, ReadingPlan.of(config), train) for i in IDS)
    assert abs(counts["val"] / len(IDS) - 0.1) < 0.02
    assert set(counts) == {"train", "val"}
    assert {assign_split(i, None, None, ReadingPlan.of(config), test) for i in IDS} == {"test"}


@pytest.mark.parametrize("val_giver", [{"split": "val"}, {"columns": {**SOURCE["columns"], "split": "split"}}])
def test_given_train_rows_stay_where_val_is_given(make_config, val_giver):
    """Catches train rows lost to val although the data has a val split of its own."""
    config = make_config("d", {**SOURCE, "split": "train"}, {**SOURCE, "path": "b", **val_giver})
    assert {assign_split(i, None, None, ReadingPlan.of(config), config.samples.sources[0]) for i in IDS} == {"train"}


def test_partners_of_a_join_stay_together(make_config):
    """Catches an image in train whose text is in test; without a join the key must decide nothing."""
    joined = make_config("d", SOURCE, samples={"combine": "join"})
    source = joined.samples.sources[0]
    keys = [str(i) for i in range(200)]
    left, right = (
        [assign_split(f"{side}#{k}", k, None, ReadingPlan.of(joined), source) for k in keys] for side in "ab"
    )
    assert left == right
    union = make_config("d", SOURCE)
    assert left != [assign_split(f"a#{k}", k, None, ReadingPlan.of(union), source) for k in keys]


def test_source_split_outranks_the_row(make_config):
    """Catches a row's own word winning over what the config says of the whole source."""
    config = make_config("d", {**SOURCE, "split": "test"})
    assert assign_split("a", None, "train", ReadingPlan.of(config), config.samples.sources[0]) == "test"


@pytest.mark.parametrize(
    ("given", "split"), [("Validation", "val"), ("dev", "val"), (" TRAIN ", "train"), ("testing", "test")]
)
def test_usual_spellings(given, split):
    """Catches `validation` becoming a fourth split that nothing reads."""
    assert normalise_split(given) == split


def test_unknown_split_is_an_error_with_the_known_words():
    """Catches a misspelt split that silently becomes train."""
    with pytest.raises(ValueError, match=r"unknown split 'trian': known: train, .*test"):
        normalise_split("trian")


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"),
        ("20news-bydate-test", "test"),
        ("x_valid", "val"),
        ("trainer", None),
        ("contest", None),
        ("cats", None),
    ],
)
def test_split_in_a_folder_name(folder, split):
    """Catches a substring match: a class `contest` is no test split."""
    assert split_in_name(folder) == split
