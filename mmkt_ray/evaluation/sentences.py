"""What the comparison of a run says in words: the only place that makes its sentences,
for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.results import Answer, Considered, Headline, ModelScores, ResultsFile, TaskResults
from mmkt_ray.scoring.run_file import RunFile
from mmkt_ray.scoring.tables import points

TONES = {"adds": "good", "hurts": "bad"}


def answer_sentence(task: str, answer: Answer) -> str:
    """An answer of `answers.correct_answers` in words; differences in points."""
    what, rest = _and(answer.modalities), _and(answer.rest_modalities)
    several = len(answer.modalities) > 1
    interval = f"[{points(answer.low)}, {points(answer.high)}]"
    text = {
        "adds": f"{what} {'add' if several else 'adds'} {_size(answer)} to {rest} for {task}",
        "depends": f"{what} {'add' if several else 'adds'} {_size(answer)} to {rest} for {task} in {answer.fused}, "
        f"which is not shown of {answer.best_fused}",
        "hurts": f"Fusing by {answer.fused} hurts {task}: adding {what} to {rest} costs {_size(answer)}",
        "suffices": f"{rest} alone {'suffice' if len(answer.rest_modalities) > 1 else 'suffices'} for {task}: "
        f"adding {what} changes {points(answer.value)} points {interval}{_no_other(answer)}",
        "unclear": f"Whether {what} {'help' if several else 'helps'} {rest} for {task} is not shown: "
        f"{points(answer.value)} points {interval}",
    }[answer.kind]
    text += f" ({_models(answer)})."
    if answer.differs:
        settings = "; ".join(f"{key} {ours} and {theirs}" for key, (ours, theirs) in answer.differs.items())
        text += f" Their training differs: {settings}."
    return text


def headline(task: str, answer: Answer | None, found: TaskResults, confidence: float) -> Headline:
    """The answer whether fusing helps one task.

    answer: of `answers.correct_answers`; None: no fused model stands beside one of a single modality.
    found: the task's results.
    """
    rows, kind = {r.model: r for r in found.rows}, task_kind(found.kind)
    if answer is None:
        title, text = _not_compared(found.row(found.best_fused), found.row(found.best_single), list(rows), kind)
        return Headline(task=task, tone="plain", title=title, text=text)
    ours, alone, size = answer.fused, answer.rest, f"{100 * abs(answer.value):.1f} points"
    title = {
        "adds": f"Fusing helps: {ours} beats every single modality, the closest ({alone}) by {size}",
        "depends": f"Fusing helps with {ours}, by {size} over {alone}; with {answer.best_fused} it is not shown to",
        "hurts": f"Fusing hurts: {ours} is {size} below {alone} alone",
        "suffices": f"{alone} alone suffices: none of the fused models tried gains a point",
        "unclear": f"Fusing is not shown to help: {ours} and {alone} alone are too close to tell apart",
    }[answer.kind]
    row, percent = rows[ours], f"{100 * confidence:g} %"
    extra = row.num_rows - answer.num_rows
    text = f"{_score(row, kind)} Beside {alone} on the {answer.num_rows:,} that both can read: {_models(answer)}. "
    text += f"Paired difference {points(answer.value)} points, {percent} interval {points(answer.low)} to "
    text += f"{points(answer.high)}{_no_other(answer) if answer.kind == 'suffices' else ''}."
    text += f" It also answers for {extra:,} samples that {alone} cannot read." if extra > 0 else ""
    return Headline(task=task, tone=TONES.get(answer.kind, "plain"), title=title, text=text)


def _not_compared(
    fused: ModelScores | None, single: ModelScores | None, models: Sequence[str], kind: TaskKind
) -> tuple[str, str]:
    if fused is not None:
        why = (
            "No model of a single modality was trained and scored on the same samples, so there is no fair "
            "difference."
        )
        return f"Whether fusing helps is not known: {fused.model} stands alone", f"{_score(fused, kind)} {why}"
    if single is not None:
        text = f"{_score(single, kind)} No fused model was trained for this task."
        return f"{single.model} is the best single modality that was trained", text
    return "No trained model to speak of", f"Scored: {', '.join(models)}."


def recommendation(
    chosen: Considered, best: Considered, num_tasks: int, num_simple: int, right: str = TaskKind.right
) -> list[str]:
    """Why a model is the one to ship. chosen, best: entries of `considered` (see `recommend`); num_simple: models
    within one standard error of the best; right: see `TaskKind`."""
    mean = f" (mean of {num_tasks} tasks)" if num_tasks > 1 else ""
    where = {"val": "the val rows", "cv": "held-out rows (cross-validation)", "test": "the test rows"}
    score = f"{chosen.model} gets {_right(right, chosen.score, where.get(chosen.on, 'held-out rows'))}{mean}"
    if chosen.model == best.model:
        why = [f"{score}, the most of all models."]
    else:
        paired = "paired by rows" if chosen.paired else "binomial"
        gap = f"{100 * (best.score - chosen.score):.1f} points behind {best.model}"
        why = [f"{score}: {gap}, within one standard error ({100 * chosen.error:.1f}, {paired})."]
    reads = len(chosen.modalities)
    size = f", {chosen.num_params:,} parameters" if chosen.num_params else ""
    if num_simple > 1:
        why.append(
            f"It is the simplest of the {num_simple} models so close to the best: it reads "
            f"{_and(chosen.modalities)} ({reads} modalit{'y' if reads == 1 else 'ies'}{size})."
        )
    if chosen.on == "test":
        why.append("There are no held-out rows but test, on which it was chosen: its scores are a little too good.")
    return why


def few_rows(num: int) -> str:
    """Where the choice is hardly one."""
    return f"It was chosen on {num} row{'s' * (num != 1)} alone, which say little."


def too_few_to_tell(task: str, fused: str) -> str:
    """Where the test rows show more than those by which the model was chosen."""
    return (
        f"On test {fused} is shown to be better for {task}; the held-out rows, by which it is chosen, are too few to "
        "tell."
    )


def _no_other(answer: Answer) -> str:
    num = answer.num_fused - 1
    return (
        f"; nor does any of the {num} other fused models gain a point" if num > 1 else "; nor does the other one" * num
    )


def _size(answer: Answer) -> str:
    ends = sorted(map(abs, (answer.low, answer.high)))
    return f"{100 * abs(answer.value):.1f} points [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _models(answer: Answer) -> str:
    fused, rest = (f"{100 * score:.1f} %" for score in (answer.scores.fused, answer.scores.rest))
    metric = {"f1_samples": "mean F1 of a sample's classes: ", "r2": "R2: "}.get(answer.metric, "")
    rows = f"{answer.num_rows:,} sample{'' if answer.num_rows == 1 else 's'}"
    return f"{metric}{answer.fused} {fused}, {answer.rest} {rest}; {rows}"


def _score(row: ModelScores, kind: TaskKind) -> str:
    a = row.interval(kind.main)
    got = _right(kind.right, a["value"], f"{row.num_rows:,} test samples")
    return f"{row.model} gets {got} ({100 * a['low']:.1f} to {100 * a['high']:.1f})."


def _right(words: str, score: float, rows: str) -> str:
    return words.format(score=f"{100 * score:.1f} %", rows=rows)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


DIFFERENT_SAMPLES = "different samples"


def _unseen(tasks: dict[str, TaskResults]) -> str:
    """The classes that train lacks, with their rows, of the model of each task that meets most of them."""
    named = []
    for task, found in tasks.items():
        most = max(found.rows, key=lambda row: row.num_unseen or 0)
        named += [f"{task} '{name}' ({n})" for name, n in (most.unseen or {}).items()]
    return f": {', '.join(named)}" if named else ""


def notes(results: ResultsFile, run: RunFile) -> list[str]:
    """What a reader must know to read the numbers right; first whether adapting encoders paid."""
    notes = [found.sentence for found in results.adapted]
    if any(t.selected_on == "test" for t in results.tasks.values()):
        notes.append(
            "There are no held-out rows but test, so the best models were chosen there: their scores are a little "
            "too good."
        )
    for task, found in results.tasks.items():
        if (found.best or "").startswith("boosting:"):
            notes.append(
                f"{found.best} is the best of all for {task} on the rows that models are chosen by: gradient "
                "boosting on the table alone would do. It is a baseline that is not saved: fit scikit-learn's "
                "HistGradientBoosting to ship it."
            )
    missing = [name for name in run.variants if name not in results.models]
    if missing:
        notes.append(
            f"Not evaluated, or trained anew since, so not shown: {', '.join(missing)}; run `mmkt evaluate` again."
        )
    rows = [r for t in results.tasks.values() for r in t.rows]
    if any(r.verdict == DIFFERENT_SAMPLES for r in rows):
        notes.append(
            '"Different samples": no single modality was scored on the same samples, so there is no fair difference.'
        )
    if alone := [t for t, found in results.tasks.items() if found.best_single is None]:
        notes.append(
            f"No model of a single modality was trained for {', '.join(alone)}: nothing says there whether fusing "
            "helps."
        )
    if any(r.num_unseen for r in rows):
        notes.append(
            f"Some test labels are of classes that the train split does not have{_unseen(results.tasks)}; they count "
            "as wrong, or are left out of a multilabel row."
        )
    by_note: dict[str, list[str]] = {}
    for task, found in results.tasks.items():
        by_note.setdefault(task_kind(found.kind).notes, []).append(task)
    notes += [note.format(tasks=", ".join(tasks)) for note, tasks in by_note.items() if note]
    if any(r.versus and r.versus.num_rows < r.num_rows for r in rows):
        notes.append("Where two models can read different samples, their difference is over those that both can read.")
    return notes
