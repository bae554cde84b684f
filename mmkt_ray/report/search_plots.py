"""Figures of a search: heat maps, the best score over time, importance, slices. See plots.py.
Scores are on validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mmkt_ray.report.colors import ACCENT, BAD
from mmkt_ray.report.plots import cell, draw, legend, matrix, name_rows, shares, shorten
from mmkt_ray.report.svg import tip
from mmkt_ray.scoring.tables import metric_name
from mmkt_ray.search.search_results import CurvePoint, HeatMap, SlicePoint

MAX_LISTED_VALUES = 8  # more whole numbers are drawn as a scale
_BEST = BAD  # ring around the best candidate


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

    def with_unit(self, score: float) -> str:
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


def draw_heat_map(found: HeatMap, measure: Measure, ends: tuple[float, float]) -> str:
    """The best score of each cell, under it the number of candidates; cells without one are empty.

    ends: lowest and highest score of all maps that are compared, which have one scale.
    """
    low, reach = ends[0], max(ends[1] - ends[0], 1e-9)
    rows, columns = ([choice_name(n) for n in names] for names in (found.row_names, found.column_names))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        across, down = ([shorten(n, 18) for n in names] for names in (columns, rows))
        matrix(axes, across, down, 8, rotation=30 if len(columns) > 3 else 0)
        axes.set(xlabel=key_name(found.columns), ylabel=key_name(found.rows))
        for y, scores in enumerate(found.score):
            for x, score in enumerate(scores):
                if score is not None:
                    num = f"{found.candidates[y][x]:,}"
                    hover = f"{rows[y]} with {columns[x]}: {measure.with_unit(score)}, the best of {num} candidates"
                    strength = 0.1 + 0.9 * (score - low) / reach
                    cell(axes, x, y, ACCENT, strength, f"{measure.text(score)}\n×{num}", hover)

    return draw(min(1.5 + 0.46 * len(rows), 8), paint)


def draw_anytime(curve: Sequence[CurvePoint], measure: Measure) -> str:
    """The best score so far against the time of search."""
    at, best, count = (np.array(column, dtype=float) for column in zip(*curve, strict=True))
    unit, size = ("min", 60.0) if at[-1] > 180 else ("s", 1.0)
    scaled = measure.scale * best

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step(at / size, scaled, where="post", color=ACCENT, linewidth=2)
        dots = axes.scatter(at / size, scaled, s=[14] * (len(at) - 1) + [40], color=ACCENT)
        steps = zip(at / size, best, count, strict=True)
        tip(dots, *(f"{measure.with_unit(b)} after {t:.3g} {unit} and {int(n):,} candidates" for t, b, n in steps))
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

    return draw(2.9, paint)


def draw_importance(explained: Mapping[str, float]) -> str:
    """Share of the scores' variance that each key explains, the most important at the top."""
    keys = sorted(explained, key=lambda k: explained[k])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(range(len(keys)), [100 * explained[k] for k in keys], height=0.62, color=ACCENT)
        for y, (key, bar) in enumerate(zip(keys, bars.patches, strict=True)):
            tip(bar, f"{key_name(key)}: {100 * explained[key]:.1f} %")
            axes.text(100 * explained[key] + 1.5, y, f"{100 * explained[key]:.0f}", va="center", fontsize=9)
        shares(axes, 0.0, 100.0)
        axes.set_xlabel("explains so much of the scores' variance, %")
        name_rows(axes, [key_name(k) for k in keys])

    return draw(1.0 + 0.34 * len(keys), paint)


def draw_slices(points: Sequence[SlicePoint], key: str, measure: Measure, ends: tuple[float, float]) -> str:
    """Score of the candidates against one key's value: a scale of numbers, else a row for each value.
    The ring is the best.

    The more epochs, the stronger the colour. ends: lowest and highest score of all slices, which have one scale.
    """
    names, at = _rows_of(points)
    score, epochs = (np.array([p[i] for p in points], dtype=float) for i in (1, 2))
    jitter = np.random.default_rng(0).uniform(-0.22, 0.22, len(points)) if names else 0.0
    scaled = measure.scale * score
    x, y = (scaled, at + jitter) if names else (at, scaled)
    best, steps = int(np.argmax(score)), sorted(set(epochs.tolist()))
    low, high = (measure.scale * e for e in ends)
    limits = low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for i, step in enumerate(steps):
            named = len(steps) <= 4 or i in (0, len(steps) - 1)
            label = f"{step:g} epoch{'' if step == 1 else 's'}" if named else None
            part, alpha = np.flatnonzero(epochs == step).tolist(), 0.3 + 0.7 * (i + 1) / len(steps)
            dots = axes.scatter(x[part], y[part], s=16, color=ACCENT, alpha=alpha, linewidths=0, label=label)
            tip(
                dots,
                *(f"{_value(points[j][0])}: {measure.with_unit(points[j][1])} after {step:g} epochs" for j in part),
            )
        axes.plot(x[best], y[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=_BEST)
        axes.grid(axis="x" if names else "y", linewidth=0.6)
        axes.set_axisbelow(True)
        if names:
            axes.set(xlabel=f"val {measure.name}, {measure.unit}", xlim=limits)
            name_rows(axes, names)
        else:
            axes.set(xlabel=key_name(key), ylabel=f"val {measure.name}, {measure.unit}", ylim=limits)
            low, high = np.quantile(at, [0.05, 0.95])
            if at.min() > 0 and high > 30 * low:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        legend(figure, axes, num_columns=4)

    return draw(1.5 + 0.34 * len(names) if names else 3.0, paint)


def _value(value: Any) -> str:
    return choice_name(value) if isinstance(value, str) else f"{value:.4g}"


def _rows_of(points: Sequence[SlicePoint]) -> tuple[list[str], np.ndarray]:
    """Names of rows, the last one at the top, and each point's row;
    no names and the numbers where these are a scale."""
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
