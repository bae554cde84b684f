"""One temperature per task, so that probabilities mean what they say (see kinds/probabilities.py).

A temperature T > 0 divides a task's logits: above 1 it makes the model less sure, below 1 surer; predictions stay as
they are.

Source: Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599
Axes: N samples, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize_scalar

from mmkt_ray.kinds.labels import Labels
from mmkt_ray.scoring.metrics import Calibration

log = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are looked at
PRIOR_ROWS = 20  # how many rows the belief is worth that the probabilities are right as they are


def fit_temperature(logits: np.ndarray, labels: Labels) -> float:
    """The temperature with the smallest log loss on these rows;
    1 where none of their labels is known, or they are numbers.

    logits: (N, C). Beside the N rows stand PRIOR_ROWS more whose labels are spread
    as the model itself foretells: few rows move the temperature little away from 1, and rows that are all right do
    not ask for 0. The loss is convex in 1 / T, so there is one minimum.
    """
    kind, rows = labels.kind, labels.known
    if not rows.any() or not kind.classes:
        return 1.0
    logits, labels = logits[rows].astype(np.float64), labels[rows]
    weight = PRIOR_ROWS / len(labels)
    target = (kind.indicators(labels, logits.shape[1]) + weight * kind.probabilities(logits)) / (1 + weight)

    def loss(log_temperature: float) -> float:
        return kind.cross_entropy(logits / np.exp(log_temperature), target)

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def fit_temperatures(logits: Mapping[str, np.ndarray], labels: Mapping[str, Labels]) -> dict[str, Calibration]:
    """For each task of classes its temperature, without what it changes."""
    found = {}
    for task, values in sorted(logits.items()):
        if not labels[task].kind.classes:
            continue
        num_rows, note = int(labels[task].known.sum()), None
        if num_rows == 0:
            note = f"task '{task}' has no labelled val rows to calibrate on: its temperature stays 1"
            log.warning(note)
        elif num_rows < PRIOR_ROWS:
            rows = "1 labelled val row" if num_rows == 1 else f"{num_rows} labelled val rows"
            note = f"task '{task}' has only {rows} to calibrate on: its temperature stays near 1"
        temperature = fit_temperature(values, labels[task])
        found[task] = Calibration(temperature=temperature, num_val_rows=num_rows, note=note)
    return found
