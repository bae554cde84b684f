"""The number by which epochs, candidates and finalists are compared: a metric of one task or of several, higher is better.

Axes: N rows, K outputs of a task. NaN stands for what is undefined.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmkt_ray.config import ObjectiveConfig
from mmkt_ray.kinds.labels import Labels

COUNTED = ("accuracy", "macro_f1")  # what validation always counts; all else takes the probabilities of every row


@dataclass(frozen=True)
class Score:
    """One number from validation scores (see training.validation): higher is better, NaN where it is undefined.

    Over several tasks it is their mean, or the worst of them. A task of `floors` that a model does not have counts as what
    the constant prediction gets there: so no candidate gains by leaving out a hard task.
    """

    metric: str = "macro_f1"
    task: str | None = None  # None: all tasks
    over: str = "mean"  # mean | worst
    floors: Mapping[str, float] = field(default_factory=dict)  # task -> score of the constant prediction

    @classmethod
    def of(cls, objective: ObjectiveConfig, tasks: Collection[str], floors: Mapping[str, float] | None = None) -> Score:
        """What a config asks for, of a model with these tasks; the default of one that lacks the objective's task."""
        if objective.task is not None and objective.task not in tasks:
            return cls()
        return cls(objective.metric, objective.task, objective.over, floors or {})

    @property
    def worst(self) -> float:
        """Stands for no score at all where a number is needed; as bad as scores get."""
        return -100.0 if self.metric == "log_loss" else 0.0

    @property
    def extra(self) -> str | None:
        """The metric that validation has to compute beside COUNTED."""
        return None if self.metric in COUNTED else self.metric

    def __call__(self, val: Mapping[str, Any]) -> float:
        """val: metric -> task -> value."""
        by_task = val[self.metric]
        if self.task is not None:
            return float(by_task.get(self.task, np.nan))
        values = list({**self.floors, **by_task}.values())
        if not values and self.metric == "macro_f1":
            values = list(val["accuracy"].values())
        if not values:
            return float("nan")
        return float(min(values) if self.over == "worst" else np.mean(values))


def constant_scores(
    metric: str, train: Mapping[str, Labels], val: Mapping[str, Labels], widths: Mapping[str, int]
) -> dict[str, float]:
    """Task -> what the shares of the classes among the train labels, predicted for every row, get on the val labels.

    train, val, widths: by task the labels of labelled rows, and K. Tasks for which it is undefined are left out.
    """
    found = {}
    for task, labels in train.items():
        if not labels.known.any() or not len(val[task]):
            continue
        outputs = np.broadcast_to(labels.kind.baseline(labels, widths[task]), (len(val[task]), widths[task]))
        value = metric_score(metric, val[task], outputs)
        if not np.isnan(value):
            found[task] = value
    return found


def metric_score(metric: str, labels: Labels, outputs: np.ndarray) -> float:
    """A metric that the labels' kind has; all rows are labelled. outputs: (N, K)."""
    return float(labels.kind.metric_scores(metric, labels, outputs, np.ones((1, len(labels))))[0])
