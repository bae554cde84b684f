"""One class in several spellings is one class, wherever the spellings meet; what meets no other keeps its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config, PairCombine
from mmkt_ray.features.combine import check_mapping, pair
from mmkt_ray.features.fit import what_is_read
from mmkt_ray.features.pretrain import Pretraining, _decode_shard
from mmkt_ray.features.spellings import respelled
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.features.test_audit import Sample, publish_parts
from tests.features.test_combine import index_of
from tests.labels import codes_of
from tests.shapes import write_shard

MakeConfig = Callable[..., Config]


def rows(start: str, split: str, labels: list) -> list[Sample]:
    return [(f"{start}{i}", split, hash((start, i)) % 2**60, None, label) for i, label in enumerate(labels)]


def test_spellings_that_meet_are_one_class(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches an accuracy of 0 % as pandas wrote train's classes as floats; pandas itself reads both alike."""
    train, test = [0.0, 1.0, 2.0, np.nan], [0, 1, 2]
    texts = [str(v) if v == v else None for v in train], [str(v) for v in test]
    store = publish_parts(make_config(), str(tmp_path / "s"), rows("a", "train", texts[0]), rows("b", "test", texts[1]))
    expected = Counter(pd.concat([pd.Series(train).dropna(), pd.Series(test)]).astype(int).astype(str))
    counts = store.manifest.counts.by_task["colour"]
    assert Counter(counts["train"]) + Counter(counts["test"]) == expected
    assert store.manifest.tasks["colour"].classes == ["0", "1", "2"]
    told = storage.read_json(f"{store.uri}/audit.json")["spellings"]
    assert told == {f"colour: '{i}.0' read as '{i}'": 1 for i in range(3)}
    labels = pa.concat_tables(store.read(["colour"])).column(0).to_pylist()
    assert labels == ["0", "1", "2", None, "0", "1", "2"]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["1.0", "1.1", "2.0"], ["1.0", "1.1", "2.0"]),  # versions
        (["True", "Fake"], ["Fake", "True"]),
        (["1", "1.0", "1.5", "2.0"], ["1", "1.5", "2"]),  # ratings of two tools
        (["True", "true", "False"], ["false", "true"]),
        (["v1.0", "v1"], ["v1", "v1.0"]),
    ],
)
def test_what_meets_no_other_spelling_keeps_its_own(tmp_path, make_config, classes, expected) -> None:
    """Catches versions that lose their zero, and classes of one task in two styles."""
    store = publish_parts(make_config(), str(tmp_path / "s"), rows("a", "train", classes))
    assert store.manifest.tasks["colour"].classes == expected
    assert bool(storage.read_json(f"{store.uri}/audit.json")["spellings"]) == (set(expected) != set(classes))


def test_classes_that_differ_in_case_alone_are_told(tmp_path, make_config, caplog) -> None:
    """Catches 0 % of `Cat` right, as train says `cat`, and nobody hears of it;
    they may be two classes, so they stay."""
    train, test = rows("a", "train", ["cat", "Dog"]), rows("b", "test", ["Cat", "Dog"])
    store = publish_parts(make_config(), str(tmp_path / "s"), train, test)
    assert store.manifest.tasks["colour"].classes == ["Dog", "cat"]
    assert "differ in case alone stay apart, write them alike if they are one: 'Cat' and 'cat'" in caplog.text
    assert "Dog" not in caplog.text


def test_a_0_or_1_for_each_class_is_told(tmp_path, make_config, caplog) -> None:
    """Catches the classes 0 and 1 in every row, as its list says of each class whether the row has it."""
    config = make_config(tasks__colour__kind="multilabel")
    publish_parts(config, str(tmp_path / "s"), rows("a", "train", [["0", "1"], ["1"], ["0"]]))
    assert "its lists hold a 0 or 1 for each class" in caplog.text
    caplog.clear()
    publish_parts(config, str(tmp_path / "t"), rows("a", "train", [["0", "1"], ["2"]]))
    assert "for each class" not in caplog.text


def test_lists_of_classes_and_a_second_publishing(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches a class twice in one list, and notes that double or vanish when shards are added later."""
    config = make_config(tasks__colour__kind="multilabel")
    train = rows("a", "train", [["1", "1.0"], ["2.0"], None])
    store = publish_parts(config, str(tmp_path / "s"), train)
    assert pa.concat_tables(store.read(["colour"])).column(0).to_pylist() == [["1"], ["2"], None]
    again = publish_parts(config, str(tmp_path / "s"), train)
    assert again.manifest.cleaned == store.manifest.cleaned == {
        "colour: '1.0' read as '1'": 1,
        "colour: '2.0' read as '2'": 1,
    }  # fmt: skip


def test_a_model_of_another_spelling_is_scored() -> None:
    """Catches classes of a model counted as unseen, as the store that it is evaluated on spells them otherwise."""
    labels = pa.chunked_array([["1", "2", None], ["3", "True"]])
    assert codes_of(Multiclass().encode(labels, ["1.0", "2", "true"])).tolist() == [0, 1, -1, -2, 2]
    lists = pa.chunked_array([[["1", "3"], ["2"], None]])
    assert codes_of(Multilabel().encode(lists, ["1.0", "2"])).tolist() == [[1, 0], [0, 1], [-1, -1]]
    assert Multilabel().outside(lists, ["1.0", "2"]).tolist() == [True, False, False]
    # exact ones first
    assert Multiclass().encode(pa.chunked_array([["1", "1.0"]]), ["1", "1.0"]).values.tolist() == [0, 1]


def test_pairs_meet_in_any_spelling() -> None:
    """Catches synthetic pairs without partners as one corpus has floats,
    and a map that must be spelled as the data is."""
    index = index_of(
        [("i0", "train", "image", "1", None), ("t0", "train", "text", None, "1.0"), ("t1", "train", "text", None, "2")]
    )
    for mapping in (None, {"1.0": "1"}):
        how = PairCombine(labels={"image": "object", "text": "topic"}, mapping=mapping)
        check_mapping(index, how)
        assert pair(index, how, 0).sample_ids == ["i0|t0"]


def test_respelled_is_final() -> None:
    """Catches a second publishing that respells again."""
    names = ["1", "1.0", "True", "2.0"]
    changes = respelled(names)
    assert changes == {"1.0": "1", "True": "true", "2.0": "2"}
    assert respelled({changes.get(name, name) for name in names}) == {}


# --- why there is nothing to fit on --------------------


def test_reasons_of_what_a_fit_lacks(shapes: Path, make_config: MakeConfig) -> None:
    """Catches 'got none' where all images are broken, and advice on fractions where no line is valid;
    also when resumed."""
    (shard,) = list_shards(ReadingPlan.of(make_config(samples__sources__0__path="shapes/0.parquet")))
    write_shard(Path(shard.uri), 0, 6, image=[b"broken"] * 5 + [None], caption=["t"] * 6)
    encoder = {"name": "cnn", "pretrain": "colour", "image_size": 16}
    config = make_config(
        samples__sources__0__path="shapes/0.parquet",
        samples__sources__0__split="train",
        modalities__image__encoder=encoder,
    )
    plan = ReadingPlan.of(config).only("image", "colour")
    job = Pretraining(config.modalities["image"].encoder, plan, config.samples, config.seed, str(shapes / "encoder"))
    for _ in range(2):
        reasons = _decode_shard(job, shard, ())
        assert sorted(reasons.values()) == [1, 5]
        assert "not a readable JPEG" in max(reasons, key=lambda reason: reasons[reason])
    with_it, without, rejects = what_is_read(ReadingPlan.of(config), "image", shard)
    assert (sum(with_it.values()), sum(without.values()), rejects) == (5, 1, {})
    bad = config.with_overrides({"samples.sources.0.columns.split": "colour", "samples.sources.0.split": None})
    with_it, without, rejects = what_is_read(ReadingPlan.of(bad), "image", shard)
    assert (with_it, without, sum(rejects.values())) == ({}, {}, 6)
    assert "unknown split" in next(iter(rejects))
