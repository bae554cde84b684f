"""Results as plain text, for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mmkt_ray import storage
from mmkt_ray.kinds.number_metrics import IN_UNITS
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.results import ModelScores, Recommended, ResultsFile, TaskResults

_WIDTH = 100


def points(value: float) -> str:
    """0.031 -> `+3.1`, with a true minus sign; in percentage points."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval_text(interval: Interval | None, form: str = ".1f", metric: str = "") -> str:
    """An interval in percentage points, each number in this format;
    of an error in the labels' units with four digits."""
    if interval is None:
        return "undefined"
    factor, form = (1, form.replace(".1f", ".4g")) if metric in IN_UNITS else (100, form)
    value, low, high = (format(factor * interval[end], form) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def metric_name(metric: str) -> str:
    """`macro_f1` -> `macro-F1`, `balanced_accuracy` -> `balanced accuracy`."""
    words = {"f1": "F1", "auroc": "AUROC", "r2": "R2", "rmse": "RMSE", "mae": "MAE", "spearman": "Spearman"}
    first, *rest = (words.get(part, part) for part in metric.split("_"))
    if first in ("macro", "micro", "weighted", "samples") and len(rest) == 1:
        return f"{first}-{rest[0]}"
    return " ".join([first, *rest])


def score_text(metric: str, score: float) -> str:
    """A score as an objective has it, higher is better: in percent; the log loss, which is negated there, in nats."""
    return f"{-score:.3f}" if metric == "log_loss" else f"{100 * score:.1f}"


def metric_text(metric: str, interval: Interval | None) -> str:
    """An interval of such scores, or of their differences."""
    if interval is None or metric != "log_loss":
        return interval_text(interval, metric=metric)
    value, low, high = (f"{-interval[end] + 0.0:.3f}" for end in ("value", "high", "low"))
    return f"{value} [{low}, {high}]"


def comparison_table(results: ResultsFile) -> str:
    """The results as text of at most 100 columns: scores and differences in percent (points), best accuracy first
    among the models that were scored on the same samples."""
    lines = []
    for task, found in results.tasks.items():
        single = found.best_single
        lines += [f"{task}: {kind_text(found)}; best single modality: {single or 'none'}"[:_WIDTH]]
        percent = f"{100 * results.confidence:g} %"
        metrics = task_kind(found.kind).reported[:2]
        names = [metric_name(metric) for metric in metrics]
        cells = [["model", *(f"{name} [{percent}]" for name in names), f"{names[0]} vs best single"]]
        titles = {}  # line of the table -> what stands above it
        for rows in same_samples(found.rows, metrics[0]):
            titles[len(cells)] = f" on {rows[0].num_rows:,} samples:"
            cells += [
                [r.model, *(interval_text(r[m], metric=m) for m in metrics), _difference(r, metrics[0])] for r in rows
            ]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        widths[0] = min(widths[0], _WIDTH - 2 - sum(widths[1:]) - 6)
        for number, row in enumerate(cells):
            lines += [titles[number]] if number in titles else []
            row[0] = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
            lines.append(("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip())
        lines += [found.headline.title if found.headline else "", ""]
    return "\n".join([*lines, *results.notes]).rstrip()


def kind_text(found: TaskResults) -> str:
    """What a task's labels are: `9 classes`, `numbers`."""
    return f"{found.num_classes} classes" if task_kind(found.kind).classes else "numbers"


def same_samples(rows: Sequence[ModelScores], main: str) -> list[list[ModelScores]]:
    """A task's rows by the samples that they were scored on, the most samples first, and in each group the best by
    the main metric first: scores on different samples have no order."""
    groups: dict[str, list[ModelScores]] = {}
    for row in sorted(rows, key=lambda r: -r.interval(main)["value"]):
        groups.setdefault(row.rows_id, []).append(row)
    return sorted(groups.values(), key=lambda group: (-group[0].num_rows, -len(group)))


def recommendation_text(results: ResultsFile, run_uri: str) -> str:
    """Which model to ship, why, where it is, and the command that uses it: of a run's folder it takes this model.
    Empty if there is none."""
    chosen = results.recommended
    if chosen is None:
        return ""
    folder = path_of(chosen, run_uri)
    lines = [f"Ship {chosen.model}.", *chosen.why]
    if (others := {t: m for t, m in chosen.per_task.items() if m != chosen.model}) and len(chosen.tasks) > 1:
        lines.append(f"For one task alone: {', '.join(f'{m} for {t}' for t, m in others.items())}.")
    python = f"in Python: mmkt_ray.load({run_uri!r}).predict(df)"
    return "\n".join([*lines, f"model: {folder}", f"use it: {predict_command(run_uri)}", python])


def path_of(chosen: Recommended, run_uri: str) -> str:
    """Where the recommended model lies."""
    return storage.join(run_uri, chosen.folder)


def predict_command(folder: str) -> str:
    """The command that predicts new shards with a model, or with the one that a run recommends."""
    return f"mmkt predict {shlex.quote(folder)} NEW_SHARDS --out FOLDER"


def _difference(row: ModelScores, main: str) -> str:
    if not row.versus:
        return row.verdict
    return f"{interval_text(row.versus[main], '+.1f')} {row.verdict}"
