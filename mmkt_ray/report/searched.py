"""What the page tells of a search and of several seeds, each from result files that a run may have or lack.

<run>/search/result.json, report.json     `mmkt search`: what won, on what evidence; what all candidates show
<run>/seeds.json                          `mmkt repeat`: the same models from several seeds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmkt_ray import storage
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.record import About
from mmkt_ray.report import search_plots, words
from mmkt_ray.report.figures import Figures
from mmkt_ray.report.search_plots import Measure
from mmkt_ray.scoring.intervals import verdict
from mmkt_ray.scoring.provenance import Current
from mmkt_ray.scoring.results import Results
from mmkt_ray.scoring.tables import metric_name, points
from mmkt_ray.studies.seeds_results import Seeds, SeedScores, TaskSeeds

MAX_SLICES = 8
STATUS = {
    "finished": "trained to the end",
    "stopped": "stopped early",
    "diverged": "diverged",
    "failed": "failed",
    "out_of_memory": "did not fit into memory",
}
COUNTS = ("candidates", "references", "fused")  # what `tried` tells beside the candidates by status
RIVALS = {"best single modality": "the best single modality", "best concat": "the best plain concat"}


def search(current: Current, figures: Figures, results: Results | None = None) -> dict[str, Any] | None:
    """Tried, winner, comparisons, finalists, ensemble and figures; None without a finished search."""
    result, insight = (
        storage.read_json_or_none(storage.join(current.run_uri, "search", name)) for name in ("result.json", "report.json")
    )
    if result is None or insight is None:
        return None
    about = About.from_dict(result.get("about") or {}, "search/result.json")
    if not current.check(about, "search/result.json", "mmkt search"):
        return None
    metric, aim = result["objective"]["metric"], result["objective"]["task"]
    measure = Measure.of(metric)
    if result["winner"] is None:
        return {**result, "metric": measure.name}
    tasks = sorted({t for f in result["finalists"].values() for t in f["test"]}, key=lambda t: (t != aim, t))
    order = sorted(result["finalists"], key=lambda role: -result["finalists"][role]["val"])
    return {
        **result,
        "metric": measure.name,
        "measure": measure,
        "tried_words": [
            f"{words.count(n)} {STATUS.get(status, status)}"
            for status, n in sorted(result["tried"].items(), key=lambda item: -item[1])
            if status not in COUNTS
        ],
        "about": {role: describe(finalist) for role, finalist in result["finalists"].items()},
        "tasks": tasks,
        "shown": shown_metrics(results, *tasks),
        "answers": [*(a for t in tasks for a in answers_of(t, result)), *notes_of(result)],
        "rows": [
            {"role": role, "task": t, "shown": shown_metrics(results, t), **row_of(role, t, result)}
            for role in order
            for t in tasks
            if t in result["finalists"][role]["test"]
        ],
        "order": order,
        "keys": list(dict.fromkeys(key for role in order for key in result["overrides"][role])),
        "maps": _heat_maps(insight, measure, figures),
        **_figures(insight, measure, figures),
    }


def shown_metrics(results: Results | None, *tasks: str) -> list[dict[str, str]]:
    """The first two metrics of the tasks: {name, title}, titles of several kinds side by side; of tasks that `results`
    (of `compare`) does not have those of classes."""
    found = results.tasks if results else {}
    known = [words.metrics_of(task_kind(found[t].kind))[:2] for t in tasks if t in found]
    known = known or [words.metrics_of(Multiclass())]
    return [
        {"name": both[0]["name"], "title": " / ".join(dict.fromkeys(m["title"] for m in both))}
        for both in zip(*known, strict=True)
    ]


def describe(finalist: Mapping[str, Any]) -> str:
    """`image + text, fusion hierarchical (depth 2), sharing task`."""
    sharing = finalist["sharing"] if isinstance(finalist["sharing"], str) else ", ".join(finalist["sharing"])
    if len(finalist["modalities"]) == 1:
        return f"{finalist['modalities'][0]} alone, sharing {sharing}"
    depth = f" (depth {finalist['fusion']['depth']})" if "depth" in finalist["fusion"] else ""
    return f"{' + '.join(finalist['modalities'])}, fusion {finalist['fusion']['name']}{depth}, sharing {sharing}"


def answers_of(task: str, result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One task's lines {kind (won | better | worse | tie | open), text}: the winner's test score, its rivals, the ensemble."""
    metric, winner = result["objective"]["metric"], result["winner"]
    test = result["finalists"][winner]["test"].get(task)
    if test is None:
        return [{"kind": "open", "text": f"{task}: the winner does not predict it."}]
    lines = [
        {"kind": "won", "text": f"{task}: the winner has {_scores(test)} on {words.count(test['num_rows'])} test samples."}
    ]
    for name, rival in RIVALS.items():
        role = result["compared_with"].get(name)
        if role not in (None, result["winner"]):
            about = f"{rival} ({describe(result['finalists'][role])})"
            lines.append(_against(task, "the winner", about, result["versus"].get(role, {}).get(task), metric))
    if result.get("ensemble"):
        scores = result["ensemble_test"].get(task, {})
        text = _scores(scores)
        ours = f"the ensemble ({text})" if text else "the ensemble"
        lines.append(_against(task, ours, "the winner", result["ensemble_versus_winner"].get(task), metric))
    return lines


def notes_of(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Lines on the rivals that the winner can't be compared with."""
    lines = []
    for name, rival in RIVALS.items():
        role = result["compared_with"].get(name)
        if role == result["winner"]:
            lines.append({"kind": "open", "text": f"The winner is {rival} itself."})
        elif role is None:
            lines.append({"kind": "open", "text": f"{rival.capitalize()} was not tried."})
    return lines


def _against(task: str, ours: str, theirs: str, versus: Mapping[str, Any] | None, metric: str) -> dict[str, str]:
    """The line on one paired comparison, by `metric`, where it is undefined by accuracy."""
    used = next((m for m in (metric, "accuracy") if versus and versus.get(m)), None)
    if versus is None or used is None:
        return {"kind": "open", "text": f"{task}: no samples to compare {ours} with {theirs}."}
    found = versus[used]
    size = f"{gain(used, found)} on {words.count(versus['num_rows'])} samples"
    said = {"better": "is better than", "worse": "is worse than", "tie": "ties with"}[found["verdict"]]
    return {"kind": found["verdict"], "text": f"{task}: {ours} {said} {theirs}: {size}."}


def gain(metric: str, found: Mapping[str, float]) -> str:
    """A paired difference with its interval, above 0 where the first is better."""
    if metric == "log_loss":
        value, low, high = (f"{found[end]:+.3f}".replace("-", "−") for end in ("value", "low", "high"))
        return f"{value} nats of log loss saved [{low}, {high}]"
    value, low, high = (points(found[end]) for end in ("value", "low", "high"))
    return f"{value} points of {metric_name(metric)} [{low}, {high}]"


def _scores(test: Mapping[str, Any]) -> str:
    """The scores of a model on one task, those that are defined."""
    return ", ".join(f"{metric_name(m)} {_score(m, test[m])}" for m in test if m != "num_rows" and test[m])


def _score(metric: str, interval: Mapping[str, float]) -> str:
    if metric == "log_loss":
        return f"{-interval['value']:.3f} ({-interval['high']:.3f} to {-interval['low']:.3f})"
    return f"{words.score(interval['value'], metric)} ({words.span(interval, metric).replace('–', ' to ')})"


def row_of(role: str, task: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A finalist's scores on one task, and by how much the winner is ahead of it."""
    finalist = result["finalists"][role]
    metric = result["objective"]["metric"]
    versus = (result["versus"].get(role, {}).get(task) or {}).get(metric)
    return {
        "val": finalist["val"],
        "by_seed": finalist["val_by_seed"],
        "test": finalist["test"].get(task),
        "versus": versus,
        "gain": gain(metric, versus) if versus else None,
    }


def _heat_maps(insight: Mapping[str, Any], measure: Measure, figures: Figures) -> list[dict[str, str]]:
    drawn, every = [], [s for found in insight["heat_maps"] for row in found["score"] for s in row if s is not None]
    for found in insight["heat_maps"]:
        rows, columns = (search_plots.key_name(found[k]) for k in ("rows", "columns"))
        cells = [
            (score, f"{search_plots.choice_name(row)} with {search_plots.choice_name(column)}")
            for row, scores in zip(found["row_names"], found["score"], strict=True)
            for column, score in zip(found["column_names"], scores, strict=True)
            if score is not None
        ]
        if not cells:
            continue
        best, where = max(cells)
        alt = f"Best val {measure.name} by {rows} and {columns}; the highest, {measure.with_unit(best)}, is {where}"
        title = f"{rows} × {columns}: best val {measure.name}, {measure.unit}"
        paint = partial(search_plots.heat_map, found, measure, (min(every), max(every)))
        drawn.append(figures.add(f"search-{rows}-{columns}", title, alt, paint))
    return drawn


def _figures(insight: Mapping[str, Any], measure: Measure, figures: Figures) -> dict[str, Any]:
    """The figures that there is data for: `curve`, `importance`, `slices`, and how many slices are left out."""
    curve, shares = insight["curve"], insight["importance"]
    found: dict[str, Any] = {"curve": None, "importance": None}
    if curve:
        alt = f"Best val {measure.name} so far over the time of search; at the end {measure.with_unit(curve[-1][1])}"
        paint = partial(search_plots.anytime, curve, measure)
        found["curve"] = figures.add("search-curve", "The best score so far", alt, paint)
    if shares:
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        alt = "Share of the variance of scores by key: " + ", ".join(f"{k} {words.percent(s)}" for k, s in ranked)
        found["importance"] = figures.add(
            "search-importance", "What matters", alt, partial(search_plots.importance, shares)
        )
    slices = {k: p for k, p in insight["slices"].items() if len({point[0] for point in p}) > 1}
    keys = sorted(slices, key=lambda k: -(shares or {}).get(k, 0.0))
    every = [point[1] for key in keys[:MAX_SLICES] for point in slices[key]]
    found["slices"] = [
        figures.add(
            f"search-slice-{key}",
            search_plots.key_name(key),
            f"Val {measure.name} of {len(slices[key])} candidates by {key}; the best one has {_plain(slices[key])}",
            partial(search_plots.slices, slices[key], key, measure, (min(every), max(every))),
        )
        for key in keys[:MAX_SLICES]
    ]
    return found | {"num_slices_hidden": max(0, len(keys) - MAX_SLICES)}


def _plain(points: list[list[Any]]) -> str:
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


def seeds(current: Current, results: Results | None = None) -> SeedsSection | None:
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
