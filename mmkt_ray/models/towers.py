"""What stands below the fusion: input stages, linear layers on dense or sparse parts, towers.

Axes: B batch, D width of the features that come in, H hidden width.

Sources: LayerNorm (https://arxiv.org/abs/1607.06450), dropout (https://jmlr.org/papers/v15/srivastava14a.html).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mmkt_ray.models.containers import ModuleDict
from mmkt_ray.models.dropout import Dropout
from mmkt_ray.models.layers import Linear, add_products, masked, norm_drop
from mmkt_ray.models.sharing import module_name
from mmkt_ray.models.sparse import SparseBatch, SparseLinear, append_column, keep_rows

FeatureBatch: TypeAlias = Tensor | SparseBatch


class Width(NamedTuple):
    """What a signal between two modules looks like: (B, dim) floats, dense or sparse."""

    dim: int
    sparse: bool = False


def make_linear(width: Width, out_dim: int, bias: bool = True) -> Linear | SparseLinear:
    """The linear map from signals of `width` to (B, out_dim)."""
    return (SparseLinear if width.sparse else Linear)(width.dim, out_dim, bias=bias)


class ConcatLinear(nn.Module):
    """A linear layer on the concatenation of named parts, [x1; ..; xn] W + b, as the sum of each part's own product.

    So parts may be dense or sparse, and a part that is absent in a row adds nothing to that row.
    """

    def __init__(self, widths: dict[str, Width], out_dim: int) -> None:
        super().__init__()
        self.parts: ModuleDict[Linear | SparseLinear] = ModuleDict()
        for name, width in sorted(widths.items()):
            self.parts[module_name(name)] = make_linear(width, out_dim, bias=False)
        with torch.no_grad():
            for part in self.parts.values():
                if not part.weight.is_meta:  # about to be loaded; PyTorch would import SymPy for the shape, 0.5 s
                    part.weight.div_(math.sqrt(len(widths)))  # the concatenation's fan-in, not the part's
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def layer(self, name: str) -> Linear | SparseLinear:
        """The linear map of one part."""
        return self.parts[module_name(name)]

    def forward(self, parts: Mapping[str, FeatureBatch], present: Mapping[str, Tensor]) -> Tensor:
        """parts: name -> (B, D_name); present: name -> (B,) bool, all rows where a name is missing.
        Returns (B, H)."""
        names = sorted(parts)
        total: Tensor = self.bias
        if total.ndim == 2:  # a stack: its dense parts go into one result
            dense = {n: x for n in names if isinstance(x := parts[n], Tensor)}
            products = [(x, self.layer(n).weight, present.get(n)) for n, x in dense.items()]
            total = add_products(total, products) if products else total[:, None]
            names = [n for n in names if n not in dense]
        for name in names:
            y: Tensor = self.layer(name)(parts[name])
            total = total + (masked(y, present[name]) if name in present else y)
        return total

    if TYPE_CHECKING:
        __call__ = forward


class InputStage(nn.Module):
    """Brings one modality's features to unit scale by statistics of the train rows, fills absent rows,
    drops features.

    Dense: (x - mean) / std per feature. Sparse: divided by one number, the root mean square of the non-zero train
    values, so that zeros stay zeros and one learning rate suits both kinds. imputation.py fills absent rows.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: Width, missing: str, feature_dropout: float) -> None:
        super().__init__()
        shape = () if width.sparse else (width.dim,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.dropout = Dropout(feature_dropout)
        self.dim, self.missing = width.dim, missing
        self.marks_absence = missing == "token" and width.sparse
        self.width = Width(width.dim + self.marks_absence, width.sparse)  # of what `forward` returns
        self.token = nn.Parameter(torch.zeros(width.dim)) if missing == "token" and not width.sparse else None

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """mean, std: (D,) for dense features, () for sparse ones, whose mean is not used."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))

    def standardize(self, x: FeatureBatch, present: Tensor) -> FeatureBatch:
        """x: (B, D); present: (B,) bool. The features at unit scale, zeros in absent rows, whatever these hold."""
        if isinstance(x, SparseBatch):
            return keep_rows(x._replace(values=x.values / self.std), present)
        return torch.where(present[..., None], (x - self.mean) / self.std, 0.0)

    def forward(self, x: FeatureBatch, present: Tensor, generated: Tensor | None = None) -> FeatureBatch:
        """x: what `standardize` returned; generated: (B, D) for absent rows. Returns signals of `self.width`."""
        if isinstance(x, SparseBatch):
            x = x._replace(values=self.dropout.of_values(x.values))
            return append_column(x, ~present, self.dim) if self.marks_absence else x
        if generated is not None:
            x = torch.where(present[..., None], x, generated)
        elif self.token is not None:
            x = torch.where(present[..., None], x, self.token[..., None, :])
        elif self.missing == "zero":
            x = torch.where(present[..., None], x, -self.mean / self.std)
        return self.dropout(x)

    if TYPE_CHECKING:
        __call__ = forward


class Tower(nn.Module):
    """One level's work on one signal: linear, layer norm, ReLU, dropout. (B, D) -> (B, H)."""

    def __init__(self, width: Width, out_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = make_linear(width, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: FeatureBatch) -> Tensor:
        return norm_drop(self.linear(x), self.norm, self.dropout, relu=True)

    if TYPE_CHECKING:
        __call__ = forward
