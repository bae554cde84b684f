"""A small set of drawn shapes with captions, as shards on disk."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmkt_ray.config import Config
from tests.configs import IMAGE_AND_TEXT, build_config, raw_config

SHAPES = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}  # columns of the shards
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def png(colour: str, seed: int, side: int = 24) -> bytes:
    """A noisy square of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 25, (side, side, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "png")
    return sink.getvalue()


def write_shard(path: Path, start: int, num_rows: int, **replace: list[Any]) -> None:
    """Rows start .. start + num_rows: image, caption, colour, id; `replace` sets whole columns."""
    names = [list(COLOURS)[i % 3] for i in range(start, start + num_rows)]
    columns: dict[str, Any] = {
        "id": [f"s{i}" for i in range(start, start + num_rows)],
        "image": pa.array([png(c, i) for i, c in enumerate(names, start)], pa.binary()),
        "caption": [f"a {c} square number w{i}" for i, c in enumerate(names, start)],
        "colour": names,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | replace), path)


def write_shards(folder: Path) -> None:
    """Three shards of 40 rows in <folder>/data/shapes."""
    for k in range(3):
        write_shard(folder / "data" / "shapes" / f"{k}.parquet", 40 * k, 40)


def shapes_config(folder: Path, **overrides: Any) -> Config:
    """A config over those shards: shapes_config(folder, training__epochs=2)."""
    raw = raw_config({"colour": "multiclass"}, SHAPES, "shapes/*.parquet") | {
        "name": "shapes",
        "data_root": str(folder / "data"),
        "run_root": str(folder / "runs"),
        "modalities": IMAGE_AND_TEXT | {"image": {"kind": "image", "encoder": {"name": "pixels", "image_size": 16}}},
        "extract": {"chunk_rows": 16, "num_actors": 1},
        "model": {"experts": False},  # their fits take time
        "training": {"auto": []},  # so does choosing settings
    }
    return build_config(raw, **overrides)
