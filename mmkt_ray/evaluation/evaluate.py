"""Score a trained model on a split of a feature store, and leave the result files in its folder.

Called by steps.py for each model folder of training/trainer.py; evaluation/compare.py reads what it leaves.

Which rows count for a task: all labelled rows of the split that have at least one modality that the model reads for
it. When only a subset of its modalities is given, the rows that have at least one of the subset.

Axes: N rows of the split that the model can read, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config, EvaluationConfig, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.task_scores import (
    ScoreSettings,
    calibration_scores,
    heldout_record,
    pattern_scores,
    scores_of_task,
    subset_scores,
)
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.conformal import coverage, fit_margins, margins_of
from mmkt_ray.inference.model_card import Card
from mmkt_ray.inference.model_folder import load_model, save_calibration
from mmkt_ray.inference.outputs import Proba, predict_logits, predict_table, probabilities
from mmkt_ray.inference.rows import Rows, load_rows, prediction_parts, subsets, without_unreadable, write_parts
from mmkt_ray.inference.training_record import Training
from mmkt_ray.models import Predictor
from mmkt_ray.scoring.calibration import fit_temperatures
from mmkt_ray.scoring.heldout import load_heldout, pattern_name
from mmkt_ray.scoring.metrics import Calibration, ModelMetrics, TaskScores

MAX_MODALITIES_FOR_ALL_SUBSETS = 4


def evaluate_model(
    model_uri: str,
    store: Store,
    split: str = "test",
    evaluation: EvaluationConfig | None = None,
    name: str | None = None,
) -> ModelMetrics:
    """Score a model folder on a split; also on held-out rows, by which models are chosen.

    Held-out rows are those of `heldout.safetensors` where the model has that file, else the val split.
    evaluation: settings; None: those that the model was trained with. name: of the model in results; None: as its
    folder. With `calibrate`, one temperature per task is fitted on held-out rows and kept in the model's card, so
    that prediction uses it too; without, the card's temperatures are taken back.

    Writes `metrics.json` (`metrics-<split>.json` for other splits), `predictions-<split>.parquet`, and
    `predictions-heldout.parquet` into the folder. Returns what metrics.json holds.

    Raises: DataError if there is no such model, the store lacks what it reads, or the split has no rows for it.
    """
    started = time.perf_counter()
    model, card = load_model(model_uri)
    config = parse_config(card.config)
    settings = ScoreSettings(evaluation or config.evaluation, config.seed)
    data = load_rows(store, config.model_modalities, config.model_tasks, card.class_names, model.spec.kinds)
    held = _held_out(model_uri, model, card, store, data) if split != "val" else None
    calibration = _calibrate(held) if settings.evaluation.calibrate and held else {}
    model.temperatures = {t: fitted.temperature for t, fitted in calibration.items()}
    held_proba = (
        without_unreadable(probabilities(model, held.logits), held.rows.table, model.spec.inputs) if held else {}
    )
    model.margins = fit_margins(held.rows.table, held_proba, settings.evaluation.confidence) if held else {}
    save_calibration(model_uri, model)

    part, subject = part_of(data, store, split), _Subject(model_uri, model, config)
    proba = subject.predict(part.table)
    tasks = {t: scores_of_task(part, t, proba[t], settings) for t in config.model_tasks}
    _score_subsets(tasks, subject, part.table, proba, settings)
    for t, raw in subject.uncalibrated(part.table).items() if calibration else ():
        if (fitted := calibration.get(t)) is not None:
            fitted.before, fitted.after = (calibration_scores(part.table, t, p) for p in (raw, proba[t]))
            tasks[t].calibration = fitted
    val = {t: heldout_record(held.rows.table, t, found, held.on) for t, found in held_proba.items()} if held else {}
    margins = {t: margins_of(part.table, config.model_modalities, found) for t, found in model.margins.items()}
    for t, scores in tasks.items():
        scores.patterns, scores.val = pattern_scores(part.table, t, proba[t]), val.get(t)
        if t in margins:
            scores.coverage = coverage(part.table, t, proba[t], margins[t], settings.evaluation.confidence)
    record = ModelMetrics(
        split=split,
        store=store.manifest.fingerprint,
        num_rows=len(part.table.sample_id),
        confidence=settings.evaluation.confidence,
        bootstrap_samples=settings.evaluation.bootstrap_samples,
        name=name or model_uri.rstrip("/").rpartition("/")[2],
        fingerprint=card.fingerprint,
        modalities=list(config.model_modalities),
        num_params=sum(p.numel() for p in model.parameters()),
        training_s=card.training.seconds if isinstance(card.training, Training) else None,
        tasks=tasks,
        seconds=time.perf_counter() - started,
    )
    if held:
        parts = prediction_parts(held.rows, config.model_modalities, held_proba)
        write_parts(storage.join(model_uri, "predictions-heldout.parquet"), parts)
    parts = prediction_parts(part, config.model_modalities, proba, margins=margins)
    made_by = {"store": record.store or "", "fingerprint": record.fingerprint or ""}
    write_parts(storage.join(model_uri, f"predictions-{split}.parquet"), parts, made_by)
    record.write(storage.join(model_uri, "metrics.json" if split == "test" else f"metrics-{split}.json"))
    return record


@dataclass(frozen=True)
class _Subject:
    """The model that is scored."""

    uri: str
    model: Predictor
    config: Config

    def predict(self, table: FeatureTable, subset: Sequence[str] | None = None) -> Proba:
        """From a subset of its modalities, None: from all. NaN where a row has none of those that the task reads.

        Raises: DataError if the model predicts NaN elsewhere.
        """
        given = self.config.model_modalities if subset is None else subset
        proba = predict_table(self.model, table, drop=[m for m in self.config.model_modalities if m not in given])
        for task, values in proba.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"'{self.uri}' predicts NaN for task '{task}': its training diverged; lower training.lr"
                )
        return without_unreadable(
            proba, table, {t: [m for m in self.config.task_inputs(t) if m in given] for t in proba}
        )

    def uncalibrated(self, table: FeatureTable) -> Proba:
        """The same by temperatures of 1."""
        raw = probabilities(self.model, predict_logits(self.model, table), temperatures={})
        return without_unreadable(raw, table, {t: self.config.task_inputs(t) for t in raw})


def _score_subsets(
    tasks: Mapping[str, TaskScores], subject: _Subject, table: FeatureTable, proba: Proba, settings: ScoreSettings
) -> None:
    """Add to each task's scores those from subsets of the modalities that it reads. proba: from all modalities."""
    for scores in tasks.values():
        scores.subsets = {}
    for subset in modality_subsets(subject.config.model_modalities):
        found = subject.predict(table, subset)
        for t, scores in tasks.items():
            if set(subset) & set(subject.config.task_inputs(t)):
                scores.subsets["+".join(subset)] = subset_scores(table, t, subset, found[t], proba[t], settings)


@dataclass(frozen=True)
class _Held:
    """Held-out rows and the logits of models that did not learn from them, task -> (N, C)."""

    on: str  # cv | val
    rows: Rows
    logits: Mapping[str, np.ndarray]


def _held_out(model_uri: str, model: Predictor, card: Card, store: Store, data: Rows) -> _Held | None:
    """The rows that a model is chosen and calibrated by; None if there are none."""
    found = load_heldout(model_uri) if card.store == store.manifest.fingerprint else None
    if found is not None:
        return _Held(found.on, data.take(found.rows), found.logits[pattern_name(list(model.spec.modalities))])
    rows = data.readable("val")
    if not len(rows):
        return None
    val = data.take(rows)
    return _Held("val", val, predict_logits(model, val.table))


def _calibrate(held: _Held) -> dict[str, Calibration]:
    """A temperature for each task from held-out rows; see `fit_temperatures`."""
    labels = held.rows.table.labels
    return fit_temperatures(dict(held.logits), {t: labels[t] for t in held.logits})


def modality_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The subsets that are scored, largest first. Of more than four modalities: all, all but one, each alone."""
    num = len(modalities)
    sizes = range(1, num + 1) if num <= MAX_MODALITIES_FOR_ALL_SUBSETS else (1, num - 1, num)
    return sorted(subsets(sorted(modalities), sizes), key=len, reverse=True)


def part_of(data: Rows, store: Store, split: str) -> Rows:
    """The readable rows of a split. Raises: DataError if there are none."""
    rows = data.readable(split)
    if len(rows) == 0:
        known = sorted(set(data.table.split))
        raise DataError(
            f"'{store.uri}' has no '{split}' rows with any of {sorted(data.table.present)}; its splits: {known}"
        )
    return data.take(rows)
