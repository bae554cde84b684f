"""The number by which epochs, candidates and finalists are compared:
a metric of one task or of several, higher is better.

Axes: N rows, K outputs of a task. NaN stands for what is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmkt_ray.config import ObjectiveConfig
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.task_kind import TaskKind

USUAL = "macro_f1"  # the metric of tasks that have no other default
COUNTED = ("accuracy", "macro_f1")  # what validation always counts; all else takes the probabilities of every row


@dataclass(frozen=True)
class Score:
    """One number from validation scores (see training.validation): higher is better, NaN where it is undefined.

    Over several tasks it is their mean, or the worst of them. A task of `floors` that a model does not have counts as
    what the constant prediction gets there: so no candidate gains by leaving out a hard task.
    """

    metric: str | None = None  # None: `defaults`
    task: str | None = None  # None: all tasks
    over: str = "mean"  # mean | worst
    floors: Mapping[str, float] = field(default_factory=dict)  # task -> score of the constant prediction
    defaults: Mapping[str, str] = field(default_factory=dict)  # task -> its metric; macro_f1 if not named

    @classmethod
    def of(
        cls, objective: ObjectiveConfig, kinds: Mapping[str, TaskKind], floors: Mapping[str, float] | None = None
    ) -> Score:
        """What a config asks for, of a model with tasks of these kinds;
        the default of one that lacks the objective's task."""
        defaults = {t: kind.val_metric for t, kind in kinds.items() if kind.val_metric != USUAL}
        if objective.task is not None and objective.task not in kinds:
            return cls(defaults=defaults)
        return cls(objective.metric, objective.task, objective.over, floors or {}, defaults)

    @property
    def name(self) -> str:
        """The metric, of several those of all tasks."""
        return self.metric or " and ".join(dict.fromkeys(self.defaults.values())) or USUAL

    @property
    def worst(self) -> float:
        """Stands for no score at all where a number is needed; as bad as scores get."""
        return -100.0 if self.metric in ("log_loss", "r2") or "r2" in self.defaults.values() else 0.0

    @property
    def extra(self) -> str | None:
        """The metric that validation has to compute beside COUNTED."""
        return None if self.metric in (None, *COUNTED) else self.metric

    def __call__(self, val: Mapping[str, Mapping[str, float]]) -> float:
        """val: metric -> task -> value."""
        names = [self.metric] if self.metric else [USUAL, *dict.fromkeys(self.defaults.values())]
        by_task = {
            t: v for m in names for t, v in val.get(m, {}).items() if self.metric or self.defaults.get(t, USUAL) == m
        }
        if self.task is not None:
            return float(by_task.get(self.task, np.nan))
        values = list({**self.floors, **by_task}.values())
        if not values and self.metric in (None, USUAL):
            values = list(val.get("accuracy", {}).values())
        if not values:
            return float("nan")
        return float(min(values) if self.over == "worst" else np.mean(values))


def constant_scores(
    metric: str | None, train: Mapping[str, Labels], val: Mapping[str, Labels], widths: Mapping[str, int]
) -> dict[str, float]:
    """Task -> what the shares of the classes among the train labels, predicted for every row, get on the val labels.

    train, val, widths: by task the labels of labelled rows, and K. Tasks for which it is undefined are left out.
    """
    found = {}
    for task, labels in train.items():
        if not labels.known.any() or not len(val[task]):
            continue
        outputs = np.broadcast_to(labels.kind.baseline(labels, widths[task]), (len(val[task]), widths[task]))
        value = metric_score(metric or labels.kind.val_metric, val[task], outputs)
        if not np.isnan(value):
            found[task] = value
    return found


def metric_score(metric: str, labels: Labels, outputs: np.ndarray) -> float:
    """A metric that the labels' kind has; all rows are labelled. outputs: (N, K)."""
    return float(labels.kind.metric_scores(metric, labels, outputs, np.ones((1, len(labels))))[0])
