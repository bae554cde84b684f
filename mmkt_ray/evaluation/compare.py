"""All models of a run side by side, each against the best single modality on the same samples.
Reads result files only.

Called by steps.py after evaluation/evaluate.py; report/page.py shows what it writes.

The best single modality of a task is the trained model that reads exactly one modality with the highest accuracy on
held-out rows (on `test`, with a note, if there are none). Differences are paired over the samples that both models
predicted. Models that share none were scored on different samples; their scores are shown, not compared.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation import sentences
from mmkt_ray.evaluation.adapted import adaptations
from mmkt_ray.evaluation.answers import Asked, Settings, ask, correct_answers
from mmkt_ray.evaluation.evaluated import Evaluated, evaluated_models
from mmkt_ray.evaluation.recommend import (
    best_of,
    best_single,
    name_of,
    recommend,
    selected_on,
    selection_scores,
    smallest_of_best,
)
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.intervals import agreeing, holm, paired_difference, paired_p, verdict
from mmkt_ray.scoring.results import ModelScores, Recommended, ResultsFile, Shared, TaskResults, Versus
from mmkt_ray.scoring.run_file import RunFile

NO_SINGLE = "no single modality trained"
REFERENCE = "best single modality"


def compare(run_uri: str) -> ResultsFile:
    """Compare what was evaluated in a run folder; written to `<run>/report/results.json` and returned.

    For a verdict, the interval and an exact test must agree. The tests are corrected (Holm) within two families: the
    chosen fused models of all tasks, and all other rows.

    Reads the variants of `<run>/run.json` ({name: {model: folder}}), without it all `<run>/models/*/metrics.json`,
    and `<run>/baselines/*/metrics.json`. Raises: DataError if nothing was evaluated.
    """
    run = RunFile.of(run_uri)
    models = evaluated_models(run_uri, run)
    if not models:
        raise DataError(f"nothing is evaluated in '{run_uri}': run `mmkt evaluate` (or `mmkt run`) first")
    scored_on = {
        t: [m for m in models if m.scores(t)] for t in sorted({t for m in models for t in m.tasks if m.scores(t)})
    }
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
    results.notes = sentences.notes(results, run)
    results.write(storage.join(run_uri, "report", "results.json"))
    return results


# --- one task ----------------------------------------------------------------------------------------------------


def _compare_task(task: str, models: list[Evaluated], asked: dict[str, Asked]) -> TaskResults:
    """The rows of one task, without its answers. What is to be answered goes into `asked`.
    All `models` were scored on it."""
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
    """One model's line: its scores, and the paired difference to the best single modality.
    trained: whether the run has one."""
    record = model.tasks[task]
    ids = np.sort(model.outcomes(task).ids)
    main, name = model.kind_of(task).main, "balanced_accuracy"
    versus = _paired(task, model, single) if single is not None and single is not model else None
    without = REFERENCE if single is model else sentences.DIFFERENT_SAMPLES if trained else NO_SINGLE
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
    """Differences model - other over the samples that both predicted; None if they share none with the same label."""
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
    """Correct the P values of the rows' differences, and the verdicts with them."""
    # the chosen fused models, all others
    families: dict[bool, list[tuple[ModelScores, Versus, str]]] = {True: [], False: []}
    for found in tasks.values():
        for row in found.rows:
            if row.versus:
                families[row.model == found.best_fused].append((row, row.versus, task_kind(found.kind).main))
    for rows in families.values():
        for (row, versus, main), p in zip(rows, holm([versus.p for _, versus, _ in rows]), strict=True):
            versus.p_holm = p
            row.verdict = verdict(agreeing(versus.interval(main), p, confidence))


def _answer(tasks: dict[str, TaskResults], asked: dict[str, Asked], confidence: float) -> None:
    """Answer what was asked of each task, corrected over all tasks, and put it into words."""
    for task, (fusing, answers) in correct_answers(asked, Settings(confidence)).items():
        for answer in answers:
            answer.sentence = sentences.answer_sentence(task, answer)
        tasks[task].answers = answers
        tasks[task].headline = sentences.headline(task, fusing, tasks[task], confidence)


def _main_model(
    scored_on: dict[str, list[Evaluated]], models: list[Evaluated], recommended: Recommended | None
) -> str | None:
    """The recommended model, if it is a trained one; else the trained model that scores most tasks, and among those
    the best on average."""
    trained = [m for m in models if m.kind == "trained"]
    if recommended and recommended.model in [m.name for m in trained]:
        return recommended.model
    by_task = {t: selection_scores(t, scored) for t, scored in scored_on.items()}

    def key(model: Evaluated) -> tuple[int, float]:
        values = [scores[model.name] for scores in by_task.values() if model.name in scores]
        return len(values), float(np.mean(values)) if values else 0.0

    return name_of(max(trained, key=key, default=None))
