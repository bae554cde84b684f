"""`mmkt compare`: the models of several runs side by side, each held against the first on the rows that both
predicted.

Rows are the same by their sample id, and count where both runs have the same label for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.answers import Difference, paired_test
from mmkt_ray.evaluation.evaluated import Evaluated, evaluated_models, is_stale
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report.html import render
from mmkt_ray.scoring.intervals import Interval, agreeing, holm, verdict
from mmkt_ray.scoring.metrics import ModelMetrics
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.scoring.run_file import RunFile
from mmkt_ray.scoring.tables import metric_name, metric_text, points

DEFAULT_RESAMPLES = 1000


@dataclass(frozen=True)
class ComparisonTable:
    """One task: a row of cells for each model."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def compare_runs(uris: Sequence[str], html_file: str | None = None) -> str:
    """The comparison as text; also as a page where `html_file` says. uris: two or more run folders, of which the
    recommended model is taken, or model folders; all evaluated.

    Raises: DataError if one was not evaluated, or no two share a task.
    """
    models = told_apart(uris)
    tables = compare_models(models)
    if not tables:
        raise DataError(f"'{uris[0]}' shares no task with the others: it predicts {sorted(models[0].tasks)}")
    if html_file:
        Path(html_file).write_text(as_page(tables), encoding="utf-8")
    text = "\n\n".join(map(as_text, tables))
    return f"{text}\n\npage: {html_file}" if html_file else text


def chosen_model(uri: str) -> Evaluated:
    """The evaluated model of a model folder, or the one that a run's report recommends. Raises: DataError."""
    uri = storage.absolute(uri)
    results = ResultsFile.read_or_none(storage.join(uri, "report", "results.json"))
    if results is not None and not storage.exists(storage.join(uri, "config.json")):
        main = results.models.get(results.main or "")
        folder = results.recommended.folder if results.recommended else main and main.folder_to_ship
        if not folder:
            raise DataError(f"the run '{uri}' recommends no model: name one of the folders in '{uri}/models'")
        # a linear model: its scores are the baselines'
        if not storage.exists(storage.join(uri, folder, "metrics.json")):
            named = results.recommended.model if results.recommended else results.main
            for model in evaluated_models(uri, RunFile.of(uri)):
                if model.name == named:
                    return replace(model, name=f"{uri.rstrip('/').rpartition('/')[2]}/{named}")
        uri = storage.join(uri, folder)
    record = ModelMetrics.read_or_none(storage.join(uri, "metrics.json"))
    card = read_card(uri)
    if record is None or card is None or is_stale(record, card):
        raise DataError(f"'{uri}' holds no evaluated model: run `mmkt evaluate` (or `mmkt run`) first")
    parts = uri.rstrip("/").split("/")
    name = f"{parts[-3]}/{parts[-1]}" if len(parts) > 2 and parts[-2] == "models" else parts[-1]
    return Evaluated(name, "trained", uri, record, storage.join(uri, f"predictions-{record.split}.parquet"), card)


def told_apart(uris: Sequence[str]) -> list[Evaluated]:
    """The models of some folders. Those of one name, as of two runs of one name, get the folder beside it."""
    models = [chosen_model(uri) for uri in uris]
    named = Counter(model.name for model in models)
    both = zip(models, uris, strict=True)
    return [replace(m, name=f"{m.name} ({uri})") if named[m.name] > 1 else m for m, uri in both]


def compare_models(models: Sequence[Evaluated]) -> list[ComparisonTable]:
    """A table for each task that the first model shares with another.
    P values are corrected over all of them (Holm)."""
    first, *others = models
    shared = [t for t in sorted(first.tasks) if any(t in other.tasks for other in others)]
    pairs = [(t, i) for t in shared for i, other in enumerate(others) if t in other.tasks]
    found = {(t, i): against(t, others[i], first) for t, i in pairs}
    tested = [pair for pair in pairs if found[pair] is not None]
    corrected = dict(zip(tested, holm([found[pair]["p"] for pair in tested]), strict=True))  # type: ignore[index]
    return [_table(t, first, others, found, corrected) for t in shared]


class Against(Difference):
    """A paired test and the number of its rows."""

    num_rows: int


def against(task: str, model: Evaluated, first: Evaluated) -> Against | None:
    """The paired test of a model's row scores less the first's; None where they share no row."""
    vocabulary: dict[Any, int] = {}
    ours, theirs = (m.scored(task, 0.0, vocabulary) for m in (model, first))
    mine, other = ours.beside(theirs)
    if not len(mine):
        return None
    found = paired_test(mine, other, first.record.confidence, first.record.bootstrap_samples)
    return {**found, "num_rows": len(mine)}


def _table(
    task: str,
    first: Evaluated,
    others: Sequence[Evaluated],
    found: dict[tuple[str, int], Against | None],
    corrected: dict[tuple[str, int], float],
) -> ComparisonTable:
    metrics = list(first.tasks[task].intervals)
    percent = f"{first.record.confidence:.0%}"
    own = (f"{metric_name(m)} [{percent}]" for m in metrics)
    head = ("model", "reads", "rows", *own, "less the first", "shared rows", "P (Holm)", "")
    rows = [(*_own(task, first, metrics), "", "", "", "the first")]
    for i, other in enumerate(others):
        if task not in other.tasks:
            continue
        pair = found[task, i]
        if pair is None:
            rows.append((*_own(task, other, metrics), "", "0", "", "no shared rows"))
            continue
        p = corrected[task, i]
        gain = f"{points(pair['value'])} [{points(pair['low'])}, {points(pair['high'])}]"
        difference: Interval = {"value": pair["value"], "low": pair["low"], "high": pair["high"]}
        shown = verdict(agreeing(difference, p, first.record.confidence))
        rows.append((*_own(task, other, metrics), gain, str(pair["num_rows"]), f"{p:.3g}", shown))
    score = metric_name(task_kind(first.tasks[task].kind).row_metric)
    return ComparisonTable(f"{task}: differences are of the {score}, in points", head, rows)


def _own(task: str, model: Evaluated, metrics: Sequence[str]) -> tuple[str, ...]:
    scores = model.tasks[task]
    texts = (metric_text(m, scores.intervals.get(m)) for m in metrics)
    return (model.name, "+".join(model.reads(task)), str(scores.num_rows), *texts)


def as_text(table: ComparisonTable) -> str:
    """For a terminal."""
    cells = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([table.title, *(f"  {line}" for line in lines)])


def as_page(tables: Sequence[ComparisonTable]) -> str:
    """A page that loads nothing."""
    return render("compared_runs.html.j2", {"tables": tables})
