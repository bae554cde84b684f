"""How many of the rows that a run calls suspect are wrong indeed:
errors are planted in a copy of the shards, and looked for.

In every planting 3 % of the rows get another class in place of their own, and another 3 % each other's texts. Then
the copy goes through the pipeline as a run would take it: features, then `find_label_issues` over the train split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmkt_ray.config import Config, load_config
from mmkt_ray.done import run_folder
from mmkt_ray.features.store import Store
from mmkt_ray.steps import extract_step
from mmkt_ray.studies.label_issues import find_label_issues

PLANTED_FRAC = 0.03  # of all rows, for each of the two errors
TASK, TEXT = "category", "text"


def measure_suspects(config_path: str, num_plantings: int, folder: Path) -> dict[str, Any]:
    """By planting: how many train rows got which error, and which share of the so many most suspect rows of the task
    is planted.

    `found`: error -> the share of its rows that is among these.
    `chance`: the share of planted rows in the train split.
    """
    original = load_config(config_path)
    shards = sorted((Path(original.data_root) / original.samples.sources[0].path).parent.glob("*.parquet"))
    plantings = [_one(config_path, shards, seed, folder / f"planting-{seed}") for seed in range(num_plantings)]
    right = sum(p["num_right"] for p in plantings) / sum(p["num_told"] for p in plantings)
    return {"figures": {"share_planted": right, "plantings": plantings}}


def _one(config_path: str, shards: list[Path], seed: int, folder: Path) -> dict[str, Any]:
    planted = plant(shards, seed, folder / "data" / shards[0].parent.name)
    where = {"data_root": str(folder / "data"), "run_root": str(folder / "runs"), "seed": seed, "variants": {}}
    config = load_config(config_path, where)
    store = extract_step(config)["model"]
    return count(store, config, planted, run_folder(config))


def plant(shards: list[Path], seed: int, out: Path) -> dict[str, set[str]]:
    """Write the shards with errors to `out`. Returns: error -> codes of the rows that have it."""
    rng = np.random.default_rng(seed)
    table = pa.concat_tables([pq.read_table(shard) for shard in shards])
    labels, texts = (np.array(table[c].to_pylist(), dtype=object) for c in (TASK, TEXT))
    num = round(PLANTED_FRAC * len(table))
    wrong, swapped = np.split(rng.permutation(len(table))[: 2 * num], 2)
    classes = sorted(set(labels))
    labels[wrong] = [rng.choice([c for c in classes if c != own]) for own in labels[wrong]]
    texts[swapped] = texts[np.roll(swapped, 1)]
    for name, values in ((TASK, labels), (TEXT, texts)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values.tolist(), pa.string()))
    out.mkdir(parents=True)
    for i in range(len(shards)):
        pq.write_table(table.take(np.arange(i, len(table), len(shards))), out / shards[i].name)
    codes = np.array(table["code"].to_pylist(), dtype=object)
    return {"label": set(codes[wrong]), "text": set(codes[swapped])}


def count(store: Store, config: Config, planted: dict[str, set[str]], folder: str) -> dict[str, Any]:
    """Look for suspects of TASK, and how many of the first are planted."""
    uri = f"{folder}/suspects.parquet"
    find_label_issues(store, config, uri)
    rows = store.table([], [])
    train = set(rows.sample_id[rows.split == "train"])
    by_error = {error: codes & train for error, codes in planted.items()}
    every = set().union(*by_error.values())
    frame = pd.read_parquet(uri)
    told = frame[frame["task"] == TASK].drop_duplicates("sample_id")["sample_id"][: len(every)]
    return {
        "num_planted": {error: len(codes) for error, codes in by_error.items()},
        "num_told": len(told),
        "num_right": int(told.isin(every).sum()),
        "found": {error: round(len(codes & set(told)) / len(codes), 3) for error, codes in by_error.items()},
        "chance": round(len(every) / len(train), 3),
    }
