"""Faults at random moments, and what is left when the same command has been given again:
all of it, once, and the same.

    python jobs/benchmark.py chaos --rounds 22      the faults of benchmark_faults.py in turn; --faults picks some

A small run (2,000 drawn images with captions, a model on two Ray Train workers, a search) goes undisturbed first.
Then each round meets one fault at a moment drawn from the undisturbed run's time, and the command is given again
until it ends well. Features are compared by id and checksum, metrics, predictions and leaderboard within 1e-6.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from benchmark_faults import (
    FAULTS,
    TITLES,
    Fault,
    Place,
    alone,
    family,
    first_of,
    impossible,
    kill,
    mend,
    remains,
    title,
)
from PIL import Image

WORDS = ["run", "search"]
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
NUM_SHARDS, ROWS_PER_SHARD = 4, 500
COMMANDS, LIMIT_S = 4, 900.0  # how often it is given, and how long each may take
CLOSE = 1e-6
TIMES = {"seconds", "training_s", "finished_at"}


# --- the run --------------------


def write_data(folder: Path, rows_per_shard: int) -> None:
    """Shards of noisy squares of one colour, with a caption and a colour that is not always the caption's."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        said = rng.choice(list(COLOURS), rows_per_shard)
        true = np.where(rng.random(rows_per_shard) < 0.8, said, rng.choice(list(COLOURS), rows_per_shard))
        columns = {
            "id": [f"{shard}-{row}" for row in range(rows_per_shard)],
            "image": pa.array([png(COLOURS[c], rng) for c in true], pa.binary()),
            "caption": [f"a {c} square w{n}" for c, n in zip(said, rng.integers(0, 200, rows_per_shard), strict=True)],
            "colour": true.tolist(),
        }
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet")


def png(colour: tuple[int, int, int], rng: np.random.Generator, side: int = 48) -> bytes:
    """A noisy square."""
    pixels = np.clip(np.array(colour) + rng.normal(0, 120, (side, side, 3)), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "png")
    return sink.getvalue()


def write_config(root: Path) -> Path:
    """The run; its search tries each architecture in one trial without early stops, so that it has one right answer:
    of further trials Optuna decides, by what has ended until then."""
    columns = {"sample_id": "id", "image": "image", "text": "caption", "colour": "colour"}
    config = {
        "name": "chaos",
        "data_root": str(root / "data"),
        "samples": {"sources": [{"reader": "parquet", "path": "shapes/*.parquet", "columns": columns}]},
        "modalities": {
            "image": {
                "kind": "image",
                "encoder": {"name": "pixels", "image_size": 32},
                "reduce": {"name": "pca", "dim": 16},
            },
            "text": {"kind": "text", "encoder": "tfidf", "reduce": {"name": "svd", "dim": 16}},
        },
        "tasks": {"colour": {}},
        "model": {"hidden_dim": 16},
        "training": {"epochs": 20, "batch_size_per_worker": 64},
        "evaluation": {"bootstrap_samples": 100, "studies": ["insight"]},
        "extract": {"chunk_rows": 128, "num_actors": 2},
        "variants": {"image": {"model.modalities": ["image"]}, "fused": {"training.num_workers": 2}},
        "search": {
            "space": {
                "model.fusion.name": {"choice": ["concat", "gated", "sum", "attention"]},
                "training.lr": {"loguniform": [1e-4, 1e-1]},
            },
            **{"population": 8, "max_candidates": 32, "rungs": 1, "finalists": 1, "seeds": 1, "time_budget_s": None},
        },
    }
    path = root / "chaos.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# --- what a run leaves --------------------


def tables(run: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every table of a run with its rows by id; features as checksums, times left out."""
    for folder in sorted(run.glob("features/*")):
        yield f"{folder.name}/data", keyed(pd.read_parquet(folder / "data"), "sample_id")
        yield f"{folder.name}/rejects", keyed(pd.read_parquet(folder / "rejects.parquet"), "sample_id")
    for file in sorted([*run.glob("models/*/*.parquet"), *run.glob("baselines/*/*.parquet")]):
        table = pd.read_parquet(file)
        if "model" in table:
            table["sample_id"] = table.pop("model") + "/" + table["sample_id"]
        yield str(file.relative_to(run)), keyed(table, "sample_id")
    for file in run.glob("search/leaderboard.parquet"):
        yield "leaderboard", keyed(pd.read_parquet(file).drop(columns=["seconds", "finished_at"]), "candidate")


def keyed(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Rows by id; whatever is neither number nor text becomes its SHA-1."""
    table = table.set_index(key)
    for name in table.columns:
        if table[name].map(lambda value: isinstance(value, (np.ndarray, dict, list))).any():
            table[name] = table[name].map(lambda value: hashlib.sha1(repr_exactly(value)).hexdigest())
    return table


def repr_exactly(value: Any) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray) and value.dtype != object else repr(value).encode()


def results(run: Path) -> dict[str, Any]:
    """Every number and word of the metrics and of the search's result, by its place."""
    files = [*run.glob("models/*/metrics.json"), *run.glob("baselines/*/metrics.json"), *run.glob("search/result.json")]
    return {
        f"{file.relative_to(run)}:{where}": value
        for file in files
        for where, value in leaves(json.loads(file.read_text().replace(str(run), "")))
    }


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The ends of a JSON tree, but for times."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield where, value
    else:
        for key, inner in items:
            if key not in TIMES:
                yield from leaves(inner, f"{where}.{key}")


def compare(reference: Path, run: Path, *, alone: bool = True) -> dict[str, Any]:
    """`lost` and `doubled` rows, and `changed`: the names of what differs.
    alone: what the reference lacks differs too."""
    found: dict[str, Any] = {"lost": 0, "doubled": 0, "changed": []}
    there = dict(tables(run))
    for name, expected in tables(reference):
        got = there.pop(name, expected.iloc[:0])
        found["lost"] += len(expected.index.difference(got.index))
        found["doubled"] += int(got.index.duplicated().sum()) + len(got.index.difference(expected.index))
        common = expected.index.intersection(got.index)
        found["changed"] += [
            f"{name}/{c}" for c in differing(expected.loc[common], got[~got.index.duplicated()].loc[common])
        ]
    found["changed"] += list(there) if alone else []
    expected_results, got_results = results(reference), results(run)
    for where in sorted(expected_results.keys() | (got_results.keys() if alone else set())):
        if not same(expected_results.get(where), got_results.get(where)):
            found["changed"].append(where)
    return found


def differing(one: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """Columns that differ: numbers by more than rounding, all else by anything."""
    if list(one.columns) != list(other.columns):
        return ["columns"]
    return [c for c in one.columns if not all(map(same, one[c].tolist(), other[c].tolist()))]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=0, atol=CLOSE, equal_nan=True))
    return bool(one == other or (one is other))


# --- rounds --------------------


@dataclass
class Round:
    """One fault and what came of it."""

    fault: str
    moment_s: float  # after the command's start; for a role's process after the first one was seen
    met: bool  # the fault found what it strikes
    commands: int  # how often the command was given; 1: it went on by itself
    seconds: float  # in all
    again: float  # seconds in all over those of an undisturbed run there
    lost: int
    doubled: int
    changed: list[str]
    said: list[str]  # last line of each command that did not end well


@dataclass
class Undisturbed:
    """A run without a fault."""

    run: Path
    seconds: float
    seen: dict[str, float]  # role -> seconds from the first sight of its processes to the last


def wait(process: subprocess.Popen[bytes], until: float) -> int:
    """The exit status; a command that takes longer is killed."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        kill(family(process))
        return process.wait()


def undisturbed(place: Place, config: Path) -> Undisturbed:
    """The reference. Raises: RuntimeError if it does not end well."""
    started, first, last = time.monotonic(), dict[str, float](), dict[str, float]()
    log = place.root / "log.txt"
    process = place.start(WORDS, config, log)
    while process.poll() is None and time.monotonic() - started < LIMIT_S:
        now, titles = time.monotonic() - started, [title(p) for p in family(process, *place.nodes)]
        for role, text in TITLES.items():
            if any(text in t for t in titles):
                first.setdefault(role, now)
                last[role] = now
        time.sleep(0.2)
    if process.poll() != 0:
        raise RuntimeError(f"the undisturbed run ended with {process.poll()}: {log.read_text()[-3000:]}")
    return Undisturbed(
        place.runs / "chaos", time.monotonic() - started, {role: last[role] - first[role] for role in first}
    )


def disturbed(
    name: str,
    fault: Fault,
    root: Path,
    config: Path,
    reference: Undisturbed,
    draw: random.Random,
) -> Round:
    """One round."""
    root.mkdir()
    span_s = reference.seconds if fault.role is None else reference.seen.get(fault.role, 0.0)
    moment_s = draw.uniform(0, 0.9) * span_s  # the next run may be faster
    with fault.place(root) as place:
        started, said, met, status, commands = time.monotonic(), [], False, -1, 0
        while (status != 0 or (fault.changes_data and commands == 1)) and commands < COMMANDS:
            log = root / f"log-{commands}.txt"
            process = place.start(WORDS, config, log)
            if commands == 0:
                if fault.role:
                    first_of(fault.role, place, process)
                met = wait_for(process, moment_s) and fault.strike(place, process)
            status = wait(process, time.monotonic() + LIMIT_S)
            commands += 1
            if status != 0:
                said.append(f"{status}: {last_line(log)}")
            mend(place)
            if not place.nodes:
                kill(remains(place.scratch))
        seconds = time.monotonic() - started
        difference = (
            # else: features of the other data
            compare(reference.run, place.runs / "chaos", alone=not fault.changes_data)
            if status == 0
            else {"lost": -1, "doubled": -1, "changed": ["all"]}
        )
    return Round(name, moment_s, met, commands, seconds, seconds / reference.seconds, said=said, **difference)


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it still runs after so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def measure_chaos(num_rounds: int, chosen: Sequence[str] | None, seed: int = 0) -> dict[str, Any]:
    """All rounds, told as they come on standard error, and as a Markdown table at the end."""
    if unknown := set(chosen or ()) - set(FAULTS):
        raise SystemExit(f"no fault called {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    skipped = {name: reason for name in chosen or FAULTS if (reason := impossible(name))}
    names = [name for name in chosen or FAULTS if name not in skipped]
    draw = random.Random(seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="mmkt-chaos-") as folder:
        root = Path(folder)
        write_data(root / "data" / "shapes", ROWS_PER_SHARD)
        config = write_config(root)
        references: dict[Any, Undisturbed] = {}
        for number in range(num_rounds):
            name = names[number % len(names)]
            fault = FAULTS[name]
            if name in skipped:
                continue
            try:
                for needed in (alone, fault.place):
                    if needed not in references:
                        references[needed] = in_place(needed, root / f"reference-{needed.__name__}", config)
            except RuntimeError as error:  # no reference, no comparison; the other faults go on
                if alone not in references:
                    raise
                skipped[name] = str(error)
                print(f"{name} is skipped: {error}", file=sys.stderr)
                continue
            expected = Undisturbed(references[alone].run, references[fault.place].seconds, references[fault.place].seen)
            rounds.append(disturbed(name, fault, root / f"round-{number}", config, expected, draw))
            print(f"round {number}: {asdict(rounds[-1])}", file=sys.stderr)
    seconds = {place.__name__: round(reference.seconds, 1) for place, reference in references.items()}
    print(as_markdown(rounds), file=sys.stderr)
    return {"rounds": [asdict(r) for r in rounds], "undisturbed_s": seconds, "skipped": skipped}


def in_place(needed: Any, root: Path, config: Path) -> Undisturbed:
    """A reference of its own for each kind of place."""
    root.mkdir()
    with needed(root) as place:
        reference = undisturbed(place, config)
    print(f"undisturbed, {needed.__name__}: {reference.seconds:.0f} s", file=sys.stderr)
    return reference


def as_markdown(rounds: Sequence[Round]) -> str:
    """A line for each fault: moments, how the command went on, and the most that was done again and lost."""
    lines = [
        "| fault | rounds, at seconds | went on by itself | commands | time / undisturbed | lost | doubled | other "
        "values |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r.fault for r in rounds):
        of_it = [r for r in rounds if r.fault == name and r.met]
        if not of_it:
            continue
        moments = ", ".join(f"{r.moment_s:.0f}" for r in of_it)
        again = sorted(r.again for r in of_it)
        cells = [
            name,
            f"{len(of_it)}, at {moments}",
            f"{sum(r.commands == 1 for r in of_it)} of {len(of_it)}",
            str(max(r.commands for r in of_it)),
            f"{statistics.median(again):.1f} ({again[0]:.1f} to {again[-1]:.1f})",
            *(str(sum(values)) for values in ([r.lost for r in of_it], [r.doubled for r in of_it])),
            str(sum(len(r.changed) for r in of_it)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
