"""Fusion: the modalities' signals become what one head reads, and the head turns that into logits.

Axes: B batch, M modalities, H hidden, C classes.

A fusion is built from the widths of its inputs, says in `widths` what it hands on, and names the `head` that reads it.
It takes signals of any widths, dense or sparse: one that needs equal widths projects them itself. `present` marks the
rows that have a modality; a part without an entry there is present in all rows. Each fusion is an entry of `FUSIONS`.

Sources: feature-level (early) and decision-level (late) fusion: Baltrusaitis et al. 2019, section 6
(https://arxiv.org/abs/1705.09406). Hierarchical: F(k) = Fuse(F(1), ..., F(k-1)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkt_ray.models.sharing import module_name
from mmkt_ray.models.towers import ConcatLinear, Features, Width, make_linear

Parts = dict[str, Features]  # name -> (B, D_name)
Masks = dict[str, Tensor]  # name -> (B,) bool


class LinearHead(ConcatLinear):
    """Logits (B, C) from one linear layer on the concatenation of the parts; an absent part adds nothing."""


class DecisionHead(nn.Module):
    """One linear classifier per modality; their log-probabilities averaged with learned weights.

    Logits (B, C) = sum over the present m of w_m log softmax(W_m F_m + b_m), where w = softmax over the present
    modalities of one learned number each. Zeros, that is even odds, where nothing is present.
    """

    def __init__(self, widths: dict[str, Width], num_classes: int) -> None:
        super().__init__()
        self.modalities = sorted(widths)
        self.classifiers = nn.ModuleDict({module_name(m): make_linear(widths[m], num_classes) for m in self.modalities})
        self.weights = nn.Parameter(torch.zeros(len(widths)))  # (M,) even to begin with

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        decisions = [F.log_softmax(self.classifiers[module_name(m)](parts[m]), dim=-1) for m in self.modalities]
        mask = torch.stack([present[m] for m in self.modalities], dim=1)  # (B, M)
        lowest = torch.finfo(self.weights.dtype).min  # not -inf, which gives NaN where all are absent
        scores = torch.where(mask, self.weights, lowest)
        weights = torch.where(mask, scores.softmax(dim=1), 0.0)
        masked = torch.where(mask[:, :, None], torch.stack(decisions, dim=1), 0.0)  # (B, M, C)
        return (weights[:, :, None] * masked).sum(dim=1)


class Fusion(nn.Module):
    """Base: says what the head reads. `depth` is for those that have one."""

    head: type[LinearHead] | type[DecisionHead] = LinearHead
    widths: dict[str, Width]  # of the parts that `forward` returns

    def __init__(self, widths: dict[str, Width], hidden_dim: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, inputs: Parts, present: Masks) -> tuple[Parts, Masks]:
        """inputs: modality -> (B, D_m); present: modality -> (B,) bool. Returns what the head reads, and its masks."""
        return inputs, present


class Concat(Fusion):
    """Feature-level fusion, F = [F_1; ..; F_n]: the head reads all signals side by side. No parameters of its own.

    Without towers below (num_levels 0) model and head together are multinomial logistic regression on the features.
    """


class Decision(Fusion):
    """Task-level (late) fusion: every modality decides for itself, the head combines the decisions."""

    head = DecisionHead


class Fuse(nn.Module):
    """Concatenation, linear, layer norm, ReLU, dropout: name -> (B, D_name) to (B, H)."""

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = ConcatLinear(widths, hidden_dim)
        self.rest = nn.Sequential(nn.LayerNorm(hidden_dim), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        return self.rest(self.linear(parts, present))


class Hierarchical(Fusion):
    """F(1) = Fuse(F_1, .., F_n); F(k) = Fuse(F(1), .., F(k-1)); the head reads F(K), K = depth."""

    def __init__(self, widths: dict[str, Width], hidden_dim: int, depth: int, dropout: float) -> None:
        fused = [f"F{k}" for k in range(1, depth + 1)]
        super().__init__({fused[-1]: Width(hidden_dim)}, hidden_dim, depth, dropout)
        reads = [widths, *({name: Width(hidden_dim) for name in fused[:k]} for k in range(1, depth))]
        self.fuses = nn.ModuleList(Fuse(r, hidden_dim, dropout) for r in reads)

    def forward(self, inputs: Parts, present: Masks) -> tuple[Parts, Masks]:
        """inputs: modality -> (B, D_m); present: modality -> (B,) bool. Returns {"F<K>": (B, H)}, {}."""
        fused: Parts = {"F1": self.fuses[0](inputs, present)}
        for k, fuse in enumerate(list(self.fuses)[1:], start=2):
            fused[f"F{k}"] = fuse(fused, {})
        last = f"F{len(self.fuses)}"
        return {last: fused[last]}, {}


FUSIONS: dict[str, type[Fusion]] = {"concat": Concat, "hierarchical": Hierarchical, "decision": Decision}
