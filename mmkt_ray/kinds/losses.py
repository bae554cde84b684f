"""Losses of class labels, and what adds up to their scores, in torch.

Axes: B rows of a batch, C classes of one task, M modalities, P models of a stack. "Codes" are tasks where a row has
one class, with values (B,); "sets" those where it has any number, with values (B, C) of 0 and 1.

Sources: label smoothing, Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567); distillation, Hinton et al. 2015
(https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkt_ray.kinds.labels import Labels

_NO_TARGET = -1  # what `ignore_index` skips, within this file


def code_losses(logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
    """(B,) cross-entropy times the class's weight; 0 without a target."""
    return F.cross_entropy(
        logits, _targets(labels), weights, ignore_index=_NO_TARGET, reduction="none", label_smoothing=smoothing
    )


def stacked_code_losses(logits: Tensor, labels: Labels, weights: Tensor, smoothing: Tensor) -> Tensor:
    """(P, B) the same of logits (P, B, C), each member with its own smoothing (P,)."""
    log_p, codes = logits.log_softmax(dim=-1), _targets(labels).repeat(len(logits))
    sharp = F.nll_loss(log_p.flatten(0, 1), codes, weights, ignore_index=_NO_TARGET, reduction="none").view(
        len(logits), -1
    )
    flat = torch.where(labels.known, log_p @ (-weights / len(weights)), 0.0)
    return sharp + smoothing[:, None] * (flat - sharp)


def _targets(labels: Labels) -> Tensor:
    return torch.where(labels.known, labels.values, _NO_TARGET)


def set_losses(logits: Tensor, labels: Labels, weights: Tensor, smoothing: float | Tensor) -> Tensor:
    """(.., B) mean over classes of the binary cross-entropy, a positive times its weight; 0 without a target.
    smoothing: a number, or for logits (P, B, C) one of each member (P, 1, 1)."""
    target = labels.values * (1 - smoothing) + smoothing / 2
    target = target.expand_as(logits) if isinstance(smoothing, Tensor) else target
    each = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="none")
    return torch.where(labels.known, each.mean(dim=-1), 0.0)


def code_distillation(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(B,) KL(teacher || student) of logits / T and softened targets (B, C)."""
    return F.kl_div((logits / temperature).log_softmax(dim=1), target, reduction="none").sum(dim=1)


def set_distillation(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """(B,) mean over classes of the binary divergences."""
    entropy = F.binary_cross_entropy(target, target, reduction="none")
    return (F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none") - entropy).mean(dim=1)


def log_mean(log_p: Tensor, mask: Tensor) -> Tensor:
    """log of the mean of p over the masked modalities: (B, M, C), (B, M) -> (B, C); zeros where there is none."""
    lowest = torch.finfo(log_p.dtype).min
    total = torch.where(mask[..., None], log_p, lowest).logsumexp(dim=-2)
    count = mask.sum(dim=-1, keepdim=True)
    return torch.where(count > 0, total - count.clamp(min=1).log(), 0.0)


# --- scores that add up ---------------------------------------------------------------------------------------------


def tally_codes(logits: Tensor, labels: Labels) -> Tensor:
    """Summed loss, rows with a loss, rows that are right, labelled rows, then for each class, and one more for those
    that train lacks, the hits, labels and predictions: (.., 4 + 3 (C + 1)) float64."""
    num_classes = logits.shape[-1]
    logits, labels = logits[..., labels.labelled, :], labels[labels.labelled]
    seen = labels.known
    loss = -logits.log_softmax(dim=-1)[..., seen, labels.values[seen]].sum(dim=-1)
    codes, pred = torch.where(seen, labels.values, num_classes), logits.argmax(dim=-1)
    right = codes == pred
    classes = torch.arange(num_classes + 1, device=logits.device)
    truth, said = codes[:, None] == classes, pred[..., None] == classes
    counts = [x.sum(dim=-2) for x in (truth & said, truth.expand_as(said), said)]
    num_losses, num_rows = (torch.full_like(loss, num) for num in (int(seen.sum()), len(labels)))
    head = torch.stack([loss, num_losses, right.sum(dim=-1), num_rows], dim=-1)
    return torch.cat([head, *counts], dim=-1).double()


def tally_sets(logits: Tensor, labels: Labels) -> Tensor:
    """The same of any number of classes per row."""
    kept = labels.known
    logits, truth = logits[..., kept, :], labels.values[kept] == 1
    pred, target = logits >= 0, truth.expand_as(logits).float()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=-1).sum(dim=-1)
    num_rows = torch.full_like(loss, len(truth))
    head = torch.stack([loss, num_rows, (truth == pred).all(dim=-1).sum(dim=-1), num_rows], dim=-1)
    counts = [F.pad(x.sum(dim=-2), (0, 1)) for x in (truth & pred, truth.expand_as(pred), pred)]
    return torch.cat([head, *counts], dim=-1).double()
