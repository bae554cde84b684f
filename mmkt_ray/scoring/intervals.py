"""Intervals: how far a score on these test rows may lie from the score on as many new rows, and tests of differences.

A share of rows (accuracy) has the exact interval of Clopper & Pearson, the difference of two on the same rows the
score interval of Tango; both hold for one row as for a million, and none has zero width. All other scores are
bootstrapped: rows are drawn with replacement. They depend only on how often each combination of label and predictions
occurs, so a resample is one multinomial draw over these combinations ("cells"): the same distribution as drawing N
rows, at a cost that does not grow with N. Scores of several predictions are drawn jointly: what makes a row hard for
all of them cancels out of their differences. Models of several seeds: seeds.py.

What the metrics are, and when a row is right, is the business of the labels' kind.

Sources: Clopper & Pearson 1934, https://doi.org/10.1093/biomet/26.4.404; Tango 1998,
https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B; McNemar 1947,
https://doi.org/10.1007/BF02295996; Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 10 (bias), 13,
15.
Axes: N samples, K distinct cells, P predictions of the same rows, R resamples.

Limits: the rows must be independent draws. Rows that share a text or an image (label-made pairs) are not, and their
intervals are too narrow. Macro-F1 over classes of a row or two is biased: its intervals tell of new test sets of as
many rows, and less often of endless ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    from scipy import optimize, special, stats
else:  # half a second, which a model that only predicts need not wait for
    optimize, special, stats = lazy("scipy.optimize"), lazy("scipy.special"), lazy("scipy.stats")

_MAX_COUNTS = 2_000_000  # drawn at once: 16 MB
_NUM_FLIPS = 9999  # of a test by random signs: the least P is one in 10,000
_MAX_SIZES = 2000  # distinct sizes of gains that are flipped; above, there are enough rows for a t test


SHARE, DIFFERENCE, ANY = (0.0, 1.0), (-1.0, 1.0), (-np.inf, np.inf)  # what bounds scores


@with_config(ConfigDict(extra="forbid"))
class Interval(TypedDict):
    """A score and the interval around it, or a difference of two scores."""

    value: float
    low: float
    high: float


def bootstrap_intervals(
    labels: Labels,
    pred: np.ndarray,
    width: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """The metrics that the task's kind reports, with intervals.

    Args:
        labels, pred: see above; rows without a label are left out.
        width: K.
        num_resamples: R, at least some hundred for stable ends.
        confidence: share of repetitions of the whole study whose interval covers the true score.

    Returns:
        {"accuracy": {value, low, high}, "macro_f1": {...}}; empty if no row is labelled.
        None stands for an undefined one.

    Neither has zero width, also where all rows are right: 20 right of 20 gives [0.83, 1], not [1, 1].
    """
    kind, rows = labels.kind, labels.labelled
    if not rows.any():
        return {}
    labels, pred = labels[rows], pred[rows]
    found: dict[str, Interval | None] = {}
    for metric, drawn in resampled_scores(labels, [pred], width, num_resamples, seed).items():
        if metric == kind.share:
            found[metric] = share_interval(int(kind.is_right(labels, pred).sum()), len(labels), confidence)
        else:
            found[metric] = percentiles(drawn[0], confidence, len(labels), kind.bounds.get(metric, SHARE))
    return found


def share_interval(num_right: int, num_rows: int, confidence: float) -> Interval:
    """A share of rows and its exact interval (Clopper & Pearson), which is never of zero width.
    There must be a row."""
    ends = stats.binomtest(num_right, num_rows).proportion_ci(confidence, method="exact")
    return {"value": num_right / num_rows, "low": float(ends.low), "high": float(ends.high)}


def paired_difference(
    labels: Labels,
    preds: tuple[np.ndarray, np.ndarray],
    metric: str = "accuracy",
    *,
    width: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Score of the first predictions minus score of the second on the same rows; None where it is undefined.

    Both predictions of a row stay together, so the interval is narrower than two separate ones suggest. Some rows are
    labelled; `metric` is one that the kind reports. A share of right rows: `share_difference`;
    others: resampled jointly.

    Raises: ValueError for another metric, or if no row is labelled.
    """
    kind, rows = labels.kind, labels.labelled
    if metric not in kind.reported:
        raise ValueError(f"metric must be one of {kind.reported}, got '{metric}'")
    if not rows.any():
        raise ValueError("no labelled row to compare on")
    labels, both = labels[rows], [pred[rows] for pred in preds]
    if metric == kind.share:
        ours, theirs = (kind.is_right(labels, p) for p in both)
        return share_difference(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(labels), confidence)
    a, b = resampled_scores(labels, both, width, num_resamples, seed)[metric]
    return percentiles(a - b, confidence, len(labels), difference_bounds(kind, metric))


def share_difference(better: int, worse: int, num_rows: int, confidence: float) -> Interval:
    """Difference of two shares of the same rows, of which `better` are right in the first only and `worse` in the
    second only, with the score interval of Tango (1998); see `agreeing` for how it goes with the exact test of
    McNemar."""
    z = float(special.ndtri((1 + confidence) / 2))

    def score(delta: float) -> float:  # falls with delta
        b = -better - worse + (2 * num_rows - better + worse) * delta
        root = sqrt(max(b * b + 8 * num_rows * worse * delta * (1 - delta), 0.0))
        share = (root - b) / (4 * num_rows)  # of rows that only the second has right, were the difference delta
        spread = num_rows * (2 * share + delta * (1 - delta))
        return (better - worse - num_rows * delta) / sqrt(max(spread, 1e-300))

    value, edge = (better - worse) / num_rows, 1 - 1e-12
    low = -1.0 if score(-edge) < z else optimize.brentq(lambda delta: score(delta) - z, -edge, value)
    high = 1.0 if score(edge) > -z else optimize.brentq(lambda delta: score(delta) + z, value, edge)
    found: Interval = {"value": value, "low": float(low), "high": float(high)}
    return agreeing(found, exact_p(better, worse), confidence)


def exact_p(better: int, worse: int) -> float:
    """P of the exact two-sided test of McNemar: as many rows are better as worse but for chance."""
    return min(1.0, 2 * float(special.bdtr(min(better, worse), better + worse, 0.5))) if better + worse else 1.0


def paired_p(gain: np.ndarray) -> float:
    """P that the mean gain (N,) of one model's row scores over another's is zero: the share of random signs of the
    gains that give as much. Of right or wrong it is the exact test of McNemar.

    Source: the randomisation test for matched pairs, Fisher 1935, The Design of Experiments, section 21.
    """
    gain = gain[np.abs(gain) > 1e-12]
    if (np.abs(gain) == 1).all():
        return exact_p(int((gain > 0).sum()), int((gain < 0).sum()))
    sizes, which = np.unique(np.abs(gain).round(12), return_inverse=True)
    if len(sizes) < 2:
        return exact_p(int((gain > 0).sum()), int((gain < 0).sum()))
    if len(sizes) > _MAX_SIZES:
        return float(stats.ttest_1samp(gain, 0).pvalue)
    counts = np.bincount(which)
    flipped = (2 * np.random.default_rng(0).binomial(counts, 0.5, (_NUM_FLIPS, len(counts))) - counts) @ sizes
    return float((1 + (np.abs(flipped) >= abs(gain.sum()) - 1e-9).sum()) / (1 + _NUM_FLIPS))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in the given order (the step-down of Holm 1979,
    https://www.jstor.org/stable/4615733)."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else []
    return [float(p) for p in corrected]


def agreeing(difference: Interval, p: float, confidence: float) -> Interval:
    """The interval, widened to zero where the test does not tell the difference from zero: so no verdict of the one
    contradicts the other."""
    if p < 1 - confidence:
        return difference
    return difference | {"low": min(difference["low"], 0.0), "high": max(difference["high"], 0.0)}


def resampled_scores(
    labels: Labels, preds: Sequence[np.ndarray], width: int, num_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Metric -> (P, 1 + R): the score of each prediction on the labelled rows given, then on the resamples, which are
    the same for all; NaN where undefined."""
    outcomes, counts = labels.kind.outcomes(labels, preds, width)
    blocks = chain([counts[None]], draw_counts(counts, num_resamples, np.random.default_rng(seed)))
    drawn = [[outcome.scores(block) for outcome in outcomes] for block in blocks]
    return {m: np.concatenate([[s[m] for s in scores] for scores in drawn], axis=1) for m in labels.kind.reported}


def difference_bounds(kind: TaskKind, metric: str) -> tuple[float, float]:
    """The lowest and the highest difference of two scores."""
    low, high = kind.bounds.get(metric, SHARE)
    return (low - high, high - low) if np.isfinite(high - low) else ANY


def percentiles(
    scores: np.ndarray, confidence: float, num_rows: int | None = None, bounds: tuple[float, float] = SHARE
) -> Interval | None:
    """Scores (1 + R,) -> the first one between percentiles of the others; None where it is undefined (NaN). Resamples
    that lack what defines it are left out.

    Resamples of macro-F1 lie below the score, because they lack rare classes, by about as much as the score lies
    below that of endless rows. The interval therefore reaches over the percentiles as they are and moved by twice
    this bias. num_rows: N, where the least width counts that any score has that rests on N rows: they may all be of
    one kind though a share 1 - (a / 2)^(1 / N) of new ones is not (Clopper & Pearson). bounds: the lowest and the
    highest possible score, both finite where that width counts.
    """
    value = float(scores[0])
    if np.isnan(value):
        return None
    drawn = scores[1:]
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    bias = 2 * (value - float(np.nanmean(drawn)))
    low, high = min(low, low + bias), max(high, high + bias)
    if num_rows is not None:
        share = 1 - ((1 - confidence) / 2) ** (1 / num_rows) if np.isfinite(bounds).all() else 0.0
        least, most = (b if np.isfinite(b) else value for b in bounds)
        low, high = min(low, value - share * (value - least)), max(high, value + share * (most - value))
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return {"value": value, "low": float(low), "high": float(high)}


def verdict(difference: Interval, neither: str = "no difference shown") -> str:
    """What a paired difference shows: better, worse or `neither`."""
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else neither


def draw_counts(counts: np.ndarray, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Counts (K,) of the rows -> blocks (r, K) of counts in resamples of as many rows, `num_resamples` in all."""
    total = int(counts.sum())
    block = max(1, _MAX_COUNTS // len(counts))
    for start in range(0, num_resamples, block):
        yield rng.multinomial(total, counts / total, size=min(block, num_resamples - start))
