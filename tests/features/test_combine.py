"""Joining on a key and pairing by label: who meets whom, and where the rest goes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config, JoinCombine, PairCombine
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.combine import ABSENT, Combined, RowIndex, join_by_key, pair
from mmkt_ray.features.dropping import DUPLICATE, parts_of_ids
from mmkt_ray.features.extract import extract
from mmkt_ray.features.publish import check_budget
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Reject, reject_table
from mmkt_ray.samples.shards import list_shards
from tests.shapes import write_shard


def index_of(
    rows: list[tuple[str, str, str | None, str | None, str | None]], keys: list[str | None] | None = None
) -> RowIndex:
    """Rows of (id, split, modality that is present, object label, topic label)."""
    return RowIndex(
        [r[0] for r in rows],
        [r[1] for r in rows],
        keys or [None] * len(rows),
        {m: np.array([r[2] == m for r in rows]) for m in ("image", "text")},
        {"object": [r[3] for r in rows], "topic": [r[4] for r in rows]},
    )


def check_accounts(index: RowIndex, combined: Combined) -> None:
    """Every source row is in a sample or rejected, never both."""
    used = {i for s in combined.sample_ids for i in s.split("|")}
    rejected = [r.sample_id for r in combined.rejects]
    assert used.isdisjoint(rejected)
    assert sorted([*used, *rejected]) == sorted(index.sample_ids)


@pytest.fixture
def corpora() -> RowIndex:
    images = [(f"i{k}", "train" if k < 8 else "test", "image", "cat" if k % 2 else "dog", None) for k in range(12)]
    texts = [(f"t{k}", "train" if k < 3 else "test", "text", None, ["pets", "space"][k % 2]) for k in range(6)]
    return index_of(images + texts)


def test_pairs_stay_within_the_split_and_the_mapping(corpora: RowIndex) -> None:
    """A test text paired with a train image: leakage; or classes that do not belong together."""
    how = PairCombine(labels={"image": "object", "text": "topic"}, mapping={"cat": "pets", "dog": "space"})
    combined = pair(corpora, how, seed=0)
    assert len(combined.sample_ids) == 12
    for sample_id, split in zip(combined.sample_ids, combined.splits, strict=True):
        image, text = (corpora.sample_ids.index(i) for i in sample_id.split("|"))
        assert corpora.splits[image] == corpora.splits[text] == split
        assert how.mapping is not None
        assert how.mapping[corpora.labels["object"][image] or ""] == corpora.labels["topic"][text]
    check_accounts(corpora, combined)


def test_pairs_are_seeded_and_use_partners_evenly(corpora: RowIndex) -> None:
    """Another dataset on every run; or one text used for nearly all images."""
    how = PairCombine(labels={"image": "object", "text": "topic"}, mapping={"cat": "pets", "dog": "pets"})
    first, second = pair(corpora, how, seed=3), pair(corpora, how, seed=3)
    assert first.sample_ids == second.sample_ids
    assert first.sample_ids != pair(corpora, how, seed=4).sample_ids
    uses = Counter(s.split("|")[1] for s, split in zip(first.sample_ids, first.splits, strict=True) if split == "train")
    assert max(uses.values()) - min(uses.values()) <= 1


def test_a_class_outside_the_mapping_is_rejected_with_a_reason(corpora: RowIndex) -> None:
    """Rows that vanish because their class has no partner."""
    how = PairCombine(labels={"image": "object", "text": "topic"}, mapping={"cat": "pets"})
    combined = pair(corpora, how, seed=0)
    reasons = {r.sample_id: r.reason for r in combined.rejects}
    assert "'dog' is not in samples.combine.mapping" in reasons["i0"]
    assert "not drawn" in reasons["t1"]
    check_accounts(corpora, combined)
    with pytest.raises(ConfigError, match=r"no class \['cow'\]"):
        pair(corpora, PairCombine(labels=how.labels, mapping={"cow": "pets"}), seed=0)


def test_inner_and_outer_join() -> None:
    """An outer join that drops what has no partner, an inner one that keeps it."""
    rows = [
        ("a", "train", "image", "cat", None),
        ("b", "train", "text", "cat", "pets"),
        ("c", "train", "image", "dog", None),
        ("d", "train", "text", None, "space"),
    ]
    index = index_of(rows, keys=["1", "1", "2", None])
    inner, outer = join_by_key(index, JoinCombine()), join_by_key(index, JoinCombine(how="outer"))
    assert inner.sample_ids == ["a|b"]
    assert outer.sample_ids == ["a|b", "c"]
    assert (outer.modality_rows["text"], outer.task_rows["topic"]) == ([1, ABSENT], [1, ABSENT])
    assert "no key" in next(r.reason for r in outer.rejects if r.sample_id == "d")
    check_accounts(index, inner)
    check_accounts(index, outer)


def test_join_tells_of_conflicts() -> None:
    """Two images under one key, or two labels for one sample, settled in silence."""
    rows = [
        ("a", "train", "image", "cat", None),
        ("b", "train", "text", "dog", None),
        ("c", "train", "image", "cat", None),
        ("d", "test", "text", None, None),
    ]
    index = index_of(rows, keys=["1", "1", "1", "1"])
    combined = join_by_key(index, JoinCombine())
    assert combined.num_conflicts == 1
    assert {r.sample_id for r in combined.rejects} == {"c", "d"}
    assert combined.task_rows["object"] == [0]
    check_accounts(index, combined)


@pytest.mark.usefixtures("ray_local")
def test_join_of_the_same_ids() -> None:
    """Samples called `a|a`, or two samples of one name where keys are given and ids occur in both sources."""
    index = RowIndex(
        ["a", "b", "a", "b"],
        ["train"] * 4,
        ["a", "b", "a", "b"],
        {"image": np.array([1, 1, 0, 0], bool), "text": np.array([0, 0, 1, 1], bool)},
        {"label": [None] * 4},
    )
    assert join_by_key(index, JoinCombine()).sample_ids == ["a", "b"]
    crossed = replace(index, keys=["1", "2", "2", "1"])
    assert sorted(join_by_key(crossed, JoinCombine()).sample_ids) == ["a|b", "b|a"]
    apart = join_by_key(replace(index, keys=["1", "2", "3", "4"]), JoinCombine(how="outer"))
    assert len(set(apart.sample_ids)) == 4


@pytest.mark.parametrize(
    ("columns", "keys"),
    [({}, ["s0", "s1"]), ({"key": "caption"}, ["a red square number w0", "a green square number w1"])],
)
def test_a_join_takes_the_id_for_a_key(
    shapes: Path, make_config: Callable[..., Config], columns: dict[str, str], keys: list[str]
) -> None:
    """Rows of two sources with the same ids that are rejected for want of a key."""
    images = {"sample_id": "id", "image": "image", "colour": "colour"} | columns
    texts = {"sample_id": "id", "text": "caption"}
    sources = [{"reader": "parquet", "path": "shapes/0.parquet", "columns": c, "limit": 2} for c in (images, texts)]
    config = make_config(samples__sources=sources, samples__combine="join")
    shards = list_shards(ReadingPlan.of(config))
    tables = [next(read_chunks(ReadingPlan.of(config), shard)).table for shard in shards]
    assert [t["key"].to_pylist() for t in tables] == [keys, ["s0", "s1"]]
    parts = [f"{shard.unit}-000000.parquet" for shard in shards]
    assert parts_of_ids(config, parts, shards) == [parts[:1], parts[1:]]
    assert parts_of_ids(make_config(), parts, shards) == [parts]


def test_ids_that_occur_twice_are_no_matter_of_budget(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """The advice to raise a budget where half of the rows would be dropped for it."""
    rejects = reject_table([Reject("a", "s", "check", f"{DUPLICATE}: an earlier row has it already")] * 6)
    storage.write_table(str(tmp_path / "rejects" / "0-0.parquet"), rejects)
    with pytest.raises(DataError, match=r"give each row an id of its own, or join rows of one id") as caught:
        check_budget(str(tmp_path), make_config().samples, 5, Counter(check=6), {"0": "s"})
    assert "raise the budget" not in str(caught.value)


@pytest.mark.usefixtures("ray_local")
def test_join_end_to_end_gathers_the_right_features(shapes: Path, make_config: Callable[..., Config]) -> None:
    """Features of one sample under the id of another; the two halves of a sample in different splits."""
    write_shard(shapes / "data" / "captions" / "0.parquet", 60, 80)
    base = make_config().samples.sources[0].model_dump()
    images = base | {"columns": {"key": "id", "image": "image", "colour": "colour"}}
    texts = base | {"path": "captions/*.parquet", "columns": {"key": "id", "text": "caption"}}
    both = [base, base | {"path": "captions/*.parquet"}]
    plain = extract(make_config(name="plain", samples__sources=both, samples__max_reject_frac=0.9), f"{shapes}/plain")
    config = make_config(
        samples__sources=[images, texts],
        samples__combine={"name": "join", "how": "outer"},
        samples__max_reject_frac=0.9,
    )
    store = extract(config, f"{shapes}/joined")
    table = pd.concat([t.to_pandas() for t in store.read()]).set_index("key")
    assert len(table) == 140
    assert table["image_features"].notna().sum() == 120
    assert table["text_features"].notna().sum() == 80
    expected = pd.concat([t.to_pandas() for t in plain.read()]).drop_duplicates("sample_id").set_index("sample_id")
    for key in ("s60", "s119"):
        assert np.array_equal(table.loc[key, "image_features"], expected.loc[key, "image_features"])
    assert store.manifest.combine == {"name": "join", "how": "outer"}
    assert store.manifest.synthetic_pairs is False
