"""`model.experts`: a model of each modality beside the fused one, and which of them answers rows that lack some modality.

An expert starts as a model of its modality alone would: without teachers, with `training.transfer.init` of that modality
only. So variants of a run share experts, and a variant of that modality alone is one.

Axes: N rows of val.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp

from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.metrics import predicted, row_scores
from mmkt_ray.evaluation.rows import subsets
from mmkt_ray.features.store import FeatureTable, labelled
from mmkt_ray.models import ExpertModel, ExpertSpec, MultimodalModel
from mmkt_ray.training.batches import narrow
from mmkt_ray.training.loop import training_rows

SAME_ALONE = {"task_modality": "task", "modality": "architecture"}  # with one modality these schemes are the same


def has_experts(config: Config) -> bool:
    """Whether the config asks for experts, and some task fuses modalities."""
    return config.model.experts and any(len(config.task_inputs(t)) > 1 for t in config.model_tasks)


def model_identity(config: Config) -> dict[str, Any]:
    """The model's keys, JSON-able, those that change nothing about it at one value: equal models have equal identities."""
    model = config.model
    found = model.model_dump(mode="json", exclude={"modalities", "tasks"})
    found |= {"sharing": list(model.schemes), "experts": has_experts(config)}
    if len(config.model_modalities) == 1:
        sharing = [SAME_ALONE.get(scheme, scheme) for scheme in model.schemes]
        found |= {"sharing": sharing, "missing": "mask", "modality_dropout": 0.0}
    return found


def fused_tasks(config: Config, modality: str) -> list[str]:
    """The tasks that read this modality and others."""
    inputs = {t: config.task_inputs(t) for t in config.model_tasks}
    return [t for t, read in inputs.items() if modality in read and len(read) > 1]


def expert_configs(config: Config, table: FeatureTable) -> dict[str, Config]:
    """Modality -> the config of its expert, for the tasks that read others as well and can be learnt from it alone."""
    found = {}
    for m in config.model_modalities:
        sparse = sp.issparse(table.features[m])
        tasks = [t for t in fused_tasks(config, m) if _can_learn(expert_config(config, m, [t], sparse), table)]
        if tasks:
            found[m] = expert_config(config, m, tasks, sparse)
    return found


def expert_fits(config: Config) -> dict[str, list[str]]:
    """Variant -> the modalities whose experts are trained after it: those that no variant and no expert before it is."""
    known: set[str] = set()
    found: dict[str, list[str]] = {}
    for name, variant in config.expand_variants().items():
        known.add(_identity(variant))
        modalities = variant.model_modalities if has_experts(variant) else ()
        experts = {m: expert_config(variant, m, tasks, False) for m in modalities if (tasks := fused_tasks(variant, m))}
        identities = {m: _identity(expert) for m, expert in experts.items()}
        found[name] = [m for m, identity in identities.items() if identity not in known]
        known.update(identities.values())
    return found


def _identity(config: Config) -> str:
    """Equal for configs of equal models, as far as that can be said without features."""
    parts = {
        "samples": config.samples.model_dump(mode="json"),
        "modalities": {m: config.modalities[m].model_dump(mode="json") for m in config.model_modalities},
        "tasks": {t: config.tasks[t].model_dump(mode="json") for t in config.model_tasks},
        "model": model_identity(config),
        "training": config.training.model_dump(mode="json"),
        "seed": [config.seed, config.training_seed],
    }
    return fingerprint(parts)


def expert_config(config: Config, modality: str, tasks: list[str], sparse: bool) -> Config:
    """The config of a model of these tasks from one modality, whose features are sparse or dense."""
    transfer = config.training.transfer
    init = {m: source for m, source in transfer.init.items() if m == modality}
    overrides: dict[str, Any] = {
        "model.modalities": [modality],
        "model.tasks": tasks,
        "model.fusion": "concat",
        "model.experts": False,
        "training.balance": None,
        "training.transfer": {"init": init, "tuning": transfer.tuning} if init else {},
        f"training.augment.{'noise' if sparse else 'word_dropout'}": 0.0,
    }
    if len(tasks) == 1:
        overrides["training.task_weighting"] = "sum"
    return config.with_overrides(overrides)


def _can_learn(config: Config, table: FeatureTable) -> bool:
    try:
        training_rows(config, narrow(table, config.model_modalities, config.model_tasks), {})
    except DataError:
        return False
    return True


def join_experts(
    fused: MultimodalModel, experts: Mapping[str, MultimodalModel], table: FeatureTable
) -> MultimodalModel | ExpertModel:
    """One model of the fused one and of those experts that answer some rows, see `choose_routes`."""
    routes = choose_routes(fused, experts, table)
    asked = {m for by_pattern in routes.values() for m in by_pattern.values()}
    if not asked:
        return fused
    experts = {m: experts[m] for m in sorted(asked)}
    return ExpertModel(ExpertSpec(fused.spec, {m: e.spec for m, e in experts.items()}, routes), fused, experts).eval()


def choose_routes(
    fused: MultimodalModel, experts: Mapping[str, MultimodalModel], table: FeatureTable
) -> dict[str, dict[str, str]]:
    """task -> {what a row has of the task's modalities, joined by +: the modality whose expert answers it}.

    For each proper part of the modalities the best on val of the fused model and the experts of that part, over the rows that
    have it, with all else hidden. Of equals an expert, of experts the better one on all val rows that it can read; so too
    where no val row tells.
    """
    val = table.take(table.rows("val"))
    own = {m: _scores(expert, val) for m, expert in experts.items()}

    @cache
    def ours(part: tuple[str, ...]) -> dict[str, np.ndarray]:
        return _scores(fused, val, drop=set(fused.spec.modalities) - set(part))

    def mean(scores: np.ndarray, task: str, part: tuple[str, ...]) -> float:
        rows = labelled(val.labels[task]) & np.logical_and.reduce([val.present[m] for m in part])
        return float(scores[rows].mean()) if rows.any() else 0.0

    routes: dict[str, dict[str, str]] = {}
    for t, inputs in fused.spec.inputs.items():
        for part in subsets(inputs, range(1, len(inputs))):
            known = {m: own[m][t] for m in part if t in own.get(m, {})}
            if not known:
                continue
            best = max(known, key=lambda m: (mean(known[m], t, part), mean(known[m], t, (m,))))
            if mean(known[best], t, part) >= mean(ours(part)[t], t, part):
                routes.setdefault(t, {})["+".join(part)] = best
    return routes


def _scores(model: MultimodalModel, table: FeatureTable, drop: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Task -> the score in [0, 1] of each row, (N,); see `row_scores`. Those of unlabelled rows mean nothing."""
    proba = predict_table(model, table, drop=drop)
    return {t: row_scores(table.labels[t], predicted(p, model.spec.kinds[t])) for t, p in proba.items()}
