"""All models of a run side by side, each against the best single modality on the same samples. Reads result files only.

The best single modality of a task is the trained variant that reads exactly one modality with the highest accuracy on
`val` (on `test`, with a note, if there is no `val`); without any the best logistic regression on one modality.
Differences are paired over the samples that both models predicted. Models that share none were scored on different
samples; their scores are shown, not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.intervals import METRICS, paired_difference, verdict
from mmkt_ray.evaluation.metrics import is_right
from mmkt_ray.evaluation.rows import Outcomes, read_outcomes, read_predictions

DIFFERENT_SAMPLES = "different samples"
REFERENCE = "best single modality"


def compare(run_uri: str) -> dict[str, Any]:
    """Compare what was evaluated in a run folder; written to `<run>/report/results.json` and returned:

        run, split, confidence, main (the trained model chosen on val over all tasks), notes [..]
        models: {name: {kind: trained|baseline, name (in its folder), modalities, fusion, sharing, num_params,
                        training_s, store, folder, folder_to_ship (None: the majority class)}}
        tasks: {task: {kind, num_classes, selected_on: val|test, best, best_trained, best_fused (see
                       `smallest_of_best`), best_single (names),
                       rows: [{model, num_rows, num_unseen, accuracy, macro_f1 (intervals or None), balanced_accuracy,
                               val_accuracy,
                               versus: {model, num_rows, shared_accuracy: {ours, theirs}, accuracy, macro_f1
                                        (paired differences)} or None, verdict}]}}

    Reads the variants of `<run>/run.json` ({name: {model: folder}}), without it all `<run>/models/*/metrics.json`, and
    `<run>/baselines/*/metrics.json`. Raises: DataError if nothing was evaluated.
    """
    run = read_optional(storage.join(run_uri, "run.json")) or {}
    models = evaluated_models(run_uri, run)
    if not models:
        raise DataError(f"nothing is evaluated in '{run_uri}': run `mmkt evaluate` (or `mmkt run`) first")
    tasks = sorted({t for m in models for t, record in m.tasks.items() if record.get("num_rows")})
    results = {
        "run": run.get("name") or run_uri.rstrip("/").rpartition("/")[2],
        "split": models[0].record["split"],
        "confidence": models[0].record["confidence"],
        "models": {m.name: m.describe() for m in models},
        "tasks": {t: _compare_task(t, [m for m in models if m.tasks.get(t, {}).get("num_rows")]) for t in tasks},
    }
    results |= {"main": _main_model(models, results["tasks"]), "notes": _notes(results, run)}
    storage.write_json(storage.join(run_uri, "report", "results.json"), results)
    return results


def read_optional(uri: str) -> Any:
    """A JSON file, or None if it is not there."""
    try:
        return storage.read_json(uri)
    except FileNotFoundError:
        return None


# --- the models of a run -----------------------------------------------------------------------------------------


@dataclass
class Evaluated:
    """One evaluated model: its record (see `evaluate_model`) and its predictions, read when needed."""

    name: str  # in the run; distinct
    kind: str  # trained | baseline
    folder: str  # relative to the run folder, or absolute
    record: dict[str, Any]
    predictions_uri: str
    card: dict[str, Any] = field(default_factory=dict)
    _outcomes: dict[str, Outcomes] = field(default_factory=dict)  # of the task that was last asked for

    @property
    def tasks(self) -> dict[str, Any]:
        return self.record["tasks"]

    def describe(self) -> dict[str, Any]:
        """What the results say about a model beside its scores."""
        model = self.card.get("config", {}).get("model", {})
        fusion = model.get("fusion") or {}
        depth = f" (depth {fusion['depth']})" if fusion.get("name") == "hierarchical" else ""
        return {
            "kind": self.kind,
            "name": self.record["name"],
            "modalities": self.record["modalities"],
            "fusion": f"{fusion['name']}{depth}" if fusion and len(self.record["modalities"]) > 1 else None,
            "sharing": model.get("sharing"),
            "num_params": self.record.get("num_params"),
            "training_s": self.record.get("training_s"),
            **({"num_train_rows": self.record["num_train_rows"]} if "num_train_rows" in self.record else {}),
            "store": self.record.get("store"),
            "folder": self.folder,
            "folder_to_ship": self.folder if self.kind == "trained" else self.record.get("folder_to_ship"),
        }

    def predictions(self, task: str) -> pd.DataFrame:
        """Columns label and pred of `read_predictions`."""
        return read_predictions(self.predictions_uri, task, self._own_name())

    def outcomes(self, task: str) -> Outcomes:
        """The same as codes."""
        if task not in self._outcomes:
            self._outcomes.clear()
            self._outcomes[task] = read_outcomes(self.predictions_uri, task, self._own_name())
        return self._outcomes[task]

    def shares_samples(self, other: Evaluated, task: str) -> bool:
        """True if both predicted some sample of the task."""
        ours, theirs = self.outcomes(task).ids, other.outcomes(task).ids
        return bool(np.array_equal(ours, theirs) and len(ours)) or bool(np.isin(ours, theirs).any())

    def _own_name(self) -> str | None:
        """What a file of several models calls this one."""
        return self.record["name"] if self.kind == "baseline" else None


def evaluated_models(run_uri: str, run: dict[str, Any]) -> list[Evaluated]:
    """What was evaluated in a run folder, trained models first; run: its run.json."""
    return [*_trained(run_uri, run), *_baselines(run_uri, run)]


def _trained(run_uri: str, run: dict[str, Any]) -> list[Evaluated]:
    """Variants in the order of run.json, else the folders under models/."""
    folders = {name: v["model"] for name, v in (run.get("variants") or {}).items()}
    if not folders:
        found = storage.glob(storage.join(run_uri, "models", "*", "metrics.json"))
        names = [f.path.split("/")[-2] for f in found]
        folders = {name: f"models/{name}" for name in names}
    models = []
    for name, folder in folders.items():
        uri = storage.join(run_uri, folder)
        if record := read_optional(storage.join(uri, "metrics.json")):
            card = read_optional(storage.join(uri, "config.json")) or {}
            predictions = storage.join(uri, f"predictions-{record['split']}.parquet")
            models.append(Evaluated(name, "trained", folder, record, predictions, card))
    return models


def _baselines(run_uri: str, run: dict[str, Any]) -> list[Evaluated]:
    """Baselines of the stores that variants of run.json were trained on (of all, if it names none).

    Where there are several stores, the store's name is in theirs, without its digest if that leaves it unique.
    """
    named = {str(v["store"]).rpartition("/")[2] for v in run.get("variants", {}).values() if "store" in v}
    found = [f.path.split("/")[-2] for f in storage.glob(storage.join(run_uri, "baselines", "*", "metrics.json"))]
    stores = [store for store in found if store in named or not named]
    kinds = [store.rpartition("-")[0] or store for store in stores]
    models = []
    for store, kind in zip(stores, kinds, strict=True):
        folder = f"baselines/{store}"
        whole = storage.read_json(storage.join(run_uri, folder, "metrics.json"))
        shared = {k: v for k, v in whole.items() if k != "models"}
        uri = storage.join(run_uri, folder, f"predictions-{whole['split']}.parquet")
        for name, record in whole["models"].items():
            place = kind if kinds.count(kind) == 1 else store
            shown = name if len(stores) == 1 else f"{name} ({place})"
            models.append(Evaluated(shown, "baseline", folder, {**shared, **record}, uri))
    return models


# --- one task ----------------------------------------------------------------------------------------------------


def _compare_task(task: str, models: list[Evaluated]) -> dict[str, Any]:
    """The rows of one task; `models` were all scored on it."""
    on = _selected_on(task, models)
    scores = selection_scores(task, models)
    trained = [m for m in models if m.kind == "trained"]
    fused = [m for m in trained if len(m.record["modalities"]) > 1]
    single = best_single(task, models, scores, relative_to=_best(fused or trained, scores))
    return {
        "kind": models[0].tasks[task].get("kind", "multiclass"),
        "num_classes": len(models[0].tasks[task]["class_names"]),
        "selected_on": on,
        "best": _name(_best(models, scores)),
        "best_trained": _name(smallest_of_best(task, trained, scores)),
        "best_fused": _name(smallest_of_best(task, fused, scores)),
        "best_single": _name(single),
        "rows": [_row(task, m, best_single(task, models, scores, relative_to=m)) for m in models],
    }


def _selected_on(task: str, models: list[Evaluated]) -> str:
    return "val" if all(m.tasks[task].get("val") for m in models) else "test"


def selection_scores(task: str, models: list[Evaluated]) -> dict[str, float]:
    """Model -> the score by which models are chosen: accuracy on val (or test), where a labelled sample that the model
    can't read but another one of the same store can counts as wrong. Without that, the model that only sees the easy
    samples would win."""
    on = _selected_on(task, models)
    found = {m.name: m.tasks[task]["val"] if on == "val" else m.tasks[task] for m in models}
    most: dict[Any, int] = {}
    for m in models:
        store = m.record.get("store")
        most[store] = max(most.get(store, 0), found[m.name]["num_rows"])
    return {m.name: found[m.name]["accuracy"] * found[m.name]["num_rows"] / most[m.record.get("store")] for m in models}


def best_single(
    task: str, models: list[Evaluated], scores: dict[str, float], relative_to: Evaluated | None
) -> Evaluated | None:
    """The best single-modality model among those scored on samples of `relative_to`: trained ones before baselines."""
    singles = [m for m in models if len(m.record["modalities"]) == 1]
    if relative_to is not None:
        singles = [m for m in singles if m is relative_to or m.shares_samples(relative_to, task)]
    trained = [m for m in singles if m.kind == "trained"]
    return _best(trained or singles, scores)


def smallest_of_best(task: str, models: list[Evaluated], scores: dict[str, float]) -> Evaluated | None:
    """The model with the fewest parameters of those within one standard error of the best score: of equals the one that costs
    least to run, where the highest score would be chance.

    Source: the one-standard-error rule, Breiman et al. 1984, Classification and Regression Trees, 3.4.3.
    """
    if not models:
        return None
    on = _selected_on(task, models)
    num_rows = max((m.tasks[task]["val"] if on == "val" else m.tasks[task])["num_rows"] for m in models)
    best = max(scores[m.name] for m in models)
    least = best - (best * (1 - best) / num_rows) ** 0.5
    return min(
        (m for m in models if scores[m.name] >= least),
        key=lambda m: (m.record.get("num_params") or 0, -scores[m.name]),
    )


def _best(models: list[Evaluated], scores: dict[str, float]) -> Evaluated | None:
    return max(models, key=lambda m: scores[m.name], default=None)


def _name(model: Evaluated | None) -> str | None:
    return model.name if model else None


def _row(task: str, model: Evaluated, single: Evaluated | None) -> dict[str, Any]:
    """One model's line: its scores, and the paired difference to the best single modality."""
    record = model.tasks[task]
    row = {
        "model": model.name,
        **{k: record.get(k) for k in ("num_rows", "num_unseen", "balanced_accuracy")},
        **record["intervals"],
    }
    row["val_accuracy"] = record["val"]["accuracy"] if record.get("val") else None
    if single is model:
        return {**row, "versus": None, "verdict": REFERENCE}
    versus = _paired(task, model, single) if single else None
    if versus is None:
        return {**row, "versus": None, "verdict": DIFFERENT_SAMPLES}
    return {**row, "versus": versus, "verdict": verdict(versus["accuracy"])}


def _paired(task: str, model: Evaluated, other: Evaluated) -> dict[str, Any] | None:
    """Differences model - other over the samples both predicted; None if they share none with the same label."""
    ours, theirs = model.outcomes(task), other.outcomes(task)
    rows, other_rows = ours.same_labels(theirs)
    if not len(rows):
        return None
    names = sorted({*model.tasks[task]["class_names"], *other.tasks[task]["class_names"]})
    labels, pred = ours.codes(rows, names)
    pred_other = theirs.codes(other_rows, names)[1]
    options: Any = {"confidence": model.record["confidence"], "num_resamples": model.record["bootstrap_samples"]}
    shared = {"ours": float(is_right(labels, pred).mean()), "theirs": float(is_right(labels, pred_other).mean())}
    found = {m: paired_difference(labels, pred, pred_other, m, num_classes=len(names), **options) for m in METRICS}
    return {"model": other.name, "num_rows": len(rows), "shared_accuracy": shared, **found}


# --- the run as a whole --------------------------------------------------------------------------------------------


def _main_model(models: list[Evaluated], tasks: dict[str, Any]) -> str | None:
    """The trained model that scores most tasks, and among those the best on average."""
    trained = [m for m in models if m.kind == "trained"]
    by_task = {t: selection_scores(t, [m for m in models if m.tasks.get(t, {}).get("num_rows")]) for t in tasks}

    def key(model: Evaluated) -> tuple[int, float]:
        values = [scores[model.name] for scores in by_task.values() if model.name in scores]
        return len(values), float(np.mean(values)) if values else 0.0

    return _name(max(trained, key=key, default=None))


def _notes(results: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """What a reader must know to read the numbers right."""
    notes = []
    if any(t["selected_on"] == "test" for t in results["tasks"].values()):
        notes.append(
            "There is no val split, so the best models were chosen on test: their scores are a little too good."
        )
    missing = [v for v in run.get("variants") or {} if v not in results["models"]]
    if missing:
        notes.append(f"Not evaluated yet, so not shown: {', '.join(missing)}.")
    rows = [r for t in results["tasks"].values() for r in t["rows"]]
    if any(r["verdict"] == DIFFERENT_SAMPLES for r in rows):
        notes.append(
            '"Different samples": no single modality was scored on the same samples, so there is no fair difference.'
        )
    if any(r["num_unseen"] for r in rows):
        notes.append(
            "Some test labels are of classes that the train split does not have; they count as wrong, "
            "or are left out of a multilabel row."
        )
    multilabel = [t for t, found in results["tasks"].items() if found["kind"] == "multilabel"]
    if multilabel:
        notes.append(
            f"Accuracy of {', '.join(multilabel)} is subset accuracy: a sample is right if all of its classes are."
        )
    if any(r["versus"] and r["versus"]["num_rows"] < r["num_rows"] for r in rows):
        notes.append("Where two models can read different samples, their difference is over those that both can read.")
    return notes
