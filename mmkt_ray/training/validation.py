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
from mmkt_ray.evaluation.metrics import scores_from_counts
from mmkt_ray.features.store import MISSING, FeatureTable
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.batches import World


@torch.inference_mode()
def validate(
    model: MultimodalModel, table: FeatureTable, rows: np.ndarray, world: World, batch_size: int = 1024
) -> dict[str, Any]:
    """Each rank reads its share of `rows`; all return the same scores.

    Returns: `loss` (nats, summed over tasks), `accuracy` and `macro_f1` by task, as evaluation defines them, for the tasks
    with a label among the rows, and `score`, the mean macro-F1 of these tasks.
    """
    tallies = {
        t: torch.zeros(2 + 3 * (c + 1), dtype=torch.float64, device=world.device) for t, c in model.spec.tasks.items()
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
    """What adds up over batches and ranks, (2 + 3 (C + 1),) float64: summed loss, rows with a loss, then for each class
    the hits, labels and predictions. logits: (B, C); labels: (B,)."""
    num_classes = logits.shape[1]
    loss = F.cross_entropy(logits, labels.clamp(min=MISSING), ignore_index=MISSING, reduction="sum")
    logits, labels = logits[labels != MISSING], labels[labels != MISSING]
    codes, pred = torch.where(labels < 0, num_classes, labels), logits.argmax(dim=1)
    counts = [torch.bincount(x, minlength=num_classes + 1) for x in (codes[codes == pred], codes, pred)]
    return torch.cat([torch.stack([loss, (labels >= 0).sum()]), *counts]).double()


def summarise(tallies: dict[str, np.ndarray]) -> dict[str, Any]:
    """Scores from the tallies of all rows; see `validate`."""
    loss, accuracy, macro_f1 = 0.0, {}, {}
    for t, tally in sorted(tallies.items()):
        right, support, predicted = tally[2:].reshape(3, 1, -1)
        if support.sum() == 0:
            continue
        scores = scores_from_counts(right, support, predicted)
        loss += float(tally[0] / max(1.0, tally[1]))
        accuracy[t], macro_f1[t] = float(scores["accuracy"][0]), float(scores["macro_f1"][0])
    return {"loss": loss, "score": float(np.mean(list(macro_f1.values()))), "accuracy": accuracy, "macro_f1": macro_f1}
