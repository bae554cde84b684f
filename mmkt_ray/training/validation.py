"""Scores on the val split, exact whatever the number of ranks: counts are summed over ranks before anything is divided.

Axes: B rows of a batch, C classes of one task, and one more for labels that the train split does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkt_ray.config import METRICS_BY_KIND
from mmkt_ray.evaluation.inference import model_inputs
from mmkt_ray.evaluation.metrics import macro_f1_from_counts
from mmkt_ray.evaluation.objective import metric_scores
from mmkt_ray.features.store import MISSING, FeatureTable, labelled
from mmkt_ray.models import MultimodalModel, to_proba
from mmkt_ray.training.batches import World, has_target


@torch.inference_mode()
def validate(
    model: MultimodalModel,
    table: FeatureTable,
    rows: np.ndarray,
    world: World,
    batch_size: int = 1024,
    metric: str | None = None,
) -> dict[str, Any]:
    """Each rank reads its share of `rows`; all return the same scores.

    Returns: `loss` (nats, summed over tasks), `accuracy` and `macro_f1` by task, as evaluation defines them, for the tasks
    with a label among the rows, and `score`, the mean macro-F1 of these tasks (mean accuracy if none is defined). Of a
    multilabel task the classes with a probability of at least 0.5 are predicted, and accuracy is the share of rows in which
    every class is right. With `metric` also that one by task, see `metric_scores`, where it is defined; the logits of all
    rows are then in memory.
    """
    tallies = {
        t: torch.zeros(4 + 3 * (c + 1), dtype=torch.float64, device=world.device) for t, c in model.spec.tasks.items()
    }
    kept = {t: torch.zeros(len(rows), c, device=world.device) for t, c in model.spec.tasks.items() if metric}
    mine = np.arange(world.rank, len(rows), world.size)
    model.eval()
    for start in range(0, len(mine), batch_size):
        here = mine[start : start + batch_size]
        batch = rows[here]
        logits = model(*model_inputs(table, batch, model.spec.modalities, world.device))
        for t, tally in tallies.items():
            tally += tally_batch(logits[t], torch.from_numpy(table.labels[t][batch]).to(world.device))
        for t, values in kept.items():
            values[torch.from_numpy(here).to(world.device)] = logits[t]
    if world.size > 1:
        for _, values in [*sorted(tallies.items()), *sorted(kept.items())]:
            dist.all_reduce(values)  # of the logits too: each row is 0 on all ranks but one
    found = summarise({t: tally.cpu().numpy() for t, tally in tallies.items()})
    return found | ({metric: task_scores(metric, table, rows, kept)} if metric else {})


def task_scores(metric: str, table: FeatureTable, rows: np.ndarray, logits: Mapping[str, Tensor]) -> dict[str, float]:
    """As `proba_scores`, of logits."""
    kinds = {t: table.kinds.get(t, "multiclass") for t in logits}
    return proba_scores(metric, table, rows, {t: to_proba(z.cpu(), kinds[t]).numpy() for t, z in logits.items()})


def proba_scores(
    metric: str, table: FeatureTable, rows: np.ndarray, proba: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Task -> the metric on those of the rows (N,) that are labelled, where the task's kind has it and it is defined.

    proba: task -> (N, C).
    """
    found: dict[str, float] = {}
    for t, values in proba.items():
        labels, kind = table.labels[t][rows], table.kinds.get(t, "multiclass")
        known = labelled(labels)
        if known.any() and metric in METRICS_BY_KIND[kind]:
            value = float(metric_scores(metric, kind, labels[known], values[known])[0])
            found |= {} if np.isnan(value) else {t: value}
    return found


def tally_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """What adds up over batches and ranks, (.., 4 + 3 (C + 1)) float64: summed loss, rows with a loss, rows that are right,
    labelled rows, then for each class the hits, labels and predictions. logits: (B, C), or of a stack (P, B, C); labels:
    (B,) or (B, C)."""
    return (tally_codes if labels.ndim == 1 else tally_sets)(logits, labels)


def tally_codes(logits: Tensor, labels: Tensor) -> Tensor:
    """`tally_batch` of one class per row."""
    num_classes = logits.shape[-1]
    logits, labels = logits[..., labels != MISSING, :], labels[labels != MISSING]
    seen = labels >= 0
    loss = -logits.log_softmax(dim=-1)[..., seen, labels[seen]].sum(dim=-1)
    codes, pred = torch.where(seen, labels, num_classes), logits.argmax(dim=-1)
    right = codes == pred
    classes = torch.arange(num_classes + 1, device=logits.device)
    truth, said = codes[:, None] == classes, pred[..., None] == classes
    counts = [x.sum(dim=-2) for x in (truth & said, truth.expand_as(said), said)]
    num_losses, num_rows = (torch.full_like(loss, num) for num in (int(seen.sum()), len(labels)))
    head = torch.stack([loss, num_losses, right.sum(dim=-1), num_rows], dim=-1)
    return torch.cat([head, *counts], dim=-1).double()


def tally_sets(logits: Tensor, labels: Tensor) -> Tensor:
    """`tally_batch` of any number of classes per row."""
    kept = has_target(labels)
    logits, truth = logits[..., kept, :], labels[kept] == 1
    pred, target = logits >= 0, truth.expand_as(logits).float()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=-1).sum(dim=-1)
    num_rows = torch.full_like(loss, len(truth))
    head = torch.stack([loss, num_rows, (truth == pred).all(dim=-1).sum(dim=-1), num_rows], dim=-1)
    counts = [F.pad(x.sum(dim=-2), (0, 1)) for x in (truth & pred, truth.expand_as(pred), pred)]
    return torch.cat([head, *counts], dim=-1).double()


def summarise(tallies: dict[str, np.ndarray]) -> dict[str, Any]:
    """Scores from the tallies of all rows; see `validate`."""
    loss, accuracy, macro_f1 = 0.0, {}, {}
    for t, tally in sorted(tallies.items()):
        total, num_losses, num_right, num_labelled = tally[:4]
        if num_labelled == 0:
            continue
        loss += float(total / max(1.0, num_losses))
        accuracy[t] = float(num_right / num_labelled)
        value = float(macro_f1_from_counts(*tally[4:].reshape(3, 1, -1))[0])
        if not np.isnan(value):  # no row of a multilabel task has or is given a class
            macro_f1[t] = value
    score = float(np.mean(list((macro_f1 or accuracy).values())))
    return {"loss": loss, "score": score, "accuracy": accuracy, "macro_f1": macro_f1}
