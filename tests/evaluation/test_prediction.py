"""Reading new shards for prediction: which columns they may lack, and what a row without a modality is told."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.config import Config
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.prediction import prediction_config
from mmkt_ray.samples.readers import list_shards, read_chunks
from tests.evaluation.runs import make_config


def read_new(config: Config, path: Path, reader: str | None = None) -> tuple[list[dict], list]:
    """Rows and rejects of new shards, read as `mmkt predict` reads them."""
    found = prediction_config(config, [str(path)], 0, reader, {})
    chunks = [c for shard in list_shards(found) for c in read_chunks(found, shard)]
    rows = pa.concat_tables([c.table for c in chunks]).to_pylist()
    return [{m: r[m] for m in ("image", "text")} for r in rows], [r for c in chunks for r in c.rejects]


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path)


def test_a_shard_without_the_column_of_a_modality_is_read_without_it(config, tmp_path):
    """Catches a whole file refused because its rows have only a text, and a neighbour's image column dropped with it."""
    pq.write_table(pa.table({"id": ["a"], "caption": ["a red car"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"id": ["b"], "caption": ["x"], "image": [b"png"]}), tmp_path / "2.parquet")
    rows, rejects = read_new(config, tmp_path / "*.parquet")
    assert rows == [{"image": None, "text": "a red car"}, {"image": b"png", "text": "x"}]
    assert rejects == []


def test_a_shard_with_no_modality_at_all_is_refused(config, tmp_path):
    """Catches a misspelt mapping that gives rows of nothing, or no rows, without a word."""
    pq.write_table(pa.table({"id": ["a"], "captions": ["a red car"]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match="has no column"):
        read_new(config, tmp_path / "1.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_manifests_may_lack_a_modality_or_its_file(config, tmp_path, suffix):
    """Catches a text that is lost because the image beside it is not where the manifest says."""
    (tmp_path / "1.png").write_bytes(b"png")
    columns = {"id": ["a", "b"], "caption": ["x", "y"], "image": ["1.png", "gone.png"]}
    for name, chosen in (("whole", columns), ("texts", {k: v for k, v in columns.items() if k != "image"})):
        rows = [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table(chosen), path)
        elif suffix == "csv":
            path.write_text("\n".join([",".join(chosen), *(",".join(r.values()) for r in rows)]) + "\n")
        else:
            path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    rows, rejects = read_new(config, tmp_path / f"whole.{suffix}", "manifest")
    assert rows == [{"image": b"png", "text": "x"}, {"image": None, "text": "y"}]
    assert [(r.sample_id, r.stage) for r in rejects] == [("b", "modality")]
    assert "no file 'gone.png'" in rejects[0].reason
    rows, rejects = read_new(config, tmp_path / f"texts.{suffix}", "manifest")
    assert (rows, rejects) == ([{"image": None, "text": "x"}, {"image": None, "text": "y"}], [])


def test_training_still_refuses_a_column_that_is_not_there(config, tmp_path):
    """Catches a typo in the config that trains on one modality only."""
    (tmp_path / "data").mkdir()
    columns = {"id": ["a"], "caption": ["x"], "thing": ["car"], "colour": ["red"]}
    pq.write_table(pa.table(columns), tmp_path / "data" / "0.parquet")
    with pytest.raises(DataError, match="no column 'image'"):
        list(read_chunks(config, list_shards(config)[0]))
