"""Linear layers, norms and masks that also work on a stack of P models of one shape, each with weights of its own.

The parameters show whether there is a stack: a layer's weight is (H, D), or (P, H, D). Signals are (B, D), the
same for all members, or (P, B, D). A single model computes by torch's own layers; for a stack, where every pass over
the signals counts, products are written into one result and what follows a norm is one step with a gradient of its
own.

Axes: P members, B rows of a batch, D width of a signal that comes in, H width of what goes out.

Source: horizontally fused training, Wang et al. 2021 (https://arxiv.org/abs/2102.02344).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkt_ray.models.dropout import Dropout


class Linear(nn.Linear):
    """`nn.Linear`, also of a stack."""

    def forward(self, x: Tensor) -> Tensor:
        """(.., B, D) to (.., B, H)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b. weight: (H, D) or (P, H, D); bias: (H,) or (P, H), zeros if null."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return add_products(weight.new_zeros(weight.shape[:2]) if bias is None else bias, [(x, weight, None)])


def add_products(bias: Tensor, parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """b + sum over the parts of m_n x_n W_n^T, of a stack: (P, B, H).

    bias: (P, H); parts: x (.., B, D_n), weight (P, H, D_n), mask (.., B), everything if null.
    """
    size, masks, flat = len(bias), [], []
    for x, weight, mask in parts:
        masks.append(None if mask is None else mask[..., None].to(x.dtype))
        flat += [x.expand(size, -1, -1), weight]
    total: Tensor = _AddProducts.apply(bias, masks, *flat)
    return total


class _AddProducts(torch.autograd.Function):
    """`add_products`: all products go into one result, and weights get their gradient in their own layout."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, masks: list[Tensor | None], *flat: Tensor) -> Tensor:
        total = bias[:, None].expand(-1, flat[0].shape[1], -1).clone(memory_format=torch.contiguous_format)
        for x, weight, mask in zip(flat[::2], flat[1::2], masks, strict=True):
            if mask is None:
                total.baddbmm_(x, weight.mT)
            else:
                total.addcmul_(torch.bmm(x, weight.mT), mask)
        ctx.save_for_backward(*flat)
        ctx.masks = masks
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        flat, needed = ctx.saved_tensors, ctx.needs_input_grad[2::2]
        for x, weight, mask, needs in zip(flat[::2], flat[1::2], ctx.masks, needed, strict=True):
            part = grad if mask is None else grad * mask
            found += [torch.bmm(part, weight) if needs else None, torch.bmm(part.mT, x)]
        return grad.sum(dim=1), None, *found


def norm_drop(x: Tensor, norm: nn.LayerNorm, dropout: Dropout | None = None, relu: bool = False) -> Tensor:
    """Layer norm, then ReLU and dropout where asked: (.., B, H)."""
    if norm.weight.ndim == 2:
        factors = None if dropout is None else dropout.factors(x)
        done: Tensor = _NormDrop.apply(x, norm.weight, norm.bias, factors, relu, norm.eps)
        return done
    x = norm(x).relu() if relu else norm(x)
    return x if dropout is None else dropout(x)


class NormDropout(nn.ModuleList):
    """`norm_drop` with a norm and a dropout of its own."""

    def __init__(self, dim: int, dropout: float, relu: bool = False) -> None:
        super().__init__([nn.LayerNorm(dim), Dropout(dropout)])
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        norm, dropout = self
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(dropout, Dropout)
        return norm_drop(x, norm, dropout, self.relu)

    if TYPE_CHECKING:
        __call__ = forward


class _NormDrop(torch.autograd.Function):
    """`norm_drop` of a stack: seven passes over the signal, both ways together, where torch's layers take twelve."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factors: Tensor | None, relu: bool, eps: float
    ) -> Tensor:
        """x: (P, B, H); weight, bias: (P, H); factors: of the dropout (.., B, H)."""
        unit, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        y = torch.addcmul(bias[:, None], unit, weight[:, None])
        if relu:
            y.relu_()
        if factors is not None:
            y *= factors
        ctx.save_for_backward(x, unit, mean, rstd, weight, factors, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, unit, mean, rstd, weight, factors, y = ctx.saved_tensors
        if factors is not None:
            grad = grad * factors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        weight_grad = torch.linalg.vecdot(grad, unit, dim=1)
        inner, *_ = torch.ops.aten.native_layer_norm_backward(
            grad * weight[:, None], x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        return inner, weight_grad, grad.sum(dim=1), None, None, None


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros in the rows where mask is False; x: (.., B, H), mask: (.., B) bool.

    What absent rows hold is finite in a stack, where `standardize` has put zeros into them:
    a product is a sixth of `where`.
    """
    return torch.where(mask[:, None], x, 0.0) if x.ndim == 2 else x * mask[..., None].to(x.dtype)
