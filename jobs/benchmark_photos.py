"""Photos: 640 x 480 JPEGs of about 110 kB, decoded and resized to 224 x 224 for an encoder that costs nothing.

Photos are made up: smooth colours, shapes and noise, as many different ones as `DIFFERENT`. The contenders read the
same Parquet shards and write a feature for each row:

- DCT loop: what one would write by hand, simplejpeg at half the size, Pillow's resize, a thread on each core
- Pillow loop: the same with Pillow alone, every pixel decoded
- pipeline, pipeline exact: `mmkt extract` with `samples.decode` as it is by default, and exact
- decoding alone: in the child that isolates decoders, on one core; rows per second of CPU, and that as a share of
  what it is in this process
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image, ImageDraw

from mmkt_ray import cluster
from mmkt_ray.config import Config, parse_config
from mmkt_ray.encoders.build import build_encoder, save_fitted
from mmkt_ray.features.decode import decode_column, input_size
from mmkt_ray.kinds.images import InputSize, decode_file
from mmkt_ray.sandbox import decoding

SIDE, WIDTH, HEIGHT, DIFFERENT, SHARDS = 224, 640, 480, 200, 8
HOW = int(Image.Resampling.BILINEAR)
Result = dict[str, float]


class FirstPixel:
    """An encoder that costs nothing: the colour of one pixel."""

    version = 1
    dim = 3
    input_size = InputSize(SIDE, SIDE, HOW)

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([value[:, 0, 0] for value in values], np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        pass


def draw_photo(rng: np.random.Generator) -> bytes:
    """One JPEG."""
    colours = rng.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = (int(rng.integers(low, high)) for low, high in ((0, WIDTH), (0, HEIGHT), (8, 120)))
        shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
        shape(
            (x, y, x + size, y + size * float(rng.uniform(0.4, 1.5))),
            fill=tuple(int(v) for v in rng.integers(0, 256, 3)),
        )
    noise = rng.normal(0, 9, (HEIGHT, WIDTH, 1)) + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    buffer = io.BytesIO()
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(85, 91)))
    return buffer.getvalue()


def photo_contenders(
    num_rows: int, folder: Path, pipeline: Callable[[Config, dict[str, str], Path], Result]
) -> dict[str, Callable[[], Result]]:
    """pipeline: runs the product on a config with fitted encoders."""
    rng = np.random.default_rng(0)
    photos = [draw_photo(rng) for _ in range(min(num_rows, DIFFERENT))]
    (folder / "photos").mkdir()
    shards = []
    for number in range(SHARDS):
        own = [photos[i % len(photos)] for i in range(number, num_rows, SHARDS)]
        shards.append(folder / "photos" / f"{number}.parquet")
        pq.write_table(
            pa.table({"image": pa.array(own, pa.binary()), "label": ["a"] * len(own)}), shards[-1], row_group_size=256
        )
    config = photo_config(folder)
    exact = config.model_copy(update={"samples": config.samples.model_copy(update={"decode": "exact"})})
    encoders = {"image": str(folder / "encoder")}
    section = config.modalities["image"].encoder
    save_fitted(build_encoder(section), section, encoders["image"])
    return {
        "DCT loop": lambda: loop(shards, decode_by_hand, folder),
        "Pillow loop": lambda: loop(shards, decode_by_pillow, folder),
        "pipeline": lambda: pipeline(config, encoders, folder),
        "pipeline exact": lambda: pipeline(exact, encoders, folder),
        "decoding alone": lambda: isolated(photos, config),
    }


def photo_config(folder: Path) -> Config:
    """One modality, read by the encoder that costs nothing."""
    source = {
        "reader": "parquet",
        "path": "photos/*.parquet",
        "split": "train",
        "columns": {"image": "image", "label": "label"},
    }
    return parse_config(
        {
            "name": "photos",
            "data_root": str(folder),
            "run_root": str(folder),
            "samples": {"sources": [source]},
            "modalities": {"image": {"kind": "image", "encoder": "benchmark_photos:FirstPixel"}},
            "tasks": {"label": {}},
        }
    )


def loop(shards: Sequence[Path], decode: Callable[[bytes], np.ndarray], folder: Path) -> Result:
    """Read, decode on all cores, encode, write."""
    start, num_rows = time.perf_counter(), 0
    with ThreadPoolExecutor(cluster.cores()) as pool:
        for path in shards:
            images = np.stack(
                list(pool.map(decode, pq.read_table(path, columns=["image"]).column("image").to_pylist()))
            )
            features = FirstPixel().encode(list(images.transpose(0, 3, 1, 2)))
            column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), FirstPixel.dim)
            pq.write_table(pa.table({"image_features": column}), folder / "loop.parquet")
            num_rows += len(images)
    wall = time.perf_counter() - start
    return {"rows_per_s": num_rows / wall, "steady_rows_per_s": num_rows / wall, "wall_s": wall}


def decode_by_hand(data: bytes) -> np.ndarray:
    """(S, S, 3) uint8."""
    pixels = simplejpeg.decode_jpeg(data, min_width=SIDE, min_height=SIDE)
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def decode_by_pillow(data: bytes) -> np.ndarray:
    """(S, S, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def isolated(photos: Sequence[bytes], config: Config) -> Result:
    """As the pipeline decodes a column, CPU seconds of both processes; and the same work without the child."""
    column, kind = pa.chunked_array([pa.array(photos, pa.large_binary())]), config.modalities["image"].kind
    decode_column(column.slice(0, 8), kind, FirstPixel(), config.samples)  # the child starts
    (child,) = decoding._idle[kind.decoder]
    before, start = _cpu_of(child.process.pid), time.process_time()
    decode_column(column, kind, FirstPixel(), config.samples)
    own, other = time.process_time() - start, _cpu_of(child.process.pid) - before
    size, start = input_size(kind, FirstPixel(), config.samples), time.process_time()
    for data in photos:
        decode_file(data, config.samples.max_image_pixels, size)
    alone = time.process_time() - start
    return {"rows_per_cpu_s": len(photos) / (own + other), "share": alone / (own + other), "parent_cpu_s": own}


def _cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
