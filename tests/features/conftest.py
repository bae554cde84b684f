"""Fixtures over a small set of drawn shapes with captions."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmkt_ray.config import Config, parse_config
from tests.features.shapes import write_shard


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Three shards of 40 rows in <tmp>/data/shapes."""
    for k in range(3):
        write_shard(tmp_path / "data" / "shapes" / f"{k}.parquet", 40 * k, 40)
    return tmp_path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """The config over those shards, with dotted overrides."""
    columns = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}
    raw = {
        "name": "shapes",
        "data_root": str(tmp_path / "data"),
        "run_root": str(tmp_path / "runs"),
        "samples": {"sources": [{"reader": "parquet", "path": "shapes/*.parquet", "columns": columns}]},
        "modalities": {
            "image": {"kind": "image", "encoder": {"name": "pixels", "image_size": 16}},
            "text": {"kind": "text", "encoder": "tfidf"},
        },
        "tasks": {"colour": {}},
        "extract": {"chunk_rows": 16, "num_actors": 1},
    }
    return lambda **overrides: parse_config(raw).with_overrides({k.replace("__", "."): v for k, v in overrides.items()})
