"""The report: one self-contained HTML page of a run, its plots as SVG files beside it.

Called by steps.py as the last step, with the results of evaluation/compare.py.

    <run>/report/index.html      everything embedded: no outside resource
    <run>/report/results.json    the numbers (evaluation/compare.py)
    <run>/report/<task>-<plot>.svg

Whatever a run folder lacks (history, gallery, baselines, manifest) is left out, and the page says so. Sections of
what a run need not have (findings.py, about_models.py, searched.py) are there where their file is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from mmkt_ray import storage
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.features.manifest import MANIFEST, Manifest
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import about_models, findings, plots, searched
from mmkt_ray.report.colors import css, model_colors
from mmkt_ray.report.figures import Figures
from mmkt_ray.report.html import render
from mmkt_ray.report.task_section import ShownModel, task_section
from mmkt_ray.scoring.metrics import BaselinesFile, ModelMetrics
from mmkt_ray.scoring.provenance import Current
from mmkt_ray.scoring.results import Described, Recommended, ResultsFile
from mmkt_ray.scoring.run_file import RunFile
from mmkt_ray.scoring.tables import path_of, predict_command
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
        "tasks": [task_section(t, results, models, colors, figures) for t in results.tasks],
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
    return Recommendation(chosen, path, predict_command(run_uri))


def _read_model(run_uri: str, described: Described) -> ShownModel:
    uri = storage.join(run_uri, described.folder)
    metrics = storage.join(uri, "metrics.json")
    if described.kind == "baseline":
        return ShownModel(BaselinesFile.read(metrics).models[described.name].tasks, [], None)
    record, card = ModelMetrics.read_or_none(metrics), read_card(uri)
    history = card.fit.history if card and card.fit else []
    gallery = Gallery.read_or_none(storage.join(uri, "gallery.json"))
    return ShownModel(record.tasks if record else {}, history, gallery)


# --- data ----------------------------------------------------------------------------------------------------------


def _stores(run: RunFile, results: ResultsFile) -> dict[str, list[str]]:
    """Store folder -> the variants that use it."""
    stores: dict[str, list[str]] = {}
    for name, place in run.variants.items():
        if name in results.models and place.store:
            stores.setdefault(place.store, []).append(name)
    return stores


def _data_card(store: str, variants: list[str], run_uri: str) -> dict[str, Any]:
    """What the page shows of a feature store; `manifest` is None if it is not there."""
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
