"""What each modality contributes to a fused model: its exact Shapley value over all subsets of the modalities.

The value v(S) of a subset is the model's score over the same labelled rows when it is given only the modalities in S; rows that
have none of S are predicted from the train split's class frequencies, and so is every row for the empty subset. The
values of the modalities add up to v(all) - v(none); a modality that never changes a prediction has 0.

Sources: Shapley 1953, A Value for n-Person Games; for modalities: Hu et al. 2022, https://arxiv.org/abs/2205.00302
Axes: N rows, C classes, M modalities, S = 2^M subsets (bit i of a subset's number: modality i is in it), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.config import parse_config
from mmkt_ray.evaluation.answers import answer_tasks
from mmkt_ray.evaluation.compare import compare, read_optional
from mmkt_ray.evaluation.disagreement import disagreements
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.intervals import METRICS, Interval
from mmkt_ray.evaluation.metrics import as_codes, is_right, macro_f1_from_counts, predicted
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.evaluation.rows import load_rows, readable
from mmkt_ray.features.store import Store, labelled

MAX_MODALITIES = 8  # 2^8 passes over the test rows
_MAX_DRAWN = 20_000_000  # counts at once: 160 MB


def insights(run_uri: str, stores: Mapping[str, Store]) -> dict[str, Any]:
    """What each modality knows, in numbers and plain sentences; `stores` maps variant -> its features.

    Reads the evaluated run and writes `<run>/insight.json`, which it returns:

        split, confidence, notes [..]
        tasks: {task: {answers: [..], disagreement: {..} or None (see answers.py, disagreement.py),
                       shapley: {model, num_rows, <metric>: {full, empty, values: {modality: interval}}} or None}}

    Raises: DataError if nothing was evaluated.
    """
    results = read_optional(storage.join(run_uri, "report", "results.json")) or compare(run_uri)
    answers, notes = answer_tasks(run_uri, results)
    shares = {}
    for name in sorted({t["best_fused"] for t in results["tasks"].values() if t["best_fused"]}):
        if len(results["models"][name]["modalities"]) > MAX_MODALITIES:
            notes.append(f"{name} reads more than {MAX_MODALITIES} modalities: too many subsets for Shapley values.")
        elif name in stores:
            folder = storage.join(run_uri, results["models"][name]["folder"])
            shares[name] = shapley_values(folder, stores[name], results["split"])
    tasks = {
        task: {
            "answers": answers[task],
            "disagreement": disagreements(run_uri, results, task),
            "shapley": shares.get(found["best_fused"], {}).get(task),
        }
        for task, found in results["tasks"].items()
    }
    found = {"split": results["split"], "confidence": results["confidence"], "notes": notes, "tasks": tasks}
    storage.write_json(storage.join(run_uri, "insight.json"), found)
    return found


def shapley_values(model_uri: str, store: Store, split: str = "test") -> dict[str, Any]:
    """task -> {model, num_rows, accuracy, macro_f1: see `contributions`} over the modalities that the task reads.

    The model predicts the split once per subset. Tasks with fewer than two modalities or no labelled row are left out.
    """
    model, card = load_model(model_uri)
    config = parse_config(card["config"])
    inputs = {t: config.task_inputs(t) for t in config.model_tasks if len(config.task_inputs(t)) > 1}
    if not inputs:
        return {}
    data = load_rows(store, config.model_modalities, config.model_tasks, card["class_names"])
    train, part = data.table.take(data.table.rows("train")), data.take(data.readable(split)).table
    given = {}
    for subset in subsets(config.model_modalities)[1:]:
        proba = predict_table(model, part, drop={*config.model_modalities} - {*subset})
        given[subset] = {t: predicted(p, part.kinds.get(t, "multiclass")) for t, p in proba.items()}
    found = {}
    for task, modalities in inputs.items():
        prior = majority(train.labels[task], len(part.class_names[task]))
        rows = np.flatnonzero(labelled(part.labels[task]) & readable(part, modalities))
        predictions = [np.broadcast_to(prior, part.labels[task].shape)]
        for subset in subsets(modalities)[1:]:
            blind = ~readable(part, subset)
            predictions.append(np.where(blind[:, None] if prior.ndim else blind, prior, given[subset][task]))
        if len(rows):
            scores = contributions(
                part.labels[task][rows],
                [pred[rows] for pred in predictions],
                modalities,
                len(part.class_names[task]),
                num_resamples=config.evaluation.bootstrap_samples,
                confidence=config.evaluation.confidence,
                seed=config.seed,
            )
            found[task] = {"model": model_uri.rstrip("/").rpartition("/")[2], "num_rows": len(rows), **scores}
    return found


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2^M subsets; that of number s has the modalities whose bit is set in s."""
    return [tuple(m for i, m in enumerate(modalities) if s >> i & 1) for s in range(2 ** len(modalities))]


def shapley_weights(num: int) -> np.ndarray:
    """(M, 2^M) weights: `weights @ values` are the Shapley values of M = `num` players."""
    weights = np.zeros((num, 2**num))
    for i in range(num):
        for s in range(2**num):
            if not s >> i & 1:
                size = s.bit_count()
                weight = math.factorial(size) * math.factorial(num - size - 1) / math.factorial(num)
                weights[i, s | 1 << i] += weight
                weights[i, s] -= weight
    return weights


def contributions(
    labels: np.ndarray,
    predictions: Sequence[np.ndarray],
    modalities: Sequence[str],
    num_classes: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Shapley values of the modalities with intervals.

    Args:
        labels: (N,) class codes, UNSEEN ones always wrong, or (N, C) 0/1; all rows are labelled.
        predictions: one for each of `subsets(modalities)`, shaped like the labels.

    Returns:
        `accuracy` and `macro_f1`: {full, empty (scores), values {modality: interval}, subsets {"image+text": score}}.
        Rows are resampled jointly over the subsets, so what makes a row hard for all of them cancels out.
    """
    weights = shapley_weights(len(modalities))
    cells, counts = _cells(labels, predictions)
    outcomes = [_Outcome(labels[cells], pred[cells], num_classes) for pred in predictions]
    point = {m: np.array([o.score(m, counts[None])[0] for o in outcomes]) for m in METRICS}
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_DRAWN // len(counts))
    drawn: dict[str, list[np.ndarray]] = {m: [] for m in METRICS}
    for start in range(0, num_resamples, block):
        weight = rng.multinomial(counts.sum(), counts / counts.sum(), size=min(block, num_resamples - start))
        for m in METRICS:
            drawn[m].append(weights @ np.stack([o.score(m, weight) for o in outcomes]))
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    found = {}
    for metric, values in point.items():
        low, high = np.quantile(np.concatenate(drawn[metric], axis=1), ends, axis=1)
        intervals = [
            Interval(value=float(v), low=float(a), high=float(b))
            for v, a, b in zip(weights @ values, low, high, strict=True)
        ]
        found[metric] = {
            "full": float(values[-1]),
            "empty": float(values[0]),
            "values": dict(zip(modalities, intervals, strict=True)),
            "subsets": {"+".join(s): float(v) for s, v in zip(subsets(modalities), values, strict=True) if s},
        }
    return found


def majority(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """What is predicted of a row about which nothing is known: the most frequent class (), or each class that more than
    half of the labelled rows have (C,)."""
    known = labels[labelled(labels)]
    if labels.ndim == 2:
        return (known.mean(axis=0) > 0.5).astype(labels.dtype) if len(known) else np.zeros(num_classes, labels.dtype)
    return np.array(np.bincount(known[known >= 0], minlength=num_classes).argmax())


def _cells(labels: np.ndarray, predictions: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One row of each distinct combination of label and predictions (K,), and how many rows are like it (K,)."""
    columns = np.column_stack([labels, *predictions])
    _, first, counts = np.unique(columns, axis=0, return_index=True, return_counts=True)
    return first, counts


class _Outcome:
    """One subset's predictions, so that scores of many resamples are a few products of matrices."""

    def __init__(self, labels: np.ndarray, pred: np.ndarray, num_classes: int) -> None:
        self.exact = is_right(labels, pred)
        self.support, self.predicted = (_members(values, num_classes) for values in (labels, pred))
        self.right = self.support.multiply(self.predicted).tocsr()

    def score(self, metric: str, counts: np.ndarray) -> np.ndarray:
        """(R,) scores of resamples (R, K); accuracy of sets of classes is the share that is predicted exactly."""
        if metric == "accuracy":
            return counts @ self.exact / counts.sum(axis=1)
        by_class = [counts @ members for members in (self.right, self.support, self.predicted)]
        return macro_f1_from_counts(*by_class)


def _members(values: np.ndarray, num_classes: int) -> sp.csr_matrix:
    """(K, C) or, of codes, (K, C + 1): 1 where the row has the class; the last one is of unseen classes."""
    if values.ndim == 2:
        return sp.csr_matrix(values.astype(np.int64))
    codes = as_codes(values, num_classes)
    return sp.csr_matrix(
        (np.ones(len(codes), int), (np.arange(len(codes)), codes)), shape=(len(codes), num_classes + 1)
    )
