"""What the page tells of a search and of several seeds, each from result files that a run may have or lack.

<run>/search/result.json, report.json     `mmkt search`: what won, on what evidence; what all candidates show
<run>/seeds.json                          `mmkt repeat`: the same models from several seeds
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mmkt_ray import storage
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import search_plots, words
from mmkt_ray.report.figures import Figures
from mmkt_ray.report.search_plots import Measure
from mmkt_ray.scoring.intervals import Interval, verdict
from mmkt_ray.scoring.provenance import Current
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.scoring.tables import metric_name, points
from mmkt_ray.search.search_results import (
    Finalist,
    HeatMap,
    JudgedInterval,
    PairedGains,
    RoleScores,
    SearchResult,
    SearchSummary,
    SlicePoint,
)
from mmkt_ray.studies.seeds_results import Seeds, SeedScores, TaskSeeds

MAX_SLICES = 8
STATUS = {
    "finished": "trained to the end",
    "stopped": "stopped early",
    "diverged": "diverged",
    "failed": "failed",
    "out_of_memory": "did not fit into memory",
}
RIVALS = {"best single modality": "the best single modality", "best concat": "the best plain concat"}


@dataclass(frozen=True)
class SearchLine:
    """One sentence on what was found."""

    kind: str  # won | better | worse | tie | open
    text: str


@dataclass(frozen=True)
class SearchRow:
    """A finalist's scores on one task, and by how much the winner is ahead of it."""

    role: str
    task: str
    metrics: list[dict[str, str]]
    finalist: Finalist
    test: RoleScores
    versus: JudgedInterval | None  # by the objective's metric; None: not compared
    gain: str | None


@dataclass(frozen=True)
class SearchFigures:
    """Those that there is data for."""

    maps: list[dict[str, str]]
    curve: dict[str, str] | None
    importance: dict[str, str] | None
    slices: list[dict[str, str]]
    num_slices_hidden: int  # keys that are not drawn


@dataclass(frozen=True)
class SearchFound:
    """What a search with a winner shows."""

    tried: list[str]  # candidates by status, in words
    about: dict[str, str]  # role -> finalist in words
    tasks: list[str]
    metrics: list[dict[str, str]]
    lines: list[SearchLine]
    rows: list[SearchRow]
    roles: list[str]  # of finalists, the best one on val first
    keys: list[str]  # that they have chosen
    figures: SearchFigures


@dataclass(frozen=True)
class SearchSection:
    """A finished search."""

    result: SearchResult
    measure: Measure
    found: SearchFound | None  # None: there is no winner


def search_section(current: Current, figures: Figures, results: ResultsFile | None = None) -> SearchSection | None:
    """None without a finished search."""
    summary = SearchSummary.read_or_none(storage.join(current.run_uri, "search", "report.json"))
    result = current.read(SearchResult, "search/result.json", "mmkt search") if summary else None
    if summary is None or result is None:
        return None
    measure = Measure.of(result.objective.metric)
    if result.winner is None:
        return SearchSection(result, measure, None)
    aim, finalists = result.objective.task, result.finalists
    tasks = sorted({t for f in finalists.values() for t in f.test}, key=lambda t: (t != aim, t))
    roles = sorted(finalists, key=lambda role: -finalists[role].val)
    rows = [
        _row(role, t, result, shown_metrics(results, t)) for role in roles for t in tasks if t in finalists[role].test
    ]
    found = SearchFound(
        tried=[
            f"{words.count(n)} {STATUS.get(status, status)}"
            for status, n in sorted(result.tried.by_status.items(), key=lambda item: -item[1])
        ],
        about={role: finalist_in_words(finalist) for role, finalist in finalists.items()},
        tasks=tasks,
        metrics=shown_metrics(results, *tasks),
        lines=[*(line for t in tasks for line in lines_on(t, result, result.winner)), *lines_on_rivals(result)],
        rows=rows,
        roles=roles,
        keys=list(dict.fromkeys(key for role in roles for key in result.overrides[role])),
        figures=_figures(summary, measure, figures),
    )
    return SearchSection(result, measure, found)


def shown_metrics(results: ResultsFile | None, *tasks: str) -> list[dict[str, str]]:
    """The first two metrics of the tasks: {name, title}, titles of several kinds side by side; of tasks that
    `results` (of `compare`) does not have those of classes."""
    found = results.tasks if results else {}
    known = [words.metrics_of(task_kind(found[t].kind))[:2] for t in tasks if t in found]
    known = known or [words.metrics_of(Multiclass())]
    return [
        {"name": both[0]["name"], "title": " / ".join(dict.fromkeys(m["title"] for m in both))}
        for both in zip(*known, strict=True)
    ]


def finalist_in_words(finalist: Finalist) -> str:
    """`image + text, fusion hierarchical (depth 2), sharing task`."""
    sharing = finalist.sharing if isinstance(finalist.sharing, str) else ", ".join(finalist.sharing)
    if len(finalist.modalities) == 1:
        return f"{finalist.modalities[0]} alone, sharing {sharing}"
    depth = f" (depth {finalist.fusion['depth']})" if "depth" in finalist.fusion else ""
    return f"{' + '.join(finalist.modalities)}, fusion {finalist.fusion['name']}{depth}, sharing {sharing}"


def lines_on(task: str, result: SearchResult, winner: str) -> list[SearchLine]:
    """One task: the winner's test score, its rivals, the ensemble. winner: its role."""
    metric, test = result.objective.metric, result.finalists[winner].test.get(task)
    if test is None:
        return [SearchLine("open", f"{task}: the winner does not predict it.")]
    lines = [SearchLine("won", f"{task}: the winner has {_scores(test)} on {words.count(test.num_rows)} test samples.")]
    for name, rival in RIVALS.items():
        role = result.compared_with.get(name)
        if role is not None and role != winner:
            about = f"{rival} ({finalist_in_words(result.finalists[role])})"
            lines.append(_against(task, "the winner", about, result.versus.get(role, {}).get(task), metric))
    if result.ensemble:
        scores = (result.ensemble_test or {}).get(task)
        text = _scores(scores) if scores else ""
        ours = f"the ensemble ({text})" if text else "the ensemble"
        lines.append(_against(task, ours, "the winner", (result.ensemble_versus_winner or {}).get(task), metric))
    return lines


def lines_on_rivals(result: SearchResult) -> list[SearchLine]:
    """Those that the winner can't be compared with."""
    lines = []
    for name, rival in RIVALS.items():
        role = result.compared_with.get(name)
        if role == result.winner:
            lines.append(SearchLine("open", f"The winner is {rival} itself."))
        elif role is None:
            lines.append(SearchLine("open", f"{rival.capitalize()} was not tried."))
    return lines


def _against(task: str, ours: str, theirs: str, versus: PairedGains | None, metric: str) -> SearchLine:
    """The line on one paired comparison, by `metric`, where it is undefined by accuracy."""
    defined = ((m, found) for m in (metric, "accuracy") if versus and (found := versus.metrics.get(m)))
    used, found = next(defined, (metric, None))
    if versus is None or found is None:
        return SearchLine("open", f"{task}: no samples to compare {ours} with {theirs}.")
    size = f"{gain(used, found)} on {words.count(versus.num_rows)} samples"
    said = {"better": "is better than", "worse": "is worse than", "tie": "ties with"}[found["verdict"]]
    return SearchLine(found["verdict"], f"{task}: {ours} {said} {theirs}: {size}.")


def gain(metric: str, found: Interval) -> str:
    """A paired difference with its interval, above 0 where the first is better."""
    ends = (found["value"], found["low"], found["high"])
    if metric == "log_loss":
        value, low, high = (f"{end:+.3f}".replace("-", "−") for end in ends)
        return f"{value} nats of log loss saved [{low}, {high}]"
    value, low, high = map(points, ends)
    return f"{value} points of {metric_name(metric)} [{low}, {high}]"


def _scores(test: RoleScores) -> str:
    """The scores of a model on one task, those that are defined."""
    return ", ".join(f"{metric_name(m)} {_score(m, found)}" for m, found in test.intervals.items() if found)


def _score(metric: str, interval: Interval) -> str:
    if metric == "log_loss":
        return f"{-interval['value']:.3f} ({-interval['high']:.3f} to {-interval['low']:.3f})"
    return f"{words.score(interval['value'], metric)} ({words.span(interval, metric).replace('–', ' to ')})"


def _row(role: str, task: str, result: SearchResult, metrics: list[dict[str, str]]) -> SearchRow:
    finalist, metric = result.finalists[role], result.objective.metric
    gains = result.versus.get(role, {}).get(task)
    versus = gains.metrics.get(metric) if gains else None
    return SearchRow(
        role, task, metrics, finalist, finalist.test[task], versus, gain(metric, versus) if versus else None
    )


def _figures(summary: SearchSummary, measure: Measure, figures: Figures) -> SearchFigures:
    """Draw what there is data for."""
    maps = _heat_maps(summary.heat_maps, measure, figures)
    curve, importance, explained = None, None, summary.importance or {}
    if summary.curve:
        alt = (
            f"Best val {measure.name} so far over the time of search; at the end "
            f"{measure.with_unit(summary.curve[-1][1])}"
        )
        paint = partial(search_plots.draw_anytime, summary.curve, measure)
        curve = figures.add("search-curve", "The best score so far", alt, paint)
    if explained:
        ranked = sorted(explained.items(), key=lambda item: -item[1])
        alt = "Share of the variance of scores by key: " + ", ".join(f"{k} {words.percent(s)}" for k, s in ranked)
        paint = partial(search_plots.draw_importance, explained)
        importance = figures.add("search-importance", "What matters", alt, paint)
    slices = {k: p for k, p in summary.slices.items() if len({point[0] for point in p}) > 1}
    keys = sorted(slices, key=lambda k: -explained.get(k, 0.0))
    every = [point[1] for key in keys[:MAX_SLICES] for point in slices[key]]
    drawn = [
        figures.add(
            f"search-slice-{key}",
            search_plots.key_name(key),
            f"Val {measure.name} of {len(slices[key])} candidates by {key}; the best one has {_plain(slices[key])}",
            partial(search_plots.draw_slices, slices[key], key, measure, (min(every), max(every))),
        )
        for key in keys[:MAX_SLICES]
    ]
    return SearchFigures(maps, curve, importance, drawn, max(0, len(keys) - MAX_SLICES))


def _heat_maps(heat_maps: list[HeatMap], measure: Measure, figures: Figures) -> list[dict[str, str]]:
    drawn, every = [], [s for found in heat_maps for row in found.score for s in row if s is not None]
    for found in heat_maps:
        rows, columns = search_plots.key_name(found.rows), search_plots.key_name(found.columns)
        cells = [
            (score, f"{search_plots.choice_name(row)} with {search_plots.choice_name(column)}")
            for row, scores in zip(found.row_names, found.score, strict=True)
            for column, score in zip(found.column_names, scores, strict=True)
            if score is not None
        ]
        if not cells:
            continue
        best, where = max(cells)
        alt = f"Best val {measure.name} by {rows} and {columns}; the highest, {measure.with_unit(best)}, is {where}"
        title = f"{rows} × {columns}: best val {measure.name}, {measure.unit}"
        paint = partial(search_plots.draw_heat_map, found, measure, (min(every), max(every)))
        drawn.append(figures.add(f"search-{rows}-{columns}", title, alt, paint))
    return drawn


def _plain(points: list[SlicePoint]) -> str:
    value = max(points, key=lambda p: p[1])[0]
    return search_plots.choice_name(value) if isinstance(value, str) else f"{value:.3g}"


@dataclass(frozen=True)
class SeedsRow:
    """One variant's line in the table of a task."""

    model: str
    scores: SeedScores
    verdict: str | None  # better | tie | worse; None: it is not compared


@dataclass(frozen=True)
class SeedsTask:
    """All variants of one task, the best first."""

    name: str
    found: TaskSeeds
    metrics: list[dict[str, str]]
    rows: list[SeedsRow]

    def with_verdict(self, verdict: str) -> list[str]:
        """Names of the variants that have it."""
        return [row.model for row in self.rows if row.verdict == verdict]


@dataclass(frozen=True)
class SeedsSection:
    """What several seeds show."""

    num: int  # seeds
    against: str | None
    tasks: list[SeedsTask]


def seeds_section(current: Current, results: ResultsFile | None = None) -> SeedsSection | None:
    """Every task's models with a verdict each; None without such a file."""
    found = current.read(Seeds, "seeds.json", "mmkt repeat")
    if found is None or not found.tasks:
        return None
    tasks = []
    for task, own in found.tasks.items():
        metrics = shown_metrics(results, task)
        main = metrics[0]["name"]
        gains = {name: scores.versus[main] if scores.versus else None for name, scores in own.models.items()}
        rows = [SeedsRow(n, own.models[n], verdict(gain, "tie") if gain else None) for n, gain in gains.items()]
        rows.sort(key=lambda r: -r.scores.interval(main)["value"])
        tasks.append(SeedsTask(task, own, metrics, rows))
    return SeedsSection(len(found.seeds), found.against, tasks)
