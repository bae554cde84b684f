"""Several images or captions in one row: pooled features, the first alone, or one text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from mmkt_ray.config import Config, parse_config
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.decode import decode_column
from mmkt_ray.features.encode import encode_column
from mmkt_ray.features.statistics import encoder_statistics
from mmkt_ray.features.store import from_arrow
from mmkt_ray.kinds.lists import pool_features
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import png

TEXTS = [["a red cat", "a cat"], ["dog"], [], None, [None, " ", "a  dog\u0007"]]
PNGS = [png(colour, 1) for colour in ("red", "green", "blue")]
IMAGES = [PNGS[:2], PNGS[2:], [], None, [PNGS[0], None]]


def config_of(folder: Path, path: str, kind: str, pool: str | None, **source: Any) -> Config:
    encoder = "tfidf" if kind == "text" else {"name": "pixels", "image_size": 16}
    source = {
        "reader": path.rpartition(".")[2],
        "path": path,
        "split": "train",
        "columns": {"x": "x", "label": "label"},
    } | source
    if source["reader"] in ("jsonl", "csv"):
        source["reader"] = "manifest"
    return parse_config(
        {
            "name": "t",
            "data_root": str(folder),
            "samples": {"sources": [source], "split": {"val_frac": 0, "test_frac": 0}},
            "modalities": {"x": {"kind": {"name": kind, "pool": pool}, "encoder": encoder}},
            "tasks": {"label": {}},
        }
    )


def read(config: Config) -> tuple[pa.Table, dict[str, str]]:
    plan = ReadingPlan.of(config)
    chunks = [chunk for shard in list_shards(plan) for chunk in read_chunks(plan, shard)]
    return pa.concat_tables([c.table for c in chunks]), {r.sample_id: r.reason for c in chunks for r in c.rejects}


def write(folder: Path, file: str, cells: list[Any]) -> None:
    rows = [{"x": cell, "label": "u"} for cell in cells]
    if file.endswith("jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / file)


@pytest.mark.parametrize("file", ["t.parquet", "t.jsonl"])
@pytest.mark.parametrize(
    ("pool", "wanted"),
    [
        ("mean", [["a red cat", "a cat"], ["dog"], ["a  dog "]]),
        ("first", ["a red cat", "dog"]),
        ("join", ["a red cat\na cat", "dog", " \na  dog "]),
    ],
)
def test_captions(tmp_path: Path, file: str, pool: str, wanted: list[Any]) -> None:
    """Catches captions that are lost or that come from another row; blank ones among them;
    a row without any that is present."""
    cells = TEXTS if pool != "first" else TEXTS[:4]
    write(tmp_path, file, cells)
    table, reasons = read(config_of(tmp_path, file, "text", pool))
    assert table["x"].to_pylist() == wanted
    assert set(reasons.values()) == {"no modality is present"}
    assert len(reasons) == 2


def test_a_remark_in_brackets_is_no_list(tmp_path: Path) -> None:
    """Catches a caption that is refused because it looks like a list."""
    write(tmp_path, "t.jsonl", ["[sic, a cat]", '["a", "b"]', "[Music]"])
    table, _ = read(config_of(tmp_path, "t.jsonl", "text", "mean"))
    assert table["x"].to_pylist() == [["[sic, a cat]"], ["a", "b"], ["[Music]"]]


def test_lists_without_a_word_are_refused(tmp_path: Path) -> None:
    """Catches lists that are taken as something else in silence."""
    told = "must be one text, got several: say what becomes of them, kind: {name: text, pool: first}"
    write(tmp_path, "t.parquet", TEXTS)
    with pytest.raises(DataError, match="must be one text, got several"):
        read(config_of(tmp_path, "t.parquet", "text", None))
    write(tmp_path, "t.jsonl", TEXTS)
    assert told in read(config_of(tmp_path, "t.jsonl", "text", None))[1]["t.jsonl#1"]
    with pytest.raises(ConfigError, match="join"):
        config_of(tmp_path, "t.jsonl", "image", "join")
    raw = config_of(tmp_path, "t.jsonl", "image", "mean").model_dump(mode="json")
    raw["modalities"]["x"]["encoder"] = {"name": "cnn", "pretrain": "label"}
    with pytest.raises(ConfigError, match=r"'cnn' is trained on single values: set kind\.pool to first"):
        parse_config(raw)


@pytest.mark.parametrize("form", ["parquet", "paths", "columns"])
def test_images_are_pooled(tmp_path: Path, form: str) -> None:
    """Catches features of the first image only, of a neighbour's, or of a row that has none;
    paths of which one is missing."""
    source: dict[str, Any] = {}
    if form == "parquet":
        write(tmp_path, "t.parquet", IMAGES)
        path = "t.parquet"
    else:
        for i, data in enumerate(PNGS):
            (tmp_path / f"{i}.png").write_bytes(data)
        if form == "paths":
            path = "t.jsonl"
            write(tmp_path, path, [["0.png", "1.png"], ["2.png"], [], None, ["0.png", None], ["0.png", "none.png"]])
        else:
            path, source = "t.csv", {"columns": {"x": ["front", "back"], "label": "label"}}
            (tmp_path / path).write_text("front,back,label\n0.png,1.png,u\n2.png,,u\n,,u\n,,u\n0.png,,u\n")
    config = config_of(tmp_path, path, "image", "mean", **source)
    table, reasons = read(config)
    assert table["x"].to_pylist() == [PNGS[:2], PNGS[2:], PNGS[:1]]
    assert list(reasons.values())[:2] == ["no modality is present"] * 2
    assert [("no file 'none.png'" in r) for r in reasons.values()][2:] == [True] * (form == "paths")
    kind = config.modalities["x"].kind
    encoder: Any = build_encoder(config.modalities["x"].encoder)
    decoded = decode_column(table["x"], kind, encoder, SamplesConfig(sources=config.samples.sources))
    assert len({*decoded.hashes}) == 3
    column, refused = encode_column(encoder, decoded.values, "float32", kind.pooled)
    assert not refused
    files, one = pa.chunked_array([pa.array(PNGS, pa.large_binary())]), kind.model_copy(update={"pool": None})
    single = decode_column(files, one, encoder, config.samples)
    alone = encoder.encode(single.values)
    np.testing.assert_allclose(
        from_arrow(column, encoder.dim)[0], [alone[:2].mean(axis=0), alone[2], alone[0]], atol=1e-5
    )


def test_a_broken_image_costs_its_row(tmp_path: Path) -> None:
    """Catches a broken image that shifts the others, or that is told of nobody."""
    write(tmp_path, "t.parquet", [PNGS[:1], [PNGS[1], b"no image"], PNGS[2:]])
    config = config_of(tmp_path, "t.parquet", "image", "max")
    table, _ = read(config)
    decoded = decode_column(table["x"], config.modalities["x"].kind, None, config.samples)
    assert list(decoded.broken) == [1]
    assert decoded.broken[1].startswith("item 2 of 2: ")
    assert [value is None for value in decoded.values] == [False, True, False]
    assert (decoded.values[2][0][:, :, 2] > 150).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_pooling(sparse: bool) -> None:
    """Catches means and maxima over rows' borders."""
    features = np.array([[1, 0, -1], [3, 0, 0], [0, 2, 0], [5, 5, 5], [0, 0, 0]], np.float32)
    given: Any = sp.csr_matrix(features) if sparse else features
    for pool, by in (("mean", np.mean), ("max", np.max)):
        pooled = pool_features(given, np.array([2, 1, 2]), pool)
        assert sp.issparse(pooled) == sparse
        wanted = [by(features[:2], axis=0), features[2], by(features[3:], axis=0)]
        np.testing.assert_allclose(pooled.toarray() if sparse else pooled, wanted)


def test_encoders_are_fitted_on_all_captions(tmp_path: Path) -> None:
    """Catches a vocabulary of first captions, and documents that are counted by row."""
    write(tmp_path, "t.parquet", TEXTS)
    config = config_of(tmp_path, "t.parquet", "text", "mean")
    plan = ReadingPlan.of(config)
    encoder: Any = build_encoder(config.modalities["x"].encoder)
    statistics = encoder_statistics(config.modalities["x"].encoder, plan, config.samples, list_shards(plan)[0], ())
    assert statistics.num_texts == 4
    encoder.finish(statistics)
    column, _ = encode_column(encoder, plan.modalities["x"].values(read(config)[0]["x"]), "float32", "mean")
    features = from_arrow(column, encoder.dim)[0]
    texts = encoder.encode(["a red cat", "a cat", "dog"]).toarray()
    np.testing.assert_allclose(features.toarray()[:2], [texts[:2].mean(axis=0), texts[2]], atol=1e-6)
