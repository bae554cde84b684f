"""The same command twice at one folder, at the same time: who goes on, who is refused, and what is left.

    python jobs/benchmark.py together --rounds 20      `mmkt run` and `mmkt predict` in turn

A small run goes by itself first. In each round a command starts in an empty folder, and the same command again after
a part of the time that one takes, drawn by chance; at first both start at once. Then it is given once more, and what
is there is compared with the undisturbed run by id and value.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from benchmark_chaos import compare, differing, keyed, write_config, write_data
from benchmark_faults import Place, alone

COMMANDS = ("run", "predict")  # in turn
ROWS_PER_SHARD = 60
REFUSED = "is in use by process"
LIMIT_S = 600.0


@dataclass
class Together:
    """One round."""

    command: str
    later_s: float  # the second start after the first
    statuses: list[int]  # of the two, and of the same command once more
    refused: int  # commands that said who holds the folder
    lost: int
    doubled: int
    changed: list[str]
    said: list[str]  # last line of each that neither ended well nor was refused


def small_run(root: Path) -> Path:
    """The config of `benchmark.py chaos` with little to do: one model of each modality, one of both."""
    write_data(root / "data" / "shapes", ROWS_PER_SHARD)
    path = write_config(root)
    raw = yaml.safe_load(path.read_text())
    del raw["variants"], raw["search"]
    raw["training"] = {"auto": [], "epochs": 2}
    raw["model"]["experts"] = False
    raw["evaluation"] = {"studies": [], "baselines": False, "bootstrap_samples": 100}
    path.write_text(yaml.safe_dump(raw))
    return path


def start(place: Place, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`mmkt`, whose output goes to `log`."""
    with log.open("wb") as sink:
        command = [sys.executable, "-m", "mmkt_ray.cli", *words]
        return subprocess.Popen(command, env=place.variables(), stdout=sink, stderr=subprocess.STDOUT)


def words_of(command: str, config: Path, reference: Path, target: Path) -> list[str]:
    """The command that fills `target`."""
    if command == "run":
        return ["run", str(config), "--set", f"run_root={target}"]
    model = next(p.parent for p in sorted(reference.glob("chaos/models/*/model.safetensors")))
    return ["predict", str(model), f"{config.parent}/data/shapes/*.parquet", "--out", str(target)]


def compare_with(command: str, expected: Path, found: Path) -> dict[str, Any]:
    """What differs; see `compare`."""
    if command == "run":
        return compare(expected / "chaos", found / "chaos")
    ours, theirs = (pd.read_parquet(folder / "predictions.parquet") for folder in (found, expected))
    one, other = keyed(theirs, "sample_id"), keyed(ours, "sample_id")
    common = one.index.intersection(other.index)
    return {
        "lost": len(one.index.difference(other.index)) + len(pd.read_parquet(found / "rejects.parquet")),
        "doubled": int(other.index.duplicated().sum()) + len(other.index.difference(one.index)),
        "changed": differing(one.loc[common], other[~other.index.duplicated()].loc[common]),
    }


def both(place: Place, words: list[str], later_s: float) -> tuple[list[int], list[str]]:
    """Statuses and outputs of two starts of a command, and of a third when both have ended."""
    logs = [place.root / f"log-{n}.txt" for n in range(3)]
    first = start(place, words, logs[0])
    time.sleep(later_s)
    second = start(place, words, logs[1])
    statuses = [first.wait(LIMIT_S), second.wait(LIMIT_S)]
    statuses.append(start(place, words, logs[2]).wait(LIMIT_S))
    return statuses, [log.read_text(errors="replace") for log in logs]


def measure_together(num_rounds: int, seed: int = 0) -> dict[str, Any]:
    """All rounds; a table on standard error."""
    draw, rounds = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="mmkt-together-") as folder:
        root = Path(folder)
        config = small_run(root)
        expected = {name: root / f"reference-{name}" for name in COMMANDS[:num_rounds]}
        seconds: dict[str, float] = {}
        for name, target in expected.items():
            with alone(root) as place:
                begun = time.monotonic()
                log = root / f"{name}.txt"
                if start(place, words_of(name, config, expected["run"], target), log).wait(LIMIT_S) != 0:
                    raise RuntimeError(f"the undisturbed {name} failed: {log.read_text()[-3000:]}")
                seconds[name] = time.monotonic() - begun
        for number in range(num_rounds):
            name = COMMANDS[number % len(COMMANDS)]
            later_s = 0.0 if number < 4 else draw.uniform(0, 0.9) * seconds[name]
            target = root / f"round-{number}"
            target.mkdir()
            with alone(target) as place:
                words = words_of(name, config, expected["run"], target / "out")
                statuses, outputs = both(place, words, later_s)
            refused = [REFUSED in text for text in outputs]
            said = [
                t.strip().splitlines()[-1] for s, r, t in zip(statuses, refused, outputs, strict=True) if s and not r
            ]
            difference = compare_with(name, expected[name], target / "out")
            rounds.append(Together(name, later_s, statuses, sum(refused), said=said, **difference))
            print(f"round {number}: {asdict(rounds[-1])}", file=sys.stderr)
    print(as_markdown(rounds), file=sys.stderr)
    return {"rounds": [asdict(r) for r in rounds], "undisturbed_s": {k: round(v, 1) for k, v in seconds.items()}}


def as_markdown(rounds: Sequence[Together]) -> str:
    """A line for each command."""
    lines = ["| command | rounds | statuses of the two | refused | lost | doubled | other values |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r.command for r in rounds):
        of_it = [r for r in rounds if r.command == name]
        ends = Counter(" and ".join(map(str, r.statuses[:2])) for r in of_it)
        cells = [
            f"`mmkt {name}`",
            str(len(of_it)),
            ", ".join(f"{end}: {n}" for end, n in ends.most_common()),
            str(sum(r.refused for r in of_it)),
            *(str(sum(values)) for values in ([r.lost for r in of_it], [r.doubled for r in of_it])),
            str(sum(len(r.changed) for r in of_it)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
