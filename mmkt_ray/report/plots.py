"""The report's figures. Every function returns an `<svg>` element;
`colors` are the stand-ins of the models' (colors.py).

Figures are narrow, so that their letters stay readable on a phone. Values are shown on hover (svg.py).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mmkt_ray.inference.training_record import Epoch
from mmkt_ray.report import svg
from mmkt_ray.report.colors import ACCENT, INK, LINE, ON_ACCENT, ON_MIDDLE, PAGE
from mmkt_ray.report.svg import tip
from mmkt_ray.report.words import percent
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.metrics import ClassScores
from mmkt_ray.scoring.results import ModelScores
from mmkt_ray.scoring.tables import points as in_points

WIDTH = 5.2  # inch
MAX_CONFUSION_CLASSES = 25  # above, the page lists the most confused pairs
MAX_NUMBERED_CLASSES = 12  # above, the cells of a confusion matrix have no numbers
MAX_F1_CLASSES = 30  # above, only the worst are drawn
LINE_STYLES = ("-", "--", "-.", ":")
_SETTINGS: Any = {
    "text.parse_math": False,  # a class called `$x` is a name, no formula
    "svg.fonttype": "none",  # text stays text
    "font.family": ["DejaVu Sans"],  # wider than most: what fits in it fits in the reader's font
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
}


def draw(height: float, paint: Callable[[Figure], None]) -> str:
    """A figure of WIDTH x `height` inch, painted, as an `<svg>` element."""
    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in scripts without a font here
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        if layout := figure.get_layout_engine():  # `savefig` would draw all of it once before, for the layout alone
            FigureCanvasSVG(figure)
            figure.dpi = 72  # as the format has it
            layout.execute(figure)
            figure.set_layout_engine(None)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return svg.for_page(out.getvalue())


def score_hover(name: str, interval: Interval) -> str:
    """`concat: 77.3 % (73.6 to 80.7)`, for a hover."""
    value, low, high = (f"{100 * interval[end]:.1f}".replace("-", "−") for end in ("value", "low", "high"))
    return f"{name}: {value} % ({low} to {high})"


def difference_hover(name: str, interval: Interval) -> str:
    """`concat less image: +9.8 points (+6.6 to +13.3)`, for a hover."""
    value, low, high = (in_points(interval[end]) for end in ("value", "low", "high"))
    return f"{name}: {value} points ({low} to {high})"


def shares(axes: Axes, low: float, high: float) -> None:
    """A scale of percent: 0 to 100, and further where values lie beyond; room for a number at the right."""
    low, high = min(low, 0.0), max(high, 100.0)
    axes.set_xlim(low - (0.04 * (high - low) if low < 0 else 0), high + 0.12 * (high - low))
    if (low, high) == (0.0, 100.0):
        axes.set_xticks(range(0, 101, 20))


def cell(axes: Axes, x: int, y: int, color: str, strength: float, text: str, hover: str) -> None:
    """A cell of a matrix, its colour as strong as `strength` (0..1), with a number in it."""
    strength = min(max(strength, 0.0), 1.0)
    patch = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=strength, linewidth=0)
    tip(axes.add_patch(patch), hover)
    if text:
        ink = INK if strength < 0.62 else ON_MIDDLE if strength < 0.8 else ON_ACCENT
        tip(axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=8), hover)


def matrix(axes: Axes, columns: Sequence[str], rows: Sequence[str], size: int, rotation: int = 90) -> None:
    """The frame of a matrix of cells: names of its columns and rows, lines between."""
    turned: Any = {"rotation": rotation, "rotation_mode": "anchor", "ha": "right" if rotation else "center"}
    turned |= {"va": "center" if rotation == 90 else "top"}
    axes.set_xticks(range(len(columns)), columns, fontsize=size, **turned)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def draw_score_bars(
    rows: Sequence[ModelScores], metrics: Sequence[Mapping[str, str]], colors: Mapping[str, str]
) -> str:
    """One bar per model, best first, with its interval; a diamond marks the second metric.
    metrics: two {name, title}."""
    main, second = metrics
    rows = sorted(rows, key=lambda r: r.interval(main["name"])["value"])
    scores = [(r.interval(main["name"]), r[second["name"]]) for r in rows]
    lowest = min(min(a["low"], (other or a)["value"]) for a, other in scores)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, (row, (a, other)) in enumerate(zip(rows, scores, strict=True)):
            hover = score_hover(f"{row.model}, {main['title']}", a)
            tip(axes.barh(y, 100 * a["value"], height=0.62, color=colors[row.model], alpha=0.8).patches[0], hover)
            line = axes.plot([100 * a["low"], 100 * a["high"]], [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
            tip(line[0], hover)
            if other:
                style: Any = {"markersize": 4.5, "markerfacecolor": PAGE, "markeredgecolor": INK}
                diamond = axes.plot(100 * other["value"], y, "D", **style)[0]
                tip(diamond, score_hover(f"{row.model}, {second['title']}", other))
            right = max(a["high"], other["value"] + 0.015 if other else 0.0, 0.0)
            axes.text(100 * right + 1.5, y, f"{100 * a['value']:.1f}", va="center", fontsize=9)
        shares(axes, 100 * lowest, 100.0)
        axes.set_xlabel(f"{main['title']}, % (line: interval, ◇: {second['title']})")
        name_rows(axes, [r.model for r in rows])

    return draw(1.0 + 0.34 * len(rows), paint)


def draw_differences(rows: Sequence[ModelScores], main: Mapping[str, str], colors: Mapping[str, str]) -> str:
    """Paired differences to the best single modality with intervals; right of zero is better. Rows without
    one are left out."""
    compared = [(r.model, r.versus.model, r.versus.interval(main["name"])) for r in rows if r.versus]
    compared.sort(key=lambda c: c[2]["value"])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for y, (model, other, d) in enumerate(compared):
            color, hover = colors[model], difference_hover(f"{model} less {other}", d)
            line = axes.plot(
                [100 * d["low"], 100 * d["high"]], [y, y], color=color, linewidth=4, solid_capstyle="round"
            )
            style: Any = {"markersize": 7, "color": color, "markeredgecolor": INK, "markeredgewidth": 0.8}
            for artist in (*line, *axes.plot(100 * d["value"], y, "o", **style)):
                tip(artist, hover)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.06)
        axes.set_xlabel(f"{main['title']} against the best single modality, points")
        name_rows(axes, [model for model, _, _ in compared])

    return draw(1.0 + 0.34 * len(compared), paint)


def draw_learning_curves(
    histories: Mapping[str, Sequence[Epoch]],
    task: str,
    main: Mapping[str, str],
    colors: Mapping[str, str],
    with_loss: bool = True,
) -> str:
    """Loss (train dashed, val solid) above, the main metric of `task` on val below where there is any, over epochs.

    histories: model -> epochs as training wrote them.
    """
    with_score = has_val(histories, task, main["name"])
    num, train = with_loss + with_score, "--" if with_score else "-"

    def paint(figure: Figure) -> None:
        panels = list(figure.subplots(num, sharex=True, squeeze=False)[:, 0])
        for number, (name, history) in enumerate(histories.items()):
            line = LINE_STYLES[number // 10 % len(LINE_STYLES)]
            if with_loss:
                _curve(
                    panels[0],
                    _series(history, lambda epoch: epoch.train_loss),
                    f"{name}, train loss",
                    colors[name],
                    train,
                )
                val_losses = _series(history, lambda epoch: epoch.val.loss if epoch.val else None)
                _curve(panels[0], val_losses, f"{name}, val loss", colors[name], line)
            if with_score:
                epochs, scores = _series(history, lambda epoch: epoch.score(main["name"], task))
                series = (epochs, [100 * s for s in scores])
                _curve(panels[-1], series, f"{name}, val {main['title']} in %", colors[name], line)
            panels[-1].plot([], [], color=colors[name], linestyle=line, label=name)
        if with_loss:
            panels[0].set_ylabel("loss (dashed: train)" if with_score else "train loss")
        if with_score:
            panels[-1].set_ylabel(f"val {main['title']}, %")
        panels[-1].set_xlabel("epoch")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels:
            axes.grid(axis="y", linewidth=0.6)
        legend(figure, panels[-1])

    return draw(0.8 + 1.8 * num + 0.12 * len(histories), paint)


def has_val(histories: Mapping[str, Sequence[Epoch]], task: str, metric: str) -> bool:
    """Whether any epoch was scored on val."""
    return any(_series(history, lambda epoch: epoch.score(metric, task))[0] for history in histories.values())


def _curve(axes: Axes, series: tuple[list[int], list[float]], name: str, color: str, line: str) -> None:
    """A line over epochs, and invisible points that tell their values on hover."""
    epochs, values = series
    axes.plot(epochs, values, color=color, linestyle=line, linewidth=1.2 if line == "--" else 1.8)
    if values:
        dots = axes.scatter(
            epochs, values, s=30 if len(epochs) > 2 else 12, color=color, alpha=0 if len(epochs) > 2 else 1
        )
        tip(dots, *(f"{name}, epoch {e}: {v:.4g}" for e, v in zip(epochs, values, strict=True)))


def draw_confusion(matrix_of: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Row-normalised confusion matrix: of the samples of a class (row), the share taken for each class (column),
    %."""
    counts = np.asarray(matrix_of, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes = len(class_names)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        names = [shorten(n, 18) for n in class_names]
        matrix(axes, names, names, 9 if num_classes <= 12 else 7)
        axes.set(xlabel="predicted", ylabel="label")
        for (y, x), value in np.ndenumerate(share):
            if counts[y, x]:
                text = f"{100 * value:.0f}" if num_classes <= MAX_NUMBERED_CLASSES and value >= 0.005 else ""
                hover = f"{class_names[y]} taken for {class_names[x]}: {percent(value)} ({counts[y, x]:,.0f} samples)"
                cell(axes, x, y, ACCENT, float(value), text, hover)

    return draw(min(1.8 + 0.45 * num_classes, WIDTH), paint)


def draw_predicted(points: Sequence[Sequence[float]], color: str, log_scale: bool) -> str:
    """Predictions against labels, pairs (label, prediction); the line is where they agree."""
    labels, said = np.array(points).T

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [min(labels.min(), said.min()), max(labels.max(), said.max())]
        axes.plot(ends, ends, color=INK, linewidth=1)
        dots = axes.scatter(labels, said, s=9, color=color, alpha=0.55, linewidths=0)
        tip(dots, *(f"label {a:.4g}, prediction {b:.4g}" for a, b in points))
        if log_scale and ends[0] > 0:
            axes.set(xscale="log", yscale="log")
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="label", ylabel="prediction")

    return draw(4.2, paint)


def draw_residuals(points: Sequence[Sequence[float]], color: str, log_scale: bool) -> str:
    """Label minus prediction against the prediction; pairs (label, prediction)."""
    labels, said = np.array(points).T

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=1)
        dots = axes.scatter(said, labels - said, s=9, color=color, alpha=0.55, linewidths=0)
        tip(dots, *(f"prediction {b:.4g}, label {a:.4g}, difference {a - b:+.4g}" for a, b in points))
        if log_scale and said.min() > 0:
            axes.set(xscale="log")
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="prediction", ylabel="label − prediction")

    return draw(3.2, paint)


def worst_classes(per_class: Mapping[str, ClassScores]) -> tuple[list[str], int]:
    """Classes with test samples, at most MAX_F1_CLASSES, the lowest F1 first, and how many there are."""
    names = sorted((n for n, c in per_class.items() if c.support), key=lambda n: per_class[n]["f1"] or 0.0)
    return names[:MAX_F1_CLASSES], len(names)


def draw_class_f1(per_class: Mapping[str, Mapping[str, ClassScores]], colors: Mapping[str, str]) -> str:
    """F1 of each class, worst at the top, of one or several models. per_class: model -> class.

    Classes without test samples are left out; of more than MAX_F1_CLASSES the worst of the first model are drawn.
    """
    names = worst_classes(next(iter(per_class.values())))[0][::-1]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (model, scores) in enumerate(per_class.items()):
            known = [(y, n, 100 * (scores[n]["f1"] or 0.0)) for y, n in enumerate(names) if n in scores]
            style: Any = {"facecolors": colors[model] if number == 0 else "none", "edgecolors": colors[model]}
            x, y = [k[2] for k in known], [k[0] for k in known]
            dots = axes.scatter(x, y, s=42, linewidths=1.8, label=model, zorder=3 - number, **style)
            if known:
                tip(dots, *(f"{n}, {model}: F1 {f1:.1f} % ({scores[n].support:,} samples)" for _, n, f1 in known))
        axes.set_xlim(-3, 103)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("F1, %")
        name_rows(axes, names)
        legend(figure, axes, "outside upper center")

    return draw(1.3 + 0.26 * len(names), paint)


def legend(figure: Figure, axes: Axes, where: Any = "outside lower center", num_columns: int = 2) -> None:
    """Outside of the axes; long names are cut."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, [shorten(n, 28) for n in names], loc=where, ncols=num_columns if len(names) > 1 else 1)


def shorten(text: str, length: int) -> str:
    """At most `length` characters on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Row names on the left, without ticks and line."""
    axes.set_yticks(range(len(names)), [shorten(n, 24) for n in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _series(history: Sequence[Epoch], value_of: Callable[[Epoch], float | None]) -> tuple[list[int], list[float]]:
    """Epochs and values of those epochs that have one."""
    points = [(epoch.epoch, value) for epoch in history if (value := value_of(epoch)) is not None]
    return [p[0] for p in points], [p[1] for p in points]
