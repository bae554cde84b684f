"""What `mmkt plan` says of an extraction on two and on three nodes, and what it takes there.

    python jobs/benchmark.py plan --rows 40000

The nodes are raylets of this machine with one CPU each, beside a head without any. All CPUs but one encode: two nodes
have one actor, three have two. A quarter of the rows, extracted on two nodes first, give the run's own rates.

Three nodes need two cores for their encoders, and a share for reading and the driver. This shows whether work is
spread over nodes and what passing it between processes costs;
not what a network between them costs, nor more nodes than cores.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from benchmark_faults import Place, alone, family, free_port, kill
from PIL import Image

from mmkt_ray.config import Config, load_config
from mmkt_ray.done import run_folder
from mmkt_ray.plan import Machines, extract_steps
from mmkt_ray.plan.rates import Rates, defaults, rates_of

NODES = (2, 3)
NUM_SHARDS, NUM_IMAGES = 8, 256
LIMIT_S = 300.0  # of each extraction


def measure_plan(root: Path, num_rows: int) -> dict[str, Any]:
    """Seconds of each stage as planned and as measured, by number of nodes; and the same as a table."""
    write_data(root / "data", num_rows)
    path = write_config(root)
    figures: dict[str, Any] = {}
    for nodes in NODES:
        with on_nodes(nodes, root / str(nodes)) as place:
            if not figures:
                figures["few"] = extract_on(place, nodes - 1, path, root / "few", limit=num_rows // NUM_SHARDS // 4)
                config = load_config(str(path), {"run_root": str(root / "few")})
                columns = {"by default": defaults(config), "by own rates": rates_of(config, run_folder(config))}
            taken = extract_on(place, nodes - 1, path, root / str(nodes) / "runs")
        planned = {name: plan_of(config, rates, nodes, num_rows) for name, rates in columns.items()}
        figures[f"{nodes} nodes"] = planned | {"measured": taken}
    return {"figures": figures, "table": "\n".join(table(figures))}


def write_data(folder: Path, num_rows: int) -> None:
    """Shards of noise of 32 x 32 pixels, each with a text of 100 of 2,000 words and a label;
    images repeat, rows do not."""
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(NUM_IMAGES)]
    words = np.array([f"word{number:04d}" for number in range(2000)])
    folder.mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        size = num_rows // NUM_SHARDS
        columns = {
            "image": pa.array([images[i % NUM_IMAGES] for i in range(size)], pa.binary()),
            "text": [" ".join(words[drawn]) for drawn in rng.integers(0, len(words), (size, 100))],
            "label": [str(i) for i in rng.integers(0, 10, size)],
        }
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet", row_group_size=1000)


def png(pixels: np.ndarray) -> bytes:
    """As a file's content."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "png")
    return sink.getvalue()


def write_config(root: Path) -> Path:
    """Two encoders whose rates mmkt_ray/plan/rates.py has."""
    source = {"reader": "parquet", "path": "*.parquet", "columns": {"image": "image", "text": "text", "label": "label"}}
    config = {
        "name": "plan",
        "data_root": str(root / "data"),
        "samples": {"sources": [source]},
        "modalities": {"image": {"kind": "image", "encoder": "pixels"}, "text": {"kind": "text", "encoder": "tfidf"}},
        "tasks": {"label": {}},
        "extract": {"chunk_rows": 512},
    }
    path = root / "plan.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def on_nodes(num_nodes: int, root: Path) -> Iterator[Place]:
    """A cluster of a head without CPUs and nodes with one each."""
    root.mkdir()
    port = free_port()
    head = ["--head", "--num-cpus=0", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    with alone(root) as place:
        try:
            place.nodes.append(place.ray_start([], *head, f"--ray-client-server-port={free_port()}"))
            place.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
            for _ in range(num_nodes):
                place.nodes.append(place.ray_start([], f"--address=127.0.0.1:{port}", "--num-cpus=1"))
            yield place
        finally:
            kill(family(*place.nodes))


def extract_on(place: Place, num_actors: int, config: Path, runs: Path, limit: int | None = None) -> dict[str, float]:
    """Seconds by stage of `mmkt extract` there, of the pipeline after its start (extract),
    and of the whole command."""
    own = yaml.safe_load(config.read_text())
    own["extract"]["num_actors"] = num_actors
    own["samples"]["sources"][0]["limit"] = limit
    path, log, place.runs = place.root / f"{runs.name}.yaml", place.root / f"{runs.name}.txt", runs
    path.write_text(yaml.safe_dump(own))
    start = time.perf_counter()
    status = place.start(["extract"], path, log).wait(LIMIT_S)
    command_s = time.perf_counter() - start
    if status:
        raise RuntimeError(f"mmkt extract on {num_actors + 1} nodes: status {status}\n{log.read_text()[-3000:]}")
    (manifest,) = (json.loads(file.read_text()) for file in runs.glob("plan/features/*/manifest.json"))
    extract_s = manifest["wall_s"] - manifest["startup_s"]
    return {**manifest["stages"], "extract": extract_s, "start-up": manifest["startup_s"], "command": command_s}


def plan_of(config: Config, rates: Rates, num_nodes: int, num_rows: int) -> dict[str, float]:
    """Core seconds by stage, and the seconds that they take together (extract)."""
    config = config.with_overrides({"extract.num_actors": num_nodes - 1})
    steps = {step.name.strip(): step for step in extract_steps(config, rates, Machines(num_nodes, 1), num_rows)}
    return {name: step.core_s for name, step in steps.items() if step.part} | {"extract": steps["extract"].seconds}


def table(figures: dict[str, Any]) -> Iterator[str]:
    """One line a stage."""
    for nodes, columns in figures.items():
        if "measured" in columns:
            yield f"{nodes:24}" + "".join(f"{name:>14}" for name in columns)
            for stage in columns["measured"]:
                cells = [columns[name].get(stage) for name in columns]
                yield f"  {stage:22}" + "".join(f"{'' if cell is None else f'{cell:.1f} s':>14}" for cell in cells)
