"""Train rows whose modalities contradict their label, or each other: candidates for a second look, most suspect first.

Each modality's features predict each task by logistic regression in 5-fold cross-validation, so that no row is judged by a
model that has seen its label. A label is suspect where confident learning says so, given the modalities' predictions taken
together; modalities contradict each other where their predictions diverge: for two of them, each about 95 % sure of another
class.

Sources: Northcutt et al. 2021, Confident Learning, https://arxiv.org/abs/1911.00068 (as in the library cleanlab);
Lin 1991, Divergence Measures Based on the Shannon Entropy, https://doi.org/10.1109/18.61115
Axes: R judged rows, M modalities, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from cleanlab.filter import find_label_issues
from cleanlab.multilabel_classification.filter import find_label_issues as find_multilabel_issues
from cleanlab.multilabel_classification.rank import get_label_quality_scores as multilabel_quality
from cleanlab.rank import get_label_quality_scores
from scipy.special import expit, logit, softmax, xlogy
from sklearn.decomposition import TruncatedSVD
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from mmkt_ray import storage
from mmkt_ray.config import Config, seed_32
from mmkt_ray.encoders.base import Features
from mmkt_ray.evaluation.calibration import fit_temperature, log_loss, usable
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.models import to_proba
from mmkt_ray.training.baselines import Majority
from mmkt_ray.training.batches import feature_statistics
from mmkt_ray.training.linear import solve

log = logging.getLogger(__name__)

NUM_FOLDS = 5
MAX_FIT_ROWS = 10_000  # that a fold's model is fitted on, the same share of each class; all others are judged by it
SPARSE_DIM = 128  # sparse features are reduced to this width: many times faster, and better with few rows
L2 = 100.0  # penalty of the folds' models: few rows and many features; finds more planted errors than 1, and in less time
MIN_DOUBT = 0.95  # probability that a suspect label is wrong, as far as the modalities can tell
MIN_DIVERGENCE = 0.7  # of modalities that contradict each other; at most 1: each is sure of another class
SMALLEST = 1e-6  # probabilities are kept this far from 0 and 1, so that no single modality settles the matter
NUM_TOLD = 20  # suspects listed in audit.json

SCHEMA = [("sample_id", pa.string()), ("task", pa.string()), ("kind", pa.string()), ("label", pa.string())]
SCHEMA += [("predicted", pa.string()), ("score", pa.float32())]


def find_suspects(store: Store, config: Config, out_uri: str) -> dict[str, Any]:
    """Write the suspects of the store's train split to `out_uri`, and the first of them into the store's audit.json.

    The Parquet file has sample_id, task, kind (label: contradicts the modalities; modalities: they contradict each other),
    label, predicted (strings), score (0..1, most suspect first) and per modality `<modality>_confidence` in the label, null
    where absent. Tasks, and classes, with too few rows to judge are left out. Memory: the train split's features.

    Returns {num_rows: {task: judged rows}, num_suspects: {task: {kind: n}}, top: [the first rows]}.
    """
    table = _train_rows(store, config)
    frames, judged = [], {}
    for task in sorted(config.tasks):
        opinions = ask_modalities(table, task, config)
        judged[task] = len(opinions.table.sample_id) if opinions is not None else 0
        frames += list(_suspects(opinions, config)) if opinions is not None else []
    columns = [*SCHEMA, *((f"{m}_confidence", pa.float32()) for m in sorted(table.features))]
    frame = pd.concat([pd.DataFrame(columns=[name for name, _ in columns]), *frames])
    frame = frame.sort_values("score", ascending=False, kind="stable")
    storage.write_table(out_uri, pa.Table.from_pandas(frame, pa.schema(columns), preserve_index=False))
    counts = {
        t: {k: int(((frame.task == t) & (frame.kind == k)).sum()) for k in ("label", "modalities")} for t in judged
    }
    result = {"num_rows": judged, "num_suspects": counts, "top": _rounded(frame.head(NUM_TOLD))}
    audit_uri = storage.join(store.uri, "audit.json")
    audit = storage.read_json(audit_uri) if storage.exists(audit_uri) else {}
    storage.write_json(audit_uri, audit | {"suspects": result})
    log.info("%d suspect rows of the train split: %s", frame.sample_id.nunique(), out_uri)
    return result


def _rounded(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON: three decimals, None for what is not there."""
    rows = frame.to_dict("records")
    return [{k: (round(v, 3) if v == v else None) if isinstance(v, float) else v for k, v in r.items()} for r in rows]


# --- what each modality says --------------------


@dataclass(frozen=True)
class Opinions:
    """Out-of-fold predictions of one task for its judged rows."""

    table: FeatureTable  # the R judged rows
    task: str
    kind: str
    proba: dict[str, np.ndarray]  # modality -> (R, C), NaN where the row lacks it
    bits: dict[str, float]  # modality -> bits that it tells about the label, beyond the class frequencies

    @property
    def labels(self) -> np.ndarray:
        """(R,) codes, or (R, C) of 0 and 1."""
        return self.table.labels[self.task]

    def telling(self) -> dict[str, np.ndarray]:
        """Predictions of the modalities that tell something about the label."""
        return {m: p for m, p in self.proba.items() if self.bits[m] > 0}

    def combined(self) -> np.ndarray:
        """The telling modalities' evidence added up, as if independent given the label, and calibrated: (R, C).

        NaN where no such modality is there.
        """
        num_classes = len(self.table.class_names[self.task])
        prior = Majority.fit(self.labels, num_classes, ()).frequency.astype(np.float64).clip(SMALLEST, 1 - SMALLEST)
        scale, back = (logit, expit) if self.labels.ndim == 2 else (np.log, partial(softmax, axis=1))
        evidence = np.full((len(self.labels), num_classes), np.nan)
        for proba in self.telling().values():
            said = scale(proba.clip(SMALLEST, 1 - SMALLEST)) - scale(prior)
            evidence = np.where(np.isnan(said), evidence, np.nan_to_num(evidence) + said)
        together = back(scale(prior) + evidence)
        known = ~np.isnan(together[:, 0])
        if known.any() and len(self.telling()) > 1:  # one alone is calibrated as it is
            together[known] = calibrate(self.labels[known], together[known])  # modalities are not quite independent
        return together


def ask_modalities(table: FeatureTable, task: str, config: Config) -> Opinions | None:
    """Every modality's out-of-fold predictions; None where too few rows are labelled. table: train rows, dense features."""
    kind = config.tasks[task].kind
    rows = _judged_rows(table.labels[task])
    if len(rows) < 2 * NUM_FOLDS or len(np.unique(table.labels[task][rows], axis=0)) < 2:
        log.info("task '%s' has too few labelled train rows to look for suspects", task)
        return None
    table = table.take(rows)
    proba = {}
    for modality in config.tasks[task].inputs or sorted(table.features):
        predicted = _out_of_fold(table, task, modality, config.seed)
        if predicted is not None:
            proba[modality] = predicted
    return Opinions(table, task, kind, proba, {m: _information(table.labels[task], p) for m, p in proba.items()})


def _judged_rows(labels: np.ndarray) -> np.ndarray:
    """Labelled rows; of classes with a row for every fold at least, as nothing can be learnt of others."""
    rows = np.flatnonzero(usable(labels))
    if labels.ndim == 2:
        return rows
    counts = np.bincount(labels[rows])
    return rows[counts[labels[rows]] >= NUM_FOLDS]


def _out_of_fold(table: FeatureTable, task: str, modality: str, seed: int) -> np.ndarray | None:
    """(N, C) probabilities, NaN where the modality is absent; None if too few rows have it."""
    here = np.flatnonzero(table.present[modality])
    labels = table.labels[task][here]
    if len(here) < 2 * NUM_FOLDS or len(np.unique(labels, axis=0)) < 2:
        return None
    strata = labels if labels.ndim == 1 else np.zeros(len(labels))
    rare = labels.ndim == 2 or np.bincount(labels)[labels].min() < NUM_FOLDS  # among the rows that have the modality
    splitter = (KFold if rare else StratifiedKFold)(NUM_FOLDS, shuffle=True, random_state=seed_32(seed))
    proba = np.full((len(table.sample_id), len(table.class_names[task])), np.nan)
    for known, judged in splitter.split(strata, strata):
        if len(known) > MAX_FIT_ROWS:
            known = train_test_split(
                known, train_size=MAX_FIT_ROWS, stratify=None if rare else strata[known], random_state=seed_32(seed)
            )[0]
        proba[here[judged]] = _judge(table, task, modality, here[known], here[judged])
    proba[here] = calibrate(labels, proba[here])
    return proba


def _judge(table: FeatureTable, task: str, modality: str, known: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """(judged, C) probabilities by logistic regression on the known rows, which all have the modality and a label."""
    x, labels = table.features[modality][known], table.labels[task][known]
    mean, std = (values.numpy() for values in feature_statistics(x, np.ones(len(x), bool)))
    std = np.where(std > 0, std, 1)
    weights, bias = solve((x - mean) / std, labels, len(table.class_names[task]), L2)
    logits = ((table.features[modality][judged] - mean) / std) @ weights + bias
    return to_proba(torch.from_numpy(logits), "multilabel" if labels.ndim == 2 else "multiclass").numpy()


def calibrate(labels: np.ndarray, proba: np.ndarray) -> np.ndarray:
    """Probabilities at the temperature that suits the labels best: models of few rows and many features are too sure."""
    proba = proba.clip(SMALLEST, 1 - SMALLEST)
    if labels.ndim == 2:
        return expit(logit(proba) / fit_temperature(logit(proba), labels))
    return softmax(np.log(proba) / fit_temperature(np.log(proba), labels), axis=1)


def _information(labels: np.ndarray, proba: np.ndarray) -> float:
    """How many bits a modality tells about the label: how far its log loss is below that of the class frequencies; >= 0."""
    here = ~np.isnan(proba[:, 0])
    frequency = Majority.fit(labels[here], proba.shape[1], ()).frequency
    prior = log_loss(labels[here], np.tile(frequency, (int(here.sum()), 1)))
    return max(0.0, float((prior - log_loss(labels[here], proba[here])) / np.log(2)))


# --- what is suspect --------------------


def _suspects(opinions: Opinions, config: Config) -> Iterator[pd.DataFrame]:
    """Rows of the result for one task."""
    combined = opinions.combined()
    judged = ~np.isnan(combined[:, 0])
    wrong = np.zeros(len(combined), dtype=bool)
    wrong[judged] = label_issues(opinions.labels[judged], combined[judged])
    score = np.zeros(len(combined))
    score[judged] = 1 - label_quality(opinions.labels[judged], combined[judged])
    wrong &= score >= MIN_DOUBT
    separator = config.tasks[opinions.task].separator
    yield _frame(opinions, "label", wrong, score, _names(opinions, combined, separator), separator)
    spread = divergence(opinions)
    said = {m: _names(opinions, p, separator) for m, p in opinions.proba.items()}
    sayings = ["; ".join(f"{m}: {n[i]}" for m, n in said.items() if n[i] is not None) for i in range(len(spread))]
    yield _frame(opinions, "modalities", spread >= MIN_DIVERGENCE, spread, np.array(sayings, dtype=object), separator)


def label_issues(labels: np.ndarray, proba: np.ndarray) -> np.ndarray:
    """(R,) bool: labels that confident learning holds for wrong, given out-of-sample probabilities (R, C); of no rows, or of one
    class alone, none."""
    if len(np.unique(labels, axis=0)) < 2:
        return np.zeros(len(labels), dtype=bool)
    if labels.ndim == 2:
        given = [np.flatnonzero(row).tolist() for row in labels]
        return np.asarray(find_multilabel_issues(given, proba, filter_by="both", n_jobs=1), dtype=bool)
    classes, labels = np.unique(labels, return_inverse=True)
    return np.asarray(find_label_issues(labels, proba[:, classes], filter_by="both", n_jobs=1), dtype=bool)


def label_quality(labels: np.ndarray, proba: np.ndarray) -> np.ndarray:
    """(R,) 0..1: the probability of the given label; of a multilabel task cleanlab's mean over the classes, worst first."""
    if not len(labels):
        return np.zeros(0)
    if labels.ndim == 2:
        return multilabel_quality([np.flatnonzero(row).tolist() for row in labels], proba)
    return get_label_quality_scores(labels, proba)


def divergence(opinions: Opinions) -> np.ndarray:
    """(R,) Jensen-Shannon divergence between the present modalities that tell something, over its largest value.

    0 where they agree or there is one only, 1 where each is sure of another class. Of a multilabel task: of the class where
    it is largest.
    """
    telling = list(opinions.telling().values())
    if len(telling) < 2:
        return np.zeros(len(opinions.labels))
    proba = np.stack(telling)  # (M, R, C)
    proba = np.stack([proba, 1 - proba], axis=-1) if opinions.labels.ndim == 2 else proba[:, :, None, :]  # (M, R, ., .)
    here = ~np.isnan(proba[:, :, :1, :1])
    proba, num_here = np.where(here, proba, 0), here.sum(axis=0)[..., 0]
    mean = proba.sum(axis=0) / np.maximum(num_here, 1)[..., None]
    entropies = -xlogy(proba, proba).sum(axis=-1).sum(axis=0) / np.maximum(num_here, 1)
    spread = -xlogy(mean, mean).sum(axis=-1) - entropies
    return (np.where(num_here > 1, spread, 0) / np.log(np.maximum(num_here, 2))).max(axis=-1).clip(0, 1)


def _names(opinions: Opinions, proba: np.ndarray, separator: str) -> np.ndarray:
    """(R,) names of the predicted classes; None where nothing is predicted."""
    names = np.array(opinions.table.class_names[opinions.task], dtype=object)
    known = ~np.isnan(proba[:, 0])
    if opinions.labels.ndim == 2:
        found = np.array([separator.join(names[row > 0.5]) for row in proba], dtype=object)
    else:
        found = names[np.nan_to_num(proba).argmax(axis=1)]
    found[~known] = None
    return found


def _frame(
    opinions: Opinions, kind: str, chosen: np.ndarray, score: np.ndarray, predicted: np.ndarray, separator: str
) -> pd.DataFrame:
    """The chosen rows as the result has them."""
    labels, num_classes = opinions.labels, len(opinions.table.class_names[opinions.task])
    given = _names(opinions, labels if labels.ndim == 2 else np.eye(num_classes)[labels], separator)
    confidence = {}
    for modality, proba in opinions.proba.items():
        known = ~np.isnan(proba[:, 0])
        confidence[modality] = np.full(len(labels), np.nan)
        confidence[modality][known] = label_quality(labels[known], proba[known])
    return pd.DataFrame(
        {
            "sample_id": opinions.table.sample_id[chosen],
            "task": opinions.task,
            "kind": kind,
            "label": given[chosen],
            "predicted": predicted[chosen],
            "score": score[chosen],
            **{f"{m}_confidence": c[chosen] for m, c in confidence.items()},
        }
    )


# --- the rows to judge --------------------


def _train_rows(store: Store, config: Config) -> FeatureTable:
    """The train split with dense features of every modality."""
    table = store.table(sorted(config.modalities), sorted(config.tasks))
    table = table.take(table.rows("train"))
    return replace(table, features={m: _dense(f, config.seed) for m, f in table.features.items()})


def _dense(features: Features, seed: int) -> np.ndarray:
    """Features (N, D) as they are, or wide sparse ones reduced by an SVD that knows no labels."""
    if isinstance(features, np.ndarray):
        return features
    if features.shape[1] <= SPARSE_DIM:
        return features.toarray()
    if not features.shape[0]:
        return np.zeros((0, SPARSE_DIM), np.float32)
    rows = np.random.default_rng(seed).permutation(features.shape[0])[: 2 * MAX_FIT_ROWS]
    return TruncatedSVD(SPARSE_DIM, random_state=seed_32(seed)).fit(features[rows]).transform(features).astype(np.float32)
