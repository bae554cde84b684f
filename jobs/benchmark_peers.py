"""Features of images, by this package, by Daft and by Ray Data as its documentation writes it:
each a program of its own.

    make bench-peers                                      installs Daft in .venv/peers, then does both
    python jobs/benchmark_peers.py photos                 640 x 480 to 224 x 224, for an encoder that costs nothing
    python jobs/benchmark_peers.py small --rows 50000     32 x 32 through the small CNN in bf16, drawn images

Each contender is given the same Parquet shards and encoder, and writes a Parquet file of features. Time is that of
the whole program, from its start to its end: imports, Ray, actors and encoder included. Each round runs every
contender once, one after another, after a round that is not counted. Features are compared: they agree in the mean,
since each decodes and resizes in its own way. Prints a Markdown table; --out writes JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from mmkt_ray.kinds.images import InputSize

SHARDS, DIFFERENT, SIDE = 8, 200, 224
BATCH, CORES = 512, 2  # images at a time; processes that encode
CONTENDERS = ("mmkt", "daft", "ray_data")
PEERS = Path(__file__).parents[1] / ".venv" / "peers"  # what only a peer's program needs


class SeededCNN:
    """The small CNN with weights drawn from a seed, in bf16."""

    version = 1
    dim = 256
    input_size = InputSize(32, 32, int(Image.Resampling.BILINEAR))

    def __init__(self) -> None:
        import torch

        from mmkt_ray.encoders.cnn import SmallCNN

        torch.manual_seed(0)
        self.model = SmallCNN(10).eval().to(memory_format=torch.channels_last)
        for values in (*self.model.parameters(), *self.model.buffers()):
            if values.is_floating_point() and not values.any():  # biases, and the whitening that is fitted on images
                torch.nn.init.normal_(values)

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """(B, 3, 32, 32) uint8 -> (B, 256)."""
        import torch

        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found: np.ndarray = self.model.features(torch.from_numpy(np.stack(values))).float().numpy()
        return found

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        pass


def encoder_of(what: str) -> Any:
    """One that the contenders share."""
    from benchmark_photos import FirstPixel

    return FirstPixel() if what == "photos" else SeededCNN()


def side_of(what: str) -> int:
    """Pixels, after the resize."""
    return SIDE if what == "photos" else 32


# --- contenders: what a program of each does ------------------------------------------------------------------------


def mmkt(what: str, folder: Path) -> None:
    """`mmkt extract`."""
    from mmkt_ray.cli import main

    source = {
        "reader": "parquet",
        "path": "shards/*.parquet",
        "split": "train",
        "columns": {"image": "image", "label": "label"},
    }
    encoder = "benchmark_photos:FirstPixel" if what == "photos" else "benchmark_peers:SeededCNN"
    config = {
        "name": "peers",
        "data_root": str(folder),
        "run_root": str(folder / "mmkt"),
        "samples": {"sources": [source]},
        "modalities": {"image": {"kind": "image", "encoder": encoder}},
        "tasks": {"label": {}},
    }
    (folder / "peers.yaml").write_text(yaml.safe_dump(config))
    assert main(["extract", str(folder / "peers.yaml"), "--quiet"]) == 0


def daft(what: str, folder: Path) -> None:
    """A data frame: decode and resize in Daft, encode in a class of a user's own."""
    import daft  # type: ignore[import-not-found, unused-ignore]  # in .venv/peers

    side = side_of(what)

    @daft.cls(max_concurrency=CORES, use_process=what != "photos")
    class Encoder:
        def __init__(self) -> None:
            self.encoder = encoder_of(what)

        @daft.method.batch(return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=BATCH)  # type: ignore[untyped-decorator]
        def __call__(self, images: Any) -> Any:
            pixels = np.stack(images.to_pylist()).transpose(0, 3, 1, 2)
            return list(self.encoder.encode(pixels))

    frame = daft.read_parquet(str(folder / "shards" / "*.parquet"))
    frame = frame.with_column("image", frame["image"].decode_image(mode="RGB"))
    if what == "photos":
        frame = frame.with_column("image", frame["image"].resize(side, side))
    frame = frame.select(frame["label"], Encoder()(frame["image"]).alias("features"))
    frame.write_parquet(str(folder / "daft"))


def ray_data(what: str, folder: Path) -> None:
    """As the pages on batch inference write it: decode in a task, encode in a pool of actors."""
    import ray

    side = side_of(what)

    def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = (Image.open(io.BytesIO(data)).convert("RGB") for data in batch["image"])
        if what == "photos":
            images = (image.resize((side, side), Image.Resampling.BILINEAR) for image in images)
        return {"image": np.stack([np.asarray(image) for image in images]), "label": batch["label"]}

    class Encoder:
        def __init__(self) -> None:
            self.encoder = encoder_of(what)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"label": batch["label"], "features": self.encoder.encode(batch["image"].transpose(0, 3, 1, 2))}

    ray.init(
        num_cpus=2 * CORES, log_to_driver=False, logging_level="ERROR", include_dashboard=False
    )  # actors take half
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(str(folder / "shards"))
    pool = ray.data.ActorPoolStrategy(size=CORES)
    encoded = rows.map_batches(decode, batch_size=BATCH).map_batches(Encoder, batch_size=BATCH, compute=pool)
    encoded.write_parquet(str(folder / "ray_data"))


def features_of(name: str, folder: Path) -> np.ndarray:
    """(N, D) that a contender wrote, in no order."""
    where = folder / ("mmkt/peers/features" if name == "mmkt" else name)
    column = "image_features" if name == "mmkt" else "features"
    files = [path for path in sorted(where.rglob("*.parquet")) if has(path, column)]
    found = [pq.read_table(path, columns=[column])[column].to_pylist() for path in files]
    return np.concatenate([np.asarray(part, np.float32).reshape(len(part), -1) for part in found])


def has(path: Path, column: str) -> bool:
    """Whether it is a file of features."""
    return column in pq.read_schema(path).names


# --- the comparison -------------------------------------------------------------------------------------------------


def write_shards(what: str, num_rows: int, folder: Path) -> None:
    """JPEGs, as many different ones as DIFFERENT."""
    from benchmark_photos import draw_photo

    rng = np.random.default_rng(0)
    images = [draw_photo(rng) if what == "photos" else draw_small(rng) for _ in range(min(num_rows, DIFFERENT))]
    (folder / "shards").mkdir()
    for number in range(SHARDS):
        own = [images[i % len(images)] for i in range(number, num_rows, SHARDS)]
        table = pa.table({"image": pa.array(own, pa.binary()), "label": ["a"] * len(own)})
        pq.write_table(table, folder / "shards" / f"{number}.parquet", row_group_size=256 if what == "photos" else 4096)


def draw_small(rng: np.random.Generator) -> bytes:
    """A JPEG of 32 x 32."""
    colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (32, 32), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    colours.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def time_of(name: str, what: str, folder: Path) -> float:
    """Seconds of a contender's program. Raises: SystemExit with what it said if it fails."""
    for left in ("mmkt", "daft", "ray_data"):
        shutil.rmtree(folder / left, ignore_errors=True)
    beside = str(Path(__file__).parent)
    paths = [beside, *([str(PEERS)] if name == "daft" else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    code = f"import benchmark_peers as peers; from pathlib import Path; peers.{name}({what!r}, Path({str(folder)!r}))"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def compare(what: str, num_rows: int, num_rounds: int, chosen: Sequence[str]) -> dict[str, Any]:
    """Seconds of each round, and how far the features' means are from ours, in their standard deviations."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    means = dict[str, np.ndarray]()
    with tempfile.TemporaryDirectory(prefix="mmkt-peers-", dir="/tmp") as name_of_folder:
        folder = Path(name_of_folder)
        write_shards(what, num_rows, folder)
        spread = np.ones(1)
        for number in range(num_rounds + 1):
            for name in chosen:
                took = time_of(name, what, folder)
                print(f"round {number}: {name} {took:.1f} s", file=sys.stderr, flush=True)
                if number:
                    seconds[name].append(took)
                    continue
                features = features_of(name, folder)
                assert len(features) == num_rows, f"{name} wrote {len(features)} of {num_rows} rows"
                means[name] = features.mean(axis=0)
                spread = features.std(axis=0) + 1e-6 if name == chosen[0] else spread
    off = {name: round(float((np.abs(mean - means[chosen[0]]) / spread).max()), 3) for name, mean in means.items()}
    return {"what": what, "rows": num_rows, "seconds": seconds, "means_off": off}


def as_table(found: dict[str, Any]) -> str:
    """Markdown: medians with least and greatest."""
    first, rows = next(iter(found["seconds"])), found["rows"]
    lines = [f"| {found['what']}, {rows:,} | seconds | rows/s | {first} is faster by |", "|---|---|---|---|"]
    for name, seconds in found["seconds"].items():
        ratios = sorted(a / b for a, b in zip(seconds, found["seconds"][first], strict=True))
        told = "" if name == first else f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        median = statistics.median(seconds)
        lines.append(
            f"| {name} | {median:.1f} [{min(seconds):.1f}, {max(seconds):.1f}] | {rows / median:,.0f} | {told} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["photos", "small"])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that is not")
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="some of the contenders, ours first"
    )
    parser.add_argument("--out", default=None, help="write the JSON here")
    args = parser.parse_args()
    if "daft" in args.only and not PEERS.exists():
        parser.error(f"{PEERS} is missing: make bench-peers installs it, --only mmkt ray_data does without")
    found = compare(args.what, args.rows, args.rounds, args.only)
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
    print(as_table(found))
    print(f"means of features, furthest from those of {args.only[0]}, in standard deviations: {found['means_off']}")


if __name__ == "__main__":
    main()
