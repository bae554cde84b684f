"""Figures of what was found beyond scores: contributions, missing modalities, calibration, transfer. See plots.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmkt_ray.report.colors import ACCENT, BAD, INK, LINE, SOFT
from mmkt_ray.report.plots import LINE_STYLES, cell, difference_hover, draw, legend, matrix, name_rows, shares, shorten
from mmkt_ray.report.svg import tip
from mmkt_ray.report.words import percent
from mmkt_ray.scoring.metrics import Bin
from mmkt_ray.scoring.tables import points
from mmkt_ray.studies.insight import Shares
from mmkt_ray.studies.missing_results import Triple
from mmkt_ray.studies.transfer_results import Gain


def draw_contributions(share: Shares, metric: str, color: str) -> str:
    """A staircase: from what the class frequencies give, each modality's Shapley value on top,
    to what all give together.

    Modalities that cost something step back. color: the model's.
    """
    full, empty = share.full or 0.0, share.empty or 0.0
    steps = sorted(((m, v) for m, v in share.values.items() if v), key=lambda item: -item[1]["value"])
    names = ["all together", *[m for m, _ in reversed(steps)], "no modality"]
    bars = [(0.0, empty, SOFT)]
    for _, value in steps:
        start = bars[-1][0] + bars[-1][1]
        bars.append((start, value["value"], color if value["value"] >= 0 else BAD))
    bars.append((0.0, full, SOFT))
    hovers = [
        f"no modality: {percent(share.empty)}",
        *(difference_hover(m, v) for m, v in steps),
        f"all together: {percent(share.full)}",
    ]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (start, size, fill), hover in zip(range(len(bars) - 1, -1, -1), bars, hovers, strict=True):
            tip(axes.barh(y, 100 * size, left=100 * start, height=0.6, color=fill, alpha=0.8).patches[0], hover)
        ends = [0.0, 100.0]
        for y, (_, value), (start, _, _) in zip(range(len(steps), 0, -1), steps, bars[1:], strict=False):
            line = [100 * (start + end) for end in (value["low"], value["high"])]
            axes.plot(line, [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
            right = 100 * max(start, start + value["value"], start + value["high"])
            axes.text(right + 1.5, y, points(value["value"]), va="center", fontsize=9)
            ends += [*line, right]
        for y, total in ((len(bars) - 1, empty), (0, full)):
            axes.text(100 * max(total, 0.0) + 1.5, y, f"{100 * total:.1f}", va="center", fontsize=9)
            ends.append(100 * total)
        shares(axes, min(ends), max(ends))
        axes.set_xlabel(f"{metric}, % (line: interval of the share)")
        name_rows(axes, names)

    return draw(1.1 + 0.36 * len(names), paint)


def draw_missing_curves(
    rates: Sequence[float],
    curves: Mapping[str, Sequence[Triple | None]],
    reference: Sequence[Triple | None] | None,
    colors: Mapping[str, str],
    metric: str = "accuracy",
    ends: tuple[float, float] | None = None,
) -> str:
    """The main metric against the share of rows that lack a modality. curves: model -> (value, low, high) or None per
    rate; ends: of the scale, the same for figures that are compared, in percent.

    The dashed line is the best model of one modality on the same rows.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        x = [100 * r for r in rates]
        for number, (name, triples) in enumerate(curves.items()):
            value, low, high = (100 * np.array([t or [np.nan] * 3 for t in triples])).T
            axes.plot(x, value, color=colors[name], linewidth=2, linestyle=LINE_STYLES[number // 10 % 4], label=name)
            if len(curves) <= 3:
                axes.fill_between(x, low, high, color=colors[name], alpha=0.15, linewidth=0)
            _points(axes, x, triples, name, colors[name], "o")
        if reference:
            line = [100 * p[0] if p else np.nan for p in reference]
            axes.plot(x, line, color=INK, linewidth=1.2, linestyle="--", label="best single modality")
            _points(axes, x, reference, "best single modality", INK, "s")
        if ends:
            axes.set_ylim(*ends)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_xlabel("samples without it, %")
        axes.set_ylabel(f"{metric}, %")
        legend(figure, axes)

    return draw(2.9 + 0.12 * len(curves), paint)


def _points(
    axes: Any, x: Sequence[float], triples: Sequence[Triple | None], name: str, color: str, marker: str
) -> None:
    known = [(a, t) for a, t in zip(x, triples, strict=True) if t]
    if known:
        dots = axes.scatter([a for a, _ in known], [100 * t[0] for _, t in known], s=14, color=color, marker=marker)
        tip(dots, *(f"{name}: {percent(t[0])} with {a:g} % without" for a, t in known))


def scale_of(lines: Sequence[Sequence[Triple | None] | None]) -> tuple[float, float]:
    """Ends of a scale in percent that holds all these lines with their intervals, with some room."""
    values = [100 * v for line in lines for triple in line or () if triple for v in triple] or [0.0, 100.0]
    room = max(0.04 * (max(values) - min(values)), 0.5)
    return min(values) - room, max(values) + room


def draw_reliability(lines: Mapping[str, Sequence[Bin]], color: str) -> str:
    """How often forecasts of a confidence came true. lines: by label, the last in the model's color;
    diagonal: as said."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=LINE, linewidth=1.2)
        for number, (label, bins) in enumerate(lines.items(), start=1):
            last = number == len(lines)
            shade, marker = (color, "o") if last else (SOFT, "s")
            most = max(b.num for b in bins)
            x, y = [100 * b.confidence for b in bins], [100 * b.accuracy for b in bins]
            axes.plot(x, y, color=shade, linewidth=1.4, linestyle="-" if last else "--")
            dots = axes.scatter(x, y, s=[12 + 60 * b.num / most for b in bins], color=shade, marker=marker, label=label)
            hovers = (f"{label}: {b.num:,} said {percent(b.confidence)}, {percent(b.accuracy)} came true" for b in bins)
            tip(dots, *hovers)
        axes.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="confidence, %", ylabel="came true, %")
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        legend(figure, axes)

    return draw(3.9, paint)


def draw_gains(cells: Sequence[Gain], reach: float) -> str:
    """Sources (rows) by targets (columns), the gain over from scratch in points; * where the interval leaves out
    zero. reach: the gain, in points, of the strongest colour."""
    sources, targets = sorted({c.source for c in cells}), sorted({c.target for c in cells})

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        matrix(axes, [shorten(t, 22) for t in targets], [shorten(s, 22) for s in sources], 8)
        axes.set(xlabel="target", ylabel="source")
        for c in cells:
            text = points(c.gain) + ("*" if c.low > 0 or c.high < 0 else "")
            hover = difference_hover(f"{c.source} → {c.target}", {"value": c.gain, "low": c.low, "high": c.high})
            strength = min(abs(100 * c.gain) / max(reach, 1.0), 1.0)
            at = targets.index(c.target), sources.index(c.source)
            cell(axes, *at, ACCENT if c.gain >= 0 else BAD, strength, text, hover)

    return draw(min(2.4 + 0.36 * len(sources), 8), paint)
