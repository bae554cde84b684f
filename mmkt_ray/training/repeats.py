"""The same models from several seeds: how much of a difference is luck of the initialisation and the order of batches.

Axes: S seeds, N test rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.intervals import Interval
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.features.store import FeatureTable, Store, labelled
from mmkt_ray.models import Predictor
from mmkt_ray.training.trainer import train
from mmkt_ray.training.transfer_matrix import Node, score_rows, seed_row_interval, target_rows

log = logging.getLogger(__name__)


def repeat(config: Config, stores: Mapping[str, Store], run_uri: str, num_seeds: int) -> dict[str, Any]:
    """Fit every variant with `num_seeds` seeds, score them on test, write `<run>/seeds.json`; goes on after a kill.

    The features stay as they are; `training.seed` alone differs. Variants are compared on rows that all of them can read,
    each with the single-modality variant that is best on val (on test, where there is no val split).

    Returns: seeds, `tasks`: task -> {num_rows, reference, models: {variant: {score (interval over seeds and rows), by_seed,
    versus (interval of the gain over the reference; None for itself)}}}.
    """
    variants = config.expand_variants()
    seeds = [config.seed + i for i in range(num_seeds)]
    found: dict[str, dict[str, list[np.ndarray]]] = {}  # task -> variant -> by seed (N,)
    val: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        table = stores[name].table(variant.model_modalities, variant.model_tasks)
        judged_on = "val" if (table.split == "val").any() else "test"
        for seed in seeds:
            uri = storage.join(run_uri, "seeds", str(seed), name)
            train(variant.with_overrides({"training.seed": seed}), stores[name].uri, uri)
            model, _ = load_model(uri)
            for task in variant.model_tasks:
                node = Node(tuple(variant.model_modalities), task)
                scores = spread(split_scores(model, table, node, "test"), table, node)
                found.setdefault(task, {}).setdefault(name, []).append(scores)
                by_task = val.setdefault(task, {})
                by_task[name] = (
                    by_task.get(name, 0.0) + float(split_scores(model, table, node, judged_on).mean()) / num_seeds
                )
        log.info("repeat: %s from %d seeds", name, num_seeds)
    single = [n for n, variant in variants.items() if len(variant.model_modalities) == 1]
    result = {
        "seeds": seeds,
        "tasks": {t: compare_seeds(config, by_name, val[t], single) for t, by_name in sorted(found.items())},
    }
    storage.write_json(storage.join(run_uri, "seeds.json"), result)
    return result


def split_scores(model: Predictor, table: FeatureTable, node: Node, split: str) -> np.ndarray:
    """The model's score in [0, 1] on each labelled row of a split that the node reads."""
    return score_rows(predict_table(model, target_rows(table, node, split))[node.task], table, node, split)


def spread(scores: np.ndarray, table: FeatureTable, node: Node) -> np.ndarray:
    """Scores of the test rows that the node reads -> of all test rows with a label (M,), NaN where unreadable."""
    every = np.flatnonzero((table.split == "test") & labelled(table.labels[node.task]))
    readable = np.logical_and.reduce([table.present[m] for m in node.modalities])[every]
    spread_out = np.full(len(every), np.nan)
    spread_out[readable] = scores
    return spread_out


def compare_seeds(
    config: Config, by_name: Mapping[str, list[np.ndarray]], val: Mapping[str, float], single: list[str]
) -> dict[str, Any]:
    """One task's models over seeds; see `repeat`. by_name: variant -> by seed (M,) scores of the test rows."""
    num, confidence = config.evaluation.bootstrap_samples, config.evaluation.confidence
    every = {name: np.stack(scores) for name, scores in by_name.items()}
    groups = {s.shape[1] for s in every.values()}
    common = np.logical_and.reduce([np.isfinite(s).all(axis=0) for s in every.values()]) if len(groups) == 1 else None
    reference = max((n for n in single if n in every), key=lambda n: val[n], default=None)
    models = {}
    for name, scores in every.items():
        own = scores[:, np.isfinite(scores).all(axis=0)] if common is None else scores[:, common]
        versus: Interval | None = None
        if reference is not None and name != reference and common is not None:
            versus = seed_row_interval(own - every[reference][:, common], num, confidence, config.seed)
        models[name] = {
            "score": seed_row_interval(own, num, confidence, config.seed),
            "by_seed": [float(s) for s in own.mean(axis=1)],
            "val": val[name],
            "versus": versus,
        }
    num_rows = int(common.sum()) if common is not None else None
    return {"num_rows": num_rows, "reference": reference, "models": models}


def seeds_table(result: Mapping[str, Any]) -> str:
    """What `repeat` found, as text."""
    lines = []
    for task, found in result["tasks"].items():
        rows = f"{found['num_rows']} test rows, " if found["num_rows"] else ""
        lines.append(f"{task}: accuracy (multilabel: F1 by sample), {rows}{len(result['seeds'])} seeds")
        width = max(map(len, found["models"]))
        for name, model in found["models"].items():
            by_seed = " ".join(f"{100 * s:.1f}" for s in model["by_seed"])
            gain = f"  {told(model['versus'], '+.1f')} against {found['reference']}" if model["versus"] else ""
            lines.append(f"  {name:{width}}  {told(model['score'], '.1f')}  ({by_seed}){gain}")
    return "\n".join(lines)


def told(interval: Interval, form: str) -> str:
    """An interval in points."""
    value, low, high = (100 * interval[k] for k in ("value", "low", "high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
