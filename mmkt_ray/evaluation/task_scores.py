"""What is said of a model on one task: metrics with intervals, also by modality subset, by presence pattern,
on held-out rows.

Called by evaluate.py, and by whatever scores predictions.

Axes: N rows that the model can read, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmkt_ray.config import EvaluationConfig
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.rows import Rows, chosen, has_prediction, presence_patterns, unseen_classes
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.probabilities import probability_scores
from mmkt_ray.scoring.intervals import Interval, bootstrap_intervals
from mmkt_ray.scoring.metrics import HeldOutScores, Metrics, PointScores, Probabilities, SubsetScores, TaskScores


@dataclass(frozen=True)
class ScoreSettings:
    """How intervals are drawn."""

    evaluation: EvaluationConfig
    seed: int

    def intervals(self, labels: Labels, pred: np.ndarray, width: int) -> dict[str, Interval | None]:
        """Of what the kind reports; empty without labelled rows."""
        num, confidence = self.evaluation.bootstrap_samples, self.evaluation.confidence
        return bootstrap_intervals(labels, pred, width, num_resamples=num, confidence=confidence, seed=self.seed)


def scores_of_task(part: Rows, task: str, proba: np.ndarray, settings: ScoreSettings) -> TaskScores:
    """Metrics and intervals of one task over the rows that are labelled and have a prediction."""
    table, rows = part.table, has_prediction(proba)
    labels, proba, names = table.labels[task][rows], chosen(proba, rows), table.class_names[task]
    kind = labels.kind
    return TaskScores(
        **{
            **kind.scores(labels, proba, names),
            "num_unseen": int(part.unseen[task][rows].sum()),
            "unseen": unseen_classes(part, task, rows),
            "class_names": names,
            "intervals": settings.intervals(labels, kind.predict(proba), table.width(task)),
        }
    )


def subset_scores(
    table: FeatureTable,
    task: str,
    subset: Sequence[str],
    proba: np.ndarray,
    proba_all: np.ndarray,
    settings: ScoreSettings,
) -> SubsetScores:
    """What the model knows from a subset of its modalities, and from all of them on the same rows."""
    rows = has_prediction(proba) & table.labels[task].labelled
    labels, proba, names = table.labels[task][rows], chosen(proba, rows), table.class_names[task]
    kind = labels.kind
    return SubsetScores(
        modalities=list(subset),
        num_modalities=len(subset),
        num_rows=len(labels),
        intervals=settings.intervals(labels, kind.predict(proba), table.width(task)),
        metrics=Metrics(**kind.scores(labels, proba, names)),
        all=point_scores(table, task, rows, proba_all),
    )


def point_scores(table: FeatureTable, task: str, rows: np.ndarray, proba: np.ndarray) -> PointScores:
    """Number of rows and what the kind reports, of some rows (N,) bool."""
    labels = table.labels[task][rows]
    metrics = labels.kind.scores(labels, chosen(proba, rows), table.class_names[task])
    return PointScores(num_rows=metrics["num_rows"], values={name: metrics.get(name) for name in labels.kind.reported})


def pattern_scores(table: FeatureTable, task: str, proba: np.ndarray) -> dict[str, PointScores]:
    """Labelled and readable rows by the modalities they have, with the main metric on each kind."""
    labels = table.labels[task]
    rows = labels.labelled & has_prediction(proba)
    main, found = labels.kind.main, dict[str, PointScores]()
    for name, here in presence_patterns(table).items():
        scored = rows & here
        if scored.any():
            scores = point_scores(table, task, scored, proba)
            found[name] = PointScores(num_rows=scores.num_rows, values={main: scores[main]})
    return found


def heldout_record(table: FeatureTable, task: str, proba: np.ndarray, on: str) -> HeldOutScores | None:
    """Accuracy and macro-F1 on held-out rows, how they were held out (`on`), and of rows held out by cross-validation
    the same of those in the val split (`split_val`, None if there are none): models without cross-validation know
    only these. None without a labelled row."""
    rows = has_prediction(proba)
    scores = point_scores(table, task, rows, proba)
    record = HeldOutScores(num_rows=scores.num_rows, on=on, values=scores.values)
    if on == "cv":
        inside = point_scores(table, task, rows & (table.split == "val"), proba)
        record.split_val = inside if inside.num_rows else None
    return record if record.num_rows else None


def calibration_scores(table: FeatureTable, task: str, proba: np.ndarray) -> Probabilities:
    """How well probabilities fit the labels of the rows that have a prediction."""
    known = has_prediction(proba)
    return Probabilities(**probability_scores(table.labels[task][known], proba[known]))
