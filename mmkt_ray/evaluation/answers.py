"""Plain answers from paired tests between the models of a run: what a modality adds, what suffices, where fusing hurts.

For each modality that the best fused model reads, that model is compared with the best one that reads all the others,
row by row; both were trained with the same settings, or the answer says what differs. Without such variants the logistic
regressions on the same features answer. The rules, on the paired bootstrap interval of the difference:

    adds, hurts   the interval leaves out zero, and so does the test after correction for all comparisons of the run
    suffices      not that, and a gain of NEGLIGIBLE or more lies outside the interval: the others alone suffice
    unclear       anything else: these rows cannot tell

Sources: McNemar 1947 (https://doi.org/10.1007/BF02295996) in its exact form, Holm 1979 (https://www.jstor.org/stable/4615733).
Axes: N rows that both models predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ttest_rel

from mmkt_ray import storage
from mmkt_ray.evaluation.compare import read_optional
from mmkt_ray.evaluation.intervals import Interval, paired_difference
from mmkt_ray.evaluation.rows import read_predictions
from mmkt_ray.evaluation.seeds import mean_interval
from mmkt_ray.evaluation.tables import points

NEGLIGIBLE = 0.01  # a gain below this is none


def answer_tasks(run_uri: str, results: dict[str, Any]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """task -> answers, and what a reader must know about them. `results` is what `compare` returned.

    An answer: {kind, sentence, modalities (in question), fused, rest (models), rest_modalities, metric, value, low, high,
    p, p_holm, num_rows, scores {fused, rest}, source: trained|baseline, differs {setting: [fused's, rest's]}}.
    """
    answers: dict[str, list[dict[str, Any]]] = {}
    notes = []
    for task in results["tasks"]:
        models = models_of(run_uri, results, task)
        pairs = _pairs([m for m in models if m["kind"] == "trained"], results["tasks"][task]["best_fused"])
        if not pairs:
            pairs = _pairs([m for m in models if m["kind"] == "baseline"], None)
            if pairs:
                notes.append(
                    f"{task}: no two trained variants differ by a modality, so logistic regression on the same features answers."
                )
        compared = [_compare(run_uri, results, task, *pair) for pair in pairs]
        answers[task] = [a for a in compared if a]
    every = [a for found in answers.values() for a in found]
    for answer, p in zip(every, holm([a["p"] for a in every]), strict=True):
        answer["p_holm"] = p
        answer["kind"] = decide(answer, p, results["confidence"])
    for task, found in answers.items():
        for answer in found:
            answer["sentence"] = sentence(task, answer)
    return answers, notes


def decide(difference: dict[str, Any] | Interval, p: float, confidence: float) -> str:
    """adds | hurts | suffices | unclear, by the rules at the top of this file."""
    shown = p < 1 - confidence
    if shown and difference["low"] > 0:
        return "adds"
    if shown and difference["high"] < 0:
        return "hurts"
    return "suffices" if difference["high"] < NEGLIGIBLE else "unclear"


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in the given order (Holm's step-down)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else []
    return [float(p) for p in corrected]


def paired_test(ours: np.ndarray, theirs: np.ndarray, confidence: float, num_resamples: int) -> dict[str, Any]:
    """Row scores (N,) of two models -> value, low, high of their mean difference, and p that it is zero.

    p is the exact McNemar test where scores are right or wrong, then the interval is that of `paired_difference`; else it
    is the t test beside a bootstrap of rows.
    """
    if np.isin([ours, theirs], (0, 1)).all():
        a, b = ((1 - scores).astype(int) for scores in (ours, theirs))
        options: Any = {"confidence": confidence, "num_resamples": num_resamples}
        found = paired_difference(np.zeros(len(ours), int), a, b, num_classes=2, **options)
        assert found is not None  # accuracy is always defined
        better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
        return {**found, "p": float(binomtest(better, better + worse).pvalue) if better + worse else 1.0}
    gain = ours - theirs
    p = ttest_rel(ours, theirs).pvalue if np.ptp(gain) > 0 else float(not gain.any())
    return {**mean_interval(gain[None], num_resamples, confidence, seed=0), "p": float(p)}


def sentence(task: str, answer: dict[str, Any]) -> str:
    """The answer in words; differences in points."""
    what, rest = _and(answer["modalities"]), _and(answer["rest_modalities"])
    several = len(answer["modalities"]) > 1
    interval = f"[{points(answer['low'])}, {points(answer['high'])}]"
    ends = sorted(abs(answer[end]) for end in ("low", "high"))
    sizes = f"{100 * abs(answer['value']):.1f} points [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    scores = {k: f"{100 * v:.1f} %" for k, v in answer["scores"].items()}
    models = f"{answer['fused']} {scores['fused']}, {answer['rest']} {scores['rest']}"
    if answer["metric"] == "f1_samples":
        models = f"mean F1 of a sample's classes: {models}"
    text = {
        "adds": f"{what} {'add' if several else 'adds'} {sizes} to {rest} for {task} ({models}).",
        "hurts": f"Fusing hurts {task}: adding {what} to {rest} costs {sizes} ({models}).",
        "suffices": f"{rest} alone {'suffice' if len(answer['rest_modalities']) > 1 else 'suffices'} for {task}: "
        f"adding {what} changes {points(answer['value'])} points {interval} ({models}).",
        "unclear": f"Whether {what} {'help' if several else 'helps'} {rest} for {task} is not shown: "
        f"{points(answer['value'])} points {interval} ({models}).",
    }[answer["kind"]]
    if answer["differs"]:
        settings = "; ".join(f"{key} {ours} and {theirs}" for key, (ours, theirs) in answer["differs"].items())
        text += f" Their training differs: {settings}."
    return text


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


# --- which models are compared ---------------------------------------------------------------------------------------


def models_of(run_uri: str, results: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """The task's scored models: {name, kind, reads (modalities, of this task), val, training (settings or None)}."""
    models = []
    for row in results["tasks"][task]["rows"]:
        about = results["models"][row["model"]]
        card = {} if about["kind"] == "baseline" else _card(run_uri, about)
        config = card.get("config", {})
        inputs = config.get("tasks", {}).get(task, {}).get("inputs")
        models.append(
            {
                "name": row["model"],
                "kind": about["kind"],
                "reads": tuple(m for m in about["modalities"] if inputs is None or m in inputs),
                "val": row["val_accuracy"] if row["val_accuracy"] is not None else row["accuracy"]["value"],
                "training": config.get("training"),
            }
        )
    return models


def _card(run_uri: str, about: dict[str, Any]) -> dict[str, Any]:
    return read_optional(storage.join(run_uri, about["folder"], "config.json")) or {}


def _pairs(models: list[dict[str, Any]], fused_name: str | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(fused model, model that reads less) for each modality left out, and for the best single modality if not among them.

    Of several models that read the same, one with the fused model's training settings is taken before the others, then
    the best on val.
    """
    fused = [m for m in models if len(m["reads"]) > 1 and fused_name in (None, m["name"])]
    if not fused:
        return []
    ours = max(fused, key=lambda m: (len(m["reads"]), m["val"]))
    singles = [m for m in models if len(m["reads"]) == 1 and {*m["reads"]} < {*ours["reads"]}]
    wanted = [{*ours["reads"]} - {m} for m in ours["reads"]]
    if singles:
        wanted.append({*max(singles, key=lambda m: m["val"])["reads"]})
    pairs = {}
    for rest in wanted:
        theirs = [m for m in models if {*m["reads"]} == rest]
        if theirs:
            pairs[tuple(sorted(rest))] = ours, max(theirs, key=lambda m: (m["training"] == ours["training"], m["val"]))
    return list(pairs.values())


def _compare(
    run_uri: str, results: dict[str, Any], task: str, fused: dict[str, Any], rest: dict[str, Any]
) -> dict[str, Any] | None:
    """The answer without its words; None if the two predicted no row in common."""
    ours, theirs = (predictions_of(run_uri, results, m["name"], task) for m in (fused, rest))
    both = ours.join(theirs.add_suffix("_rest"), how="inner")
    both = both[both["label"] == both["label_rest"]]
    if both.empty:
        return None
    ours_scores, theirs_scores = (row_scores(both["label"], both[c]) for c in ("pred", "pred_rest"))
    num_resamples = _num_resamples(run_uri, results, fused["name"])
    training = [m["training"] or {} for m in (fused, rest)]
    return {
        "modalities": [m for m in fused["reads"] if m not in rest["reads"]],
        "fused": fused["name"],
        "rest": rest["name"],
        "rest_modalities": list(rest["reads"]),
        "metric": "f1_samples" if isinstance(both["label"].iloc[0], tuple) else "accuracy",
        **paired_test(ours_scores, theirs_scores, results["confidence"], num_resamples),
        "num_rows": len(both),
        "scores": {"fused": float(ours_scores.mean()), "rest": float(theirs_scores.mean())},
        "source": fused["kind"],
        "differs": {k: [t.get(k) for t in training] for k in training[0] if training[0][k] != training[1].get(k)},
    }


def _num_resamples(run_uri: str, results: dict[str, Any], name: str) -> int:
    folder = results["models"][name]["folder"]
    return int(storage.read_json(storage.join(run_uri, folder, "metrics.json"))["bootstrap_samples"])


# --- predictions -----------------------------------------------------------------------------------------------------


def predictions_of(run_uri: str, results: dict[str, Any], name: str, task: str) -> pd.DataFrame:
    """Columns label, pred and proba of `read_predictions` of one of the run's models."""
    about = results["models"][name]
    uri = storage.join(run_uri, about["folder"], f"predictions-{results['split']}.parquet")
    model = about["name"] if about["kind"] == "baseline" else None
    return read_predictions(uri, task, model, ("label", "pred", "proba"))


def row_scores(labels: Sequence[Any], pred: Sequence[Any]) -> np.ndarray:
    """(N,) score of each row: right or wrong; of sets of classes their F1, 1 where both are empty."""
    return np.array([_f1(a, b) if isinstance(a, tuple) else float(a == b) for a, b in zip(labels, pred, strict=True)])


def _f1(label: tuple[str, ...], pred: tuple[str, ...]) -> float:
    return 2 * len({*label} & {*pred}) / (len(label) + len(pred)) if label or pred else 1.0
