"""How well scores rank the samples of a class before the others; small things that undefined scores need.

Axes: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def auroc(positive: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve (the Mann-Whitney statistic, ties count half);
    None without a positive or a negative row.

    positive: (N,) bool; score: (N,).
    """
    num_positive = int(positive.sum())
    num_pairs = num_positive * (len(positive) - num_positive)
    if num_pairs == 0:
        return None
    return float((rankdata(score)[positive].sum() - num_positive * (num_positive + 1) / 2) / num_pairs)


def mean_defined(values: Sequence[float | None]) -> float | None:
    """Mean of those that are defined; None if none is."""
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if defined else None


def none_if_nan(value: float) -> float | None:
    """scikit-learn's NaN for an undefined score, as JSON has it."""
    return None if np.isnan(value) else float(value)
