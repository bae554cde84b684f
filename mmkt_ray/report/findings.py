"""What the page tells beyond scores, each from a result file that a run may have or lack.

<run>/insight.json             what each modality knows (studies/contribution.py)
<run>/transferability.json     scores of features before training (studies/scores.py)
<run>/transfer.json            gains of transfer over from scratch
<model>/missing.json           scores against the share of rows that lack a modality
<store>/audit.json             leakage, conflicting labels and suspects in the data
metrics and cards of models    calibration, numbers of parameters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mmkt_ray import storage
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.training_record import Training
from mmkt_ray.kinds.base import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import curves, words
from mmkt_ray.report.figures import Figures
from mmkt_ray.scoring.provenance import Current
from mmkt_ray.scoring.results import Results
from mmkt_ray.scoring.tables import points

if TYPE_CHECKING:
    from mmkt_ray.report.page import ShownModel

MAX_HEAT_MAPS = 6
MAX_LISTED = 6  # shown losses and gains of transfer, each
RATES_IN_TABLE = (0.0, 0.2, 0.5, 0.8, 1.0)


def knowledge(
    current: Current, results: Results, colors: Mapping[str, str], figures: Figures
) -> dict[str, Any] | None:
    """Plain answers, Shapley values and disagreement of every task."""
    insight = current.read("insight.json", "mmkt run")
    if insight is None:
        return None
    tasks = []
    for task, found in insight["tasks"].items():
        share, metrics = found["shapley"], words.metrics_of(task_kind(results.tasks[task].kind))[:2]
        figure = None
        if share:
            own, title = share[metrics[0]["name"]], metrics[0]["title"]
            values = own["values"]
            alt = f"Shapley values of {title} on task {task}: " + ", ".join(
                f"{m} {points(v['value'])} points" for m, v in values.items()
            )
            paint = partial(curves.contributions, own, title, colors[share["model"]])
            figure = figures.add(f"{task}-shapley", f"{task}: what {share['model']} takes from each modality", alt, paint)
        if share or found["answers"] or found["disagreement"]:
            tasks.append({"name": task, "figure": figure, "metrics": metrics, **found})
    return {"tasks": tasks, "notes": insight["notes"], "confidence": insight["confidence"]} if tasks else None


def representation(current: Current) -> dict[str, Any] | None:
    """Transferability scores, best LogME first."""
    found = current.read("transferability.json", "mmkt scores")
    if found is None:
        return None
    stores = {s["store"] for task in found["tasks"].values() for s in task["sets"]}
    for task in found["tasks"].values():
        task["sets"] = sorted(task["sets"], key=lambda s: -s["logme"])
    return {**found, "several_stores": len(stores) > 1}


def _fit_of(run_uri: str, folder: str) -> Training | None:
    """How a model of the run was trained; None where that is not known."""
    card = read_card(storage.join(run_uri, folder))
    return card.fit if card else None


def parameters(run_uri: str, results: Results) -> dict[str, Any] | None:
    """Numbers of trained parameters by part of each trained model."""
    rows: list[dict[str, Any]] = []
    for name, about in results.models.items():
        fit = _fit_of(run_uri, about.folder) if about.kind == "trained" else None
        parts = fit.num_params_by_part if fit else None
        if parts:
            rows.append({"model": name, "about": about.to_dict(), "parts": parts, "total": sum(parts.values())})
    columns = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    order = ["input", *sorted(c for c in columns if c.startswith("level_")), "fusion", "heads"]
    columns = sorted(columns, key=lambda c: order.index(c) if c in order else len(order))
    return {"rows": sorted(rows, key=lambda r: r["total"]), "columns": columns} if rows else None


def settings(run_uri: str, results: Results) -> dict[str, Any] | None:
    """What `training.auto` chose for each trained model, and the scores by which."""
    rows = []
    for name, about in results.models.items():
        fit = _fit_of(run_uri, about.folder) if about.kind == "trained" else None
        if fit and fit.auto:
            candidates = list(enumerate(fit.auto.candidates, start=1))
            losses = {i: candidate.loss for i, candidate in candidates}
            rank = next((i for i, candidate in candidates if candidate.chosen), None)
            rows.append({"model": name, "losses": losses, "rank": rank, **fit.auto.to_dict()})
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    return {"rows": rows, "keys": keys} if rows else None


def missing(
    current: Current, results: Results, colors: Mapping[str, str], figures: Figures
) -> dict[str, Any] | None:
    """For each task and hidden modality: curves of all models that have them, and how far they fall below the reference."""
    folders = {name: about.folder_to_ship for name, about in results.models.items() if about.folder_to_ship}
    files = {name: current.read(f"{place}/missing.json", "mmkt evaluate --missing") for name, place in folders.items()}
    files = {name: f for name, f in files.items() if f}
    places = dict.fromkeys((t, h) for f in files.values() for h, by_task in f["curves"].items() for t in by_task)
    if not places:
        return None
    below = [
        {"model": n, **a} for n, f in files.items() for a in f["answers"] if a["below"]
    ]
    num = sum(len(f["answers"]) for f in files.values())
    experts = [row for name in files for row in _experts_of(current.run_uri, name, folders[name])]
    kinds = {t: task_kind(found.kind) for t, found in results.tasks.items()}
    ends = _scales(sorted(places), kinds, files)
    sections = [_missing_of(t, h, kinds[t], files, ends[t], colors, figures) for t, h in sorted(places) if t in kinds]
    return {"sections": sections, "below": below, "num": num, "experts": experts}


def _experts_of(run_uri: str, name: str, folder: str) -> list[dict[str, str]]:
    """Who answers what, of a model with experts."""
    fit = _fit_of(run_uri, folder)
    routes = (fit.experts_for if fit else None) or {}
    return [
        {"model": name, "task": task, "there": there.replace("+", " + "), "expert": expert}
        for task, by_pattern in routes.items()
        for there, expert in by_pattern.items()
    ]


def _scales(
    places: Sequence[tuple[str, str]], kinds: Mapping[str, TaskKind], files: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """Task -> ends of the scale of its figures: that of all tasks with the same main metric."""
    lines: dict[str, list[Any]] = {}
    main = {task: words.metrics_of(kind)[0]["name"] for task, kind in kinds.items()}
    for task, hidden in places:
        if task in kinds:
            found = [f[part].get(hidden, {}).get(task) for f in files.values() for part in ("curves", "reference")]
            lines.setdefault(main[task], []).extend(scores[main[task]] for scores in found if scores)
    return {task: curves.scale_of(lines[main[task]]) for task, _ in places if task in kinds}


def _missing_of(
    task: str,
    hidden: str,
    kind: TaskKind,
    files: Mapping[str, Any],
    ends: tuple[float, float],
    colors: Mapping[str, str],
    figures: Figures,
) -> dict[str, Any]:
    shown = {n: f for n, f in files.items() if task in f["curves"].get(hidden, {})}
    rates = next(iter(shown.values()))["rates"]
    main = words.metrics_of(kind)[0]
    points = {n: f["curves"][hidden][task][main["name"]] for n, f in shown.items()}
    references = [f["reference"].get(hidden, {}).get(task) for f in shown.values()]
    reference = next((r[main["name"]] for r in references if r), None)
    what = "any modality" if hidden == "any" else hidden
    figure = figures.add(
        f"{task}-without-{hidden}",
        f"{task}: {what} hidden",
        f"{main['title']} on task {task} against the share of samples without {what}, for {', '.join(points)}; also in the table",
        partial(curves.missing_curves, rates, points, reference, colors, metric=main["title"], ends=ends),
    )
    at = list(dict.fromkeys(min(range(len(rates)), key=lambda i: abs(rates[i] - r)) for r in RATES_IN_TABLE))
    rows = []
    for name, f in shown.items():
        answers = [a for a in f["answers"] if (a["hidden"], a["task"]) == (hidden, task)]
        rows.append({"model": name, "values": [points[name][i] for i in at], "answer": answers[0] if answers else None})
    return {"task": task, "hidden": what, "figure": figure, "rates": [rates[i] for i in at], "rows": rows}


def calibration(
    models: Mapping[str, ShownModel], results: Results, colors: Mapping[str, str], figures: Figures
) -> list[dict[str, Any]]:
    """Reliability of each task's shown model, and every trained model's calibration error and log loss."""
    sections = []
    for task, found in results.tasks.items():
        rows: list[dict[str, Any]] = []
        for row in found.rows:
            record = models[row.model].tasks[task]
            fitted = record.calibration
            after = fitted.after if fitted and fitted.after else record.probabilities()
            if after.reliability:
                rows.append(
                    {
                        "model": row.model,
                        "temperature": fitted.temperature if fitted else None,
                        "note": fitted.note if fitted else None,
                        "before": fitted.before.to_dict() if fitted and fitted.before else None,
                        "after": after.to_dict(),
                    }
                )
        shown = next((r for r in rows if r["model"] == (found.best_trained or found.best)), None)
        if shown is None:
            continue
        lines = (
            {"before": shown["before"]["reliability"], "after": shown["after"]["reliability"]}
            if shown["before"]
            else {}
        )
        lines = lines or {shown["model"]: shown["after"]["reliability"]}
        figure = figures.add(
            f"{task}-reliability",
            f"{task}: does {shown['model']} know how sure it may be?",
            f"Reliability of {shown['model']} on task {task}: share that came true by confidence; "
            f"calibration error {words.percent(shown['after']['calibration_error'])}",
            partial(curves.reliability, lines, colors[shown["model"]]),
        )
        rows.sort(key=lambda r: r["after"]["calibration_error"])
        sections.append({"task": task, "figure": figure, "rows": rows, "fitted": any(r["before"] for r in rows)})
    return sections


def transfer(current: Current, figures: Figures) -> dict[str, Any] | None:
    """The transfer matrix: heat maps by method and share of labels, gains and losses that are shown."""
    found = current.read("transfer.json", "mmkt transfer")
    if not found or not found["cells"]:
        return None
    cells = sorted(found["cells"], key=lambda c: c["gain"])
    maps = dict.fromkeys((c["label_frac"], c["method"]) for c in found["cells"])
    drawn, reach = [], 100 * max(abs(c["gain"]) for c in cells)
    for frac, method in sorted(maps)[:MAX_HEAT_MAPS]:
        chosen = [c for c in cells if (c["label_frac"], c["method"]) == (frac, method)]
        drawn.append(
            figures.add(
                f"transfer-{method}-{frac:g}",
                f"{method}, {100 * frac:g} % of the labels",
                f"Gain over from scratch in points by {method} with {100 * frac:g} % of the labels; also in the table",
                partial(curves.gains, chosen, reach),
            )
        )
    return {
        "figures": drawn,
        "cells": cells,
        "worse": [c for c in cells if c["verdict"] == "negative"],
        "better": [c for c in reversed(cells) if c["verdict"] == "positive"],
        "num": len(cells),
        "num_hidden": max(0, len(maps) - MAX_HEAT_MAPS),
        "listed": MAX_LISTED,
    }


def audits(run_uri: str, stores: Mapping[str, Any]) -> dict[str, Any]:
    """store -> what was found in its data, for stores that were audited."""
    found = {store: storage.read_json_or_none(storage.join(run_uri, store, "audit.json")) for store in stores}
    return {store: audit for store, audit in found.items() if audit}
