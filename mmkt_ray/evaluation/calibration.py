"""Do probabilities mean what they say? Reliability tables, calibration error, and one temperature per task to mend them.

A temperature T > 0 divides a task's logits: above 1 it makes the model less sure, below 1 surer; predictions stay as they
are. Confidence is the probability of the predicted class; for a multilabel task every class of every row is a forecast of
its own, and its probability is held against the share of such forecasts that came true.

Source: Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
Axes: N samples, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

log = logging.getLogger(__name__)

NUM_BINS = 15
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are looked at
PRIOR_ROWS = 20  # how many rows the belief is worth that the probabilities are right as they are
_SMALLEST = 1e-7  # probabilities are float32: smaller ones are noise to the logarithm


def usable(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: rows with a label among the known classes. labels: (N,) codes, or (N, C) of a multilabel task."""
    return (labels if labels.ndim == 1 else labels.min(axis=1, initial=0)) >= 0


def chosen(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows (N,) bool of values (N, ..): the values themselves where that is all of them."""
    return values if rows.all() else values[rows]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the smallest log loss on these rows; 1 where none of them is usable.

    logits: (N, C); labels: (N,) codes, or (N, C) of 0 and 1. Beside the N rows stand PRIOR_ROWS more whose labels are spread
    as the model itself foretells: few rows move the temperature little away from 1, and rows that are all right do not ask
    for 0. The loss is convex in 1 / T, so there is one minimum.
    """
    rows = usable(labels)
    if not rows.any():
        return 1.0
    logits, labels = logits[rows].astype(np.float64), labels[rows]
    weight = PRIOR_ROWS / len(labels)
    target = (_as_shares(labels, logits.shape[1]) + weight * _forecast(logits, labels.ndim)) / (1 + weight)

    def loss(log_temperature: float) -> float:
        return _log_loss(logits / np.exp(log_temperature), target, labels.ndim)

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def _as_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(N, C): 1 for each class that a row has."""
    return np.eye(num_classes)[labels] if labels.ndim == 1 else labels.astype(np.float64)


def _forecast(logits: np.ndarray, label_ndim: int) -> np.ndarray:
    """(N, C) probabilities."""
    return expit(logits) if label_ndim == 2 else softmax(logits, axis=1)


def _log_loss(logits: np.ndarray, target: np.ndarray, label_ndim: int) -> float:
    """Of targets (N, C), the share of each class in a row; of a multilabel task each class by itself."""
    if label_ndim == 2:
        return float(-(target * log_expit(logits) + (1 - target) * log_expit(-logits)).mean())
    return float(-(target * log_softmax(logits, axis=1)).sum(axis=1).mean())


def log_loss(labels: np.ndarray, proba: np.ndarray) -> float:
    """Mean negative log-likelihood in nats of usable rows (at least one); of every class's own forecast for (N, C) labels."""
    if labels.ndim == 1:
        of_label = proba[np.arange(len(labels)), labels].astype(np.float64)
    else:
        proba = proba.astype(np.float64)
        of_label = np.where(labels == 1, proba, 1 - proba)
    return float(-np.log(of_label.clip(_SMALLEST, 1)).mean())


def reliability(labels: np.ndarray, proba: np.ndarray) -> list[dict[str, float]]:
    """Forecasts of usable rows by confidence: the bins of equal width over 0..1 that hold any.

    Returns [{low, high, num, confidence, accuracy}]: the bin's ends, its forecasts, their mean confidence, and the share
    that came true.
    """
    if labels.ndim == 2:
        confidence, right = proba.ravel().astype(np.float64), labels.ravel() == 1
    else:
        confidence, right = proba.max(axis=1).astype(np.float64), proba.argmax(axis=1) == labels
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
    """Expected calibration error, 0..1: mean gap between confidence and accuracy of the bins, weighted by forecasts."""
    num = sum(b["num"] for b in bins)
    return sum(b["num"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / num


def probability_scores(labels: np.ndarray, proba: np.ndarray) -> dict[str, Any]:
    """`log_loss`, `calibration_error` and `reliability` over the usable rows; None (and no bins) where there is none."""
    rows = usable(labels)
    if not rows.any():
        return {"log_loss": None, "calibration_error": None, "reliability": []}
    labels, proba = chosen(labels, rows), chosen(proba, rows)
    bins = reliability(labels, proba)
    return {
        "log_loss": log_loss(labels, proba),
        "calibration_error": calibration_error(bins),
        "reliability": bins,
    }


def fit_temperatures(logits: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """For each task {temperature, num_val_rows, note}; `note` tells why nothing, or little, was fitted, else None."""
    found = {}
    for task, values in sorted(logits.items()):
        num_rows, note = int(usable(labels[task]).sum()), None
        if num_rows == 0:
            note = f"task '{task}' has no labelled val rows to calibrate on: its temperature stays 1"
            log.warning(note)
        elif num_rows < PRIOR_ROWS:
            rows = "1 labelled val row" if num_rows == 1 else f"{num_rows} labelled val rows"
            note = f"task '{task}' has only {rows} to calibrate on: its temperature stays near 1"
        temperature = fit_temperature(values, labels[task])
        found[task] = {"temperature": temperature, "num_val_rows": num_rows, "note": note}
    return found
