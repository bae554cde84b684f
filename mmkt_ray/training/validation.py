"""Scores on the val split. They are exact for any number of ranks: counts are summed over ranks before any division.

Axes: B rows of a batch, C classes of one task, and one more for labels that the train split does not have.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import model_inputs
from mmkt_ray.inference.rows import readable
from mmkt_ray.inference.training_record import ValScores
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models import MultimodalModel
from mmkt_ray.scoring.heldout import HeldOut, pattern_name
from mmkt_ray.scoring.objective import metric_score
from mmkt_ray.training.batches import Worker


@torch.inference_mode()
def validate(
    model: MultimodalModel,
    table: FeatureTable,
    rows: np.ndarray,
    worker: Worker,
    batch_size: int = 1024,
    metric: str | None = None,
) -> ValScores:
    """Each rank reads its share of `rows`; all return the same scores.

    `loss` is in nats, summed over tasks. `metrics` has what the kinds report, such as `accuracy`, by task, as
    evaluation defines it, for the tasks with a label among the rows. `score` is the mean over these tasks of the
    kinds' `val_metric` (of the main one if none is defined).

    metric: one more, see `metric_scores`; the logits of all rows are then in memory.
    """
    tallies = {
        t: torch.zeros(model.spec.kinds[t].tally_size(c), dtype=torch.float64, device=worker.device)
        for t, c in model.spec.tasks.items()
    }
    kept = {t: torch.zeros(len(rows), c, device=worker.device) for t, c in model.spec.tasks.items() if metric}
    mine = np.arange(worker.rank, len(rows), worker.world_size)
    model.eval()
    for start in range(0, len(mine), batch_size):
        here = mine[start : start + batch_size]
        batch = rows[here]
        logits = model(*model_inputs(table, batch, model.spec.modalities, worker.device))
        for t, tally in tallies.items():
            labels = table.labels[t][batch].tensors(worker.device)
            tally += labels.kind.tally(logits[t], labels)
        for t, values in kept.items():
            values[torch.from_numpy(here).to(worker.device)] = logits[t]
    if worker.world_size > 1:
        for _, values in [*sorted(tallies.items()), *sorted(kept.items())]:
            dist.all_reduce(values)  # of the logits too: each row is 0 on all ranks but one
    found = summarise({t: tally.cpu().numpy() for t, tally in tallies.items()}, model.spec.kinds)
    return found.replaced(**{metric: task_scores(metric, table, rows, kept)}) if metric else found


def task_scores(metric: str, table: FeatureTable, rows: np.ndarray, logits: Mapping[str, Tensor]) -> dict[str, float]:
    """As `proba_scores`, of logits."""
    return proba_scores(metric, table, rows, {t: table.kinds[t].outputs(z.cpu()).numpy() for t, z in logits.items()})


def proba_scores(
    metric: str, table: FeatureTable, rows: np.ndarray, proba: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Task -> the metric on those of the rows (N,) that are labelled, where the task's kind has it and it is defined.

    proba: task -> (N, C).
    """
    found: dict[str, float] = {}
    for t, values in proba.items():
        labels = table.labels[t][rows]
        if labels.labelled.any() and metric in labels.kind.metrics:
            value = metric_score(metric, labels[labels.labelled], values[labels.labelled])
            found |= {} if np.isnan(value) else {t: value}
    return found


def summarise(
    tallies: Mapping[str, np.ndarray], kinds: Mapping[str, TaskKind], on: str | None = None
) -> ValScores:
    """Scores from the tallies of all rows; see `validate`. on: how the rows were held out, if not as val."""
    scores = {t: kinds[t].tally_scores(tally) for t, tally in sorted(tallies.items())}
    loss = sum((found.get("loss", 0.0) for found in scores.values()), 0.0)
    metrics = dict.fromkeys(metric for t in scores for metric in kinds[t].reported)
    by_metric = {m: {t: found[m] for t, found in scores.items() if m in found} for m in metrics}
    defined = [found[kinds[t].val_metric] for t, found in scores.items() if kinds[t].val_metric in found]
    defined = defined or [found[kinds[t].main] for t, found in scores.items() if found]
    said = {"on": on} if on else {}
    return ValScores(loss=loss, score=float(np.mean(defined)), metrics=by_metric, **said)


def heldout_scores(heldout: HeldOut, config: Config, table: FeatureTable) -> ValScores:
    """The scores of `validate` on held-out rows, and how these were held out."""
    logits = heldout.logits[pattern_name(config.model_modalities)]
    tallies = {}
    for t, values in logits.items():
        able = readable(table, config.task_inputs(t))[heldout.rows]
        labels = table.labels[t][heldout.rows[able]].tensors()
        tallies[t] = labels.kind.tally(torch.from_numpy(values[able]), labels).numpy()
    return summarise(tallies, table.kinds, heldout.on)
