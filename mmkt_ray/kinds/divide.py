"""Division in arrays that are in part not to be divided."""

from __future__ import annotations

import numpy as np


def divide_where(mask: np.ndarray, a: np.ndarray, b: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """a / b in float64 where the mask is true, `otherwise` elsewhere;
    a and b have the mask's shape, or broadcast to it."""
    return np.asarray(np.divide(a, b, out=np.full(np.shape(mask), otherwise), where=mask))
