"""How a model's scores fall as modalities go missing, beside the best model of what is still there.

Rows are hidden at random: at rate r a share r of the rows that have the modality, and another one that the task
reads, loses it; under "any" each chosen row loses one of those it has, drawn at random. So no row is left with
nothing. The model is asked once with everything and once without each modality;
every rate and seed is a mixture of these answers.

The reference is no single model: every row gets the prediction of the best single-modality model (on `val`) among
those whose modality the row still has. A fused model that stays below it would better have been left out.

Axes: N rows of the split, C classes of one task, R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, EvaluationConfig, parse_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.evaluation.evaluated import Evaluated, evaluated_models
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import Rows, has_prediction, load_rows, presence_patterns, without_unreadable
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models import Predictor
from mmkt_ray.record import About
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.intervals import SHARE, difference_bounds, holm, paired_p, percentiles, resampled_scores
from mmkt_ray.scoring.metrics import PointScores
from mmkt_ray.scoring.run_file import RunFile
from mmkt_ray.studies.missing_results import (
    ANY,
    Curve,
    DifferenceCurve,
    MissingCurves,
    ReferenceCurve,
    Triple,
    WorstRate,
)

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
) -> MissingCurves:
    """Scores against the share of rows that lack a modality; written to `<model>/missing.json` and returned.

    Intervals hold both the rows that happen to be in the split and those that happen to be hidden: they are
    percentiles of the bootstrap over all seeds. `run_uri` is the run whose evaluated models are the reference;
    evaluation: null: as when the model was trained. Raises: ConfigError if the model reads one modality only;
    DataError as `load_model`.
    """
    model, card = load_model(model_uri)
    config = parse_config(card.config)
    modalities = config.model_modalities
    if len(modalities) < 2:
        raise ConfigError(f"'{model_uri}' reads {modalities[0]} only: without it there is nothing left to predict from")
    data = load_rows(store, modalities, config.model_tasks, card.class_names, model.spec.kinds)
    part = data.take(data.readable(split))
    run = RunFile.of(run_uri)
    singles = [m for m in evaluated_models(run_uri, run) if m.record.store == store.manifest.fingerprint]
    best = {t: _best_singles(singles, part, t, config.task_inputs(t)) for t in config.model_tasks}
    whole = predict_table(model, part.table)
    inputs = {t: config.task_inputs(t) for t in config.model_tasks}
    subject = Subject(
        model_uri.rstrip("/").rpartition("/")[2],
        split,
        modalities,
        _about(model_uri, run_uri, store, best),
        _patterns(part.table, without_unreadable(whole, part.table, inputs)),
    )
    draws = Draws.of(evaluation or config.evaluation, config.seed, num_seeds, rates)
    result = curves_of(subject, [predict_hidden(model, whole, part.table, config, best)], config, draws)
    result.write(storage.join(model_uri, "missing.json"))
    return result


def _about(model_uri: str, run_uri: str, store: Store, best: Mapping[str, Mapping[str, Single]]) -> About:
    """The model and the trained ones that it is measured by."""
    place = storage.absolute(model_uri).removeprefix(storage.absolute(run_uri).rstrip("/") + "/")
    folders = {single.folder for by_modality in best.values() for single in by_modality.values() if single.folder}
    return provenance.about(run_uri, {place, *folders}, [store.manifest.fingerprint])


@dataclass(frozen=True)
class Subject:
    """Whose curves they are; see `MissingCurves`."""

    model: str
    split: str
    modalities: Sequence[str]
    about: About
    patterns: dict[str, dict[str, PointScores]] | None = None


def curves_of(
    subject: Subject, models: Sequence[Mapping[str, HiddenPredictions]], config: Config, draws: Draws
) -> MissingCurves:
    """The curves of one model of this config, or of those of several training seeds in turn: every draw of hidden
    rows asks the next one. models: task -> what each predicts."""
    measured: dict[str, dict[str, _Measured]] = {}  # hidden modality -> task
    for task, first in models[0].items():
        for hidden in (*first.inputs, ANY):
            found = _measure([predictions[task] for predictions in models], hidden, draws)
            if found is not None:
                measured.setdefault(hidden, {})[task] = found
    difference = _corrected(
        {h: {t: m.difference for t, m in by_task.items() if m.difference} for h, by_task in measured.items()}
    )
    reference = {h: {t: m.reference for t, m in by_task.items() if m.reference} for h, by_task in measured.items()}
    hint = "" if config.model.experts else "; model.experts: true leaves such rows to it"
    mains = {task: first.table.kinds[task].main for task, first in models[0].items()}
    worst = [
        _worst(hidden, task, curve, mains[task], draws, hint)
        for hidden, by_task in difference.items()
        for task, curve in by_task.items()
    ]
    return MissingCurves(
        model=subject.model,
        split=subject.split,
        modalities=list(subject.modalities),
        about=subject.about,
        patterns=subject.patterns,
        confidence=draws.confidence,
        num_seeds=draws.num_seeds,
        rates=list(draws.rates),
        curves={h: {t: m.curve for t, m in by_task.items()} for h, by_task in measured.items()},
        reference={h: by_task for h, by_task in reference.items() if by_task},
        difference=difference,
        answers=worst,
    )


def _corrected(differences: dict[str, dict[str, DifferenceCurve]]) -> dict[str, dict[str, DifferenceCurve]]:
    """The same with P values that are corrected for the number of all rates, tasks and hidden modalities (Holm)."""
    corrected = iter(holm([p for by_task in differences.values() for curve in by_task.values() for p in curve.p_holm]))
    return {
        hidden: {
            task: DifferenceCurve(
                num_rows=curve.num_rows, by_metric=curve.by_metric, p_holm=[next(corrected) for _ in curve.p_holm]
            )
            for task, curve in by_task.items()
        }
        for hidden, by_task in differences.items()
        if by_task
    }


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
    cells = [v if k else None for v, k in zip(pred.tolist(), known, strict=True)]
    return kind.encode_predictions(pa.chunked_array([pa.array(cells, kind.arrow_type)]), names)


def _val_score(model: Evaluated, task: str) -> float:
    scores = model.tasks[task].val or model.tasks[task]
    return scores.value(model.kind_of(task).main)


# --- one task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """How rows are hidden and resampled."""

    num_resamples: int  # R of each seed
    confidence: float
    num_seeds: int
    seed: int
    rates: tuple[float, ...]

    @classmethod
    def of(cls, options: EvaluationConfig, seed: int, num_seeds: int, rates: Sequence[float] = RATES) -> Draws:
        """As the config says."""
        return cls(options.bootstrap_samples // num_seeds, options.confidence, num_seeds, seed, tuple(rates))

    def interval(self, scores: Sequence[np.ndarray], num_rows: int, bounds: tuple[float, float]) -> Triple | None:
        """Scores (1 + R,) of each seed, the score itself first -> mean, low, high; None where undefined. bounds: see
        `percentiles`."""
        mean = np.mean([s[0] for s in scores])
        drawn = np.concatenate([[mean], *(s[1:] for s in scores)])
        found = percentiles(drawn, self.confidence, num_rows, bounds)
        return (found["value"], found["low"], found["high"]) if found else None


@dataclass(frozen=True)
class _Scores:
    """Scores (1 + R,) by metric, the score itself first, of the model, the reference and their difference."""

    curve: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]  # this and what follows empty where the model is not compared
    difference: dict[str, np.ndarray]
    gain: np.ndarray  # (rows,) by how much the model's main score of a row is above the reference's


@dataclass(frozen=True)
class HiddenPredictions:
    """What the model predicts for one task with all modalities and without each of them."""

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
        """The rows in the order in which they lose a modality (indices into `rows`), and which one:
        index into `inputs`."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(rows))
        if hidden != ANY:
            return order, np.full(len(rows), list(self.inputs).index(hidden))
        present = np.stack([self.table.present[m][rows] for m in self.inputs], axis=1)  # (rows, M)
        return order, np.where(present, rng.random((len(rows), len(self.inputs))), -1).argmax(axis=1)

    def scores(
        self, rows: np.ndarray, order: tuple[np.ndarray, np.ndarray], num_hidden: int, draws: Draws
    ) -> _Scores:
        """On the rows, of which the first so many in the order have lost a modality."""
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
        scores = resampled_scores(labels, preds, self.table.width(self.task), draws.num_resamples, draws.seed)
        curve = {m: s[0] for m, s in scores.items()}
        if not self.compared():
            return _Scores(curve, {}, {}, np.zeros(0))
        reference = {m: s[1] for m, s in scores.items()}
        ours, theirs = (labels.kind.main_by_row(labels, p) for p in (pred, other))
        return _Scores(curve, reference, {m: s[0] - s[1] for m, s in scores.items()}, ours - theirs)


def predict_hidden(
    model: Predictor,
    whole: Mapping[str, np.ndarray],
    table: FeatureTable,
    config: Config,
    singles: Mapping[str, Mapping[str, Single]],
) -> dict[str, HiddenPredictions]:
    """Task -> what the model predicts. whole: its probabilities with everything;
    singles: task -> modality -> its best model."""
    without = {m: predict_table(model, table, drop=[m]) for m in config.model_modalities}
    found = {}
    for task in config.model_tasks:
        kind = table.kinds[task]
        alone = {m: kind.predict(proba[task]) for m, proba in without.items()}
        inputs = config.task_inputs(task)
        found[task] = HiddenPredictions(table, task, inputs, kind.predict(whole[task]), alone, singles[task])
    return found


@dataclass(frozen=True)
class _Measured:
    """The curves of one task and hidden modality; P of the difference is not corrected yet."""

    curve: Curve
    reference: ReferenceCurve | None = None
    difference: DifferenceCurve | None = None


def _measure(models: Sequence[HiddenPredictions], hidden: str, draws: Draws) -> _Measured | None:
    """None if no row can lose the modality."""
    first = models[0]
    rows, kind = first.able(hidden), first.table.kinds[first.task]
    if len(rows) == 0:
        return None
    asked = [models[s % len(models)] for s in range(draws.num_seeds)]
    orders = [predictions.hiding_order(hidden, rows, [draws.seed, s]) for s, predictions in enumerate(asked)]
    at_rates = []  # at each rate the scores of each seed
    for rate in draws.rates:
        num_hidden = round(rate * len(rows))
        at_rates.append([a.scores(rows, order, num_hidden, draws) for a, order in zip(asked, orders, strict=True)])

    def lines(
        scores_of: Callable[[_Scores], Mapping[str, np.ndarray]], bounds: Callable[[str], tuple[float, float]]
    ) -> dict[str, list[Triple | None]]:
        return {
            m: [draws.interval([scores_of(s)[m] for s in scores], len(rows), bounds(m)) for scores in at_rates]
            for m in kind.reported
        }

    def level(metric: str) -> tuple[float, float]:
        return kind.bounds.get(metric, SHARE)

    curve = Curve(num_rows=len(rows), by_metric=lines(lambda s: s.curve, level))
    if not first.compared():
        return _Measured(curve)
    names = {m: single.name for m, single in first.singles.items()}
    return _Measured(
        curve,
        ReferenceCurve(num_rows=len(rows), by_metric=lines(lambda s: s.reference, level), models=names),
        DifferenceCurve(
            num_rows=len(rows),
            by_metric=lines(lambda s: s.difference, lambda m: difference_bounds(kind, m)),
            p_holm=[paired_p(np.mean([s.gain for s in scores], axis=0)) for scores in at_rates],
        ),
    )


# --- what it comes to -----------------------------------------------------------------------------------------------


def _patterns(table: FeatureTable, proba: dict[str, np.ndarray]) -> dict[str, dict[str, PointScores]]:
    """Every score that is one number, by what the rows have as they are."""
    found: dict[str, dict[str, PointScores]] = {}
    for pattern, here in presence_patterns(table).items():
        for task, values in proba.items():
            rows = here & has_prediction(values) & table.labels[task].labelled
            if rows.any():
                scores = table.kinds[task].scores(table.labels[task][rows], values[rows], table.class_names[task])
                numbers = {k: v for k, v in scores.items() if v is None or isinstance(v, int | float)}
                found.setdefault(pattern, {})[task] = PointScores(
                    **{k: v for k, v in numbers.items() if k != "confusion"}
                )
    return found


def _worst(hidden: str, task: str, curve: DifferenceCurve, main: str, draws: Draws, hint: str) -> WorstRate:
    """The rate at which the model stands worst against the reference, in words.
    main: metric; hint: what to do about it."""
    every = [
        (r, d, p) for r, d, p in zip(draws.rates, curve.by_metric[main], curve.p_holm, strict=True) if d is not None
    ]
    shown = [(r, d) for r, d, p in every if d[2] < 0 and p < 1 - draws.confidence]
    worst = min(shown or [(r, d) for r, d, _ in every], key=lambda pair: pair[1][0], default=None)
    rate, difference = worst or (draws.rates[0], None)
    lost = "any modality" if hidden == ANY else hidden
    beside = f"the best single-modality model of what is there ({task})"
    text = f"With {lost} missing the model is never shown to be worse than {beside}"
    if shown and difference is not None:
        value, low, high = difference
        text = (
            f"With {lost} missing in {100 * rate:.0f} % of rows the model is {-100 * value:.1f} points "
            f"[{-100 * high:.1f}, {-100 * low:.1f}] below {beside}{hint}"
        )
    return WorstRate(hidden=hidden, task=task, rate=rate, difference=difference, below=bool(shown), text=text + ".")
