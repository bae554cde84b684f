"""The report: one self-contained HTML page of a run, its plots as SVG files beside it.

Called by steps.py as the last step, with the results of evaluation/compare.py.

    <run>/report/index.html      everything embedded: no outside resource
    <run>/report/results.json    the numbers (evaluation/compare.py)
    <run>/report/<task>-<plot>.svg

Whatever a run folder lacks (history, gallery, baselines, manifest) is left out, and the page says so. Sections of what a run
need not have (findings.py, about_models.py, searched.py) are there where their file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from mmkt_ray import storage
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.features.manifest import MANIFEST, Manifest
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.training_record import Epoch
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import about_models, findings, plots, searched, words
from mmkt_ray.report.colors import css, model_colors
from mmkt_ray.report.figures import Figures
from mmkt_ray.report.html import render
from mmkt_ray.scoring.metrics import BaselinesFile, ModelMetrics, TaskScores
from mmkt_ray.scoring.provenance import Current
from mmkt_ray.scoring.results import Described, ModelScores, Recommended, ResultsFile, TaskResults
from mmkt_ray.scoring.run_file import RunFile
from mmkt_ray.scoring.tables import kind_text, path_of, predict_command, same_samples
from mmkt_ray.studies.gallery_results import Gallery

SCORE_NAMES = (
    *("accuracy", "balanced_accuracy", "hamming_loss", "precision", "recall", "f1"),
    *(
        f"{average}_{name}"
        for average in ("macro", "micro", "weighted", "samples")
        for name in ("precision", "recall", "f1")
    ),
    *("average_precision", "macro_average_precision", "micro_average_precision", "auroc", "calibration_error"),
    *("quadratic_kappa", "r2", "spearman", "rmse", "mae", "median_absolute_error", "mean_error"),
)
NUMBER_GROUP_TITLES = {"right": "Closest", "wrong": "Furthest off"}
GROUP_TITLES = {"right": "Most confident and right", "wrong": "Most confident and wrong", "tie": "Near ties"}


def build_report(run_uri: str) -> str:
    """Compare the run's models afresh, draw, write the page; returns the path of the HTML file.

    Raises: DataError if nothing was evaluated in the folder.
    """
    results = compare(run_uri)
    run = RunFile.of(run_uri)
    models = {name: _read_model(run_uri, m) for name, m in results.models.items()}
    reads = {name: m.modalities for name, m in results.models.items()}
    colors = model_colors(reads)
    figures = Figures(storage.join(run_uri, "report"), css(reads))
    stores = _stores(run, results)
    current = Current.of(run_uri, run, results)
    gallery_of = next((n for n in (results.main, *models) if n and models[n].gallery), None)
    context = {
        "results": results,
        "recommended": _recommended(results, run_uri),
        "headlines": [found.headline for found in results.tasks.values() if found.headline],
        "tasks": [_task_section(t, results, models, colors, figures) for t in results.tasks],
        "gallery": models[gallery_of].gallery if gallery_of else None,
        "gallery_of": gallery_of,
        "knowledge": findings.knowledge(current, results, colors, figures),
        "search": searched.search_section(current, figures, results),
        "seeds": searched.seeds_section(current, results),
        "missing": findings.missing(current, results, colors, figures),
        "calibration": about_models.calibration(models, results, colors, figures),
        "transfer": findings.transfer(current, figures),
        "representation": findings.representation(current),
        "settings": about_models.settings(run_uri, results),
        "parameters": about_models.parameters(run_uri, results),
        "audits": findings.audits(current, stores),
        "left_out": current.left_out,
        "data": [_data_card(store, names, run_uri) for store, names in stores.items()],
        "run": run,
        "config_yaml": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else None,
        "colors": colors,
        "group_titles": GROUP_TITLES,
        "number_group_titles": NUMBER_GROUP_TITLES,
        "score_names": SCORE_NAMES,
        "max_confusion_classes": plots.MAX_CONFUSION_CLASSES,
    }
    uri = storage.join(run_uri, "report", "index.html")
    storage.write_bytes(uri, render("template.html.j2", context, reads).encode())
    return uri


@dataclass(frozen=True)
class Recommendation:
    """The model to ship."""

    chosen: Recommended
    path: str  # its folder
    command: str  # that uses it


def _recommended(results: ResultsFile, run_uri: str) -> Recommendation | None:
    """None if there is no such model."""
    chosen = results.recommended
    if chosen is None:
        return None
    path = path_of(chosen, run_uri)
    return Recommendation(chosen, path, predict_command(path))


@dataclass(frozen=True)
class ShownModel:
    """A model's files; empty where there are none."""

    tasks: Mapping[str, TaskScores]
    history: list[Epoch]
    gallery: Gallery | None


def _read_model(run_uri: str, described: Described) -> ShownModel:
    uri = storage.join(run_uri, described.folder)
    metrics = storage.join(uri, "metrics.json")
    if described.kind == "baseline":
        return ShownModel(BaselinesFile.read(metrics).models[described.name].tasks, [], None)
    record, card = ModelMetrics.read_or_none(metrics), read_card(uri)
    history = card.fit.history if card and card.fit else []
    gallery = Gallery.read_or_none(storage.join(uri, "gallery.json"))
    return ShownModel(record.tasks if record else {}, history, gallery)


# --- one task ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskSection:
    """Table, figures and details of one task."""

    name: str
    found: TaskResults
    about: str  # its labels, in words
    classes: bool  # its labels are classes
    metrics: list[dict[str, str]]
    groups: list[list[ModelScores]]  # models that were scored on the same samples
    figures: list[dict[str, str]]
    shown: str  # the model whose mistakes are shown
    record: TaskScores  # of that model
    subsets: list[tuple[str, TaskScores]]  # of models that were scored with some of their modalities, the best fused one first


def _task_section(
    task: str, results: ResultsFile, models: dict[str, ShownModel], colors: dict[str, str], figures: Figures
) -> TaskSection:
    found = results.tasks[task]
    shown = found.best_trained or found.best or ""
    kind = task_kind(found.kind)
    subsets = [(n, m.tasks[task]) for n, m in models.items() if task in m.tasks and len(m.tasks[task].subsets) > 1]
    return TaskSection(
        name=task,
        found=found,
        about=kind_text(found).capitalize(),
        classes=kind.classes,
        metrics=words.metrics_of(kind),
        groups=same_samples(found.rows, kind.main),
        figures=_task_figures(task, found, models, colors, figures, task == next(iter(results.tasks))),
        shown=shown,
        record=models[shown].tasks[task],
        subsets=sorted(subsets, key=lambda named: named[0] != found.best_fused),
    )


def _task_figures(
    task: str,
    found: TaskResults,
    models: dict[str, ShownModel],
    colors: dict[str, str],
    figures: Figures,
    with_loss: bool,
) -> list[dict[str, str]]:
    """The figures of a task, in the page's order; those without data are left out. with_loss: also the loss of all tasks."""
    shown, single = found.best_trained or found.best or "", found.best_single
    kind = task_kind(found.kind)
    main, second = words.metrics_of(kind)[:2]
    groups = same_samples(found.rows, kind.main)
    rows = groups[0]  # those scored on the most samples; others have no place in their order
    best = rows[0]
    drawn = [
        figures.add(
            f"{task}-{main['name']}",
            f"{main['title']} of every model"
            if len(groups) == 1
            else f"{main['title']} of the models scored on {words.count(best.num_rows)} samples",
            f"Bars of {main['title']} on task {task}; best: {best.model}, {words.percent(best.interval(kind.main)['value'])}",
            lambda: plots.draw_score_bars(rows, (main, second), colors),
        )
    ]
    compared = [r for r in rows if r.versus and r.reads]  # what reads nothing is far behind, and would set the scale
    if compared:
        alt = f"Differences of {main['title']} to the best single modality on task {task}, with intervals; also in the table"
        drawn.append(
            figures.add(
                f"{task}-differences",
                "Against the best single modality",
                alt,
                lambda: plots.draw_differences(compared, main, colors),
            )
        )
    histories = {name: m.history for name, m in models.items() if m.history and task in m.tasks}
    if histories and (with_loss or plots.has_val(histories, task, main["name"])):
        what = f"{'Loss and validation' if with_loss else 'Validation'} {main['title']}"
        alt = f"{what} over epochs on task {task} for {', '.join(histories)}"
        paint = partial(plots.draw_learning_curves, histories, task, main, colors, with_loss)
        drawn.append(figures.add(f"{task}-learning", "Learning curves", alt, paint))
    record = models[shown].tasks[task]
    if not kind.classes:
        return drawn + _number_figures(task, shown, record, colors, figures)
    if record.confusion and len(record.class_names) <= plots.MAX_CONFUSION_CLASSES:
        alt = f"Confusion matrix of {shown} on task {task}, share of each label's samples by prediction"
        drawn.append(
            figures.add(
                f"{task}-confusion",
                f"What {shown} takes for what, %",
                alt,
                lambda: plots.draw_confusion(record.confusion or [], record.class_names),
            )
        )
    other = single if single != shown else found.best_fused
    per_class = {name: models[name].tasks[task].per_class for name in (shown, other) if name}
    alt = f"F1 of each class of task {task} for {' and '.join(per_class)}; the table of classes has the numbers"
    worst, num = plots.worst_classes(per_class[shown])
    title = "F1 of each class" if len(worst) == num else f"F1 of each class: the {len(worst)} worst of the {num} that were tested"
    drawn.append(figures.add(f"{task}-classes", title, alt, lambda: plots.draw_class_f1(per_class, colors)))
    return drawn


def _number_figures(
    task: str, shown: str, record: TaskScores, colors: dict[str, str], figures: Figures
) -> list[dict[str, str]]:
    """Predictions against labels, and what is left, of one model."""
    points, log_scale = record.points, isinstance(record.kind, dict) and record.kind["transform"] == "log"
    if not points:
        return []
    return [
        figures.add(
            f"{task}-predicted",
            f"What {shown} says, and the label",
            f"Predictions of {shown} against labels of task {task}; R2 {words.percent(record['r2'])}",
            lambda: plots.draw_predicted(points, colors[shown], log_scale),
        ),
        figures.add(
            f"{task}-residuals",
            f"What {shown} leaves unexplained",
            f"Label minus prediction against the prediction of {shown} on task {task}",
            lambda: plots.draw_residuals(points, colors[shown], log_scale),
        ),
    ]


# --- data ----------------------------------------------------------------------------------------------------------


def _stores(run: RunFile, results: ResultsFile) -> dict[str, list[str]]:
    """Store folder -> the variants that use it."""
    stores: dict[str, list[str]] = {}
    for name, place in run.variants.items():
        if name in results.models and place.store:
            stores.setdefault(place.store, []).append(name)
    return stores


def _data_card(store: str, variants: list[str], run_uri: str) -> dict[str, Any]:
    """What the page tells about a feature store; `manifest` is None if it is not there."""
    manifest = Manifest.read_or_none(storage.join(run_uri, store, MANIFEST))
    shown: dict[str, Any] = {"store": store, "variants": variants, "manifest": manifest}
    if manifest is None:
        return shown
    counts = manifest.counts
    found = {s for by in [counts.by_split, *counts.missing.values()] for s in by}
    found |= {s for by_split in counts.by_task.values() for s in by_split}
    splits = [s for s in ("train", "val", "test") if s in found] + sorted(found - {"train", "val", "test"})
    with_classes = [t for t, about in manifest.tasks.items() if task_kind(about.kind).classes]
    return {**shown, "counts": counts, "splits": splits, "with_classes": with_classes}
