"""How a model's scores fall as modalities go missing, beside the best model of what is still there.

Rows are hidden at random: at rate r a share r of the rows that have the modality, and another one that the task reads,
loses it; under "any" each chosen row loses one of those it has, drawn at random. So no row is left with nothing. The model
is asked once with everything and once without each modality; every rate and seed is a mixture of these answers.

The reference is no single model: every row gets the prediction of the best single-modality model (on `val`) among those
whose modality the row still has. A fused model that stays below it would better have been left out.

Axes: N rows of the split, C classes of one task, R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, EvaluationConfig, parse_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.evaluation.compare import Evaluated, evaluated_models
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import Rows, has_prediction, load_rows, presence_patterns, without_unreadable
from mmkt_ray.kinds.base import TaskKind
from mmkt_ray.models import Predictor
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.intervals import SHARE, difference_bounds, holm, paired_p, percentiles, resampled_scores

ANY = "any"
RATES = tuple(r / 10 for r in range(11))
NUM_SEEDS = 3


def missing_curves(
    model_uri: str,
    store: Store,
    run_uri: str,
    *,
    rates: Sequence[float] = RATES,
    num_seeds: int = NUM_SEEDS,
    split: str = "test",
    evaluation: EvaluationConfig | None = None,
) -> dict[str, Any]:
    """Scores against the share of rows that lack a modality; written to `<model>/missing.json` and returned:

        model, split, confidence, num_seeds, modalities, rates [..], about (see provenance.py)
        curves: {hidden modality or "any": {task: {num_rows, accuracy, macro_f1: [[value, low, high] for each rate]}}}
        reference: the same for the best single-modality models of what is there, where the run evaluated any, and
                   `models` {modality: name}; difference: the same for model - reference, paired, and `p_holm` for each
                   rate: P that the accuracies are equal, corrected for all rates, tasks and hidden modalities together
        patterns: {"image+text": {task: {num_rows and every score that is one number}}} by what rows have as they are
        answers: [{hidden, task, rate, difference [value, low, high], below, text}]: where the model stands worst, and
                   whether it is shown to stand below the reference there

    Intervals hold both the rows that happen to be in the split and those that happen to be hidden: they are percentiles of
    the bootstrap over all seeds. `run_uri` is the run whose evaluated models are the reference; evaluation: null: as when
    the model was trained. Raises: ConfigError if the model reads one modality only; DataError as `load_model`.
    """
    model, card = load_model(model_uri)
    config = parse_config(card["config"])
    modalities = config.model_modalities
    if len(modalities) < 2:
        raise ConfigError(f"'{model_uri}' reads {modalities[0]} only: without it there is nothing left to predict from")
    data = load_rows(store, modalities, config.model_tasks, card["class_names"], model.spec.kinds)
    part = data.take(data.readable(split))
    options = evaluation or config.evaluation
    run = storage.read_json_or_none(storage.join(run_uri, "run.json")) or {}
    singles = [m for m in evaluated_models(run_uri, run) if m.record.store == store.manifest.get("fingerprint")]
    best = {t: _best_singles(singles, part, t, config.task_inputs(t)) for t in config.model_tasks}
    whole = predict_table(model, part.table)
    inputs = {t: config.task_inputs(t) for t in config.model_tasks}
    result = {
        "model": model_uri.rstrip("/").rpartition("/")[2],
        "split": split,
        "modalities": list(modalities),
        "about": _about(model_uri, run_uri, store, best),
        "patterns": _patterns(part.table, without_unreadable(whole, part.table, inputs)),
        **curves_of([ask(model, whole, part.table, config, best)], options, config, rates, num_seeds),
    }
    storage.write_json(storage.join(model_uri, "missing.json"), result)
    return result


def _about(model_uri: str, run_uri: str, store: Store, best: Mapping[str, Mapping[str, Single]]) -> dict[str, Any]:
    """The model and the trained ones that it is measured by."""
    place = storage.absolute(model_uri).removeprefix(storage.absolute(run_uri).rstrip("/") + "/")
    folders = {single.folder for by_modality in best.values() for single in by_modality.values() if single.folder}
    return provenance.about(run_uri, {place, *folders}, [store.manifest.get("fingerprint")])


def curves_of(
    models: Sequence[Mapping[str, Answers]],
    options: EvaluationConfig,
    config: Config,
    rates: Sequence[float] = RATES,
    num_seeds: int = NUM_SEEDS,
) -> dict[str, Any]:
    """What `missing_curves` says beside the model's name and patterns. models: what one model of this config, or those of
    several training seeds in turn, say about each task; every draw of hidden rows asks the next one."""
    draw = _Draws(options.bootstrap_samples // num_seeds, options.confidence, num_seeds, config.seed)
    result: dict[str, Any] = {"confidence": options.confidence, "num_seeds": num_seeds, "rates": list(rates)}
    result |= {"curves": {}, "reference": {}, "difference": {}}
    for task, first in models[0].items():
        for hidden in (*first.inputs, ANY):
            for name, scores in _curves([answers[task] for answers in models], hidden, rates, draw).items():
                result[name].setdefault(hidden, {})[task] = scores
    _correct(result["difference"])
    hint = "" if config.model.experts else "; model.experts: true leaves such rows to it"
    mains = {task: first.table.kinds[task].main for task, first in models[0].items()}
    return result | {"answers": _tell(result, mains, hint)}


def _correct(differences: dict[str, Any]) -> None:
    """Correct the P values of all rates, tasks and hidden modalities for their number."""
    cells = [scores for by_task in differences.values() for scores in by_task.values()]
    corrected = iter(holm([p for scores in cells for p in scores["p_holm"]]))
    for scores in cells:
        scores["p_holm"] = [next(corrected) for _ in scores["p_holm"]]


# --- the reference --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Single:
    """The best single-modality model of one modality: its predictions for the rows, and which rows have one."""

    name: str
    score: float  # main metric on val
    pred: np.ndarray  # (N,) codes or (N, C)
    known: np.ndarray  # (N,) bool
    folder: str = ""  # of a trained model, in the run


def _best_singles(models: Sequence[Evaluated], part: Rows, task: str, modalities: Sequence[str]) -> dict[str, Single]:
    """Modality -> its best model; the best modality last."""
    found = {}
    for modality in modalities:
        able = [m for m in models if m.record.modalities == [modality] and m.scores(task)]
        best = max(able, key=lambda m: _val_score(m, task), default=None)
        if best is not None:
            pred = best.predictions(task)["pred"].reindex(part.table.sample_id)
            known = pred.notna().to_numpy()
            codes = _encode(pred, known, part.table.class_names[task], part.table.kinds[task])
            folder = best.folder if best.kind == "trained" else ""
            found[modality] = Single(best.name, _val_score(best, task), codes, known, folder)
    return dict(sorted(found.items(), key=lambda item: item[1].score))


def _encode(pred: pd.Series, known: np.ndarray, names: Sequence[str], kind: TaskKind) -> np.ndarray:
    told = [v if k else None for v, k in zip(pred.tolist(), known, strict=True)]
    return kind.encode_predictions(pa.chunked_array([pa.array(told, kind.arrow_type)]), names)


def _val_score(model: Evaluated, task: str) -> float:
    scores = model.tasks[task].val or model.tasks[task]
    return scores.value(model.kind_of(task).main)


# --- one task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """How rows are hidden and resampled."""

    num_resamples: int  # R of each seed
    confidence: float
    num_seeds: int
    seed: int

    def interval(
        self, scores: Sequence[np.ndarray], num_rows: int, bounds: tuple[float, float]
    ) -> list[float] | None:
        """Scores (1 + R,) of each seed, the score itself first -> [mean, low, high]; None where undefined. bounds: see
        `percentiles`."""
        mean = np.mean([s[0] for s in scores])
        drawn = np.concatenate([[mean], *(s[1:] for s in scores)])
        found = percentiles(drawn, self.confidence, num_rows, bounds)
        return [found["value"], found["low"], found["high"]] if found else None


@dataclass(frozen=True)
class Answers:
    """What the model says about one task with all modalities and without each of them."""

    table: FeatureTable
    task: str
    inputs: Sequence[str]  # modalities that the task reads
    whole: np.ndarray  # (N,) codes or (N, C)
    without: dict[str, np.ndarray]  # modality -> the same without it
    singles: Mapping[str, Single]  # the best single-modality model of each modality, the best of all last

    def able(self, hidden: str) -> np.ndarray:
        """The labelled rows that have the modality and another one, or for ANY two of those that the task reads."""
        num_there = np.sum([self.table.present[m] for m in self.inputs], axis=0)
        able = self.table.labels[self.task].labelled & (num_there > 1)
        return np.flatnonzero(able if hidden == ANY else able & self.table.present[hidden])

    def compared(self) -> bool:
        """There is a single-modality model of each modality."""
        return set(self.singles) == set(self.inputs)

    def hiding_order(self, hidden: str, rows: np.ndarray, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order in which they lose a modality (indices into `rows`), and which one: index into `inputs`."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(rows))
        if hidden != ANY:
            return order, np.full(len(rows), list(self.inputs).index(hidden))
        present = np.stack([self.table.present[m][rows] for m in self.inputs], axis=1)  # (rows, M)
        return order, np.where(present, rng.random((len(rows), len(self.inputs))), -1).argmax(axis=1)

    def scores(
        self, rows: np.ndarray, order: tuple[np.ndarray, np.ndarray], num_hidden: int, draw: _Draws
    ) -> dict[str, dict[str, np.ndarray]]:
        """Metric -> (1 + R,) of the model, and where it is compared of the reference and of their difference, and `gain` {rows:
        (rows,)}, by how much the model's accuracy is above the reference's."""
        gone = np.full(len(rows), -1)
        gone[order[0][:num_hidden]] = order[1][order[0][:num_hidden]]
        pred, other = self.whole[rows], np.zeros_like(self.whole[rows])
        for i, m in enumerate(self.inputs):
            pred[gone == i] = self.without[m][rows[gone == i]]
        for m, single in self.singles.items():  # the best one last, so that it has the last word
            there = single.known[rows] & (gone != list(self.inputs).index(m))
            other[there] = single.pred[rows[there]]
        labels = self.table.labels[self.task][rows]
        preds = [pred, other] if self.compared() else [pred]
        scores = resampled_scores(labels, preds, self.table.width(self.task), draw.num_resamples, draw.seed)
        found = {"curves": {m: s[0] for m, s in scores.items()}}
        if self.compared():
            found["reference"] = {m: s[1] for m, s in scores.items()}
            found["difference"] = {m: s[0] - s[1] for m, s in scores.items()}
            ours, theirs = (labels.kind.main_by_row(labels, p) for p in (pred, other))
            found["gain"] = {"rows": ours - theirs}
        return found


def ask(
    model: Predictor,
    whole: Mapping[str, np.ndarray],
    table: FeatureTable,
    config: Config,
    singles: Mapping[str, Mapping[str, Single]],
) -> dict[str, Answers]:
    """Task -> what the model says. whole: its probabilities with everything; singles: task -> modality -> its best model."""
    without = {m: predict_table(model, table, drop=[m]) for m in config.model_modalities}
    found = {}
    for task in config.model_tasks:
        kind = table.kinds[task]
        alone = {m: kind.predict(proba[task]) for m, proba in without.items()}
        inputs = config.task_inputs(task)
        found[task] = Answers(table, task, inputs, kind.predict(whole[task]), alone, singles[task])
    return found


def _curves(models: Sequence[Answers], hidden: str, rates: Sequence[float], draw: _Draws) -> dict[str, dict[str, Any]]:
    """`curves`, `reference` and `difference` of one task and hidden modality; empty if no row can lose it."""
    rows = models[0].able(hidden)
    if len(rows) == 0:
        return {}
    kind = models[0].table.kinds[models[0].task]
    metrics = kind.reported
    asked = [models[s % len(models)] for s in range(draw.num_seeds)]
    orders = [answers.hiding_order(hidden, rows, [draw.seed, s]) for s, answers in enumerate(asked)]
    names = ["curves"] + (["reference", "difference"] if models[0].compared() else [])
    found: dict[str, dict[str, Any]] = {n: {"num_rows": len(rows)} | {m: [] for m in metrics} for n in names}
    for rate in rates:
        num_hidden = round(rate * len(rows))
        scores = [a.scores(rows, order, num_hidden, draw) for a, order in zip(asked, orders, strict=True)]
        for name in names:
            for metric in metrics:
                bounds = difference_bounds(kind, metric) if name == "difference" else kind.bounds.get(metric, SHARE)
                found[name][metric].append(draw.interval([s[name][metric] for s in scores], len(rows), bounds))
        if "difference" in names:
            p = paired_p(np.mean([s["gain"]["rows"] for s in scores], axis=0))
            found["difference"].setdefault("p_holm", []).append(p)
    if models[0].compared():
        found["reference"]["models"] = {m: s.name for m, s in models[0].singles.items()}
    return found


# --- what it comes to -----------------------------------------------------------------------------------------------


def _patterns(table: FeatureTable, proba: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every score that is one number, by what the rows have as they are."""
    found: dict[str, Any] = {}
    for pattern, here in presence_patterns(table).items():
        for task, values in proba.items():
            rows = here & has_prediction(values) & table.labels[task].labelled
            if rows.any():
                scores = table.kinds[task].scores(table.labels[task][rows], values[rows], table.class_names[task])
                numbers = {k: v for k, v in scores.items() if v is None or isinstance(v, int | float)}
                found.setdefault(pattern, {})[task] = {k: v for k, v in numbers.items() if k != "confusion"}
    return found


def _tell(result: dict[str, Any], mains: Mapping[str, str], hint: str) -> list[dict[str, Any]]:
    """For each hidden modality and task the rate at which the model stands worst against the reference, in words. mains:
    task -> its main metric; hint: what to do about it."""
    told = []
    for hidden, by_task in result["difference"].items():
        for task, scores in by_task.items():
            rate, worst = min(zip(result["rates"], scores[mains[task]], strict=True), key=lambda pair: pair[1][0])
            lost = "any modality" if hidden == ANY else hidden
            beside = f"the best single-modality model of what is there ({task})"
            text = f"With {lost} missing the model is never shown to be worse than {beside}"
            every = zip(result["rates"], scores[mains[task]], scores["p_holm"], strict=True)
            shown = [(r, d) for r, d, p in every if d[2] < 0 and p < 1 - result["confidence"]]
            if shown:
                rate, worst = min(shown, key=lambda pair: pair[1][0])
                text = (
                    f"With {lost} missing in {100 * rate:.0f} % of rows the model is {-100 * worst[0]:.1f} points "
                    f"[{-100 * worst[2]:.1f}, {-100 * worst[1]:.1f}] below {beside}{hint}"
                )
            about = {"hidden": hidden, "task": task, "rate": rate, "difference": worst, "below": bool(shown)}
            told.append(about | {"text": text + "."})
    return told
