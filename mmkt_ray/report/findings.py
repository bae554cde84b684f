"""What the page tells beyond scores, each from a result file that a run may have or lack.

<run>/insight.json             what each modality knows (studies/contribution.py)
<run>/transferability.json     scores of features before training (studies/scores.py)
<run>/transfer.json            gains of transfer over from scratch
<model>/missing.json           scores against the share of rows that lack a modality
<store>/audit.json             leakage, conflicting labels and label issues in the data
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mmkt_ray import storage
from mmkt_ray.features.audit import Audit, LabelIssues
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import curves, words
from mmkt_ray.report.about_models import training_of
from mmkt_ray.report.figures import Figures
from mmkt_ray.scoring.provenance import Current, about_table
from mmkt_ray.scoring.results import Answer, ResultsFile
from mmkt_ray.scoring.tables import points
from mmkt_ray.studies.insight import Disagreement, Insight, Shapley
from mmkt_ray.studies.missing_results import ANY, MissingCurves, Triple, WorstRate
from mmkt_ray.studies.scores_results import TaskTransferability, Transferability
from mmkt_ray.studies.transfer_results import Gain, Transfers

LABEL_ISSUES = "suspects.parquet"  # in the run: all of those that audits show the first of
MAX_HEAT_MAPS = 6
MAX_LISTED = 6  # shown losses and gains of transfer, each
RATES_IN_TABLE = (0.0, 0.2, 0.5, 0.8, 1.0)


@dataclass(frozen=True)
class TaskKnowledge:
    """What the modalities know of one task."""

    name: str
    metrics: list[dict[str, str]]
    figure: dict[str, str] | None
    answers: list[Answer]
    disagreement: Disagreement | None
    shapley: Shapley | None


@dataclass(frozen=True)
class KnowledgeSection:
    """Plain answers, Shapley values and disagreement of every task."""

    tasks: list[TaskKnowledge]
    notes: list[str]
    confidence: float


def knowledge(
    current: Current, results: ResultsFile, colors: Mapping[str, str], figures: Figures
) -> KnowledgeSection | None:
    """None without such a file, or where it says nothing."""
    insight = current.read(Insight, "insight.json", "mmkt run")
    if insight is None:
        return None
    tasks = []
    for task, found in insight.tasks.items():
        share, metrics = found.shapley, words.metrics_of(task_kind(results.tasks[task].kind))[:2]
        figure = None
        if share:
            own, title = share.shares[metrics[0]["name"]], metrics[0]["title"]
            alt = f"Shapley values of {title} on task {task}: " + ", ".join(
                f"{m} {points(v['value'])} points" for m, v in own.values.items() if v
            )
            paint = partial(curves.draw_contributions, own, title, colors[share.model])
            figure = figures.add(f"{task}-shapley", f"{task}: what {share.model} takes from each modality", alt, paint)
        if share or found.answers or found.disagreement:
            tasks.append(TaskKnowledge(task, metrics, figure, found.answers, found.disagreement, share))
    return KnowledgeSection(tasks, insight.notes, insight.confidence) if tasks else None


@dataclass(frozen=True)
class Representation:
    """Transferability scores; the sets of a task best LogME first."""

    tasks: dict[str, TaskTransferability]
    found: Transferability
    several_stores: bool


def representation(current: Current) -> Representation | None:
    """None without such a file."""
    found = current.read(Transferability, "transferability.json", "mmkt scores")
    if found is None:
        return None
    stores = {s.store for task in found.tasks.values() for s in task.sets}
    tasks = {
        name: TaskTransferability(sets=sorted(task.sets, key=lambda s: -s.logme), predicted=task.predicted)
        for name, task in found.tasks.items()
    }
    return Representation(tasks, found, len(stores) > 1)


@dataclass(frozen=True)
class MissingRow:
    """One model's line in the table of a task and hidden modality."""

    model: str
    points: list[Triple | None]  # at some of the rates
    answer: WorstRate | None


@dataclass(frozen=True)
class MissingSection:
    """One task and hidden modality."""

    task: str
    hidden: str  # in words
    figure: dict[str, str]
    rates: list[float]
    rows: list[MissingRow]


@dataclass(frozen=True)
class Route:
    """Who answers for samples with just these modalities."""

    model: str
    task: str
    there: str
    expert: str


@dataclass(frozen=True)
class Missing:
    """Curves of all models that have them, and how far they fall below the reference."""

    sections: list[MissingSection]
    below: list[tuple[str, WorstRate]]  # with the model's name
    num: int  # of answers
    experts: list[Route]


def missing(current: Current, results: ResultsFile, colors: Mapping[str, str], figures: Figures) -> Missing | None:
    """None if no model has such a file."""
    folders = {name: about.folder_to_ship for name, about in results.models.items() if about.folder_to_ship}
    read = {
        n: current.read(MissingCurves, f"{place}/missing.json", "mmkt evaluate --missing")
        for n, place in folders.items()
    }
    files = {name: f for name, f in read.items() if f}
    places = dict.fromkeys((t, h) for f in files.values() for h, by_task in f.curves.items() for t in by_task)
    if not places:
        return None
    experts = [route for name in files for route in _experts_of(current.run_uri, name, folders[name])]
    kinds = {t: task_kind(found.kind) for t, found in results.tasks.items()}
    ends = _scales(sorted(places), kinds, files)
    return Missing(
        [_missing_of(t, h, kinds[t], files, ends[t], colors, figures) for t, h in sorted(places) if t in kinds],
        [(name, answer) for name, f in files.items() for answer in f.answers if answer.below],
        sum(len(f.answers) for f in files.values()),
        experts,
    )


def _experts_of(run_uri: str, name: str, folder: str) -> list[Route]:
    """Who answers what, of a model with experts."""
    fit = training_of(run_uri, folder)
    routes = (fit.experts_for if fit else None) or {}
    return [
        Route(name, task, there.replace("+", " + "), expert)
        for task, by_pattern in routes.items()
        for there, expert in by_pattern.items()
    ]


def _scales(
    places: Sequence[tuple[str, str]], kinds: Mapping[str, TaskKind], files: Mapping[str, MissingCurves]
) -> dict[str, tuple[float, float]]:
    """Task -> ends of the scale of its figures: that of all tasks with the same main metric."""
    lines: dict[str, list[list[Triple | None]]] = {}
    main = {task: words.metrics_of(kind)[0]["name"] for task, kind in kinds.items()}
    for task, hidden in places:
        if task in kinds:
            found = [part.get(hidden, {}).get(task) for f in files.values() for part in (f.curves, f.reference)]
            lines.setdefault(main[task], []).extend(curve.by_metric[main[task]] for curve in found if curve)
    return {task: curves.scale_of(lines[main[task]]) for task, _ in places if task in kinds}


def _missing_of(
    task: str,
    hidden: str,
    kind: TaskKind,
    files: Mapping[str, MissingCurves],
    ends: tuple[float, float],
    colors: Mapping[str, str],
    figures: Figures,
) -> MissingSection:
    shown = {n: f for n, f in files.items() if task in f.curves.get(hidden, {})}
    rates = next(iter(shown.values())).rates
    main = words.metrics_of(kind)[0]
    lines = {n: f.curves[hidden][task].by_metric[main["name"]] for n, f in shown.items()}
    references = [f.reference.get(hidden, {}).get(task) for f in shown.values()]
    reference = next((r.by_metric[main["name"]] for r in references if r), None)
    what = "any modality" if hidden == ANY else hidden
    figure = figures.add(
        f"{task}-without-{hidden}",
        f"{task}: {what} hidden",
        f"{main['title']} on task {task} against the share of samples without {what}, for {', '.join(lines)}; also "
        "in the table",
        partial(curves.draw_missing_curves, rates, lines, reference, colors, metric=main["title"], ends=ends),
    )
    at = list(dict.fromkeys(min(range(len(rates)), key=lambda i: abs(rates[i] - r)) for r in RATES_IN_TABLE))
    rows = []
    for name, f in shown.items():
        answer = next((a for a in f.answers if (a.hidden, a.task) == (hidden, task)), None)
        rows.append(MissingRow(name, [lines[name][i] for i in at], answer))
    return MissingSection(task, what, figure, [rates[i] for i in at], rows)


@dataclass(frozen=True)
class Transfer:
    """The transfer matrix: heat maps by method and share of labels, gains and losses that are shown."""

    figures: list[dict[str, str]]
    cells: list[Gain]  # the greatest loss first
    worse: list[Gain]
    better: list[Gain]  # the greatest gain first
    num_hidden: int  # heat maps that are not drawn
    listed: int = MAX_LISTED


def transfer(current: Current, figures: Figures) -> Transfer | None:
    """None without such a file."""
    found = current.read(Transfers, "transfer.json", "mmkt transfer")
    if found is None or not found.cells:
        return None
    cells = sorted(found.cells, key=lambda c: c.gain)
    maps = dict.fromkeys((c.label_frac, c.method) for c in found.cells)
    drawn, reach = [], 100 * max(abs(c.gain) for c in cells)
    for frac, method in sorted(maps)[:MAX_HEAT_MAPS]:
        chosen = [c for c in cells if (c.label_frac, c.method) == (frac, method)]
        drawn.append(
            figures.add(
                f"transfer-{method}-{frac:g}",
                f"{method}, {100 * frac:g} % of the labels",
                f"Gain over from scratch in points by {method} with {100 * frac:g} % of the labels; also in the "
                "table",
                partial(curves.draw_gains, chosen, reach),
            )
        )
    worse = [c for c in cells if c.verdict == "negative"]
    better = [c for c in reversed(cells) if c.verdict == "positive"]
    return Transfer(drawn, cells, worse, better, max(0, len(maps) - MAX_HEAT_MAPS))


def audits(current: Current, stores: Iterable[str]) -> dict[str, Audit]:
    """store -> what was found in its data, for stores that were audited; without label issues of other features."""
    found = {}
    for store in stores:
        audit = Audit.read_or_none(storage.join(current.run_uri, store, "audit.json"))
        if audit and audit.suspects and not _issues_are_current(current, audit.suspects):
            audit = audit.with_label_issues(None)
        if audit:
            found[store] = audit
    return found


def _issues_are_current(current: Current, issues: LabelIssues) -> bool:
    """Whether the label issues of an audit, and the file that has all of them,
    are about features that the run has."""
    uri = storage.join(current.run_uri, LABEL_ISSUES)
    said = [issues.about, *([about_table(uri)] if storage.exists(uri) else [])]
    return all(current.check(about, LABEL_ISSUES, "mmkt run") for about in said)
