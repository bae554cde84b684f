"""Fuses: named signals of any widths, any of them absent in any row, become one (B, H).

Axes: B batch, N parts (modalities, or fused levels), H hidden, R rank.

All are built alike, from the parts' widths, H, the dropout and the config's fusion section. A row without any part gets
finite numbers that depend on no row. Each is an entry of `FUSES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkt_ray.models.dropout import Dropout
from mmkt_ray.models.sharing import module_name
from mmkt_ray.models.towers import ConcatLinear, Features, Width, make_linear

Parts = dict[str, Features]  # name -> (B, D_name)
Masks = dict[str, Tensor]  # name -> (B,) bool; a part without an entry is present in all rows
Options = Mapping[str, Any]


class Concat(nn.Module):
    """Concatenation, linear, layer norm, ReLU, dropout."""

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Options) -> None:
        super().__init__()
        self.linear = ConcatLinear(widths, hidden_dim)
        self.rest = nn.Sequential(nn.LayerNorm(hidden_dim), nn.ReLU(), Dropout(dropout))

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        return self.rest(self.linear(parts, present))


class Sum(nn.Module):
    """Additive fusion: the sum over the present parts of h_n = tanh(W_n x_n + b_n). A gated unit with all gates open."""

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Options) -> None:
        super().__init__()
        self.projections = projections(widths, hidden_dim)
        self.names, self.dropout = sorted(widths), Dropout(dropout)

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        return self.dropout(self.squashed(parts, present).sum(dim=1))

    def squashed(self, parts: Parts, present: Masks) -> Tensor:
        """h_n of each part (B, N, H), zeros where it is absent."""
        values = torch.stack([self.projections[module_name(n)](parts[n]).tanh() for n in self.names], dim=1)
        return torch.where(stack_masks(self.names, parts, present)[:, :, None], values, 0.0)


class Gated(Sum):
    """Gated multimodal unit: sum of z_n * h_n, h_n = tanh(W_n x_n + b_n), z = softmax over the present n of V_n [x] + c_n.

    Arevalo et al. 2017 (https://arxiv.org/abs/1702.01992). For two parts that are both there, the softmax is the paper's
    sigmoid gate with V_1 - V_2 as its weights; for more, the gates of the present parts sum to one in every unit, so a
    part that is missing leaves its share to the others.
    """

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Options) -> None:
        super().__init__(widths, hidden_dim, dropout, options)
        self.gates = ConcatLinear(widths, len(widths) * hidden_dim)

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        values = self.squashed(parts, present)
        scores = self.gates(parts, present).unflatten(1, values.shape[1:])
        mask = stack_masks(self.names, parts, present)[:, :, None].expand(values.shape)
        return self.dropout((masked_softmax(scores, mask) * values).sum(dim=1))


class LowRankBilinear(nn.Module):
    """Low-rank tensor fusion: sum over r of w_r * product over n of (U_rn [x_n; 1]), plus b; then layer norm, dropout.

    That is a linear map of the outer product of all [x_n; 1], its tensor of rank R, without ever making either. An absent
    part contributes the neutral element, a factor of one. Liu et al. 2018 (https://arxiv.org/abs/1806.00064). The weights
    of the appended 1 start at one, so that the product starts near a sum of the parts and does not vanish when there are
    many; the norm, which the paper has not, keeps products of any number of parts at one scale.
    """

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Options) -> None:
        super().__init__()
        self.rank: int = options["rank"]
        self.factors = projections(widths, self.rank * hidden_dim)
        for factor in self.factors.values():
            nn.init.ones_(factor.bias)
        self.weights = nn.Parameter(torch.randn(self.rank) * math.sqrt(2 / (1 + self.rank)))  # (R,) Xavier's scale
        self.bias = nn.Parameter(torch.zeros(hidden_dim))
        self.rest = nn.Sequential(nn.LayerNorm(hidden_dim), Dropout(dropout))

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        names = sorted(parts)
        factors = torch.stack([self.factors[module_name(n)](parts[n]) for n in names], dim=1)  # (B, N, R H)
        neutral = torch.where(stack_masks(names, parts, present)[:, :, None], factors, 1.0)
        product = multiply(neutral.unbind(dim=1)).unflatten(1, (self.rank, -1))  # (B, R, H)
        return self.rest((product * self.weights[:, None]).sum(dim=1) + self.bias)


class Attention(nn.Module):
    """A learned query attends over the present parts as tokens: one pre-norm transformer block, read at its CLS token.

    Tokens t_n = W_n x_n + e_n, where the bias e_n says which part it is, and CLS, so that a row without any part attends
    to CLS alone. c = CLS + Attention(norm(CLS), norm([CLS; t])); F = norm(c + MLP(norm(c))). Only CLS is read, so only
    CLS is computed. Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), pre-norm: Xiong et al. 2020
    (https://arxiv.org/abs/2002.04745), CLS: Devlin et al. 2019 (https://arxiv.org/abs/1810.04805).
    """

    def __init__(self, widths: dict[str, Width], hidden_dim: int, dropout: float, options: Options) -> None:
        super().__init__()
        self.tokens = projections(widths, hidden_dim)
        self.cls = nn.Parameter(torch.randn(hidden_dim) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(3))
        self.attention = nn.MultiheadAttention(hidden_dim, options["num_heads"], batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, 2 * hidden_dim), nn.GELU(), Dropout(dropout), nn.Linear(2 * hidden_dim, hidden_dim)
        )
        self.dropout = Dropout(dropout)

    def forward(self, parts: Parts, present: Masks) -> Tensor:
        names = sorted(parts)
        mask = stack_masks(names, parts, present)
        tokens = torch.stack([self.tokens[module_name(n)](parts[n]) for n in names], dim=1)  # (B, N, H)
        cls = self.cls.expand(len(tokens), 1, -1)
        tokens = self.norms[0](torch.cat([cls, torch.where(mask[:, :, None], tokens, 0.0)], dim=1))
        ignored = torch.cat([torch.zeros_like(mask[:, :1]), ~mask], dim=1)
        query = tokens[:, :1]
        # with weights, it is written out in operations that `torch.func.vmap` knows
        seen, _ = self.attention(query, tokens, tokens, key_padding_mask=ignored, need_weights=True)
        c = (cls + self.dropout(seen)).squeeze(1)
        return self.dropout(self.norms[2](c + self.mlp(self.norms[1](c))))


FUSES: dict[str, type[nn.Module]] = {
    "concat": Concat,
    "sum": Sum,
    "gated": Gated,
    "low_rank_bilinear": LowRankBilinear,
    "attention": Attention,
}


def projections(widths: dict[str, Width], out_dim: int) -> nn.ModuleDict:
    """A linear map to (B, out_dim) for each part."""
    return nn.ModuleDict({module_name(name): make_linear(width, out_dim) for name, width in sorted(widths.items())})


def multiply(factors: Sequence[Tensor]) -> Tensor:
    """Element-wise product. `Tensor.prod` has a gradient that looks for zeros, which `torch.func.vmap` can't do."""
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def stack_masks(names: Sequence[str], parts: Parts, present: Masks) -> Tensor:
    """Which parts each row has: (B, N) bool."""
    return torch.stack([present[n] if n in present else everywhere(parts[n]) for n in names], dim=1)


def everywhere(part: Features) -> Tensor:
    """Present in all rows: (B,) bool."""
    rows = part[:, 0] if isinstance(part, Tensor) else part.offsets[1:]
    return torch.ones_like(rows, dtype=torch.bool)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the masked entries of dim 1, zeros elsewhere, also where there is none; both (B, N, ..)."""
    lowest = torch.finfo(scores.dtype).min  # not -inf, which gives NaN where all are absent
    return torch.where(mask, torch.where(mask, scores, lowest).softmax(dim=1), 0.0)
