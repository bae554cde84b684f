"""Plain answers from paired tests between the models of a run: does fusing help, what a modality adds, what suffices.

A question is what the best fused model (chosen on held-out rows) gains over models that read less, its rivals: all
models of the best single modality, or those that read all modalities but one. Rivals that are shown to be worse than
the best of them are left out. The rules, on differences row by row over the rows that both models predicted:

    adds      better than every rival (so the largest P counts); the answer has the gain over the closest one
    depends   not so, but another fused model is; P counts times the number of other models and of questions
    hurts     worse than a rival; P counts times the number of rivals
    suffices  none of these, and for every fused model tried the interval leaves out a gain of NEGLIGIBLE or more
    unclear   anything else: these rows cannot tell

P is that of an exact test by rows, corrected for all questions of the run (Holm 1979). The same question is asked
once, so one page never gives two answers to it. Words: sentences.py.

Source of the largest P of several tests that must all hold: Berger 1982,
https://doi.org/10.1080/00401706.1982.10487790
Axes: N rows that a model predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmkt_ray.scoring.intervals import Interval, agreeing, holm, paired_p, share_difference
from mmkt_ray.scoring.results import Answer, BothScores
from mmkt_ray.scoring.seeds import mean_interval

NEGLIGIBLE = 0.01  # a gain below this is none


@dataclass(frozen=True, eq=False)
class Scored:
    """One model's labelled rows of one task."""

    name: str
    trained: bool  # else it is a baseline
    reads: tuple[str, ...]  # the modalities that it reads for the task
    held_out: float  # the score by which models are chosen
    ids: np.ndarray  # (N,) of the samples; distinct
    labels: np.ndarray  # (N,) codes, the same for all models of a task
    scores: np.ndarray  # (N,) see `TaskKind.row_scores`
    training: Mapping[str, Any] | None = None
    row_metric: str = "accuracy"  # what the mean of the scores is
    # scores of some rows and their codes -> scores whose mean is the metric of these rows; None where it is anyway
    among: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def beside(self, other: Scored) -> tuple[np.ndarray, np.ndarray]:
        """Scores of both on the rows that both predicted and that have the same label."""
        if np.array_equal(self.ids, other.ids):
            ours = theirs = np.arange(len(self.ids))
        else:
            _, ours, theirs = np.intersect1d(self.ids, other.ids, assume_unique=True, return_indices=True)
        same = self.labels[ours] == other.labels[theirs]
        return self._of_rows(ours[same]), other._of_rows(theirs[same])

    def _of_rows(self, rows: np.ndarray) -> np.ndarray:
        scores = self.scores[rows]
        return scores if self.among is None else self.among(scores, self.labels[rows])

    def on(self, ids: np.ndarray) -> np.ndarray:
        """Scores on these samples; 0 where it has no prediction."""
        _, theirs, ours = np.intersect1d(ids, self.ids, assume_unique=True, return_indices=True)
        found = np.zeros(len(ids))
        found[theirs] = self.scores[ours]
        return found


@dataclass(frozen=True)
class Settings:
    """How differences are judged."""

    confidence: float = 0.95
    num_resamples: int = 1000
    chosen_on_test: bool = False  # then P counts times the number of fused models that the best was chosen of

    @property
    def alpha(self) -> float:
        return 1 - self.confidence


class Difference(Interval):
    """A mean difference with its interval, and P that it is zero."""

    p: float


def paired_test(ours: np.ndarray, theirs: np.ndarray, confidence: float, num_resamples: int) -> Difference:
    """Row scores (N,) of two models -> value, low, high of their mean difference, and p that it is zero.

    Right or wrong: the exact McNemar test and the interval that goes with it. Else the same test by random signs, and
    a bootstrap of rows. The interval holds zero where p tells no difference.
    """
    p = paired_p(ours - theirs)
    if np.isin([ours, theirs], (0, 1)).all():
        better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
        return {**share_difference(better, worse, len(ours), confidence), "p": p}
    interval = mean_interval((ours - theirs)[None], num_resamples, confidence, seed=0)
    return {**agreeing(interval, p, confidence), "p": p}


@dataclass(frozen=True)
class Pair:
    """One fused model against one that reads less."""

    fused: Scored
    rest: Scored
    found: Difference
    num_rows: int
    scores: tuple[float, float]  # means of both over these rows

    @classmethod
    def of(cls, fused: Scored, rest: Scored, settings: Settings) -> Pair | None:
        """None if the two predicted no row in common."""
        ours, theirs = fused.beside(rest)
        if not len(ours):
            return None
        found = paired_test(ours, theirs, settings.confidence, settings.num_resamples)
        return cls(fused, rest, found, len(ours), (float(ours.mean()), float(theirs.mean())))

    def p(self, sign: int) -> float:
        """P of a difference of this sign; 1 if it has the other one."""
        return self.found["p"] if sign * self.found["value"] > 0 else 1.0


@dataclass(frozen=True, eq=False)
class Question:
    """What the fused model gains over models that read less."""

    pairs: tuple[Pair, ...]  # of the fused model against its rivals, the best of them first
    others: tuple[tuple[Pair, ...], ...]  # the same of the other fused models
    factor: int = 1  # by which P is to be multiplied

    @cached_property
    def p_adds(self) -> float:
        return min(1.0, self.factor * max(pair.p(1) for pair in self.pairs))

    @cached_property
    def p_hurts(self) -> float:
        return min(1.0, self.factor * len(self.pairs) * min(pair.p(-1) for pair in self.pairs))

    def decide(self, p_holm: float, alpha: float, num_questions: int = 1) -> tuple[str, Pair]:
        """The kind of the answer and the pair that it is about, by the rules at the top of this file. p_holm: the
        smaller of `p_adds` and `p_hurts`, corrected for the number of questions."""
        shown = p_holm < alpha
        if shown and self.p_adds <= self.p_hurts:
            return "adds", _closest(self.pairs)
        times = num_questions * len(self.others)
        better = [pairs for pairs in self.others if times * max(pair.p(1) for pair in pairs) < alpha]
        if better:
            return "depends", _closest(max(better, key=lambda pairs: pairs[0].fused.held_out))
        if shown:
            return "hurts", min(self.pairs, key=lambda pair: pair.p(-1))
        if all(pairs[0].found["high"] < NEGLIGIBLE for pairs in (self.pairs, *self.others)):
            return "suffices", self.pairs[0]
        first = self.pairs[0]
        return "unclear", max(self.pairs, key=lambda pair: pair.p(1)) if first.p(1) < alpha else first


def _closest(pairs: Sequence[Pair]) -> Pair:
    """Of a fused model that is better than all rivals, the pair with the least gain."""
    return min(pairs, key=lambda pair: pair.found["value"])


@dataclass(frozen=True)
class Asked:
    """The questions of one task."""

    fusing: Question | None  # against all single modalities; None: there is no such model on the same rows
    modalities: tuple[Question, ...]  # what each modality adds; the former may be among them

    def every(self) -> tuple[Question, ...]:
        """All questions, each once."""
        return self.modalities + ((self.fusing,) if self.fusing and self.fusing not in self.modalities else ())


def ask(models: Sequence[Scored], fused: str | None, single: str | None, settings: Settings) -> Asked:
    """One task's questions. fused, single: the best fused and the best single-modality model, both trained.

    Where no two trained models differ by a modality, the baselines among `models` answer what a modality adds.
    """
    ours = next((m for m in models if m.name == fused), None)
    best = next((m for m in models if m.name == single), None)
    fusing = None
    if ours is not None and best is not None:
        rivals = [best, *(m for m in models if len(m.reads) == 1 and m is not best)]
        fusing = _question(ours, rivals, [m for m in models if len(m.reads) > 1], settings)
    asked = _by_modality(ours, models, fusing, settings) if ours is not None else []
    if not asked and fusing is None:  # like with like
        baselines = [m for m in models if not m.trained]
        ours = max((m for m in baselines if len(m.reads) > 1), key=lambda m: (len(m.reads), m.held_out), default=None)
        asked = _by_modality(ours, baselines, None, settings) if ours is not None else []
    return Asked(fusing, tuple(asked))


def _by_modality(
    ours: Scored, models: Sequence[Scored], fusing: Question | None, settings: Settings
) -> list[Question]:
    """What each modality adds to the others, where a model (a trained one if `ours` is) reads just these."""
    asked = []
    for modality in ours.reads:
        rest = {*ours.reads} - {modality}
        rivals = [m for m in models if {*m.reads} == rest]
        first = max(rivals, key=lambda m: (m.trained, m.training == ours.training, m.held_out), default=None)
        if first is None or first.trained != ours.trained:
            continue
        if fusing is not None and all({*pair.rest.reads} == rest for pair in fusing.pairs):
            asked.append(fusing)
            continue
        tried = [m for m in models if len(m.reads) > 1 and rest < {*m.reads}]
        question = _question(ours, [first, *(m for m in rivals if m is not first)], tried, settings)
        asked += [question] if question is not None else []
    return asked


def _question(
    ours: Scored, rivals: Sequence[Scored], tried: Sequence[Scored], settings: Settings
) -> Question | None:
    """None if the first of the rivals shares no row with the model."""
    first, ids = rivals[0], ours.ids
    rivals = [first, *(m for m in rivals[1:] if not _shown_worse(m, first, ids, settings))]
    found = [Pair.of(ours, rival, settings) for rival in rivals]
    if found[0] is None:
        return None
    pairs = tuple(pair for pair in found if pair is not None)
    others = []
    for model in tried:
        if model is not ours:
            beside = [Pair.of(model, pair.rest, settings) for pair in pairs]
            if beside[0] is not None:
                others.append(tuple(pair for pair in beside if pair is not None))
    return Question(pairs, tuple(others), 1 + len(others) if settings.chosen_on_test else 1)


def _shown_worse(model: Scored, best: Scored, ids: np.ndarray, settings: Settings) -> bool:
    """Whether the model is shown to be worse on these samples, one that it can't read counting as wrong."""
    gain = best.on(ids) - model.on(ids)
    return bool(gain.mean() > 0 and paired_p(gain) < settings.alpha)


def correct_answers(asked: Mapping[str, Asked], settings: Settings) -> dict[str, tuple[Answer | None, list[Answer]]]:
    """Task -> the answer whether fusing helps, or None, and all answers (the former too where no other is about the
    same two models), P corrected for all questions together. They have no sentences yet.
    """
    every = [q for found in asked.values() for q in found.every()]
    tests = [min(q.p_adds, q.p_hurts) for q in every]
    answers = {
        id(q): _answer(q, p, settings, corrected, len(every))
        for q, p, corrected in zip(every, tests, holm(tests), strict=True)
    }
    settled = {}
    for task, found in asked.items():
        fusing = answers[id(found.fusing)] if found.fusing else None
        settled[task] = fusing, [answers[id(q)] for q in found.modalities]
        if fusing and not any((a.fused, a.rest) == (fusing.fused, fusing.rest) for a in settled[task][1]):
            settled[task][1].append(fusing)
    return settled


def _answer(question: Question, p: float, settings: Settings, p_holm: float, num_questions: int) -> Answer:
    kind, pair = question.decide(p_holm, settings.alpha, num_questions)
    both = pair.fused.trained and pair.rest.trained
    training = [m.training or {} if both else {} for m in (pair.fused, pair.rest)]
    return Answer(
        kind=kind,
        modalities=[m for m in pair.fused.reads if m not in pair.rest.reads],
        fused=pair.fused.name,
        rest=pair.rest.name,
        rest_modalities=list(pair.rest.reads),
        metric=pair.fused.row_metric,
        value=pair.found["value"],
        low=pair.found["low"],
        high=pair.found["high"],
        p=p,
        p_holm=p_holm,
        num_rows=pair.num_rows,
        scores=BothScores(fused=pair.scores[0], rest=pair.scores[1]),
        best_fused=question.pairs[0].fused.name,
        num_fused=1 + len(question.others),
        source="trained" if question.pairs[0].fused.trained else "baseline",
        differs={k: [t.get(k) for t in training] for k in training[0] if training[0][k] != training[1].get(k)},
    )
