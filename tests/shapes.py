"""A small set of drawn shapes with captions, as shards on disk."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
