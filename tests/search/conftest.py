"""A small feature store of two dense modalities and two tasks, and a config that searches over it."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.features.store import Store, column_of, open_store, to_arrow, write_manifest
from tests.configs import build_config, raw_config
from tests.manifests import make_manifest

MODALITIES, DIM, NUM_ROWS = ("image", "text"), 6, 400
CLASSES = {"mood": ["bad", "good"], "topic": ["x", "y", "z"]}


@pytest.fixture(scope="session")
def make_config(tmp_path_factory) -> Callable[..., Config]:
    """make_config(**{"training.epochs": 2}): a search that takes seconds."""
    folder = tmp_path_factory.mktemp("runs")

    def make(**overrides) -> Config:
        raw = raw_config(dict.fromkeys(CLASSES, "multiclass")) | {
            "run_root": str(folder),
            "modalities": {
                "image": {"kind": "image", "encoder": "pixels", "reduce": {"name": "pca", "dim": DIM}},
                "text": {"kind": "text", "encoder": "tfidf", "reduce": {"name": "svd", "dim": DIM}},
            },
            "model": {"hidden_dim": 8, "experts": False},
            "training": {"auto": [], "epochs": 9, "batch_size_per_worker": 128},
            "evaluation": {"bootstrap_samples": 100},
            "search": {
                "space": {
                    "model.fusion.name": {"choice": ["concat", "hierarchical"]},
                    "model.fusion.depth": {"int": [1, 2], "when": {"model.fusion.name": "hierarchical"}},
                    "model.sharing": {"choice": ["task", "task_modality"]},
                    "training.lr": {"loguniform": [1e-4, 1e-1]},
                    "model.dropout": {"float": [0.0, 0.5]},
                },
                "population": 6,
                "max_candidates": 72,
                "time_budget_s": None,
                "seeds": 2,
            },
        }
        return build_config(raw, **overrides)

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Store:
    """Topic shows in the image and a little in the text, mood in the text alone; either may be missing."""
    uri, rng = str(tmp_path_factory.mktemp("store")), np.random.default_rng(0)
    topic, mood = rng.integers(0, 3, NUM_ROWS), rng.integers(0, 2, NUM_ROWS)
    image = rng.normal(size=(NUM_ROWS, DIM)) + 2 * np.eye(DIM)[topic]
    text = rng.normal(size=(NUM_ROWS, DIM)) + np.eye(DIM)[topic] + 2 * np.eye(DIM)[3 + mood]
    features = {"image": image.astype(np.float32), "text": text.astype(np.float32)}
    codes = {"mood": mood, "topic": topic}
    columns = {
        "sample_id": pa.array([f"s{i}" for i in range(NUM_ROWS)]),
        "split": pa.array(np.resize(["train", "train", "val", "test"], NUM_ROWS)),
        **{task: pa.array([CLASSES[task][c] for c in codes[task]]) for task in CLASSES},
    }
    for m, values in features.items():
        present = rng.random(NUM_ROWS) < 0.9
        columns[column_of(m)] = to_arrow(values[present], present)
    storage.write_table(storage.join(uri, "data", "part-0.parquet"), pa.table(columns))
    modalities = {m: {"dim": DIM} for m in MODALITIES}
    tasks = {task: {"classes": names} for task, names in CLASSES.items()}
    write_manifest(uri, make_manifest(parts=["part-0.parquet"], modalities=modalities, tasks=tasks))
    return open_store(uri)
