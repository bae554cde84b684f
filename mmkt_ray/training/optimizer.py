"""The optimiser, AdamW, and its learning-rate schedule.

Sources: AdamW (https://arxiv.org/abs/1711.05101), cosine decay (https://arxiv.org/abs/1608.03983).
"""

from __future__ import annotations

import math

import torch
from torch import nn

WARMUP_FRAC = 0.05


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no biases, norms or combination weights."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def lr_factor(step: int, num_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(WARMUP_FRAC * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
