"""Figures of a search: heat maps, the best score over time, importance, slices. See plots.py. Scores are on validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mmkt_ray.report.plots import LIGHT, Theme, draw, name_rows, shorten
from mmkt_ray.scoring.tables import metric_name

MAX_LISTED_VALUES = 8  # more whole numbers are drawn as a scale
_LINE, _BEST = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Measure:
    """How a metric of an objective is drawn; higher is better."""

    name: str
    unit: str = "%"
    scale: float = 100.0
    digits: int = 1

    @classmethod
    def of(cls, metric: str) -> Measure:
        """Of a metric's name in the config."""
        return cls("negative log loss", "nats", 1.0, 3) if metric == "log_loss" else cls(metric_name(metric))

    def text(self, score: float) -> str:
        """A score in this unit, without its name."""
        return f"{self.scale * score:.{self.digits}f}"

    def told(self, score: float) -> str:
        """A score with its unit."""
        return f"{self.text(score)} {self.unit}"


def key_name(key: str) -> str:
    """`model.fusion.depth` -> `fusion depth`."""
    for section in ("model.", "training."):
        key = key.removeprefix(section)
    return key.removesuffix(".name").replace(".", " ").replace("_", " ")


def choice_name(text: str) -> str:
    """`["task", "modality"]` -> `task, modality`; other texts as they are."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return ", ".join(map(str, value)) if isinstance(value, list) else text


def heat_map(found: Mapping[str, Any], measure: Measure, theme: Theme) -> bytes:
    """The best score of each cell, under it the number of candidates; cells without one are empty.

    found: {rows, columns (keys), row_names, column_names, score, candidates}.
    """
    score = np.array([[np.nan if s is None else measure.scale * s for s in row] for row in found["score"]])
    low, high = float(np.nanmin(score)), float(np.nanmax(score))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        ramp = LinearSegmentedColormap.from_list("score", theme.ramp)
        axes.imshow(score, cmap=ramp, vmin=low - 0.15 * max(high - low, 0.01 * measure.scale), vmax=high, aspect="auto")
        for axis, key, names in ((axes.xaxis, "columns", "column_names"), (axes.yaxis, "rows", "row_names")):
            axis.set_ticks(range(len(found[names])), [shorten(choice_name(n), 18) for n in found[names]], fontsize=8)
            axis.set_label_text(key_name(found[key]))
        axes.tick_params(length=0)
        axes.tick_params(axis="x", rotation=30 if len(found["column_names"]) > 3 else 0)
        axes.spines[:].set_visible(False)
        for (y, x), value in np.ndenumerate(score):
            if np.isfinite(value):
                strong = value > low + 0.5 * (high - low)
                color = ("#ffffff" if theme is LIGHT else "#0d1117") if strong else theme.ink
                text = f"{value:.{measure.digits}f}\n×{found['candidates'][y][x]:,}"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)

    return draw(min(1.5 + 0.46 * len(found["row_names"]), 8), theme, paint)


def anytime(curve: Sequence[Sequence[float]], measure: Measure, theme: Theme) -> bytes:
    """The best score so far against the time of search. curve: [seconds, best, candidates by then]."""
    at, best, count = (np.array(column, dtype=float) for column in zip(*curve, strict=True))
    unit, size = ("min", 60.0) if at[-1] > 180 else ("s", 1.0)
    scaled = measure.scale * best

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step(at / size, scaled, where="post", color=_LINE, linewidth=2)
        axes.plot(at[:-1] / size, scaled[:-1], "o", color=_LINE, markersize=3.5)
        axes.plot(at[-1] / size, scaled[-1], "o", color=_BEST, markersize=6)
        axes.annotate(
            f"{measure.text(best[-1])} after {int(count[-1]):,} candidates",
            (at[-1] / size, scaled[-1]),
            (4, 9),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axes.set_xlim(0, 1.05 * at[-1] / size)
        axes.margins(y=0.22)
        axes.grid(axis="y", linewidth=0.6)
        axes.set(xlabel=f"time of search, {unit}", ylabel=f"best val {measure.name}, {measure.unit}")

    return draw(2.9, theme, paint)


def importance(shares: Mapping[str, float], theme: Theme) -> bytes:
    """Share of the scores' variance that each key explains, the most important at the top."""
    keys = sorted(shares, key=lambda k: shares[k])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.barh(range(len(keys)), [100 * shares[k] for k in keys], height=0.62, color=_LINE, alpha=0.85)
        for y, key in enumerate(keys):
            axes.text(100 * shares[key] + 1.5, y, f"{100 * shares[key]:.0f}", va="center", fontsize=9)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("explains so much of the scores' variance, %")
        name_rows(axes, [key_name(k) for k in keys])

    return draw(1.0 + 0.34 * len(keys), theme, paint)


def slices(points: Sequence[Sequence[Any]], key: str, measure: Measure, theme: Theme) -> bytes:
    """Score of the candidates against one key's value: a scale of numbers, else a row for each value. The ring is the best.

    points: [value, score, epochs]; the more epochs, the stronger the colour.
    """
    names, at = _rows_of(points)
    score, epochs = (np.array([p[i] for p in points], dtype=float) for i in (1, 2))
    jitter = np.random.default_rng(0).uniform(-0.22, 0.22, len(points)) if names else 0.0
    scaled = measure.scale * score
    x, y = (scaled, at + jitter) if names else (at, scaled)
    best, steps = int(np.argmax(score)), sorted(set(epochs.tolist()))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        ramp = LinearSegmentedColormap.from_list("epochs", [theme.faint, theme.ramp[1]])
        for i, step in enumerate(steps):
            color = ramp((i + 1) / len(steps))
            named = len(steps) <= 4 or i in (0, len(steps) - 1)
            label = f"{step:g} epoch{'' if step == 1 else 's'}" if named else None
            part = epochs == step
            axes.scatter(x[part], y[part], s=16, color=color, linewidths=0, alpha=0.85, label=label)
        axes.plot(x[best], y[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=_BEST)
        axes.grid(axis="x" if names else "y", linewidth=0.6)
        axes.set_axisbelow(True)
        if names:
            axes.set_xlabel(f"val {measure.name}, {measure.unit}")
            name_rows(axes, names)
        else:
            axes.set(xlabel=key_name(key), ylabel=f"val {measure.name}, {measure.unit}")
            low, high = np.quantile(at, [0.05, 0.95])
            if at.min() > 0 and high > 30 * low:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)

    return draw(1.5 + 0.34 * len(names) if names else 3.0, theme, paint)


def _rows_of(points: Sequence[Sequence[Any]]) -> tuple[list[str], np.ndarray]:
    """Names of rows, the last one at the top, and each point's row; no names and the numbers where these are a scale."""
    values = [p[0] for p in points]
    if any(isinstance(v, str) for v in values):
        best: dict[Any, float] = {}
        for value, score, _ in points:
            best[value] = max(score, best.get(value, score))
        distinct = sorted(best, key=lambda v: best[v])
    else:
        distinct = sorted(set(values), reverse=True)
        if len(distinct) > MAX_LISTED_VALUES or not all(float(v).is_integer() for v in distinct):
            return [], np.array(values, dtype=float)
    return [choice_name(v) if isinstance(v, str) else f"{v:g}" for v in distinct], np.array(
        [distinct.index(v) for v in values]
    )
