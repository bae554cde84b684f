"""Peak memory of every process of a run against the number of samples, of shards, and the size of one shard.

Shards are made up as they are written: a text of words from a fixed vocabulary, to every fourth row an image of 8 x 8
random pixels, one of ten labels. Each case runs `mmkt` as a user does, with a Ray of its own, and is sampled from
outside: every 0.2 s each process of the command, by the kernel's count of its pages (/proc/<pid>/smaps_rollup,
Linux).

- own: pages that only this process holds and the kernel cannot drop (anonymous). Shared libraries, mapped files and
  Ray's object store, which is bounded by `cluster.local.OBJECT_STORE_BYTES` and shared by all, are not in it
- resident: all pages that are in memory for the process, those shared with others and mapped files included
- all: every process together, pages that several hold counted once (PSS), the object store included
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure

SAMPLE_EVERY_S = 0.2
VOCABULARY, WORDS, CLASSES, SIDE = 2000, 20, 10, 8
CASES = {  # name -> shards, rows of each, words of a text
    **{f"{10_000 * num:,} samples": (num, 10_000, WORDS) for num in (1, 10, 100)},
    "1,000 shards of 100": (1000, 100, WORDS),
    "1 GB of text in one shard": (1, 50_000, 2222),
}
SECTIONS = ("own", "resident")  # MB of each process

ROLES = (  # the first that a command line matches
    (r"ray::.*EncodeChunk", "encoder actor"),
    (r"ray::.*read_shard", "reader"),
    (r"ray::.*(write_part|reduce_part)", "writer"),
    (r"ray::.*(compute|combine|lambda|merge_in_tree)", "fit"),
    (r"ray::IDLE", "idle worker"),
    (r"ray::", "Ray's own actors"),
    (r"raylet/raylet", "raylet"),
    (r"gcs_server", "gcs"),
    (r"mmkt_ray\.cli", "driver"),
)


# --- synthetic shards -----------------------------------------------------------------------------------------------


def write_shards(folder: Path, num_shards: int, rows_each: int, words: int = WORDS) -> int:
    """Parquet shards in `folder`; bytes of text in all. In memory is one row group of them at a time."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    size = max(1, min(1000, rows_each, 20_000_000 // (8 * words)))
    schema = pa.schema([("text", pa.string()), ("image", pa.binary()), ("label", pa.string())])
    num_bytes = 0
    for shard in range(num_shards):
        with pq.ParquetWriter(folder / f"{shard:05d}.parquet", schema) as writer:
            for start in range(0, rows_each, size):
                group = draw_rows(rng, min(size, rows_each - start), words)
                num_bytes += pc.sum(pc.binary_length(group.column("text"))).as_py()
                writer.write_table(group.cast(schema))
    return num_bytes


def draw_rows(rng: np.random.Generator, num_rows: int, words: int) -> pa.Table:
    """Random samples; the first word tells the label."""
    labels = rng.integers(0, CLASSES, num_rows)
    drawn = rng.integers(0, VOCABULARY, (num_rows, words))
    drawn[:, 0] = labels
    vocabulary = pa.array([f"word{i:04d}" for i in range(VOCABULARY)])
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(0, num_rows * words + 1, words, dtype=np.int32)), vocabulary.take(pa.array(drawn.ravel()))
    )
    there = np.arange(num_rows) % 4 == 0
    images = np.concatenate([np.tile(bitmap_header(), (num_rows, 1)), rng.integers(0, 256, (num_rows, 3 * SIDE**2))], 1)
    flat = pa.py_buffer(images.astype(np.uint8).tobytes())
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(images.shape[1]), num_rows, [None, flat])
    return pa.table(
        {
            "text": pc.binary_join(lists, " "),
            "image": pc.if_else(pa.array(there), fixed.cast(pa.binary()), pa.scalar(None, pa.binary())),
            "label": pa.array(labels).cast(pa.string()),
        }
    )


def bitmap_header() -> np.ndarray:
    """The first 54 bytes of a BMP of SIDE x SIDE pixels of 24 bits: a format that costs nothing to write."""
    numbers = np.array([54 + 3 * SIDE**2, 0, 54, 40, SIDE, SIDE, 1 | 24 << 16, 0, 3 * SIDE**2, 2835, 2835, 0, 0], "<u4")
    return np.concatenate([np.frombuffer(b"BM", np.uint8), numbers.view(np.uint8)])


# --- measuring ------------------------------------------------------------------------------------------------------


def processes_of(root: int) -> Iterator[tuple[int, str]]:
    """Ids and command lines of a process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            except (OSError, IndexError):  # it has ended since
                continue
            children[parent].append(int(entry.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        waiting += children[pid]
        try:
            yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def read_pages(pid: int) -> dict[str, float]:
    """MB by the kernel's names: Rss, Pss, Anonymous, ..; empty for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return {}
    return {name: int(kb) / 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", lines, re.MULTILINE)}


def role_of(command: str) -> str:
    """What a process of a run does, by its command line."""
    return next((role for pattern, role in ROLES if re.search(pattern, command)), "other")


class Peaks:
    """The most that each role's largest process, and all processes together, held at any sample."""

    def __init__(self) -> None:
        self.roles: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(SECTIONS, 0.0))
        self.all_mb = 0.0
        self.num_samples = 0

    def sample(self, root: int) -> None:
        """Look at every process of a command once."""
        total = 0.0
        for pid, command in processes_of(root):
            pages = read_pages(pid)
            if pages:
                peak = self.roles[role_of(command)]
                peak["own"] = max(peak["own"], pages["Anonymous"])
                peak["resident"] = max(peak["resident"], pages["Rss"])
                total += pages["Pss"]
        self.all_mb = max(self.all_mb, total)
        self.num_samples += 1

    @contextmanager
    def watching(self, root: int) -> Iterator[None]:
        """Sample until the block ends."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_EVERY_S):
                self.sample(root)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def run_watched(arguments: list[str], log: Path) -> dict[str, Any]:
    """One `mmkt` command and what its processes held at most. Raises: RuntimeError with the log's end if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MALLOC_TRIM_THRESHOLD_")}
    peaks, started = Peaks(), time.perf_counter()
    with log.open("w") as out:
        command = subprocess.Popen(
            [sys.executable, "-m", "mmkt_ray.cli", *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        with peaks.watching(command.pid):
            code = command.wait()
    if code:
        raise RuntimeError(f"mmkt {' '.join(arguments)} ended with {code}:\n{log.read_text()[-3000:]}")
    roles = {role: {k: round(v) for k, v in peak.items()} for role, peak in sorted(peaks.roles.items())}
    return {
        "roles": roles,
        "all_mb": round(peaks.all_mb),
        "wall_s": round(time.perf_counter() - started, 1),
        "num_samples": peaks.num_samples,
    }


# --- cases ----------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, most_rows: int, train: bool, chosen: str | None = None) -> dict[str, Any]:
    """Each case's peaks by step, extract first, and with `train` what comes after it."""
    figures: dict[str, Any] = {}
    for name, (num_shards, rows_each, words) in CASES.items():
        if num_shards * rows_each > most_rows or (chosen and not re.search(chosen, name)):
            continue
        place = folder / re.sub(r"\W+", "-", name)
        started = time.perf_counter()
        num_bytes = write_shards(place / "shards", num_shards, rows_each, words)
        figures[name] = {"num_samples": num_shards * rows_each, "text_bytes": num_bytes}
        print(f"{name}: made in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        config = place / "config.yaml"
        config.write_text(yaml.safe_dump(describe(place)))
        for step, arguments in steps(config, train).items():
            figures[name][step] = run_watched(arguments, place / f"{step}.log")
            print(name, step, figures[name][step], file=sys.stderr)
    return {"figures": figures, "table": memory_table(figures)}


def describe(place: Path) -> dict[str, Any]:
    """The config of a case."""
    source = {"reader": "parquet", "path": "shards/*.parquet", "columns": {c: c for c in ("text", "image", "label")}}
    image = {"kind": "image", "encoder": {"name": "pixels", "image_size": SIDE}, "reduce": {"name": "pca", "dim": 16}}
    return {
        "name": "memory",
        "data_root": str(place),
        "run_root": str(place / "runs"),
        "samples": {"sources": [source]},
        "modalities": {"text": {"kind": "text", "encoder": "tfidf"}, "image": image},
        "tasks": {"label": {}},
        "model": {"hidden_dim": 64},
        "training": {"epochs": 1, "batch_size_per_worker": 1024},
    }


def steps(config: Path, train: bool) -> dict[str, list[str]]:
    """Name -> arguments of `mmkt`."""
    commands = {"extract": ["extract", str(config)]}
    if train:
        model = str(config.parent / "runs" / "memory" / "models" / "model")
        commands |= {"train": ["train", str(config)], "evaluate": ["evaluate", str(config)]}
        commands["predict"] = ["predict", model, "--out", str(config.parent / "predictions")]
    return commands


def memory_table(figures: dict[str, Any]) -> str:
    """Markdown: a row for each role of each step, a column for each case; own MB, and resident ones in brackets."""
    cases = list(figures)
    lines = [f"| MB | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    known = [s for s in ("extract", "train", "evaluate", "predict") if any(s in f for f in figures.values())]
    for step in known:
        told = [figures[c].get(step) for c in cases]
        for role in sorted({role for f in told if f for role in f["roles"]}):
            peaks = [f["roles"].get(role) if f else None for f in told]
            cells = [f"{p['own']:,} ({p['resident']:,})" if p else "" for p in peaks]
            lines.append(f"| {step}: {role} | {' | '.join(cells)} |")
        totals = [f"{f['all_mb']:,}" if f else "" for f in told]
        lines.append(f"| **{step}: all together** | {' | '.join(totals)} |")
    return "\n".join(lines)


def draw_memory(figures: dict[str, Any], path: Path) -> None:
    """Own memory of each role of `extract` against the number of samples, as PNG."""
    counted = [f for name, f in figures.items() if name.endswith(" samples")]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for role in sorted({role for f in counted for role in f["extract"]["roles"]} - {"other", "gcs", "idle worker"}):
        points = [
            (f["num_samples"], f["extract"]["roles"][role]["own"]) for f in counted if role in f["extract"]["roles"]
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=role)
    axes.set(xscale="log", xlabel="samples", ylabel="own memory of one process, MB", ylim=(0, None))
    figure.legend(frameon=False, loc="outside right center")
    figure.savefig(path, dpi=150)
