"""`model.missing: expert`: a model of each modality beside the fused one, and which of them answers rows with one modality.

Axes: N rows of val.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mmkt_ray.config import Config
from mmkt_ray.evaluation.inference import score_rows
from mmkt_ray.features.store import FeatureTable, labelled
from mmkt_ray.models import ExpertModel, ExpertSpec, MultimodalModel


def expert_configs(config: Config) -> dict[str, Config]:
    """Modality -> the config of its expert, for the tasks that read others as well; empty where there is nothing to fuse."""
    found = {}
    for m in config.model_modalities:
        tasks = [t for t in config.model_tasks if m in config.task_inputs(t) and len(config.task_inputs(t)) > 1]
        if tasks:
            overrides: dict[str, Any] = {"model.modalities": [m], "model.tasks": tasks, "model.missing": "mask"}
            overrides["training.balance"] = None
            overrides["training.transfer.init"] = {k: v for k, v in config.training.transfer.init.items() if k == m}
            if len(tasks) == 1:
                overrides["training.task_weighting"] = "sum"
            found[m] = config.with_overrides(overrides)
    return found


def join_experts(fused: MultimodalModel, experts: Mapping[str, MultimodalModel], table: FeatureTable) -> ExpertModel:
    """One model of them all. An expert answers where, with its modality alone, it is at least as good on val as the fused
    model; where no val row tells, too."""
    routes: dict[str, list[str]] = {t: [] for t in fused.spec.tasks}
    for m, expert in experts.items():
        nothing = np.zeros(len(table.sample_id), bool)
        alone = replace(table, present={o: here if o == m else nothing for o, here in table.present.items()})
        for t in expert.spec.tasks:
            rows = (table.split == "val") & labelled(table.labels[t]) & table.present[m]
            theirs, own = (score_rows(model, alone, t, rows) for model in (fused, expert))
            if not len(own) or own.mean() >= theirs.mean():
                routes[t].append(m)
    spec = ExpertSpec(
        fused.spec, {m: e.spec for m, e in experts.items()}, {t: tuple(found) for t, found in routes.items()}
    )
    return ExpertModel(spec, fused, experts).eval()
