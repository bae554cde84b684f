"""Which model to ship: the simplest of those within one standard error of the best on held-out rows.

Held out are the rows of val, or out-of-fold predictions of cross-validation; the test split only where there are
none. A sample that a model can't read but another one can counts as wrong. Simple is what reads fewer modalities,
then what has fewer parameters. The standard error is that of the paired difference to the best, row by row, where
both models left their held-out predictions, else the binomial one of the best; of several tasks it is the mean, which
is no less than that of the mean difference. Over fewer than FEW_ROWS rows it says little, as one wrong row in four is
within it: then the best is taken, and the simplest of several.

Source: the one-standard-error rule, Breiman et al. 1984, Classification and Regression Trees, 3.4.3.
Axes: N held-out rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmkt_ray import storage
from mmkt_ray.evaluation import sentences
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.metrics import HeldOutScores, PointScores, TaskScores
from mmkt_ray.scoring.results import Considered, Recommended, ResultsFile, TaskResults

if TYPE_CHECKING:
    from mmkt_ray.evaluation.evaluated import Evaluated

FEW_ROWS = 20
HeldOutRows = tuple[np.ndarray, np.ndarray]  # distinct sample ids (N,), see `LabelledPredictions.right` (N,)


@dataclass(frozen=True)
class Candidate:
    """A model that may be shipped, by task."""

    name: str
    modalities: tuple[str, ...]
    num_params: int
    scores: Mapping[str, float]  # share of the held-out rows that it has right; of numbers R2
    num_rows: Mapping[str, int]  # N, those that it can't read among them
    rows: Mapping[str, HeldOutRows | None]
    on: str = "val"  # val | cv | test

    @property
    def score(self) -> float:
        return float(np.mean(list(self.scores.values())))

    def simplicity(self) -> tuple[int, int, float]:
        """The lowest is the simplest."""
        return len(self.modalities), self.num_params, -self.score


def rank_candidates(candidates: Sequence[Candidate]) -> list[Considered]:
    """All candidates: the chosen one first, then by score. They all have the same tasks; there is one."""
    best = max(candidates, key=lambda c: (c.score, -c.simplicity()[0], -c.simplicity()[1]))
    errors = {c.name: standard_error(best, c) for c in candidates}
    enough = min(best.num_rows.values()) >= FEW_ROWS
    allowed = {name: error if enough else 0.0 for name, (error, _) in errors.items()}
    within = {c.name: c is best or best.score - c.score <= allowed[c.name] + 1e-12 for c in candidates}
    chosen = min((c for c in candidates if within[c.name]), key=Candidate.simplicity)
    order = sorted(candidates, key=lambda c: (c is not chosen, -c.score))
    return [
        Considered(
            model=c.name,
            score=c.score,
            error=errors[c.name][0],
            paired=errors[c.name][1],
            within=within[c.name],
            modalities=list(c.modalities),
            num_params=c.num_params,
            on=c.on,
        )
        for c in order
    ]


def standard_error(best: Candidate, other: Candidate) -> tuple[float, bool]:
    """Of the difference of two candidates' scores, and whether it is paired on every task."""
    paired = [_paired_error(best.rows[t], other.rows[t], best.num_rows[t]) for t in best.scores]
    binomial = [_binomial_error(best.scores[t], best.num_rows[t]) for t in best.scores]
    errors = [b if p is None else p for p, b in zip(paired, binomial, strict=True)]
    return float(np.mean(errors)), None not in paired


def _paired_error(ours: HeldOutRows | None, theirs: HeldOutRows | None, num_rows: int) -> float | None:
    """None where a model left no held-out predictions, or there are too few rows."""
    if ours is None or theirs is None or num_rows < 2:
        return None
    ids = np.union1d(ours[0], theirs[0])
    gain = np.zeros(len(ids))
    for sign, (mine, right) in ((1, ours), (-1, theirs)):
        np.add.at(gain, np.searchsorted(ids, mine), sign * right.astype(float))
    gain = np.append(gain, np.zeros(max(num_rows - len(ids), 0)))
    return float(gain.std(ddof=1) / np.sqrt(len(gain)))


def _binomial_error(score: float, num_rows: int) -> float:
    """With one right and one wrong row more, so that it is not 0 where all are right."""
    share = (max(score, 0.0) * num_rows + 1) / (num_rows + 2)
    return float(np.sqrt(share * (1 - share) / max(num_rows, 1)))


# --- the models of a run -----------------------------------------------------------------------------------------


def selected_on(task: str, models: list[Evaluated]) -> str:
    """val, cv (out-of-fold predictions of train and val), or test where a model has neither. Where only some of the
    models were cross-validated, all are compared on val."""
    held = [m.tasks[task].val for m in models]
    found = [h for h in held if h is not None]
    if len(found) < len(held):
        return "test"
    ways = {h.on for h in found}
    if len(ways) > 1:
        return "val" if all(_on_val(h) for h in found) else "test"
    return ways.pop() if ways else "val"


def _on_val(held: HeldOutScores) -> PointScores | None:
    """Of the rows of the val split alone."""
    return held.split_val if held.on == "cv" else held


def _selected_by(task: str, models: list[Evaluated]) -> dict[str, PointScores | TaskScores]:
    """Model -> the scores by which it is chosen."""
    on, found = selected_on(task, models), dict[str, PointScores | TaskScores]()
    for m in models:
        held = m.tasks[task].val
        part = _on_val(held) if held is not None and on == "val" else held
        found[m.name] = part if part is not None and on != "test" else m.tasks[task]
    return found


def selection_scores(task: str, models: list[Evaluated]) -> dict[str, float]:
    """Model -> the score by which models are chosen: the main metric on held-out rows (or test), where a labelled
    sample that the model can't read but another one of the same store can counts as wrong. Without that, the model
    that only sees the easy samples would win."""
    found, most = _selected_by(task, models), _most_rows(task, models)
    return {m.name: found[m.name].value(m.kind_of(task).main) * found[m.name].num_rows / most[m.name] for m in models}


def _most_rows(task: str, models: list[Evaluated]) -> dict[str, int]:
    """Model -> how many rows the one of the same store that reads most was scored on."""
    found = _selected_by(task, models)
    most: dict[str | None, int] = {}
    for m in models:
        most[m.record.store] = max(most.get(m.record.store, 0), found[m.name].num_rows)
    return {m.name: most[m.record.store] for m in models}


def best_single(
    task: str, models: list[Evaluated], scores: dict[str, float], relative_to: Evaluated | None
) -> Evaluated | None:
    """The best of the models of a single modality that were scored on samples of `relative_to`."""
    singles = [m for m in models if len(m.reads(task)) == 1]
    if relative_to is not None:
        singles = [m for m in singles if m is relative_to or m.shares_samples(relative_to, task)]
    return best_of(singles, scores)


def smallest_of_best(task: str, models: list[Evaluated], scores: dict[str, float]) -> Evaluated | None:
    """The simplest of the models within one standard error of the best: of equals the one that costs least to run,
    where the highest score would be chance; see recommend.py."""
    if not models:
        return None
    most = _most_rows(task, models)
    found = rank_candidates([_candidate(m, {task: scores[m.name]}, {task: most[m.name]}, "val") for m in models])
    return next(m for m in models if m.name == found[0].model)


def _candidate(model: Evaluated, scores: dict[str, float], num_rows: dict[str, int], on: str) -> Candidate:
    reads, num_params = tuple(model.record.modalities), model.record.num_params or 0
    held_out = {t: model.held_out(t) if on != "test" else None for t in scores}
    return Candidate(model.name, reads, num_params, scores, num_rows, held_out, on)


def best_of(models: list[Evaluated], scores: dict[str, float]) -> Evaluated | None:
    return max(models, key=lambda m: scores[m.name], default=None)


def name_of(model: Evaluated | None) -> str | None:
    return model.name if model else None


def recommend(
    run_uri: str, scored_on: dict[str, list[Evaluated]], tasks: dict[str, TaskResults]
) -> Recommended | None:
    """The model to ship, of those that have a model folder and score the most tasks; None if there is none."""
    able = {t: [m for m in models if m.record.modalities and _can_ship(run_uri, m)] for t, models in scored_on.items()}
    counts = Counter(m.name for models in able.values() for m in models)
    most = [n for n, count in counts.items() if count == max(counts.values())]
    if not most:
        return None
    mine = [t for t, models in able.items() if any(m.name == most[0] for m in models)]
    names = [n for n in most if all(any(m.name == n for m in able[t]) for t in mine)]
    scores = {t: selection_scores(t, scored_on[t]) for t in mine}
    rows = {t: _most_rows(t, scored_on[t]) for t in mine}
    ons = {tasks[t].selected_on for t in mine}
    on = next(place for place in ("test", "cv", "val") if place in ons)
    by_name = {m.name: m for m in able[mine[0]]}
    considered = rank_candidates(
        [_candidate(by_name[n], {t: scores[t][n] for t in mine}, {t: rows[t][n] for t in mine}, on) for n in names]
    )
    chosen, best = considered[0], max(considered, key=lambda c: c.score)
    words = {task_kind(tasks[t].kind).right for t in mine}
    right = words.pop() if len(words) == 1 else "{score} of {rows} right (of numbers: R2)"
    why = sentences.recommendation(chosen, best, len(mine), sum(c.within for c in considered), right)
    if (fewest := min(rows[t][n] for t in mine for n in names)) < FEW_ROWS:
        why.append(sentences.few_rows(fewest))
    for t in mine:
        helped = next((a for a in tasks[t].answers if a.kind == "adds" and a.rest == chosen.model), None)
        why += [sentences.too_few_to_tell(t, helped.fused)] if helped else []
    per_task = {t: smallest_of_best(t, able[t], selection_scores(t, scored_on[t])) for t in mine}
    folder = by_name[chosen.model].folder_to_ship
    assert folder is not None, chosen.model  # see `_can_ship`
    return Recommended(
        model=chosen.model,
        folder=folder,
        tasks=mine,
        why=why,
        considered=considered,
        per_task={t: name_of(m) for t, m in per_task.items()},
    )


def fused_to_study(results: ResultsFile) -> list[str]:
    """The models whose scores with missing modalities matter: the recommended one, and the best fused trained ones of
    the tasks where that one reads a single modality."""
    names = [results.recommended.model] if results.recommended else []
    if not names or len(results.models[names[0]].modalities) < 2:
        names = sorted({found.best_fused for found in results.tasks.values() if found.best_fused})
    return names


def _can_ship(run_uri: str, model: Evaluated) -> bool:
    folder = model.folder_to_ship
    return bool(model.card) or (folder is not None and storage.exists(storage.join(run_uri, folder, "config.json")))
