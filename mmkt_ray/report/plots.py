"""The report's figures as PNG. Every function draws on a given theme and returns the bytes.

Figures are narrow (5.2 inch at 100 CSS pixels to the inch), so that their letters stay readable on a phone. Colours are
those of Okabe & Ito (2008), told apart under the common kinds of colour blindness; a model keeps its colour throughout.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 5.2  # inch
DPI = 200  # twice the CSS pixel, for sharp letters on dense screens
MAX_CONFUSION_CLASSES = 25  # above, the page lists the most confused pairs
MAX_NUMBERED_CLASSES = 12  # above, the cells of a confusion matrix have no numbers
MAX_F1_CLASSES = 30  # above, only the worst are drawn
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_BASELINE_COLORS = ("#6E7681", "#8B949E", "#A8B0B8", "#C3C9CF")
_LINE_STYLES = ("-", "--", ":", "-.")
_SETTINGS = {
    "text.parse_math": False,  # a class called `$x` is a name, no formula
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Theme:
    """Colours of one page background; figures are transparent."""

    ink: str
    faint: str
    ramp: tuple[str, str]  # of a matrix: nothing, everything


LIGHT = Theme("#1f2328", "#d0d7de", ("#ffffff", "#0072B2"))
DARK = Theme("#e6edf3", "#3d444d", ("#161b22", "#56B4E9"))


def model_colors(kinds: Mapping[str, str]) -> dict[str, str]:
    """Model -> colour; `kinds` says which are baselines (greys). Beyond six trained models they repeat."""
    numbers = {"trained": 0, "baseline": 0}
    colors = {}
    for name, kind in kinds.items():
        palette = _BASELINE_COLORS if kind == "baseline" else _PALETTE
        colors[name] = palette[numbers[kind] % len(palette)]
        numbers[kind] += 1
    return colors


def draw(height: float, theme: Theme, paint: Callable[[Figure], None]) -> bytes:
    """A figure of WIDTH x `height` inch, painted and encoded."""
    settings: Any = _SETTINGS | {k: theme.ink for k in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    settings |= {"axes.edgecolor": theme.faint, "grid.color": theme.faint}
    out = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in scripts without a font here
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        figure.savefig(out, format="png", dpi=DPI, transparent=True, metadata={"Software": None})
    return out.getvalue()


def score_bars(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, str]], colors: Mapping[str, str], theme: Theme
) -> bytes:
    """One bar per model, best first, with its interval; a diamond marks the second metric. rows: of `results["tasks"][task]`;
    metrics: two {name, title}. Bars begin at zero; the part of an interval below it is cut off."""
    main, second = metrics
    rows = sorted(rows, key=lambda r: r[main["name"]]["value"])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            a, color = row[main["name"]], colors[row["model"]]
            axes.barh(y, 100 * max(a["value"], 0.0), height=0.62, color=color, alpha=0.85)
            axes.plot([100 * a["low"], 100 * a["high"]], [y, y], color=theme.ink, linewidth=1.6, solid_capstyle="butt")
            other = row[second["name"]]["value"] if row[second["name"]] else 0.0
            if row[second["name"]]:
                style: Any = {"markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": theme.ink}
                axes.plot(100 * other, y, "D", **style)
            axes.text(
                100 * max(a["high"], other + 0.015, 0.0) + 1.5,
                y,
                f"{100 * a['value']:.1f}",
                va="center",
                fontsize=9,
            )
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f"{main['title']}, % (line: interval, ◇: {second['title']})")
        name_rows(axes, [r["model"] for r in rows])

    return draw(1.0 + 0.34 * len(rows), theme, paint)


def differences(
    rows: Sequence[Mapping[str, Any]], main: Mapping[str, str], colors: Mapping[str, str], theme: Theme
) -> bytes:
    """Paired differences to the best single modality with intervals; right of zero is better.

    The scale is that of the models nearest to zero; those far off it are told as a number at the edge.
    """
    rows = sorted((r for r in rows if r["versus"]), key=lambda r: r["versus"][main["name"]]["value"])
    reach = 100 * np.array(
        [max(abs(r["versus"][main["name"]]["low"]), abs(r["versus"][main["name"]]["high"])) for r in rows]
    )
    edge = 1.15 * max(reach[reach <= max(10.0, 3 * reach.min())].max(initial=0.0), 1.0)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=theme.ink, linewidth=1)
        for y, row in enumerate(rows):
            d, color = row["versus"][main["name"]], colors[row["model"]]
            if reach[y] > edge:
                low = d["value"] < 0
                text = f"{100 * d['value']:+.1f}".replace("-", "−")
                axes.text(
                    -edge if low else edge,
                    y,
                    f"◀ {text}" if low else f"{text} ▶",
                    va="center",
                    ha="left" if low else "right",
                    fontsize=9,
                )
                continue
            axes.plot(
                [100 * d["low"], 100 * d["high"]], [y, y], color=color, linewidth=4, alpha=0.85, solid_capstyle="round"
            )
            axes.plot(
                100 * d["value"], y, "o", markersize=7, color=color, markeredgecolor=theme.ink, markeredgewidth=0.8
            )
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(-1.05 * edge, 1.05 * edge)
        axes.set_xlabel(f"{main['title']} against the best single modality, points")
        name_rows(axes, [r["model"] for r in rows])

    return draw(1.0 + 0.34 * len(rows), theme, paint)


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    task: str,
    main: Mapping[str, str],
    colors: Mapping[str, str],
    theme: Theme,
) -> bytes:
    """Loss (train dashed, val solid) above, the main metric of `task` on val below, over epochs; the kept epochs are not marked.

    histories: model -> epochs as training wrote them: {epoch, train_loss, val: {loss, <metric>: {task}} or None}.
    """

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, sharex=True)
        for number, (name, history) in enumerate(histories.items()):
            style = {"color": colors[name], "linewidth": 1.8}
            trained, val = (_series(history, k) for k in (("train_loss",), ("val", "loss")))
            top.plot(*trained, **(style | {"linewidth": 1.0}), linestyle="--")
            top.plot(*val, **style)
            line = _LINE_STYLES[number // len(_PALETTE) % len(_LINE_STYLES)]
            epochs, scores = _series(history, ("val", main["name"], task))
            bottom.plot(
                epochs,
                [100 * s for s in scores],
                **style,
                linestyle=line,
                label=name,
                marker="." if len(epochs) < 3 else None,
            )
        top.set_ylabel("loss (dashed: train)")
        bottom.set_ylabel(f"val {main['title']}, %")
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, bottom):
            axes.grid(axis="y", linewidth=0.6)
        figure.legend(
            *bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2 if len(histories) > 1 else 1
        )

    return draw(4.4 + 0.12 * len(histories), theme, paint)


def confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str], theme: Theme) -> bytes:
    """Row-normalised confusion matrix: of the samples of a class (row), the share taken for each class (column), %."""
    counts = np.asarray(matrix, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes = len(class_names)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(share, cmap=LinearSegmentedColormap.from_list("share", theme.ramp), vmin=0, vmax=1)
        names, size = [shorten(n, 18) for n in class_names], 9 if num_classes <= 12 else 7
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(num_classes), names, fontsize=size)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="label")
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        for (y, x), value in np.ndenumerate(share) if num_classes <= MAX_NUMBERED_CLASSES else ():
            if value >= 0.005:
                strong = value > 0.55
                color = ("#ffffff" if theme is LIGHT else "#0d1117") if strong else theme.ink
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)

    return draw(min(1.8 + 0.45 * num_classes, WIDTH), theme, paint)


def predicted(points: Sequence[Sequence[float]], color: str, log_scale: bool, theme: Theme) -> bytes:
    """Predictions against labels, pairs (label, prediction); the line is where they agree."""
    labels, said = np.array(points).T

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [min(labels.min(), said.min()), max(labels.max(), said.max())]
        axes.plot(ends, ends, color=theme.ink, linewidth=1)
        axes.scatter(labels, said, s=9, color=color, alpha=0.55, linewidths=0)
        if log_scale and ends[0] > 0:
            axes.set(xscale="log", yscale="log")
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="label", ylabel="prediction")

    return draw(4.2, theme, paint)


def residuals(points: Sequence[Sequence[float]], color: str, log_scale: bool, theme: Theme) -> bytes:
    """Label minus prediction against the prediction; pairs (label, prediction)."""
    labels, said = np.array(points).T

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=theme.ink, linewidth=1)
        axes.scatter(said, labels - said, s=9, color=color, alpha=0.55, linewidths=0)
        if log_scale and said.min() > 0:
            axes.set(xscale="log")
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="prediction", ylabel="label − prediction")

    return draw(3.2, theme, paint)


def class_f1(
    per_class: Mapping[str, Mapping[str, Mapping[str, float]]], colors: Mapping[str, str], theme: Theme
) -> bytes:
    """F1 of each class, worst at the top, of one or several models. per_class: model -> class -> {f1, support}.

    Classes without test samples are left out; of more than MAX_F1_CLASSES the worst of the first model are drawn.
    """
    first = next(iter(per_class.values()))
    names = sorted((n for n in first if first[n]["support"]), key=lambda n: first[n]["f1"] or 0.0)[:MAX_F1_CLASSES][
        ::-1
    ]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (model, scores) in enumerate(per_class.items()):
            values = [100 * (scores[n]["f1"] or 0.0) if n in scores else np.nan for n in names]
            face = colors[model] if number == 0 else "none"
            axes.scatter(
                values,
                range(len(names)),
                s=42,
                facecolors=face,
                edgecolors=colors[model],
                linewidths=1.8,
                label=model,
                zorder=3 - number,
            )
        axes.set_xlim(-3, 103)
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("F1, %")
        name_rows(axes, names)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)

    return draw(1.3 + 0.26 * len(names), theme, paint)


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


def _series(history: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[list[int], list[float]]:
    """Epochs and values of those epochs that have one."""
    points = []
    for number, record in enumerate(history, start=1):
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            points.append((record.get("epoch", number), float(value)))
    return [p[0] for p in points], [p[1] for p in points]
