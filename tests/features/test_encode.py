"""The stages in the middle of the pipeline, called as Ray calls them but without Ray."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, save_fitted
from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.chunks import make_row, open_row, read_shard, write_part
from mmkt_ray.features.decode import decode_chunk
from mmkt_ray.features.encode import EncodeChunk, EncodePlan, assigned_device
from mmkt_ray.features.publish import Origin, publish
from mmkt_ray.features.store import open_store
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.manifests import make_manifest
from tests.shapes import png, write_shard

MakeConfig = Callable[..., Config]


def image_config(make_config: MakeConfig, shapes: Path) -> Config:
    write_shard(
        shapes / "data" / "shapes" / "bad.parquet", 90, 3, image=pa.array([png("red", 1), b"broken", None], pa.binary())
    )
    columns = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}
    source = {"reader": "parquet", "path": "shapes/bad.parquet", "columns": columns}
    text = {"name": "slow_encoder:SlowLength", "options": {"delay_s": 0.0}}
    return make_config(samples__sources=[source], modalities__text__encoder=text)


def encoder_folders(config: Config, folder: Path) -> dict[str, str]:
    for name, modality in config.modalities.items():
        save_fitted(build_encoder(modality.encoder), modality.encoder, str(folder / name))
    return {name: str(folder / name) for name in config.modalities}


def test_decoding_before_or_inside_the_actor_gives_the_same_rows(shapes: Path, make_config: MakeConfig) -> None:
    """Other features, or other rejects, on a GPU cluster, where images are decoded by a stage of their own."""
    config = image_config(make_config, shapes)
    plan = EncodePlan(config, encoder_folders(config, shapes), reuse={}, use_gpu=False, num_threads=1)
    encode = EncodeChunk(plan)
    shard = list_shards(ReadingPlan.of(config))[0]
    batch = next(read_shard({k: [v] for k, v in vars(shard).items()}, ReadingPlan.of(config), done={}))
    inside, before = encode(batch), encode(decode_chunk(batch, config))
    assert open_row(inside).samples.equals(open_row(before).samples)
    assert open_row(inside).rejects.equals(open_row(before).rejects)
    table, told = open_row(inside).samples, open_row(inside).rejects
    assert table.column("sample_id").to_pylist() == ["s90", "s91", "s92"]
    assert table.column("image_features").is_null().to_pylist() == [False, True, True]
    assert (told.column("sample_id").to_pylist(), told.column("stage").to_pylist()) == (["s91"], ["modality"])


def test_a_row_with_nothing_but_a_broken_image_is_rejected(shapes: Path, make_config: MakeConfig) -> None:
    """A row of nulls in the store, or a row that is lost without a word."""
    config = image_config(make_config, shapes)
    images = pa.array([b"broken", b"broken", png("red", 1)], pa.binary())
    captions = pa.array([None, "a red square", None])
    write_shard(shapes / "data" / "shapes" / "bad.parquet", 90, 3, image=images, caption=captions)
    encode = EncodeChunk(EncodePlan(config, encoder_folders(config, shapes), reuse={}, use_gpu=False, num_threads=1))
    plan = ReadingPlan.of(config)
    batch = next(read_shard({k: [v] for k, v in vars(list_shards(plan)[0]).items()}, plan, done={}))
    for row in (encode(batch), encode(decode_chunk(batch, config))):
        told = open_row(row).rejects
        assert open_row(row).samples.column("sample_id").to_pylist() == ["s91", "s92"]
        assert told.column("stage").to_pylist() == ["decode", "modality"]
        assert all(reason.startswith("image: ") for reason in told.column("reason").to_pylist())


@pytest.mark.parametrize(
    ("gives", "reason"),
    [
        ("nan", "NaN, infinity"),
        ("inf", "NaN, infinity"),
        ("huge", "too large for float16"),
        ("wide", "no features of width 2"),
        ("text", "no features of width 2"),
    ],
)
def test_features_that_are_none_cost_their_rows_alone(shapes, make_config, gives, reason):
    """A NaN of a user's encoder that ends as "lower the learning rate", or as a null prediction with 0 rejected."""
    captions = ["good one", "bad one", None, "bad two", "good two"]
    images = pa.array([png("red", 1), png("red", 2), png("red", 3), None, None], pa.binary())
    write_shard(shapes / "data" / "shapes" / "bad.parquet", 90, 5, image=images, caption=captions)
    columns = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}
    config = make_config(
        samples__sources=[{"reader": "parquet", "path": "shapes/bad.parquet", "columns": columns}],
        modalities__text__encoder={"name": "odd_encoder:Odd", "options": {"gives": gives}},
        extract__feature_dtype="float16" if gives == "huge" else "float32",
    )
    folders = encoder_folders(config, shapes)
    encode = EncodeChunk(EncodePlan(config, folders, reuse={}, use_gpu=False, num_threads=1))
    plan = ReadingPlan.of(config)
    batch = next(read_shard({k: [v] for k, v in vars(list_shards(plan)[0]).items()}, plan, done={}))
    row = encode(batch)
    table, told = open_row(row).samples, open_row(row).rejects
    assert table.column("sample_id").to_pylist() == ["s90", "s91", "s92", "s94"]
    assert table.column("text_features").to_pylist() == [[8.0, 1.0], None, None, [8.0, 1.0]]
    assert told.column("sample_id").to_pylist() == ["s91", "s93"]
    assert told.column("stage").to_pylist() == ["modality", "encode"]
    assert all(why.startswith("text: ") and reason in why for why in told.column("reason").to_pylist())
    # the rows that stay are told again where a store of other encoders takes these features over
    (shapes / "other" / "data").mkdir(parents=True)
    write_part(row, str(shapes / "other"))
    reuse = EncodePlan(config, folders, reuse={"text": str(shapes / "other")}, use_gpu=False, num_threads=1)
    kept = open_row(batch).samples.filter(pa.array([True, True, True, False, True]))
    unit, _, last, *_ = open_row(batch)
    again = EncodeChunk(reuse)(make_row(unit, 0, last, kept, open_row(batch).rejects, {}))
    assert open_row(again).samples.equals(table)
    assert open_row(again).rejects.column("sample_id").to_pylist() == ["s91"]


def test_stored_chunks_are_not_read_again(shapes: Path, make_config: MakeConfig) -> None:
    """A resumed run that encodes what it has."""
    config = make_config(extract__chunk_rows=16)
    shard = list_shards(ReadingPlan.of(config))[0]
    rows = list(read_shard({k: [v] for k, v in vars(shard).items()}, ReadingPlan.of(config), done={shard.unit: {0, 1}}))
    assert [open_row(row)[1:3] for row in rows] == [(2, True)]


def test_empty_chunk_keeps_the_schema(shapes: Path, make_config: MakeConfig) -> None:
    """An empty shard whose part no reader can open together with the others."""
    config = image_config(make_config, shapes)
    encode = EncodeChunk(EncodePlan(config, encoder_folders(config, shapes), reuse={}, use_gpu=False, num_threads=1))
    plan = ReadingPlan.of(config)
    batch = next(read_shard({k: [v] for k, v in vars(list_shards(plan)[0]).items()}, plan, done={}))
    full, samples = open_row(encode(batch)).samples, open_row(batch).samples
    empty = make_row("u", 0, True, samples.slice(0, 0), open_row(batch).rejects, {})
    assert open_row(encode(empty)).samples.schema == full.schema


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_an_assigned_gpu_that_torch_cannot_use_is_told() -> None:
    """Encoding on the CPU of a GPU machine without a word, while the bill for the GPU runs."""
    assert assigned_device(use_gpu=False).type == "cpu"
    with pytest.raises(ResourceError, match=r"extract\.num_gpus=0"):
        assigned_device(use_gpu=True)


@pytest.mark.parametrize(("share", "taken"), [(0.25, [0.25]), (1.0, [])])
def test_an_actor_takes_the_gpu_that_ray_gave_it_and_no_more(
    share: float, taken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a GPU's number written down, where Ray shows an actor its own alone; and one of four actors on a GPU
    that takes the memory of the others."""
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    assert assigned_device(use_gpu=False) == torch.device("cpu")
    assert assigned_device(use_gpu=True, gpu_frac=share) == torch.device("cuda")
    assert limits == taken


def test_chunks_in_flight_share_the_encoders(shapes: Path, make_config: MakeConfig) -> None:
    """Catches chunks that get each other's features, an encoder that two threads use at once though it is not made
    for it, and seconds that a plan counts twice."""
    config = make_config(
        modalities__image__encoder={"name": "cnn", "pretrain": "colour", "width": 8, "image_size": 12},
        modalities__text__encoder={"name": "slow_encoder:SlowLength", "options": {"delay_s": 0.01}},
        extract__chunk_rows=10,
        extract__encode_batch_size=4,
    )
    section = config.modalities["image"].encoder
    image, text = build_encoder(section), build_encoder(config.modalities["text"].encoder)
    image.adopt(SmallCNN(2, image_size=12, width=8), ["blue", "red"])  # type: ignore[attr-defined]
    save_fitted(image, section, str(shapes / "image"))
    save_fitted(text, config.modalities["text"].encoder, str(shapes / "text"))
    folders = {"image": str(shapes / "image"), "text": str(shapes / "text")}
    encode = EncodeChunk(EncodePlan(config, folders, reuse={}, use_gpu=False, num_threads=1))
    plan = ReadingPlan.of(config)
    batches = [
        batch
        for shard in list_shards(plan)
        for batch in read_shard({k: [v] for k, v in vars(shard).items()}, plan, done={})
    ]
    inside, most, slow = [0], [0], encode.encoders["text"].encode

    def watched(values: list[str]) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        found = slow(values)
        inside[0] -= 1
        return found

    encode.encoders["text"].encode = watched
    one_by_one = [open_row(encode(batch)).samples for batch in batches]
    start = time.perf_counter()
    with ThreadPoolExecutor(3) as pool:
        rows = list(pool.map(encode, batches))
    passed = time.perf_counter() - start
    together = [open_row(row).samples for row in rows]
    assert len(batches) > 3
    assert all(a.equals(b) for a, b in zip(one_by_one, together, strict=True))
    assert most == [1]
    for name in ("encode image", "encode text"):
        assert 0 < sum(open_row(row).seconds[name] for row in rows) <= passed


def test_checksums_are_those_of_the_parts_as_published(shapes: Path, make_config: MakeConfig) -> None:
    """A store that calls itself damaged after rows were taken out of a part, or a class was spelled as in another
    part, or after a run that went on."""
    write_shard(shapes / "data" / "shapes" / "again.parquet", 30, 20)  # ten rows of two other shards again
    for start, spelling in ((200, "1"), (202, "1.0")):
        write_shard(shapes / "data" / "shapes" / f"{start}.parquet", start, 2, colour=[spelling] * 2)
    config = make_config(samples__max_reject_frac=0.5)
    config = config.with_overrides(
        {"modalities.text.encoder": {"name": "odd_encoder:Odd", "options": {"gives": "nan"}}}
    )
    encode, uri = EncodeChunk(EncodePlan(config, encoder_folders(config, shapes), {}, False, 1)), str(shapes / "store")
    checksums, shards = {}, list_shards(ReadingPlan.of(config))
    for shard in shards:
        for batch in read_shard({k: [v] for k, v in vars(shard).items()}, ReadingPlan.of(config), done={}):
            told = write_part(encode(batch), uri)
            checksums[told["name"][0]] = told["checksum"][0]
    about = make_manifest(modalities={m: {"dim": e.dim} for m, e in encode.encoders.items()}).modalities
    units = [shard.unit for shard in shards]
    store = publish(uri, config, Origin(units, layout="x"), about, checksums=checksums)
    assert store.manifest.counts.rows == 124
    assert store.manifest.checksums != checksums  # rows were taken out of some
    rows = pa.concat_tables(open_store(uri).read())
    assert len(set(rows.column("sample_id").to_pylist())) == 124
    assert set(rows.column("colour").to_pylist()) == {"red", "green", "blue", "1"}
    assert publish(uri, config, Origin(units, layout="x"), about).manifest.checksums == store.manifest.checksums
