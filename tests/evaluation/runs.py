"""A small run folder made by the real code, but for the features, which are drawn: samples of a thing with a colour.

The image knows the colour well and the thing a little, the text knows the thing well and the colour not at all.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from PIL import Image

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.evaluate import evaluate_model
from mmkt_ray.evaluation.scoring_baselines import evaluate_baselines
from mmkt_ray.features.store import Store, column_of, open_store, to_arrow, write_manifest
from mmkt_ray.inference.model_folder import save_model
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.studies.gallery import write_gallery
from mmkt_ray.training.loop import fit
from tests.configs import build_config, raw_config
from tests.manifests import make_manifest, make_training

THINGS = ("bird", "boat", "car", "cat")
COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 30, 30)}
SINGLES = {"image": {"model.modalities": ["image"]}, "text": {"model.modalities": ["text"]}}
VARIANTS = {**SINGLES, "concat": {}}
TASKS = {"thing": "multiclass", "colour": "multiclass"}
KINDS = {"thing": "multiclass", "warm": "binary", "tags": "multilabel"}  # one task of each kind
TAGS = {"bird": ["animal", "flies"], "boat": ["swims"], "car": [], "cat": ["animal"], "unicorn": ["animal", "magic"]}
IMAGE_DIM, TEXT_DIM = 12, 40


def make_config(
    folder: Path, variants: Mapping[str, Any] = VARIANTS, tasks: Mapping[str, str] = TASKS, **overrides: Any
) -> Config:
    """The config of the run; tasks: name -> kind; keyword `a__b` overrides `a.b`."""
    columns = {"sample_id": "id", "image": "image", "text": "caption", **{t: t for t in tasks}}
    raw = raw_config(tasks, columns) | {
        "name": "things",
        "data_root": str(folder / "data"),
        "run_root": str(folder / "runs"),
        "model": {"hidden_dim": 32},
        "training": {"epochs": 6, "batch_size_per_worker": 64, "lr": 5e-3},
        "evaluation": {"bootstrap_samples": 200},
        "variants": dict(variants),
    }
    return build_config(raw, **overrides)


def draw_samples(
    num_rows: int, things: Sequence[str] = THINGS, missing_frac: float = 0.15, seed: int = 0
) -> dict[str, Any]:
    """Columns of N samples: sample_id, split, thing, colour, image (N, IMAGE_DIM), text (N, TEXT_DIM), presence.

    `test` may hold a thing that `train` lacks: the last one of more than four. Two more follow from these: `warm`,
    yes or no, from the colour, and `tags`, a list, from the thing (with the unseen thing's own tag) and the colour
    red.
    """
    rng = np.random.default_rng(seed)
    split = rng.choice(["train", "val", "test"], num_rows, p=[0.6, 0.1, 0.3])
    thing = rng.integers(0, len(things), num_rows)
    if len(things) > 4:
        split[thing == len(things) - 1] = "test"
    colour = rng.integers(0, 3, num_rows)
    image = rng.normal(size=(num_rows, IMAGE_DIM))
    image[:, :3] += 2.5 * np.eye(3)[colour]
    image += 0.9 * rng.normal(size=(len(things), IMAGE_DIM))[thing]
    words = (rng.random((num_rows, TEXT_DIM)) < 0.08) + (rng.random((num_rows, TEXT_DIM)) < 0.35) * (
        np.arange(TEXT_DIM) % len(things) == thing[:, None]
    )
    gone = rng.random(num_rows)
    tags = [
        None if i % 17 == 0 else [*TAGS.get(things[t], ()), *["red"] * int(colour[i] == 2)] for i, t in enumerate(thing)
    ]
    return {
        "warm": ["yes" if c == 2 else "no" for c in colour],
        "tags": tags,
        "sample_id": [f"s{i}" for i in range(num_rows)],
        "split": split.tolist(),
        "thing": [None if rng.random() < 0.05 else things[i] for i in thing],
        "colour": [list(COLOURS)[i] for i in colour],
        "image": (image.astype(np.float32), gone >= missing_frac / 2),
        "text": (sp.csr_matrix(words.astype(np.float32)), (gone < missing_frac / 2) | (gone >= missing_frac)),
    }


def write_store(
    uri: str, samples: Mapping[str, Any], synthetic_pairs: bool = False, tasks: Mapping[str, str] = TASKS
) -> Store:
    """A published feature store of these samples."""
    columns = {c: pa.array(samples[c], pa.string()) for c in ("sample_id", "split")}
    columns |= {t: pa.array(samples[t], task_kind(kind).arrow_type) for t, kind in tasks.items()}
    for m in ("image", "text"):
        features, present = samples[m]
        columns[column_of(m)] = to_arrow(features[present], present)
    storage.write_table(storage.join(uri, "data", "part-0.parquet"), pa.table(columns))
    splits = np.array(samples["split"])
    by_task: dict[str, Any] = {}
    for task in tasks:
        for split, label in zip(samples["split"], samples[task], strict=True):
            for name in label if isinstance(label, list) else [label] if label is not None else []:
                counts = by_task.setdefault(task, {}).setdefault(split, {})
                counts[name] = counts.get(name, 0) + 1
    about = {
        "fingerprint": uri.rsplit("/", 1)[-1],
        "parts": ["part-0.parquet"],
        "synthetic_pairs": synthetic_pairs,
        "combine": {"name": "union"},
        "modalities": {
            "image": {
                "dim": IMAGE_DIM,
                "folders": [],
                "sparse": False,
                "kind": "image",
                "encoder": {"name": "pixels"},
                "reduce": None,
            },
            "text": {
                "dim": TEXT_DIM,
                "sparse": True,
                "kind": "text",
                "encoder": {"name": "tfidf"},
                "reduce": None,
                "folders": [],
            },
        },
        "tasks": {t: {"kind": kind, "classes": sorted(by_task[t]["train"])} for t, kind in tasks.items()},
        "counts": {
            "rows": len(splits),
            "rejects": 3,
            "unreadable_modalities": 0,
            "by_split": {s: int((splits == s).sum()) for s in ("train", "val", "test")},
            "by_task": by_task,
            "missing": {
                m: {s: int((~samples[m][1])[splits == s].sum()) for s in ("train", "val", "test")}
                for m in ("image", "text")
            },
        },
        "reject_reasons": {"cannot decode image": 2, "duplicate sample_id": 1},
        "stages": {"read": 1.0},
        "wall_s": 1.0,
        "startup_s": 0.1,
        "rows_per_s": 1234.5,
    }
    write_manifest(uri, make_manifest(**about))
    return open_store(uri)


def write_shards(folder: Path, samples: Mapping[str, Any]) -> None:
    """The raw shard that the samples came from: a coloured square and a caption, null where absent."""

    def png(colour: str, seed: int) -> bytes:
        noise = np.random.default_rng(seed).integers(-35, 35, (32, 32, 3))
        out = io.BytesIO()
        Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(out, "png")
        return out.getvalue()

    rows = range(len(samples["sample_id"]))
    columns = {
        "id": samples["sample_id"],
        "image": pa.array(
            [png(samples["colour"][i], i) if samples["image"][1][i] else None for i in rows], pa.binary()
        ),
        "caption": [
            f"a {samples['thing'][i]} <script>alert(1)</script> & more, seen {i} times"
            if samples["text"][1][i]
            else None
            for i in rows
        ],
        **{t: pa.array(samples[t], task_kind(kind).arrow_type) for t, kind in {**TASKS, **KINDS}.items()},
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "data" / "0.parquet")


def train_variant(config: Config, store: Store, model_uri: str) -> None:
    """Fit and publish one model, as training does without Ray."""
    result = fit(config, store.table(config.model_modalities, config.model_tasks))
    training = make_training(history=result.epochs, seconds=result.seconds, val=result.val)
    save_model(model_uri, result.model, config, store.manifest, training)


def write_run(folder: Path, config: Config, samples: Mapping[str, Any], **store_options: Any) -> str:
    """Store, models, evaluation, baselines, comparison, gallery, run.json: all but the report. Returns the folder."""
    run_uri = str(folder / "runs" / config.name)
    write_shards(folder, samples)
    tasks = {t: task.kind.as_json() for t, task in config.tasks.items()}
    store = write_store(f"{run_uri}/features/union", samples, tasks=tasks, **store_options)
    variants = config.expand_variants()
    for name, variant in variants.items():
        train_variant(variant, store, f"{run_uri}/models/{name}")
        evaluate_model(f"{run_uri}/models/{name}", store)
    evaluate_baselines(config, store, f"{run_uri}/baselines/union")
    card = {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "variants": {name: {"store": "features/union", "model": f"models/{name}"} for name in variants},
        "versions": {"python": "3.11", "torch": "2.9"},
        "commit": "0123456789abcdef",
        "hardware": "2 cores",
        "seconds": {"extract": 12.5, "train": 130.0},
    }
    storage.write_json(f"{run_uri}/run.json", card)
    write_gallery(f"{run_uri}/models/{compare(run_uri).main}")
    return run_uri
