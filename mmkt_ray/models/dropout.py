"""Dropout whose rate is a number in the model rather than in the code,
so that stacked models can each have their own.

Source: Srivastava et al. 2014 (https://jmlr.org/papers/v15/srivastava14a.html).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """As `nn.Dropout`. Draws one number per value even at rate 0,
    so that equal seeds draw alike whatever the rates."""

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., B, H)."""
        factors = self.factors(x)
        return x if factors is None else x * factors  # one factor per value: a single product to go back through

    if TYPE_CHECKING:
        __call__ = forward

    def of_values(self, values: Tensor) -> Tensor:
        """The same of a sparse batch's values, (Z,) or of a stack (P, Z); all members draw the same numbers (Z,)."""
        if not self.training:
            return values
        rate = self.rate[..., None] if self.rate.ndim else self.rate
        kept = (torch.rand(values.shape[-1:], device=values.device) - rate).floor_().add_(1.0)
        return values * kept.mul_(1 / (1 - rate))

    def factors(self, x: Tensor) -> Tensor | None:
        """What each value is multiplied by, null after training. Members of a stack draw the same numbers, (B, H);
        with rates of their own, (P,), these become (P, B, H) factors."""
        if not self.training:
            return None
        rate = self.rate[..., None, None] if self.rate.ndim else self.rate
        # 1 where the number is at least the rate, else 0, without bools, which cost a stack of models 5 times as much
        kept = (torch.rand(x.shape[-2:], device=x.device) - rate).floor_().add_(1.0)
        return kept.mul_(1 / (1 - rate))
