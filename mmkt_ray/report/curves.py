"""Figures of what was found beyond scores: contributions, missing modalities, calibration, transfer. See plots.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mmkt_ray.report.plots import LIGHT, Theme, draw, name_rows, shorten
from mmkt_ray.scoring.tables import points

_GAIN, _LOSS, _START = "#0072B2", "#D55E00", "#8B949E"


def contributions(share: Mapping[str, Any], metric: str, theme: Theme) -> bytes:
    """A staircase: from what the class frequencies give, each modality's Shapley value on top, to what all give together.

    share: {full, empty, values {modality: interval}} of one metric. Modalities that cost something step back.
    """
    steps = sorted(share["values"].items(), key=lambda item: -item[1]["value"])
    names = ["all together", *[m for m, _ in reversed(steps)], "no modality"]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bars = [(0.0, share["empty"], _START)]
        for _, value in steps:
            start = bars[-1][0] + bars[-1][1] if len(bars) > 1 else share["empty"]
            bars.append((start, value["value"], _GAIN if value["value"] >= 0 else _LOSS))
        bars.append((0.0, share["full"], _START))
        for y, (start, size, color) in zip(range(len(bars) - 1, -1, -1), bars, strict=True):
            axes.barh(y, 100 * size, left=100 * start, height=0.6, color=color, alpha=0.9)
        for y, (_, value), (start, _, _) in zip(range(len(steps), 0, -1), steps, bars[1:], strict=False):
            ends = [100 * (start + value[k]) for k in ("low", "high")]
            axes.plot(ends, [y, y], color=theme.ink, linewidth=1.6, solid_capstyle="butt")
            right = 100 * max(start, start + value["value"], start + value["high"])
            axes.text(right + 1.5, y, points(value["value"]), va="center", fontsize=9)
        for y, total in ((len(bars) - 1, share["empty"]), (0, share["full"])):
            axes.text(100 * total + 1.5, y, f"{100 * total:.1f}", va="center", fontsize=9)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f"{metric}, % (line: interval of the share)")
        name_rows(axes, names)

    return draw(1.1 + 0.36 * len(names), theme, paint)


def missing_curves(
    rates: Sequence[float],
    curves: Mapping[str, Sequence[Sequence[float] | None]],
    reference: Sequence[Sequence[float] | None] | None,
    colors: Mapping[str, str],
    theme: Theme,
    metric: str = "accuracy",
) -> bytes:
    """The main metric against the share of rows that lack a modality. curves: model -> (value, low, high) or None per rate.

    The dashed line is the best model of one modality on the same rows.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        x = [100 * r for r in rates]
        for name, triples in curves.items():
            value, low, high = (100 * np.array([t or [np.nan] * 3 for t in triples])).T
            axes.plot(x, value, color=colors[name], linewidth=2, marker="o", markersize=3.5, label=name)
            if len(curves) <= 3:
                axes.fill_between(x, low, high, color=colors[name], alpha=0.15, linewidth=0)
        if reference:
            line = [100 * p[0] if p else np.nan for p in reference]
            axes.plot(x, line, color=theme.ink, linewidth=1.2, linestyle="--", label="best single modality")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_xlabel("samples without it, %")
        axes.set_ylabel(f"{metric}, %")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return draw(2.9 + 0.12 * len(curves), theme, paint)


def reliability(lines: Mapping[str, Sequence[Mapping[str, float]]], theme: Theme) -> bytes:
    """How often forecasts of a confidence came true. lines: label -> bins {confidence, accuracy, num}; diagonal: as said."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=theme.faint, linewidth=1.2)
        for (label, bins), color, marker in zip(lines.items(), (_LOSS, _GAIN), ("s", "o"), strict=False):
            most = max(b["num"] for b in bins)
            x, y = ([100 * b[k] for b in bins] for k in ("confidence", "accuracy"))
            axes.plot(x, y, color=color, linewidth=1.4, marker=marker, markersize=3, label=label)
            axes.scatter(x, y, s=[12 + 60 * b["num"] / most for b in bins], color=color, marker=marker, alpha=0.85)
        axes.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="confidence, %", ylabel="came true, %")
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return draw(3.9, theme, paint)


def gains(cells: Sequence[Mapping[str, Any]], theme: Theme) -> bytes:
    """Sources (rows) by targets (columns), the gain over from scratch in points; * where the interval leaves out zero."""
    sources, targets = (sorted({c[k] for c in cells}) for k in ("source", "target"))
    values = np.full((len(sources), len(targets)), np.nan)
    for c in cells:
        values[sources.index(c["source"]), targets.index(c["target"])] = 100 * c["gain"]
    reach = max(float(np.nanmax(np.abs(values))), 1.0)
    middle = "#ffffff" if theme is LIGHT else "#161b22"

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        ramp = LinearSegmentedColormap.from_list("gain", [_LOSS, middle, _GAIN])
        axes.imshow(values, cmap=ramp, vmin=-reach, vmax=reach, aspect="auto")
        axes.set_xticks(range(len(targets)), [shorten(t, 22) for t in targets], rotation=90, fontsize=8)
        axes.set_yticks(range(len(sources)), [shorten(s, 22) for s in sources], fontsize=8)
        axes.tick_params(length=0)
        axes.set(xlabel="target", ylabel="source")
        axes.spines[:].set_visible(False)
        for c in cells:
            shown = "*" if c["low"] > 0 or c["high"] < 0 else ""
            text = points(c["gain"]) + shown
            strong = abs(100 * c["gain"]) > 0.6 * reach
            color = "#ffffff" if strong else theme.ink
            at = targets.index(c["target"]), sources.index(c["source"])
            axes.text(*at, text, ha="center", va="center", fontsize=8, color=color)

    return draw(min(2.4 + 0.36 * len(sources), 8), theme, paint)
