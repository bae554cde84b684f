"""The same content twice is found, whatever shard it is in, and train rows that leak are left out on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, save_fitted
from mmkt_ray.errors import DataError
from mmkt_ray.features.audit import Contents, audit, find_groups, leaking_rows
from mmkt_ray.features.chunks import open_row, read_shard
from mmkt_ray.features.decode import decode_chunk
from mmkt_ray.features.encode import EncodeChunk, EncodePlan
from mmkt_ray.features.publish import Origin, publish
from mmkt_ray.features.store import Store, column_of, hash_of, part_schema, to_arrow
from mmkt_ray.kinds.content import hash_array, hash_text
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard
from mmkt_ray.samples.shards import list_shards
from tests.manifests import make_features
from tests.shapes import png, write_shard

MakeConfig = Callable[..., Config]
Sample = tuple[str, str, int | None, int | None, Any]  # id, split, hash of the image, of the text, label
SHARD = Shard(0, "", "shard", "")
MODALITIES = {m: make_features(dim=2, kind=m, fingerprint=m) for m in ("image", "text")}


def write_part(config: Config, uri: str, name: str, rows: list[Sample]) -> None:
    """A part of a store with the content hashes of `rows` and features of ones."""
    ids, splits, image, text, labels = map(list, zip(*rows, strict=True))
    hashes = {"image": image, "text": text}
    present = {m: np.array([v is not None for v in column]) for m, column in hashes.items()}
    columns: dict[str, Any] = {"sample_id": ids, "split": splits, "key": [None] * len(ids), "colour": labels}
    columns |= {column_of(m): to_arrow(np.ones((p.sum(), 2), np.float32), p) for m, p in present.items()}
    columns |= {hash_of(m): pa.array(column, pa.uint64()) for m, column in hashes.items()}
    columns |= {"cleaned": [["text: control characters"] if i.endswith("!") else None for i in ids]}
    schema = part_schema(config, {m: (2, False) for m in MODALITIES})
    storage.write_table(storage.join(uri, "data", name), pa.table(columns, schema=schema))


def publish_parts(config: Config, uri: str, *parts: list[Sample]) -> Store:
    """A published store of one shard."""
    for i, rows in enumerate(parts):
        write_part(config, uri, f"{SHARD.unit}-{i:06d}{'-end' if i == len(parts) - 1 else ''}.parquet", rows)
    return publish(uri, config, Origin([SHARD.unit], [SHARD], "l"), MODALITIES, {})


FIRST: list[Sample] = [
    ("a", "train", 1, 10, "red"),
    ("b", "train", 1, 11, "red"),  # the image of a
    ("c", "test", 2, 12, "blue"),
]
SECOND: list[Sample] = [
    ("d", "train", 2, 12, "red"),  # all of c, another label
    ("e", "val", 3, None, None),
    ("f", "train", 3, None, "blue"),  # all of e, which has no label
    ("g", "test", 4, 10, "blue"),  # the text of a
]


def test_duplicates_across_parts_splits_and_labels(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches duplicates found within one shard only, absent modalities that count as equal,
    and unlabelled conflicts."""
    store = publish_parts(make_config(), str(tmp_path / "s"), FIRST, SECOND)
    found = storage.read_json(f"{store.uri}/audit.json")
    assert found["num_rows"] == 7
    image, text, whole = found["modalities"]["image"], found["modalities"]["text"], found["samples"]
    assert image["by_splits"] == {"train": 1, "train+val": 1, "test+train": 1}
    assert (image["num_groups"], image["num_rows"], image["num_leaking"]) == (3, 6, 2)
    assert text["by_splits"] == {"test+train": 2}
    assert whole["by_splits"] == {"train+val": 1, "test+train": 1}
    assert {tuple(s["sample_id"] for s in e["samples"]) for e in whole["examples"]} == {("c", "d"), ("e", "f")}
    assert image["examples"][-1]["splits"] == ["train"]  # leaking groups come first
    conflicts = found["conflicts"]["colour"]
    assert (conflicts["num_groups"], conflicts["num_rows"]) == (1, 2)
    assert conflicts["examples"] == [
        {
            "splits": ["test", "train"],
            "num_rows": 2,
            "samples": [
                {"sample_id": "c", "split": "test", "labels": {"colour": "blue"}},
                {"sample_id": "d", "split": "train", "labels": {"colour": "red"}},
            ],
        }
    ]


def test_leaking_rows_are_left_out_on_request_and_accounted_for(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches test rows dropped in place of train rows, rows lost without a reject, and a spent reject budget."""
    config = make_config(samples__drop_leakage=True, samples__max_reject_frac=0.0)
    store = publish_parts(config, str(tmp_path / "s"), FIRST, SECOND)
    left = pa.concat_tables(store.read(["sample_id"])).column(0).to_pylist()
    assert left == ["a", "b", "c", "e", "g"]
    rejects = pq.read_table(f"{store.uri}/rejects.parquet").to_pylist()
    assert [(r["sample_id"], r["source"], r["stage"]) for r in rejects] == [
        ("d", "shard", "leakage"),
        ("f", "shard", "leakage"),
    ]
    assert store.manifest.counts.rows + store.manifest.counts.rejects == 7
    assert storage.read_json(f"{store.uri}/audit.json")["samples"]["num_leaking"] == 0


def test_a_publishing_that_broke_off_tells_each_row_once(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches rejects that double where the process died between the part's rejects and its rows."""
    config = make_config(samples__drop_leakage=True)
    store = publish_parts(config, str(tmp_path / "s"), FIRST, SECOND)
    write_part(config, store.uri, f"{SHARD.unit}-000001-end.parquet", SECOND)
    store = publish(store.uri, config, Origin([SHARD.unit], layout="l"), MODALITIES, {})
    assert store.manifest.counts.rejects == 2


def test_nothing_is_left_out_without_being_asked(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches rows that vanish from sets that repeat texts by design."""
    store = publish_parts(make_config(), str(tmp_path / "s"), FIRST, SECOND)
    assert store.manifest.counts.rows == 7


def test_long_groups_and_many_groups_are_cut(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches an audit.json as large as the store where one caption stands on every row."""
    same: list[Sample] = [(f"s{i}", "train", i, 7, "red") for i in range(500)]
    pairs: list[Sample] = [(f"p{i}", "train", 1000 + i // 2, None, "red") for i in range(500)]
    store = publish_parts(make_config(), str(tmp_path / "s"), same, pairs)
    found = storage.read_json(f"{store.uri}/audit.json")["modalities"]
    assert (found["text"]["num_rows"], len(found["text"]["examples"][0]["samples"])) == (500, 10)
    assert (found["image"]["num_groups"], len(found["image"]["examples"])) == (250, 100)


def test_a_store_without_hashes_is_published_without_duplicates(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches rows without hashes taken for one large group of the same content."""
    write_part(make_config(), str(tmp_path), "u-000000-end.parquet", FIRST)
    path = tmp_path / "data" / "u-000000-end.parquet"
    pq.write_table(pq.read_table(path).drop_columns([hash_of("image"), hash_of("text")]), path)
    found = audit(str(tmp_path), ["u-000000-end.parquet"], ["image", "text"], ["colour"])
    assert (found.num_rows, found.samples.num_groups, found.modalities) == (3, 0, {})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=40))
def test_groups_equal_the_obvious_slow_version(rows: list[tuple[int, int, bool]]) -> None:
    """Catches groups that mix, rows of absent modalities grouped, and leaks counted among val and test alone."""
    hashes = np.array([h for h, _, _ in rows], dtype=np.uint64)
    split = np.array([s for _, s, _ in rows], dtype=np.int8)
    here = np.array([p for _, _, p in rows], dtype=bool)
    groups = find_groups(hashes, np.flatnonzero(here), split)
    expected = {}
    for value in set(hashes[here].tolist()):
        members = np.flatnonzero(here & (hashes == value)).tolist()
        if len(members) > 1:
            splits = {int(split[i]) for i in members}
            expected[tuple(members)] = 0 in splits and len(splits) > 1
    found = {tuple(groups.rows[groups.group == g].tolist()): bool(groups.leaks[g]) for g in range(groups.num_groups)}
    assert found == expected
    contents = Contents(["p"], [len(rows)], split, {"image": hashes}, {"image": here})
    slow = [s == 0 and any(other != 0 for k, other, q in rows if q == p and (k == h or not p)) for h, s, p in rows]
    assert leaking_rows(contents).tolist() == slow


# --- classes --------------------


def test_a_binary_task_with_three_classes_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches a third class that is silently counted as negative."""
    rows: list[Sample] = [(f"s{i}", "train", i, i, c) for i, c in enumerate(["red", "green", "blue"])]
    with pytest.raises(DataError, match=r"3 classes: blue, green, red.*kind: multiclass"):
        publish_parts(make_config(tasks__colour__kind="binary"), str(tmp_path / "s"), rows)
    rows[2] = ("s2", "test", 2, 2, "blue")
    store = publish_parts(make_config(tasks__colour__kind="binary"), str(tmp_path / "t"), rows)
    assert store.manifest.tasks["colour"].to_dict() == {"kind": "binary", "classes": ["green", "red"]}


def test_multilabel_counts_each_class_of_each_row(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches combinations counted as classes, and conflicts between equal sets."""
    rows: list[Sample] = [
        ("a", "train", 1, 1, ["blue", "red"]),
        ("b", "train", 1, 1, ["blue", "red"]),
        ("c", "train", 2, 2, []),
        ("d", "test", 2, 2, ["green"]),
        ("e", "test", 3, 3, None),
    ]
    store = publish_parts(make_config(tasks__colour__kind="multilabel"), str(tmp_path / "s"), rows)
    assert store.manifest.counts.by_task["colour"] == {"test": {"green": 1}, "train": {"blue": 2, "red": 2}}
    assert store.manifest.tasks["colour"].classes == ["blue", "red"]
    conflicts = storage.read_json(f"{store.uri}/audit.json")["conflicts"]["colour"]
    assert [[s["sample_id"] for s in e["samples"]] for e in conflicts["examples"]] == [["c", "d"]]


# --- where the hashes come from --------------------


def test_hashes_are_of_the_content_not_of_the_file() -> None:
    """Catches copies that differ in case, spaces, or in how they were saved."""
    assert hash_text("A  red\nSquare ") == hash_text("a red square")
    assert hash_text("stra\u00dfe") == hash_text("STRASSE")
    assert hash_text("a red square") != hash_text("a red squares")
    pixels = np.arange(24, dtype=np.uint8)
    assert hash_array(pixels.reshape(2, 4, 3)) != hash_array(pixels.reshape(4, 2, 3))
    assert hash_array(pixels[::2]) == hash_array(pixels[::2].copy())


@pytest.mark.parametrize("before", [False, True])
def test_encoding_writes_hashes_and_what_was_cleaned(shapes: Path, make_config: MakeConfig, before: bool) -> None:
    """Catches hashes of resized pixels, or of other rows where a broken one was left out;
    and changes that go untold."""
    same = [png("red", 1), png("red", 2), None, png("red", 1), None]
    write_shard(
        shapes / "data" / "shapes" / "c.parquet",
        0,
        5,
        image=pa.array(same, pa.binary()),
        caption=["A b", "a\x07b", "a  B", None, "\ufeffc"],
    )
    columns = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}
    source = {"reader": "parquet", "path": "shapes/c.parquet", "columns": columns}
    text = {"name": "slow_encoder:SlowLength", "options": {"delay_s": 0.0}}
    config = make_config(samples__sources=[source], modalities__text__encoder=text)
    for name, modality in config.modalities.items():
        save_fitted(build_encoder(modality.encoder), modality.encoder, str(shapes / name))
    encode = EncodeChunk(EncodePlan(config, {m: str(shapes / m) for m in MODALITIES}, {}, False, 1))
    plan = ReadingPlan.of(config)
    batch = next(read_shard({k: [v] for k, v in vars(list_shards(plan)[0]).items()}, plan, done={}))
    part = open_row(encode(decode_chunk(batch, config) if before else batch)).samples
    image, text_hash = (part.column(hash_of(m)).to_pylist() for m in ("image", "text"))
    assert image[0] == image[3] != image[1]
    assert (image[2], text_hash[3]) == (None, None)
    assert text_hash[:3] == [hash_text("a b")] * 3
    assert part.column("cleaned").to_pylist() == [
        None,
        ["text: control characters"],
        None,
        None,
        ["text: byte order mark"],
    ]


def test_what_was_cleaned_is_counted_in_the_manifest(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches normalisation that nobody hears of."""
    rows: list[Sample] = [("a!", "train", 1, 1, "red"), ("b", "train", 2, 2, "red"), ("c!", "test", 3, 3, "red")]
    store = publish_parts(make_config(), str(tmp_path / "s"), rows)
    assert store.manifest.cleaned == {"text: control characters": 2}
