"""A trained model on new labelled files: predictions, and how good they are.

<out>/predictions.parquet   as `predict` writes it, each prediction beside its label
<out>/metrics.json          what `score_files` returns

Axes: N labelled rows with a prediction, C classes known to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.prediction import NewShards, model_to_ship, predict
from mmkt_ray.inference.rows import classes_outside
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.intervals import Interval, bootstrap_intervals, percentiles
from mmkt_ray.scoring.metrics import ClassScores, FilesMetrics, FilesScores, PatternScores
from mmkt_ray.scoring.seeds import metric_seed_scores
from mmkt_ray.scoring.tables import interval_text, metric_name

MAX_RANKED = 1_000_000  # probabilities: of more, resamples of how they rank take minutes, and have no interval
MAX_CLASSES = 20  # in the terminal; metrics.json has all


def score_files(
    model_uri: str,
    inputs: Sequence[str],
    out_uri: str,
    reading: NewShards = NewShards(),  # noqa: B008  (immutable)
) -> FilesMetrics:
    """Predict labelled shards and score the predictions. Writes the files above.

    Returns what metrics.json holds, for the tasks that some row has a label of.
    Raises: ConfigError, DataError as `predict`; DataError if no row has a label.
    """
    model_uri = model_to_ship(model_uri)
    path = predict(model_uri, inputs, out_uri, reading)
    card = read_card(model_uri)
    if card is None:
        raise DataError(
            f"'{model_uri}' is no finished model folder of this version: run `mmkt train` with the same config"
        )
    config = parse_config(card.config)
    rows = storage.read_table(path)
    tasks = [t for t in config.model_tasks if f"{t}_label" in rows.column_names]
    if not tasks:
        columns = {t: s.columns[t] for s in config.samples.sources for t in config.model_tasks if t in s.columns}
        asked = ", ".join(f"{t} from column '{theirs}'" for t, theirs in columns.items())
        raise DataError(
            f"no row of {', '.join(inputs) or 'the sources'} has a label ({asked}): name every column with --column "
            f"OURS=THEIRS; the predictions are in '{path}'"
        )
    kinds = {t: config.tasks[t].kind for t in tasks}
    scored = {t: score_task(rows, t, kinds[t], card.class_names[t], config) for t in tasks}
    result = FilesMetrics(
        model=model_uri,
        inputs=list(inputs),
        predictions=path,
        num_rows=len(rows),
        confidence=config.evaluation.confidence,
        bootstrap_samples=config.evaluation.bootstrap_samples,
        tasks=scored,
    )
    result.write(storage.join(storage.absolute(out_uri), "metrics.json"))
    return result


def score_task(rows: pa.Table, task: str, kind: TaskKind, names: list[str], config: Config) -> FilesScores:
    """One task's scores over rows of predictions.parquet; see `score_files`."""
    labels = kind.encode(rows[f"{task}_label"], names)
    has_label, answered = labels.labelled, rows[f"{task}_pred"].is_valid().to_numpy()
    known = has_label & answered
    kept = rows.filter(pa.array(known))
    proba = kind.read_outputs(kept, task) if len(kept) else np.empty((0, kind.width(names)), np.float32)
    patterns = np.array([pattern_of(missing, config.model_modalities) for missing in kept["missing"].to_pylist()])
    labels = labels[known]
    by_pattern = {}
    for name in sorted(set(patterns), key=lambda n: (-n.count("+"), n)):
        here = patterns == name
        by_pattern[name] = PatternScores(**_scores(labels[here], proba[here], names, config))
    outside = known & kind.outside(rows[f"{task}_label"], names)
    unseen = classes_outside(rows[f"{task}_label"].filter(pa.array(outside)), kind, names) if outside.any() else {}
    return FilesScores(
        **{
            **_scores(labels, proba, names, config),
            "num_unseen": int(outside.sum()),
            "unseen": unseen,
            "num_unreadable": int((has_label & ~answered).sum()),
            "class_names": names,
            "patterns": by_pattern,
        }
    )


def pattern_of(missing: Sequence[str], modalities: Sequence[str]) -> str:
    """`image+text`: the modalities that a row has."""
    return "+".join(m for m in modalities if m not in missing)


def _scores(labels: Labels, proba: np.ndarray, names: list[str], config: Config) -> dict[str, Any]:
    """Metrics, as the kind has them, and intervals of the main ones."""
    kind, how = labels.kind, (config.evaluation.bootstrap_samples, config.seed)
    confidence = config.evaluation.confidence
    found: dict[str, Interval | None] = dict(
        bootstrap_intervals(
            labels, kind.predict(proba), kind.width(names), num_resamples=how[0], confidence=confidence, seed=how[1]
        )
    )
    for metric in kind.further if len(labels) else ():
        if metric not in kind.ranked or proba.size <= MAX_RANKED:
            found[metric] = percentiles(metric_seed_scores(metric, labels, [proba[None]], *how)[0], confidence)
    if loss := found.get("log_loss"):
        found["log_loss"] = {"value": -loss["value"], "low": -loss["high"], "high": -loss["low"]}
    return {**kind.scores(labels, proba, names), "intervals": found}


def scores_text(result: FilesMetrics) -> str:
    """The scores as text: by task the metrics with intervals,
    then a line for each class and each presence pattern."""
    percent = f"{100 * result.confidence:g} %"
    lines = [f"{result.num_rows} rows; brackets are {percent} intervals"]
    for task, found in result.tasks.items():
        lines.append(f"{task} ({task_kind(found.kind).name}): {found.num_rows} labelled rows{_left_out(found)}")
        lines += [f"  {metric_name(m)} {plain_text(m, interval)}" for m, interval in found.intervals.items()]
        classes = list(found.per_class.items())
        if classes:
            width = max(len("class"), *(len(name) for name, _ in classes[:MAX_CLASSES]))
            lines.append(f"  {'class':{width}}  precision  recall     F1   rows")
            lines += [f"  {name:{width}}  {_class_line(scores)}" for name, scores in classes[:MAX_CLASSES]]
        if len(classes) > MAX_CLASSES:
            lines.append(f"  and {len(classes) - MAX_CLASSES} more classes in metrics.json")
        for name, part in found.patterns.items():
            metrics = task_kind(found.kind).reported[:2]
            scores = ", ".join(f"{metric_name(m)} {plain_text(m, part.intervals.get(m))}" for m in metrics)
            lines.append(f"  rows with {name}: {part.num_rows}, {scores}")
    return "\n".join(lines)


def plain_text(metric: str, interval: Interval | None) -> str:
    """An interval in percent, of the log loss in nats."""
    if interval is None or metric != "log_loss":
        return interval_text(interval)
    return " ".join([f"{interval['value']:.3f}", f"[{interval['low']:.3f}, {interval['high']:.3f}]"])


def _left_out(found: FilesScores) -> str:
    named = ", ".join(f"'{name}' {num}" for name, num in found.unseen.items())
    parts = [
        f", {num} {text}"
        for num, text in (
            (found.num_unseen, f"of them with a class that the model does not know, which count as wrong ({named})"),
            (found.num_unreadable, "more without a modality that it reads, left out"),
        )
        if num
    ]
    return "".join(parts)


def _class_line(scores: ClassScores) -> str:
    values = (scores[name] for name in ("precision", "recall", "f1"))
    cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
    return f"{cells[0]:>9}  {cells[1]:>6}  {cells[2]:>5}  {scores.support:>5}"
