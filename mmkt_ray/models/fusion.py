"""Fusion: the modalities' signals become what one head reads, and the head turns that into logits.

Axes: B batch, M modalities, H hidden, C classes.

A fusion is built from the widths of its inputs, says in `widths` what it hands on, and builds the head that reads it.
It takes signals of any widths, dense or sparse. `present` marks the rows that have a modality; what an absent one
holds has no influence. Each fusion is an entry of `FUSIONS`.

Sources: feature-level (early) and decision-level (late) fusion: Baltrusaitis et al. 2019, section 6
(https://arxiv.org/abs/1705.09406). Hierarchical: F(k) = Fuse(F(1), ..., F(k-1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models.containers import ModuleDict, ModuleList
from mmkt_ray.models.fuses import FUSES, Fuse, Masks, Parts, masked_softmax, stack_masks
from mmkt_ray.models.layers import Linear, masked
from mmkt_ray.models.sharing import module_name
from mmkt_ray.models.sparse import SparseLinear
from mmkt_ray.models.towers import ConcatLinear, Width, make_linear


class LinearHead(ConcatLinear):
    """Logits (B, C) from one linear layer on the concatenation of the parts; an absent part adds nothing."""


class DecisionHead(nn.Module):
    """One linear classifier per modality, z_m = W_m F_m + b_m; their decisions combined over the present modalities.

    A decision is a vector of log-probabilities, log softmax(z_m). Logits (B, C):
        learned: sum of w_m log p_m, w = softmax over the present modalities of one learned number each
        average: log of the mean of p_m
        product: sum of log p_m, which the softmax after it renormalises (product of experts, Hinton 2002,
            https://doi.org/10.1162/089976602760128018)
    Of a multilabel task each class is a decision between yes and no. In log odds the same combinations are the
    weighted sum of z_m, the log odds of the mean of sigmoid(z_m), and the sum of z_m.
    Zeros, that is even odds, where nothing is present.
    """

    def __init__(self, widths: dict[str, Width], num_classes: int, kind: TaskKind, combine: str) -> None:
        super().__init__()
        self.modalities, self.kind, self.combine = sorted(widths), kind, combine
        self.classifiers: ModuleDict[Linear | SparseLinear] = ModuleDict(
            {module_name(m): make_linear(widths[m], num_classes) for m in self.modalities}
        )
        self.weights = nn.Parameter(torch.zeros(len(widths))) if combine == "learned" else None  # (M,) even at first

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        mask = stack_masks(self.modalities, parts, present)  # (B, M)
        decided = zip(self.modalities, mask.unbind(dim=-1), strict=True)
        z = torch.stack([masked(self.classifiers[module_name(m)](parts[m]), there) for m, there in decided], dim=-2)
        if self.combine == "average":
            return self.kind.mean_decision(z, mask)
        if self.weights is None:
            weights = mask.to(z.dtype)
        else:
            weights = masked_softmax(self.weights[..., None, :], mask)
        return (weights[..., None] * self.kind.decisions(z)).sum(dim=-2)

    if TYPE_CHECKING:
        __call__ = forward


Head: TypeAlias = LinearHead | DecisionHead  # of one task: (parts, masks) -> logits (B, C)


class Fusion(nn.Module):
    """Base: hands the signals on as they are. `options` is the config's fusion section as plain values."""

    widths: dict[str, Width]  # of the parts that `forward` returns

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.widths, self.options = widths, options

    def forward(self, inputs: Parts, present: Masks) -> tuple[Parts, Masks]:
        """inputs: modality -> (B, D_m); present: modality -> (B,) bool.
        Returns what the head reads, and its masks."""
        return inputs, present

    if TYPE_CHECKING:
        __call__ = forward

    def build_head(self, num_classes: int, kind: TaskKind) -> Head:
        """A head for one task on what this fusion hands on."""
        return LinearHead(self.widths, num_classes)


class Concat(Fusion):
    """Feature-level fusion, F = [F_1; ..; F_n]: the head reads all signals side by side. No parameters of its own.

    Without towers below (num_levels 0) model and head together are multinomial logistic regression on the features.
    """


class Decision(Fusion):
    """Task-level (late) fusion: every modality decides for itself, the head combines the decisions."""

    def build_head(self, num_classes: int, kind: TaskKind) -> Head:
        return DecisionHead(self.widths, num_classes, kind, self.options["combine"])


class Hierarchical(Fusion):
    """F(1) = Fuse(F_1, .., F_n); F(k) = Fuse(F(1), .., F(k-1)); the head reads F(K), K = depth.

    Fuse is any of `FUSES`. A fuse by its own name (`fusion: gated`) is depth 1 of it.
    """

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Mapping[str, Any]) -> None:
        fused = [f"F{k}" for k in range(1, options["depth"] + 1)]
        super().__init__({fused[-1]: Width(hidden_dim)}, hidden_dim, dropout, options)
        fuse = FUSES[options["fuse"] if options["name"] == "hierarchical" else options["name"]]
        reads = [widths, *({name: Width(hidden_dim) for name in fused[:k]} for k in range(1, len(fused)))]
        self.fuses: ModuleList[Fuse] = ModuleList(fuse(r, hidden_dim, dropout, options) for r in reads)

    def forward(self, inputs: Parts, present: Masks) -> tuple[Parts, Masks]:
        """inputs: modality -> (B, D_m); present: modality -> (B,) bool. Returns {"F<K>": (B, H)}, {}."""
        fused = {"F1": self.fuses[0](inputs, present)}
        for k, fuse in enumerate(list(self.fuses)[1:], start=2):
            fused[f"F{k}"] = fuse(fused, {})
        last = f"F{len(self.fuses)}"
        return {last: fused[last]}, {}


FUSIONS: dict[str, type[Fusion]] = {
    **dict.fromkeys(FUSES, Hierarchical),
    "concat": Concat,
    "hierarchical": Hierarchical,
    "decision": Decision,
}
