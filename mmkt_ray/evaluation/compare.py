"""All models of a run side by side, each against the best single modality on the same samples. Reads result files only.

Called by steps.py after evaluation/evaluate.py; report/page.py shows what it writes.

The best single modality of a task is the trained model that reads exactly one modality with the highest accuracy on held-out
rows (on `test`, with a note, if there are none). Differences are paired over the samples that both models predicted. Models
that share none were scored on different samples; their scores are shown, not compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation import sentences
from mmkt_ray.evaluation.adapted import adaptations
from mmkt_ray.evaluation.answers import Asked, Scored, Settings, ask, correct_answers
from mmkt_ray.evaluation.recommend import (
    HeldOutRows,
    best_of,
    best_single,
    name_of,
    recommend,
    selected_on,
    selection_scores,
    smallest_of_best,
)
from mmkt_ray.inference.model_card import Card, read_card
from mmkt_ray.inference.rows import LabelledPredictions, read_outcomes, read_predictions
from mmkt_ray.kinds.base import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.intervals import agreeing, holm, paired_difference, paired_p, verdict
from mmkt_ray.scoring.metrics import BaselinesFile, ModelMetrics, TaskScores
from mmkt_ray.scoring.results import Described, ModelScores, Recommended, ResultsFile, Shared, TaskResults, Versus
from mmkt_ray.scoring.run_file import RunFile

DIFFERENT_SAMPLES = "different samples"
NO_SINGLE = "no single modality trained"
REFERENCE = "best single modality"
HELD_OUT = "predictions-heldout.parquet"


def compare(run_uri: str) -> ResultsFile:
    """Compare what was evaluated in a run folder; written to `<run>/report/results.json` and returned.

    A verdict is that of the interval and of an exact test, corrected for all of its kind (Holm): the chosen fused models are
    one family over the tasks, all other rows another.

    Reads the variants of `<run>/run.json` ({name: {model: folder}}), without it all `<run>/models/*/metrics.json`, and
    `<run>/baselines/*/metrics.json`. Raises: DataError if nothing was evaluated.
    """
    run = RunFile.of(run_uri)
    models = evaluated_models(run_uri, run)
    if not models:
        raise DataError(f"nothing is evaluated in '{run_uri}': run `mmkt evaluate` (or `mmkt run`) first")
    scored_on = {t: [m for m in models if m.scores(t)] for t in sorted({t for m in models for t in m.tasks if m.scores(t)})}
    asked: dict[str, Asked] = {}
    tasks = {t: _compare_task(t, scored, asked) for t, scored in scored_on.items()}
    confidence = models[0].record.confidence
    _judge_rows(tasks, confidence)
    _answer(tasks, asked, confidence)
    recommended = recommend(run_uri, scored_on, tasks)
    results = ResultsFile(
        run=run.name or run_uri.rstrip("/").rpartition("/")[2],
        split=models[0].record.split,
        confidence=confidence,
        models={m.name: m.describe() for m in models},
        tasks=tasks,
        adapted=adaptations(run_uri, [m for m in models if m.kind == "trained"], list(tasks), _paired),
        recommended=recommended,
        main=_main_model(scored_on, models, recommended),
        notes=[],
    )
    results.notes = _notes(results, run)
    results.write(storage.join(run_uri, "report", "results.json"))
    return results


# --- the models of a run -----------------------------------------------------------------------------------------


@dataclass
class Evaluated:
    """One evaluated model: its metrics and its predictions, read when needed."""

    name: str  # in the run; distinct
    kind: str  # trained | baseline
    folder: str  # relative to the run folder, or absolute
    record: ModelMetrics
    predictions_uri: str
    card: Card | None = None  # of a trained one
    automatic: bool = False  # trained without being asked for, to compare with
    _outcomes: dict[str, LabelledPredictions] = field(default_factory=dict)  # of the task that was last asked for
    _held_out: dict[str, HeldOutRows | None] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """As it was trained with; empty of a baseline."""
        return self.card.config if self.card else {}

    @property
    def tasks(self) -> dict[str, TaskScores]:
        return self.record.tasks

    def scores(self, task: str) -> TaskScores | None:
        """Of a task; None if it was scored on no row of it."""
        found = self.tasks.get(task)
        return found if found is not None and found.num_rows else None

    def describe(self) -> Described:
        """What the results say about a model beside its scores."""
        model = self.config.get("model", {})
        fusion = model.get("fusion") or {}
        depth = f" (depth {fusion['depth']})" if fusion.get("name") == "hierarchical" else ""
        return Described(
            kind=self.kind,
            name=self.record.name,
            automatic=self.automatic,
            modalities=self.record.modalities,
            fusion=f"{fusion['name']}{depth}" if fusion and len(self.record.modalities) > 1 else None,
            sharing=model.get("sharing"),
            num_params=self.record.num_params,
            training_s=self.record.training_s,
            num_train_rows=self.record.num_train_rows,
            store=self.record.store,
            folder=self.folder,
            folder_to_ship=self.folder_to_ship,
        )

    @property
    def folder_to_ship(self) -> str | None:
        """The model folder in the run; None of a baseline that has none."""
        return self.folder if self.kind == "trained" else self.record.folder_to_ship

    def reads(self, task: str) -> tuple[str, ...]:
        """The modalities that it reads for a task."""
        inputs = self.config.get("tasks", {}).get(task, {}).get("inputs")
        return tuple(m for m in self.record.modalities if inputs is None or m in inputs)

    def kind_of(self, task: str) -> TaskKind:
        """A task's kind."""
        return task_kind(self.tasks[task].kind)

    def predictions(self, task: str) -> pd.DataFrame:
        """Columns label and pred of `read_predictions`."""
        return read_predictions(self.predictions_uri, task, self.kind_of(task), self._own_name())

    def outcomes(self, task: str) -> LabelledPredictions:
        """The same as codes."""
        if task not in self._outcomes:
            self._outcomes.clear()
            self._outcomes[task] = read_outcomes(self.predictions_uri, task, self.kind_of(task), self._own_name())
        return self._outcomes[task]

    def scored(self, task: str, held_out: float, vocabulary: dict[Any, int]) -> Scored:
        """Its labelled rows; vocabulary: label -> code, of all models of the task."""
        found = self.outcomes(task)
        codes = np.array([vocabulary.setdefault(v, len(vocabulary)) for v in found.values], np.int32)
        pairs, which = np.unique(np.stack([found.label, found.pred]), axis=1, return_inverse=True)
        by_pair = np.array([found.kind.score_pair(found.values[y], found.values[p]) for y, p in pairs.T], float)
        labels, scores = codes[found.label], by_pair[which.reshape(-1)]
        training, metric, trained = self.config.get("training"), found.kind.row_metric, self.kind == "trained"
        return Scored(self.name, trained, self.reads(task), held_out, found.ids, labels, scores, training, metric)

    def held_out(self, task: str) -> HeldOutRows | None:
        """How right it has each held-out row, where it left their predictions."""
        if task not in self._held_out:
            uri = storage.join(self.predictions_uri.rpartition("/")[0], HELD_OUT)
            found = read_outcomes(uri, task, self.kind_of(task)) if storage.exists(uri) else None
            self._held_out[task] = (found.ids, found.right()) if found else None
        return self._held_out[task]

    def shares_samples(self, other: Evaluated, task: str) -> bool:
        """True if both predicted some sample of the task."""
        ours, theirs = self.outcomes(task).ids, other.outcomes(task).ids
        return bool(np.array_equal(ours, theirs) and len(ours)) or bool(np.isin(ours, theirs).any())

    def _own_name(self) -> str | None:
        """What a file of several models calls this one."""
        return self.record.name if self.kind == "baseline" else None


def evaluated_models(run_uri: str, run: RunFile) -> list[Evaluated]:
    """What was evaluated in a run folder, trained models first."""
    return [*_trained(run_uri, run), *_baselines(run_uri, run)]


def _trained(run_uri: str, run: RunFile) -> list[Evaluated]:
    """Variants in the order of run.json, else the folders under models/."""
    singles = {name: place.model for name, place in run.singles.items()}
    folders = {name: place.model for name, place in run.variants.items()} | singles
    if not run.variants:
        found = storage.glob(storage.join(run_uri, "models", "*", "metrics.json"), fixed=run_uri)
        names = [f.path.split("/")[-2] for f in found]
        folders = {name: f"models/{name}" for name in names} | singles
    models = []
    for name, folder in folders.items():
        uri = storage.join(run_uri, folder)
        if record := ModelMetrics.read_or_none(storage.join(uri, "metrics.json")):
            card = read_card(uri)
            if is_stale(record, card):
                continue
            predictions = storage.join(uri, f"predictions-{record.split}.parquet")
            models.append(Evaluated(name, "trained", folder, record, predictions, card, automatic=name in singles))
    return models


def is_stale(record: ModelMetrics, card: Card | None) -> bool:
    """Whether metrics are those of another model than the one that lies there now."""
    return card is not None and None not in (record.fingerprint, card.fingerprint) and record.fingerprint != card.fingerprint


def _baselines(run_uri: str, run: RunFile) -> list[Evaluated]:
    """Baselines of the stores that variants of run.json were trained on (of all, if it names none).

    Where there are several stores, the store's name is in theirs, without its digest if that leaves it unique.
    """
    named = {place.store.rpartition("/")[2] for place in run.variants.values() if place.store}
    found_in = storage.glob(storage.join(run_uri, "baselines", "*", "metrics.json"), fixed=run_uri)
    found = [f.path.split("/")[-2] for f in found_in]
    stores = [store for store in found if store in named or not named]
    kinds = [store.rpartition("-")[0] or store for store in stores]
    models = []
    for store, kind in zip(stores, kinds, strict=True):
        folder = f"baselines/{store}"
        whole = BaselinesFile.read(storage.join(run_uri, folder, "metrics.json"))
        uri = storage.join(run_uri, folder, f"predictions-{whole.split}.parquet")
        for name in whole.models:
            place = kind if kinds.count(kind) == 1 else store
            shown = name if len(stores) == 1 else f"{name} ({place})"
            models.append(Evaluated(shown, "baseline", folder, whole.of(name), uri))
    return models


# --- one task ----------------------------------------------------------------------------------------------------


def _compare_task(task: str, models: list[Evaluated], asked: dict[str, Asked]) -> TaskResults:
    """The rows of one task, without its answers; what is asked of it goes into `asked`. `models` were all scored on it."""
    scores = selection_scores(task, models)
    trained = [m for m in models if m.kind == "trained"]
    fused = [m for m in trained if len(m.reads(task)) > 1]
    best_fused = smallest_of_best(task, fused, scores)
    single = best_single(task, trained, scores, relative_to=best_fused or best_of(trained, scores))
    vocabulary: dict[Any, int] = {}
    rows = [m.scored(task, scores[m.name], vocabulary) for m in models]
    record, on = models[0].record, selected_on(task, models)
    settings = Settings(record.confidence, record.bootstrap_samples, chosen_on_test=on == "test")
    asked[task] = ask(rows, name_of(best_fused), name_of(single), settings)
    return TaskResults(
        kind=models[0].tasks[task].kind,
        num_classes=len(models[0].tasks[task].class_names),
        selected_on=on,
        best=name_of(best_of(models, scores)),
        best_trained=name_of(smallest_of_best(task, trained, scores)),
        best_fused=name_of(best_fused),
        best_single=name_of(single),
        rows=[_row(task, m, best_single(task, trained, scores, relative_to=m), single is not None) for m in models],
    )


def _row(task: str, model: Evaluated, single: Evaluated | None, trained: bool) -> ModelScores:
    """One model's line: its scores, and the paired difference to the best single modality. trained: there is one."""
    record = model.tasks[task]
    ids = np.sort(model.outcomes(task).ids)
    main, name = model.kind_of(task).main, "balanced_accuracy"
    versus = _paired(task, model, single) if single is not None and single is not model else None
    without = REFERENCE if single is model else DIFFERENT_SAMPLES if trained else NO_SINGLE
    return ModelScores(
        model=model.name,
        reads=list(model.reads(task)),
        rows_id=hashlib.sha256(ids.tobytes()).hexdigest()[:12],
        num_rows=record.num_rows,
        num_unseen=record.num_unseen,
        unseen=record.unseen,
        balanced_accuracy=record.intervals.get(name, record.values.get(name)),
        intervals={metric: interval for metric, interval in record.intervals.items() if metric != name},
        val_accuracy=record.val[main] if record.val else None,
        versus=versus,
        verdict=without if versus is None else verdict(versus.interval(main)),
    )


def _paired(task: str, model: Evaluated, other: Evaluated) -> Versus | None:
    """Differences model - other over the samples both predicted; None if they share none with the same label."""
    ours, theirs = model.outcomes(task), other.outcomes(task)
    rows, other_rows = ours.same_labels(theirs)
    if not len(rows):
        return None
    names = sorted({*model.tasks[task].class_names, *other.tasks[task].class_names})
    labels, pred = ours.encoded(rows, names)
    pred_other = theirs.encoded(other_rows, names)[1]
    kind = labels.kind
    options: Any = {"confidence": model.record.confidence, "num_resamples": model.record.bootstrap_samples}
    right, other_right = (kind.main_by_row(labels, p) for p in (pred, pred_other))
    shared = Shared(ours=float(right.mean()), theirs=float(other_right.mean()))
    both, width = (pred, pred_other), kind.width(names)
    found = {m: paired_difference(labels, both, m, width=width, **options) for m in kind.reported}
    p = paired_p(right - other_right)
    return Versus(model=other.name, num_rows=len(rows), shared_accuracy=shared, intervals=found, p=p)


# --- the run as a whole --------------------------------------------------------------------------------------------


def _judge_rows(tasks: dict[str, TaskResults], confidence: float) -> None:
    """Correct the P of the rows' differences, and with it their verdicts."""
    families: dict[bool, list[tuple[ModelScores, Versus, str]]] = {True: [], False: []}  # the chosen fused models, all others
    for found in tasks.values():
        for row in found.rows:
            if row.versus:
                families[row.model == found.best_fused].append((row, row.versus, task_kind(found.kind).main))
    for rows in families.values():
        for (row, versus, main), p in zip(rows, holm([versus.p for _, versus, _ in rows]), strict=True):
            versus.p_holm = p
            row.verdict = verdict(agreeing(versus.interval(main), p, confidence))


def _answer(tasks: dict[str, TaskResults], asked: dict[str, Asked], confidence: float) -> None:
    """Settle what was asked of each task, all together, and put it into words."""
    for task, (fusing, answers) in correct_answers(asked, Settings(confidence)).items():
        for answer in answers:
            answer.sentence = sentences.answer_sentence(task, answer)
        tasks[task].answers = answers
        tasks[task].headline = sentences.headline(task, fusing, tasks[task], confidence)


def _main_model(
    scored_on: dict[str, list[Evaluated]], models: list[Evaluated], recommended: Recommended | None
) -> str | None:
    """The recommended model, if it is a trained one; else the trained model that scores most tasks, and among those the best
    on average."""
    trained = [m for m in models if m.kind == "trained"]
    if recommended and recommended.model in [m.name for m in trained]:
        return recommended.model
    by_task = {t: selection_scores(t, scored) for t, scored in scored_on.items()}

    def key(model: Evaluated) -> tuple[int, float]:
        values = [scores[model.name] for scores in by_task.values() if model.name in scores]
        return len(values), float(np.mean(values)) if values else 0.0

    return name_of(max(trained, key=key, default=None))


def _unseen(tasks: dict[str, TaskResults]) -> str:
    """The classes that train lacks, with their rows, of the model of each task that meets most of them."""
    named = []
    for task, found in tasks.items():
        most = max(found.rows, key=lambda row: row.num_unseen or 0)
        named += [f"{task} '{name}' ({n})" for name, n in (most.unseen or {}).items()]
    return f": {', '.join(named)}" if named else ""


def _notes(results: ResultsFile, run: RunFile) -> list[str]:
    """What a reader must know to read the numbers right; first whether adapting encoders paid."""
    notes = [found.sentence for found in results.adapted]
    if any(t.selected_on == "test" for t in results.tasks.values()):
        notes.append(
            "There are no held-out rows but test, so the best models were chosen there: their scores are a little too good."
        )
    for task, found in results.tasks.items():
        if (found.best or "").startswith("boosting:"):
            notes.append(
                f"{found.best} is the best of all for {task} on the rows that models are chosen by: gradient boosting on the "
                "table alone would do. It is a baseline that is not saved: fit scikit-learn's HistGradientBoosting to ship it."
            )
    missing = [name for name in run.variants if name not in results.models]
    if missing:
        notes.append(f"Not evaluated, or trained anew since, so not shown: {', '.join(missing)}; run `mmkt evaluate` again.")
    rows = [r for t in results.tasks.values() for r in t.rows]
    if any(r.verdict == DIFFERENT_SAMPLES for r in rows):
        notes.append(
            '"Different samples": no single modality was scored on the same samples, so there is no fair difference.'
        )
    if alone := [t for t, found in results.tasks.items() if found.best_single is None]:
        notes.append(
            f"No model of a single modality was trained for {', '.join(alone)}: nothing says there whether fusing helps."
        )
    if any(r.num_unseen for r in rows):
        notes.append(
            f"Some test labels are of classes that the train split does not have{_unseen(results.tasks)}; they count as "
            "wrong, or are left out of a multilabel row."
        )
    by_note: dict[str, list[str]] = {}
    for task, found in results.tasks.items():
        by_note.setdefault(task_kind(found.kind).notes, []).append(task)
    notes += [note.format(tasks=", ".join(tasks)) for note, tasks in by_note.items() if note]
    if any(r.versus and r.versus.num_rows < r.num_rows for r in rows):
        notes.append("Where two models can read different samples, their difference is over those that both can read.")
    return notes
