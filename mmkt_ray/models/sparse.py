"""Linear maps of sparse features, with nothing of width D made but the weights and their gradient.

Axes: B batch, D width of the features, H hidden width, Z non-zero values in a batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SparseBatch(NamedTuple):
    """B rows of a sparse matrix (B, D): row b holds `values[offsets[b]:offsets[b + 1]]` at columns `indices[...]`."""

    indices: Tensor  # (Z,) int64
    offsets: Tensor  # (B + 1,) int64
    values: Tensor  # (Z,) float32; (P, Z) where the members of a stack see other values
    # (Z,) int64 row of each value, which then come in any order: what an exported graph works by
    rows: Tensor | None = None

    def to(self, device: torch.device) -> SparseBatch:
        """The same rows on a device."""
        parts = {name: part for name, part in self._asdict().items() if part is not None}
        return self._replace(**{name: part.to(device, non_blocking=True) for name, part in parts.items()})


class SparseLinear(nn.Module):
    """`nn.Linear` for a SparseBatch: (B, D) -> (B, H); of a stack of P, whose weight is (P, D, H), -> (P, B, H)."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: SparseBatch) -> Tensor:
        y = sparse_matmul(x, self.weight)
        return y if self.bias is None else y + (self.bias[:, None] if self.bias.ndim == 2 else self.bias)


def sparse_matmul(x: SparseBatch, weight: Tensor) -> Tensor:
    """X W: (B, D) times (D, H) or (P, D, H). Differentiable in W."""
    if x.rows is not None:
        if weight.ndim == 3:
            values = x.values if x.values.ndim == 2 else x.values.expand(len(weight), -1)
            return torch.stack(
                [sparse_matmul(x._replace(values=v), w) for v, w in zip(values, weight.unbind(), strict=True)]
            )
        empty = weight.new_zeros(x.offsets.shape[0] - 1, weight.shape[1])
        return empty.index_add(0, x.rows, x.values[:, None] * weight[x.indices])
    function = _SparseMatmul if weight.ndim == 2 else _SparseMatmuls
    product: Tensor = function.apply(x.indices, x.offsets, x.values, weight)
    return product


def keep_rows(x: SparseBatch, kept: Tensor) -> SparseBatch:
    """The batch with zeros in the rows that are not kept; kept: (B,) bool, or (P, B) of a stack."""
    if x.rows is not None:
        return x._replace(values=torch.where(kept[x.rows], x.values, 0.0))
    keep = torch.repeat_interleave(kept, x.offsets.diff(), dim=-1, output_size=x.values.shape[-1])  # (.., Z)
    return x._replace(values=torch.where(keep, x.values, 0.0))


def append_column(x: SparseBatch, column: Tensor, dim: int) -> SparseBatch:
    """[X, column]: one more column behind the `dim` of X; column: (B,), or (P, B) of a stack."""
    if x.rows is not None:
        new = torch.arange(column.shape[0], device=column.device)
        indices, rows = torch.cat([x.indices, torch.full_like(new, dim)]), torch.cat([x.rows, new])
        return SparseBatch(indices, x.offsets, torch.cat([x.values, column.to(x.values.dtype)]), rows)
    before = torch.arange(column.shape[-1], device=column.device)  # (B,) values put in ahead of each row
    old = torch.arange(len(x.indices), device=column.device)
    old = old + torch.repeat_interleave(before, x.offsets.diff(), output_size=len(old))
    places = torch.cat([old, x.offsets[1:] + before])  # where the old values and the new ones go
    indices = torch.cat([x.indices, torch.full_like(before, dim)])
    parts = torch.broadcast_tensors(x.values[..., :1], column[..., :1])  # a stack's members may differ in either
    own = parts[0].shape[:-1]
    values = torch.cat([x.values.expand(*own, -1), column.to(x.values.dtype).expand(*own, -1)], dim=-1)
    return SparseBatch(
        torch.empty_like(indices).index_copy(0, places, indices),
        x.offsets + torch.arange(len(x.offsets), device=column.device),
        torch.empty_like(values).index_copy(-1, places, values),
    )


class _SparseMatmul(torch.autograd.Function):
    """Weighted sums of rows of a table, both ways: forward over the batch's rows, backward over its columns.

    `embedding_bag` alone would do, but with a gradient it takes a slow path: 43 ms instead of 4 ms a step, measured
    for 256 posts, 130,107 terms, H = 20, on one core. This one is deterministic on GPUs too.
    """

    @staticmethod
    def forward(indices: Tensor, offsets: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        return _row_sums(indices, offsets, values, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        indices, offsets, values, weight = inputs
        ctx.save_for_backward(indices, offsets, values)
        ctx.num_columns = len(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        """grad: (B, H). The gradient of the weights (D, H) is X^T grad, X the batch:
        so the batch is sorted by column."""
        indices, offsets, values = ctx.saved_tensors
        order, rows, columns, column_offsets = _by_column(indices, offsets)
        weight_grad = grad.new_zeros(ctx.num_columns, grad.shape[1])
        weight_grad[columns] = _SparseMatmul.apply(rows, column_offsets, values[order], grad)
        return None, None, None, weight_grad


class _SparseMatmuls(torch.autograd.Function):
    """The same of a stack: the batch is sorted once for all members, and results are written where they belong."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, offsets: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        """values: (Z,) or (P, Z); weight: (P, D, H). Returns (P, B, H)."""
        ctx.save_for_backward(indices, offsets, values)
        ctx.num_columns = weight.shape[1]
        product = weight.new_empty(len(weight), len(offsets) - 1, weight.shape[2])
        for own, table, out in zip(values.expand(len(weight), -1), weight, product, strict=True):
            out.copy_(_row_sums(indices, offsets, own, table))
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        """grad: (P, B, H)."""
        indices, offsets, values = ctx.saved_tensors
        order, rows, columns, column_offsets = _by_column(indices, offsets)
        weight_grad = grad.new_zeros(len(grad), ctx.num_columns, grad.shape[2])
        for own, table, out in zip(values[..., order].expand(len(grad), -1), grad, weight_grad, strict=True):
            out.index_copy_(0, columns, _row_sums(rows, column_offsets, own, table.contiguous()))
        return None, None, None, weight_grad


def _row_sums(indices: Tensor, offsets: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """out[b] = sum over i in offsets[b]..offsets[b + 1] of values[i] * table[indices[i]]."""
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def _by_column(indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch sorted by column: the order of its values (Z,), the row of each (Z,), the columns that it has (K,), and
    where each begins (K + 1,)."""
    order = torch.argsort(indices, stable=True)
    numbers = torch.arange(len(offsets) - 1, device=indices.device)
    rows = torch.repeat_interleave(numbers, offsets.diff(), output_size=len(indices))
    columns, counts = torch.unique_consecutive(indices[order], return_counts=True)
    return order, rows[order], columns, F.pad(counts.cumsum(0), (1, 0))
