"""What the results say, in plain words: the sentences at the top of the page. Scores are told in percent."""

from __future__ import annotations

from typing import Any

from mmkt_ray.evaluation.compare import DIFFERENT_SAMPLES
from mmkt_ray.evaluation.tables import points


def percent(value: float | None) -> str:
    """0.912 -> `91.2 %`."""
    return "–" if value is None else f"{100 * value:.1f} %"


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


def headline(task: str, results: dict[str, Any]) -> dict[str, str]:
    """The answer for one task: {task, tone (good|bad|plain), title, text}.

    Speaks of the models that `compare` chose: among the trained ones, and among the fused ones.
    """
    found = results["tasks"][task]
    rows = {r["model"]: r for r in found["rows"]}
    fused, single = rows.get(found["best_fused"]), rows.get(found["best_single"])
    if fused is None:
        title, text, tone = *_without_fusion(rows.get(found["best_trained"]), single), "plain"
    elif not fused["versus"]:
        tone, title = "plain", f"Whether fusing helps is not known: {fused['model']} stands alone"
        text = f"{_score(fused)} " + (
            "No single-modality model was scored on the same samples, so there is no fair difference."
            if fused["verdict"] == DIFFERENT_SAMPLES
            else "There is no single-modality model beside it."
        )
    else:
        tone, title, text = _with_fusion(fused, rows[fused["versus"]["model"]], results["confidence"])
    return {
        "task": task,
        "tone": tone,
        "title": title,
        "text": text + _better_baseline(rows, found, results) + _weak_yardstick(rows, results),
    }


def _with_fusion(fused: dict[str, Any], single: dict[str, Any], confidence: float) -> tuple[str, str, str]:
    name, other, change = fused["model"], single["model"], fused["versus"]["accuracy"]
    size = f"{100 * abs(change['value']):.1f} points"
    interval = f"{100 * confidence:g} % interval {points(change['low'])} to {points(change['high'])}"
    versus, extra = fused["versus"], fused["num_rows"] - fused["versus"]["num_rows"]
    ours, theirs = (percent(versus["shared_accuracy"][who]) for who in ("ours", "theirs"))
    there = f"On the {count(versus['num_rows'])} that {other} can read too: {ours}, " if extra else ""
    text = f"{_score(fused)} {there}{other} alone {theirs}. "
    text += f"Paired difference {points(change['value'])} points, {interval}."
    text += f" It also answers for {count(extra)} samples that {other} cannot read." if extra else ""
    if fused["verdict"] == "better":
        return "good", f"Fusing helps: {name} beats the best single modality by {size}", text
    if fused["verdict"] == "worse":
        return "bad", f"Fusing hurts: {name} is {size} below {other} alone", text
    return "plain", f"Fusing is not shown to help: {name} and {other} alone are too close to tell apart", text


def _without_fusion(best: dict[str, Any] | None, single: dict[str, Any] | None) -> tuple[str, str]:
    row = best or single
    if row is None:
        return "No model to speak of", "Only the majority class was scored."
    return f"{row['model']} is the best single modality", f"{_score(row)} No fused model was trained for this task."


def _score(row: dict[str, Any]) -> str:
    a = row["accuracy"]
    return (
        f"{row['model']} gets {percent(a['value'])} of {count(row['num_rows'])} test samples right "
        f"({100 * a['low']:.1f} to {100 * a['high']:.1f})."
    )


def _better_baseline(rows: dict[str, dict[str, Any]], found: dict[str, Any], results: dict[str, Any]) -> str:
    """A sentence if a baseline on the same store reaches the best trained model; else nothing."""
    best = rows.get(found["best_trained"])
    if best is None:
        return ""
    store = results["models"][best["model"]]["store"]
    baselines = [r for r in rows.values() if results["models"][r["model"]]["kind"] == "baseline"]
    baselines = [
        r for r in baselines if results["models"][r["model"]]["store"] == store and r["num_rows"] == best["num_rows"]
    ]
    top = max(baselines, key=lambda r: r["accuracy"]["value"], default=None)
    if top is None or top["accuracy"]["value"] < best["accuracy"]["value"]:
        return ""
    return f" Mind the baseline: {top['model']} reaches {percent(top['accuracy']['value'])} with no network."


def _weak_yardstick(rows: dict[str, dict[str, Any]], results: dict[str, Any]) -> str:
    """A sentence if a baseline on one modality is shown to beat the trained single modality that all are measured by."""
    models = results["models"]
    for row in rows.values():
        about = models[row["model"]]
        if about["kind"] == "baseline" and len(about["modalities"]) == 1 and row["verdict"] == "better":
            return f" The yardstick is weak: {row['model']} is better than {row['versus']['model']}, so more training may pay."
    return ""
