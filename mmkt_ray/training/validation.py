"""Scores on the val split, exact whatever the number of ranks: counts are summed over ranks before anything is divided.

Axes: B rows of a batch, C classes of one task, and one more for labels that the train split does not have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkt_ray.evaluation.inference import model_inputs
from mmkt_ray.evaluation.metrics import macro_f1_from_counts
from mmkt_ray.features.store import MISSING, FeatureTable
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.batches import World, has_target


@torch.inference_mode()
def validate(
    model: MultimodalModel, table: FeatureTable, rows: np.ndarray, world: World, batch_size: int = 1024
) -> dict[str, Any]:
    """Each rank reads its share of `rows`; all return the same scores.

    Returns: `loss` (nats, summed over tasks), `accuracy` and `macro_f1` by task, as evaluation defines them, for the tasks
    with a label among the rows, and `score`, the mean macro-F1 of these tasks (mean accuracy if none is defined). Of a
    multilabel task the classes with a probability of at least 0.5 are predicted, and accuracy is the share of rows in which
    every class is right.
    """
    tallies = {
        t: torch.zeros(4 + 3 * (c + 1), dtype=torch.float64, device=world.device) for t, c in model.spec.tasks.items()
    }
    mine = rows[world.rank :: world.size]
    model.eval()
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        logits = model(*model_inputs(table, batch, model.spec.modalities, world.device))
        for t, tally in tallies.items():
            tally += tally_batch(logits[t], torch.from_numpy(table.labels[t][batch]).to(world.device))
    if world.size > 1:
        for t in sorted(tallies):
            dist.all_reduce(tallies[t])
    return summarise({t: tally.cpu().numpy() for t, tally in tallies.items()})


def tally_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """What adds up over batches and ranks, (4 + 3 (C + 1),) float64: summed loss, rows with a loss, rows that are right, labelled
    rows, then for each class the hits, labels and predictions. logits: (B, C); labels: (B,) or (B, C)."""
    return (tally_codes if labels.ndim == 1 else tally_sets)(logits, labels)


def tally_codes(logits: Tensor, labels: Tensor) -> Tensor:
    """`tally_batch` of one class per row."""
    num_classes = logits.shape[1]
    loss = F.cross_entropy(logits, labels.clamp(min=MISSING), ignore_index=MISSING, reduction="sum")
    logits, labels = logits[labels != MISSING], labels[labels != MISSING]
    codes, pred = torch.where(labels < 0, num_classes, labels), logits.argmax(dim=1)
    right = codes == pred
    counts = [torch.bincount(x, minlength=num_classes + 1) for x in (codes[right], codes, pred)]
    head = torch.stack([loss, (labels >= 0).sum(), right.sum(), torch.ones_like(labels).sum()])
    return torch.cat([head, *counts]).double()


def tally_sets(logits: Tensor, labels: Tensor) -> Tensor:
    """`tally_batch` of any number of classes per row."""
    kept = has_target(labels)
    logits, truth, pred = logits[kept], labels[kept] == 1, logits[kept] >= 0
    loss = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none").mean(dim=1).sum()
    head = torch.stack([loss, kept.sum(), (truth == pred).all(dim=1).sum(), kept.sum()])
    counts = [F.pad(x.sum(dim=0), (0, 1)) for x in (truth & pred, truth, pred)]
    return torch.cat([head, *counts]).double()


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
