"""What the page says of models beyond scores: calibration, settings chosen by data, numbers of parameters.

Read from the metrics and the cards of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mmkt_ray import storage
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.training_record import ChosenSettings, Training
from mmkt_ray.report import curves, words
from mmkt_ray.report.figures import Figures
from mmkt_ray.scoring.metrics import Probabilities
from mmkt_ray.scoring.results import Described, ResultsFile

if TYPE_CHECKING:
    from mmkt_ray.report.task_section import ShownModel


@dataclass(frozen=True)
class CalibrationRow:
    """Whether one model's probabilities mean what they say."""

    model: str
    temperature: float | None
    note: str | None
    before: Probabilities | None
    after: Probabilities


@dataclass(frozen=True)
class CalibrationSection:
    """All models of one task, the best calibrated one first."""

    task: str
    figure: dict[str, str]
    rows: list[CalibrationRow]

    @property
    def fitted(self) -> bool:
        """A temperature was fitted for one of them."""
        return any(row.before for row in self.rows)


def calibration(
    models: Mapping[str, ShownModel], results: ResultsFile, colors: Mapping[str, str], figures: Figures
) -> list[CalibrationSection]:
    """Reliability of each task's shown model, and every trained model's calibration error and log loss."""
    sections = []
    for task, found in results.tasks.items():
        rows: list[CalibrationRow] = []
        for row in found.rows:
            record = models[row.model].tasks[task]
            fitted = record.calibration
            after = fitted.after if fitted and fitted.after else record.probabilities()
            if after.reliability:
                temperature, note, before = (
                    (fitted.temperature, fitted.note, fitted.before) if fitted else (None, None, None)
                )
                rows.append(CalibrationRow(row.model, temperature, note, before, after))
        shown = next((r for r in rows if r.model == (found.best_trained or found.best)), None)
        if shown is None:
            continue
        lines = {shown.model: shown.after.reliability}
        if shown.before:
            lines = {"before": shown.before.reliability, "after": shown.after.reliability}
        figure = figures.add(
            f"{task}-reliability",
            f"{task}: does {shown.model} know how sure it may be?",
            f"Reliability of {shown.model} on task {task}: share that came true by confidence; "
            f"calibration error {words.percent(shown.after.calibration_error)}",
            partial(curves.draw_reliability, lines, colors[shown.model]),
        )
        rows.sort(key=lambda r: r.after.calibration_error or 0.0)
        sections.append(CalibrationSection(task, figure, rows))
    return sections


@dataclass(frozen=True)
class ModelParameters:
    """Trained parameters of a model."""

    model: str
    about: Described
    parts: dict[str, int]  # part -> how many

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Parameters:
    """Trained parameters of all models, the smallest one first."""

    rows: list[ModelParameters]
    columns: list[str]  # parts


def parameters(run_uri: str, results: ResultsFile) -> Parameters | None:
    """Numbers of trained parameters by part of each trained model."""
    rows = []
    for name, about in results.models.items():
        fit = training_of(run_uri, about.folder) if about.kind == "trained" else None
        if fit and fit.num_params_by_part:
            rows.append(ModelParameters(name, about, fit.num_params_by_part))
    columns = list(dict.fromkeys(part for row in rows for part in row.parts))
    order = ["input", *sorted(c for c in columns if c.startswith("level_")), "fusion", "heads", "wide"]
    columns = sorted(columns, key=lambda c: order.index(c) if c in order else len(order))
    return Parameters(sorted(rows, key=lambda r: r.total), columns) if rows else None


@dataclass(frozen=True)
class SettingsRow:
    """What `training.auto` chose for one model."""

    model: str
    found: ChosenSettings
    wide: dict[str, float]  # task -> share of the network beside a linear model


@dataclass(frozen=True)
class SettingsSection:
    """What `training.auto` chose for each trained model, and the losses by which."""

    rows: list[SettingsRow]
    keys: list[str]  # dotted
    wide: list[str]  # tasks for which a linear model stands beside some network


def settings(run_uri: str, results: ResultsFile) -> SettingsSection | None:
    """What `training.auto` chose for the run's trained models; None where nothing was chosen."""
    rows = []
    for name, about in results.models.items():
        fit = training_of(run_uri, about.folder) if about.kind == "trained" else None
        if fit and fit.auto:
            rows.append(SettingsRow(name, fit.auto, fit.wide or {}))
    keys = list(dict.fromkeys(key for row in rows for key in row.found.settings))
    return SettingsSection(rows, keys, sorted({t for row in rows for t in row.wide})) if rows else None


def training_of(run_uri: str, folder: str) -> Training | None:
    """How a model of the run was trained; None where that is not known."""
    card = read_card(storage.join(run_uri, folder))
    return card.fit if card else None
