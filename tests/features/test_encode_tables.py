"""Tables, vectors and lists of images through the stages in the middle of the pipeline, without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, save_fitted
from mmkt_ray.features.chunks import ChunkRow, open_row, read_shard, write_part
from mmkt_ray.features.decode import decode_chunk
from mmkt_ray.features.encode import EncodeChunk, EncodePlan
from mmkt_ray.features.publish import count_cleaned, nulled
from mmkt_ray.features.statistics import encoder_statistics
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import png, write_shard

MakeConfig = Callable[..., Config]


def read(config: Config) -> ChunkRow:
    plan = ReadingPlan.of(config)
    return next(read_shard({k: [v] for k, v in vars(list_shards(plan)[0]).items()}, plan, done={}))


def fitted(config: Config, folder: Path) -> dict[str, str]:
    """Folders of the encoders, fitted on the only shard."""
    plan = ReadingPlan.of(config)
    for name, modality in config.modalities.items():
        encoder: Any = build_encoder(modality.encoder)
        if hasattr(encoder, "partial"):
            encoder.finish(
                encoder_statistics(modality.encoder, plan.only(name), config.samples, list_shards(plan)[0], ())
            )
        save_fitted(encoder, modality.encoder, str(folder / name))
    return {name: str(folder / name) for name in config.modalities}


def test_bad_cells_and_vectors_are_told_once(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches a bad cell that is told twice, or not at all, where features come from another store; a vector of
    another length that costs its row's table, or whose row has the next one's features."""
    price = [str(i) for i in range(16)]
    price[3] = "12,5"
    vectors = [[float(i), 1.0] for i in range(16)]
    vectors[5] = [1.0]
    write_shard(tmp_path / "data" / "shapes" / "a.parquet", 0, 16, price=price, vector=vectors)
    columns = {"sample_id": "id", "table": ["price"], "vector": "vector", "colour": "colour"}
    source = {"reader": "parquet", "path": "shapes/a.parquet", "split": "train", "columns": columns}
    modalities = {"table": {"kind": "table", "encoder": "table"}, "vector": {"kind": "vector", "encoder": "identity"}}
    config = make_config(
        samples__sources=[source], samples__split={"val_frac": 0, "test_frac": 0}, modalities=modalities
    )
    folders, store = fitted(config, tmp_path), str(tmp_path / "store")
    first = EncodeChunk(EncodePlan(config, folders, reuse={}, use_gpu=False, num_threads=1))(read(config))
    told = write_part(first, store)
    reuse = {"table": store, "vector": store}
    again = EncodeChunk(EncodePlan(config, folders, reuse=reuse, use_gpu=False, num_threads=1))(read(config))
    table = open_row(first).samples
    assert open_row(again).samples.equals(table)
    assert table["vector_features"].to_pylist() == [None if i == 5 else v for i, v in enumerate(vectors)]
    assert table["table_features"].to_pylist()[3] == [0.0, 1.0]
    rejects = open_row(first).rejects.to_pylist()
    assert [(r["sample_id"], r["stage"]) for r in rejects] == [("s5", "modality")]
    assert rejects[0]["reason"] == "vector: a vector of 1 numbers, where the first of the train split has 2"
    assert nulled(count_cleaned(store, told["name"])) == {"table: 'price' is no number, read as null": 1}


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_lists_of_images_decoded_before_or_inside(tmp_path: Path, make_config: MakeConfig, pool: str) -> None:
    """Catches prepared images of a list that are cut at the wrong place on a GPU cluster,
    and a broken one told of nobody."""
    images = [[png("red", 1), png("blue", 2)], [png("green", 3)], [png("red", 4), b"broken"], None]
    write_shard(tmp_path / "data" / "shapes" / "a.parquet", 0, 4, image=pa.array(images, pa.list_(pa.binary())))
    columns = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}
    source = {"reader": "parquet", "path": "shapes/a.parquet", "columns": columns}
    text = {"name": "slow_encoder:SlowLength", "options": {"delay_s": 0.0}}
    image_kind = {"name": "image", "pool": pool}
    config = make_config(samples__sources=[source], modalities__text__encoder=text, modalities__image__kind=image_kind)
    encode = EncodeChunk(EncodePlan(config, fitted(config, tmp_path), reuse={}, use_gpu=False, num_threads=1))
    batch = read(config)
    inside, before = encode(batch), encode(decode_chunk(batch, config))
    table = open_row(inside).samples
    assert open_row(before).samples.equals(table)
    assert open_row(before).rejects.equals(open_row(inside).rejects)
    (reject,) = open_row(inside).rejects.to_pylist()
    assert reject["sample_id"] == "s2"
    assert reject["reason"].startswith("image: item 2 of 2: ")
    assert table["image_features"].is_null().to_pylist() == [False, False, True, True]
    alone = [
        encode.encoders["image"].encode([encode.encoders["image"].prepare(p)])[0]
        for p in _pixels(config, images[0] or [])
    ]
    wanted = np.mean(alone, axis=0) if pool == "mean" else np.max(alone, axis=0)
    np.testing.assert_allclose(table["image_features"][0].as_py(), wanted, atol=1e-5)


def _pixels(config: Config, files: list[bytes]) -> list[np.ndarray]:
    from mmkt_ray.kinds.file_kinds import Image
    from mmkt_ray.sandbox.child import Limits
    from mmkt_ray.sandbox.decoding import decode_samples

    found = decode_samples(files, Image(), Limits(config.samples.max_image_pixels, config.samples.decode_timeout_s))
    return [outcome[0] for outcome in found]  # type: ignore[index]  # none is broken
