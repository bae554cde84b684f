"""Numbers as people say them. Scores are in percent, errors in the labels' units."""

from __future__ import annotations

from mmkt_ray.kinds.number_metrics import IN_UNITS
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.scoring.intervals import Interval


def percent(value: float | None) -> str:
    """0.912 -> `91.2 %`."""
    return "–" if value is None else f"{100 * value:.1f} %"


def score(value: float | None, metric: str) -> str:
    """A metric's value: `91.2 %`, `R2` too; an error of numbers as it is, `12.3`."""
    return percent(value) if metric not in IN_UNITS or value is None else f"{value:.4g}"


def span(interval: Interval, metric: str) -> str:
    """`89.9–92.3`: the ends of an interval."""
    factor, form = (1.0, ".4g") if metric in IN_UNITS else (100.0, ".1f")
    return "–".join(format(factor * end, form) for end in (interval["low"], interval["high"]))


def metrics_of(kind: TaskKind) -> list[dict[str, str]]:
    """The metrics that a kind reports, the main one first: {name, title}."""
    words = {"macro_f1": "Macro-F1"}
    return [
        {"name": m, "title": words.get(m, kind.called.get(m, m.replace("_", " ").capitalize()))} for m in kind.reported
    ]


def count(value: int) -> str:
    """12345 -> `12,345`."""
    return f"{value:,}"


def seconds(value: float | None) -> str:
    """A duration as people say it."""
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
