"""Do probabilities mean what they say? Log loss, and a table of confidence against the share of forecasts that came
true.

Axes: N samples, C classes. All labels are known, but where it says otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmkt_ray.kinds.labels import Labels

NUM_BINS = 15
SMALLEST = 1e-7  # probabilities are float32: smaller ones are noise to the logarithm


def log_loss(labels: Labels, proba: np.ndarray) -> float:
    """Mean negative log-likelihood in nats of at least one row;
    where a row has several forecasts, of each of them."""
    return float(-np.log(labels.kind.label_probability(labels, proba).clip(SMALLEST, 1)).mean())


def reliability(labels: Labels, proba: np.ndarray) -> list[dict[str, float]]:
    """Forecasts by confidence: the bins of equal width over 0..1 that hold any.

    Returns [{low, high, num, confidence, accuracy}]: the bin's ends, its forecasts, their mean confidence, and the
    share that came true.
    """
    confidence, right = labels.kind.forecasts(labels, proba)
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    num, sure, true = (np.bincount(bins, weights=w, minlength=NUM_BINS) for w in (None, confidence, right))
    return [
        {
            "low": b / NUM_BINS,
            "high": (b + 1) / NUM_BINS,
            "num": int(num[b]),
            "confidence": float(sure[b] / num[b]),
            "accuracy": float(true[b] / num[b]),
        }
        for b in np.flatnonzero(num)
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected calibration error, 0..1: mean gap between confidence and accuracy of the bins,
    weighted by forecasts."""
    num = sum(b["num"] for b in bins)
    return sum(b["num"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / num


def probability_scores(labels: Labels, proba: np.ndarray) -> dict[str, Any]:
    """`log_loss`, `calibration_error` and `reliability` over the known labels;
    None (and no bins) where there is none."""
    if not labels.known.any():
        return {"log_loss": None, "calibration_error": None, "reliability": []}
    if not labels.known.all():
        labels, proba = labels[labels.known], proba[labels.known]
    bins = reliability(labels, proba)
    return {
        "log_loss": log_loss(labels, proba),
        "calibration_error": calibration_error(bins),
        "reliability": bins,
    }
