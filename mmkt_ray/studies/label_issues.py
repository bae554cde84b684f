"""Train rows whose modalities contradict their label, or each other:
candidates for a second look, most suspect first.

Each modality's features predict each task by logistic regression in 5-fold cross-validation, so that no row is judged
by a model that has seen its label. A label is suspect where confident learning says so, given the modalities'
predictions taken together; modalities contradict each other where their predictions diverge: for two of them, each
about 95 % sure of another class.

Sources: Northcutt et al. 2021, Confident Learning, https://arxiv.org/abs/1911.00068 (as in the library cleanlab);
Lin 1991, Divergence Measures Based on the Shannon Entropy, https://doi.org/10.1109/18.61115
Axes: R judged rows, M modalities, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import xlogy
from sklearn.decomposition import TruncatedSVD
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from mmkt_ray import storage
from mmkt_ray.config import Config, seed_32
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.features.audit import Audit, LabelIssue, LabelIssueCounts, LabelIssues
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.probabilities import log_loss
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.calibration import fit_temperature
from mmkt_ray.scoring.provenance import with_about
from mmkt_ray.studies.gallery import read_inputs
from mmkt_ray.training.batches import feature_statistics
from mmkt_ray.training.linear import solve

log = logging.getLogger(__name__)

NUM_FOLDS = 5
MAX_FIT_ROWS = 10_000  # that a fold's model is fitted on, the same share of each class; all others are judged by it
SPARSE_DIM = 128  # sparse features are reduced to this width: many times faster, and better with few rows
# penalty of the folds' models: few rows and many features; finds more planted errors than 1, and in less time
L2 = 100.0
MIN_DOUBT = 0.95  # probability that a suspect label is wrong, as far as the modalities can tell
MIN_DIVERGENCE = 0.7  # of modalities that contradict each other; at most 1: each is sure of another class
SMALLEST = 1e-6  # probabilities are kept this far from 0 and 1, so that no single modality settles the matter
NUM_LISTED = 20  # in audit.json

SCHEMA = [("sample_id", pa.string()), ("task", pa.string()), ("kind", pa.string()), ("label", pa.string())]
SCHEMA += [("predicted", pa.string()), ("score", pa.float32())]


def find_label_issues(store: Store, config: Config, out_uri: str) -> LabelIssues:
    """Write the label issues of the store's train split to `out_uri`,
    and the first of them into the store's audit.json.

    The Parquet file has sample_id, task, kind (label: contradicts the modalities; modalities: they contradict each
    other), label, predicted (strings), score (0..1, most suspect first) and per modality `<modality>_confidence` in
    the label, null where absent; its metadata says which features it is about (`about_table`). Tasks, and classes,
    with too few rows to judge are left out. Memory: the train split's features. Returns what audit.json gets.
    """
    table = _train_rows(store, config)
    frames, judged = list[pd.DataFrame](), dict[str, int]()
    for task in sorted(config.tasks):
        predicted = predict_out_of_fold(table, task, config)
        judged[task] = len(predicted.table.sample_id) if predicted is not None else 0
        frames += list(_issues(predicted, config)) if predicted is not None else []
    columns = [*SCHEMA, *((f"{m}_confidence", pa.float32()) for m in sorted(table.features))]
    frame = pd.concat([pd.DataFrame(columns=[name for name, _ in columns]), *frames])
    frame = frame.sort_values("score", ascending=False, kind="stable")
    about = provenance.about(out_uri.rpartition("/")[0], (), [store.manifest.fingerprint])  # no model is asked
    table_of_issues = pa.Table.from_pandas(frame, pa.schema(columns), preserve_index=False)
    storage.write_table(out_uri, with_about(table_of_issues, about))
    first = frame.head(NUM_LISTED)
    inputs, note = read_inputs(first.sample_id.tolist(), config)
    result = LabelIssues(
        num_rows=judged,
        num_suspects={
            t: LabelIssueCounts(
                **{k: int(((frame.task == t) & (frame.kind == k)).sum()) for k in LabelIssueCounts.model_fields}
            )
            for t in judged
        },
        top=[LabelIssue.from_row(row, inputs.get(row["sample_id"], {})) for row in first.to_dict("records")],
        note=note,
        about=about,
    )
    audit_uri = storage.join(store.uri, "audit.json")
    audit = Audit.read_or_none(audit_uri) or Audit()
    audit.with_label_issues(result).write(audit_uri)
    log.info("%d suspect rows of the train split: %s", frame.sample_id.nunique(), out_uri)
    return result


# --- what each modality says --------------------


@dataclass(frozen=True)
class OutOfFold:
    """Out-of-fold predictions of one task for its judged rows."""

    table: FeatureTable  # the R judged rows
    task: str
    proba: dict[str, np.ndarray]  # modality -> (R, C), NaN where the row lacks it
    bits: dict[str, float]  # modality -> bits that it tells about the label, beyond the class frequencies

    @property
    def labels(self) -> Labels:
        """Of R rows, all known."""
        return self.table.labels[self.task]

    def telling(self) -> dict[str, np.ndarray]:
        """Predictions of the modalities that tell something about the label."""
        return {m: p for m, p in self.proba.items() if self.bits[m] > 0}

    def combined(self) -> np.ndarray:
        """The telling modalities' evidence added up, as if independent given the label, and calibrated: (R, C).

        NaN where no such modality is there.
        """
        kind, num_classes = self.labels.kind, self.table.width(self.task)
        prior = kind.baseline(self.labels, num_classes).astype(np.float64).clip(SMALLEST, 1 - SMALLEST)
        scale = kind.evidence
        evidence = np.full((len(self.labels), num_classes), np.nan)
        for proba in self.telling().values():
            said = scale(proba.clip(SMALLEST, 1 - SMALLEST)) - scale(prior)
            evidence = np.where(np.isnan(said), evidence, np.nan_to_num(evidence) + said)
        together = kind.from_evidence(scale(prior) + evidence)
        known = ~np.isnan(together[:, 0])
        if known.any() and len(self.telling()) > 1:  # one alone is calibrated as it is
            together[known] = calibrate(self.labels[known], together[known])  # modalities are not quite independent
        return together


def predict_out_of_fold(table: FeatureTable, task: str, config: Config) -> OutOfFold | None:
    """Every modality's out-of-fold predictions; None where too few rows are labelled.
    table: train rows, dense features."""
    labels = table.labels[task]
    if not labels.kind.classes:
        log.info("task '%s' has numbers for labels: label issues are looked for among classes", task)
        return None
    rows = labels.kind.judged_rows(labels, NUM_FOLDS)
    if len(rows) < 2 * NUM_FOLDS or num_distinct(labels[rows]) < 2:
        log.info("task '%s' has too few labelled train rows to look for label issues", task)
        return None
    table = table.take(rows)
    proba = {}
    for modality in config.tasks[task].inputs or sorted(table.features):
        predicted = _modality_out_of_fold(table, task, modality, config.seed)
        if predicted is not None:
            proba[modality] = predicted
    return OutOfFold(table, task, proba, {m: _information(table.labels[task], p) for m, p in proba.items()})


def num_distinct(labels: Labels) -> int:
    """How many different labels there are; all are known."""
    return len(np.unique(labels.values, axis=0))


def _modality_out_of_fold(table: FeatureTable, task: str, modality: str, seed: int) -> np.ndarray | None:
    """(N, C) probabilities, NaN where the modality is absent; None if too few rows have it."""
    here = np.flatnonzero(table.present[modality])
    labels = table.labels[task][here]
    if len(here) < 2 * NUM_FOLDS or num_distinct(labels) < 2:
        return None
    strata, frequent = labels.kind.fold_strata(labels, NUM_FOLDS)  # among the rows that have the modality
    splitter = (StratifiedKFold if frequent else KFold)(NUM_FOLDS, shuffle=True, random_state=seed_32(seed))
    proba = np.full((len(table.sample_id), table.width(task)), np.nan)
    for known, judged in splitter.split(strata, strata):
        if len(known) > MAX_FIT_ROWS:
            known = train_test_split(
                known, train_size=MAX_FIT_ROWS, stratify=strata[known] if frequent else None, random_state=seed_32(seed)
            )[0]
        proba[here[judged]] = _probabilities(table, task, modality, here[known], here[judged])
    proba[here] = calibrate(labels, proba[here])
    return proba


def _probabilities(table: FeatureTable, task: str, modality: str, known: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """(judged, C) probabilities by logistic regression on the known rows, which all have the modality and a label."""
    x, labels = table.features[modality][known], table.labels[task][known]
    mean, std = (values.numpy() for values in feature_statistics(x, np.ones(len(x), bool)))
    std = np.where(std > 0, std, 1)
    weights, bias = solve((x - mean) / std, labels, table.width(task), L2)
    logits = ((table.features[modality][judged] - mean) / std) @ weights + bias
    return labels.kind.outputs_of(logits)


def calibrate(labels: Labels, proba: np.ndarray) -> np.ndarray:
    """Probabilities at the temperature that suits the labels best:
    models of few rows and many features are too sure."""
    evidence = labels.kind.evidence(proba.clip(SMALLEST, 1 - SMALLEST))
    return labels.kind.from_evidence(evidence / fit_temperature(evidence, labels))


def _information(labels: Labels, proba: np.ndarray) -> float:
    """How many bits a modality tells about the label: how far its log loss is below that of the class frequencies;
    >= 0."""
    here = ~np.isnan(proba[:, 0])
    frequency = labels.kind.baseline(labels[here], proba.shape[1])
    prior = log_loss(labels[here], np.tile(frequency, (int(here.sum()), 1)))
    return max(0.0, float((prior - log_loss(labels[here], proba[here])) / np.log(2)))


# --- what is suspect --------------------


def _issues(out_of_fold: OutOfFold, config: Config) -> Iterator[pd.DataFrame]:
    """Rows of the result for one task."""
    combined = out_of_fold.combined()
    judged = ~np.isnan(combined[:, 0])
    wrong = np.zeros(len(combined), dtype=bool)
    known, score = out_of_fold.labels[judged], np.zeros(len(combined))
    if num_distinct(known) > 1:
        wrong[judged] = known.kind.label_issues(known, combined[judged])
    score[judged] = 1 - label_quality(known, combined[judged])
    wrong &= score >= MIN_DOUBT
    separator = config.tasks[out_of_fold.task].separator
    yield _frame(out_of_fold, "label", wrong, score, _predicted_names(out_of_fold, combined, separator), separator)
    spread = divergence(out_of_fold)
    said = {m: _predicted_names(out_of_fold, p, separator) for m, p in out_of_fold.proba.items()}
    sayings = ["; ".join(f"{m}: {n[i]}" for m, n in said.items() if n[i] is not None) for i in range(len(spread))]
    yield _frame(
        out_of_fold, "modalities", spread >= MIN_DIVERGENCE, spread, np.array(sayings, dtype=object), separator
    )


def label_quality(labels: Labels, proba: np.ndarray) -> np.ndarray:
    """(R,) 0..1, see `TaskKind.label_quality`; also of no rows."""
    return labels.kind.label_quality(labels, proba) if len(labels) else np.zeros(0)


def divergence(out_of_fold: OutOfFold) -> np.ndarray:
    """(R,) Jensen-Shannon divergence between the present modalities that tell something, over its largest value.

    0 where they agree or there is one only, 1 where each is sure of another class. Of several decisions in a row:
    of the one where it is largest.
    """
    telling = list(out_of_fold.telling().values())
    if len(telling) < 2:
        return np.zeros(len(out_of_fold.labels))
    proba = out_of_fold.labels.kind.distributions(np.stack(telling))  # (M, R, decisions, answers)
    here = ~np.isnan(proba[:, :, :1, :1])
    proba, num_here = np.where(here, proba, 0), here.sum(axis=0)[..., 0]
    mean = proba.sum(axis=0) / np.maximum(num_here, 1)[..., None]
    entropies = -xlogy(proba, proba).sum(axis=-1).sum(axis=0) / np.maximum(num_here, 1)
    spread = -xlogy(mean, mean).sum(axis=-1) - entropies
    found = np.where(num_here > 1, spread, 0) / np.log(np.maximum(num_here, 2))
    return np.asarray(found.max(axis=-1).clip(0, 1))


def _names(out_of_fold: OutOfFold, predictions: np.ndarray, known: np.ndarray, separator: str) -> np.ndarray:
    """(R,) predictions in words; None in rows that are not known (R,) bool."""
    kind = out_of_fold.labels.kind
    cells = kind.decode(predictions, out_of_fold.table.class_names[out_of_fold.task])
    return np.array(
        [kind.tell(cell, separator) if k else None for cell, k in zip(cells, known, strict=True)], dtype=object
    )


def _predicted_names(out_of_fold: OutOfFold, proba: np.ndarray, separator: str) -> np.ndarray:
    """The same of probabilities (R, C), NaN where nothing is predicted."""
    predictions = out_of_fold.labels.kind.predict(np.nan_to_num(proba))
    return _names(out_of_fold, predictions, ~np.isnan(proba[:, 0]), separator)


def _frame(
    out_of_fold: OutOfFold, kind: str, chosen: np.ndarray, score: np.ndarray, predicted: np.ndarray, separator: str
) -> pd.DataFrame:
    """The chosen rows as the result has them."""
    labels = out_of_fold.labels
    given = _names(out_of_fold, labels.values, labels.known, separator)
    confidence = {}
    for modality, proba in out_of_fold.proba.items():
        known = ~np.isnan(proba[:, 0])
        confidence[modality] = np.full(len(labels), np.nan)
        confidence[modality][known] = label_quality(labels[known], proba[known])
    return pd.DataFrame(
        {
            "sample_id": out_of_fold.table.sample_id[chosen],
            "task": out_of_fold.task,
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
        return np.asarray(features.toarray())
    if not features.shape[0]:
        return np.zeros((0, SPARSE_DIM), np.float32)
    rows = np.random.default_rng(seed).permutation(features.shape[0])[: 2 * MAX_FIT_ROWS]
    reduced = TruncatedSVD(SPARSE_DIM, random_state=seed_32(seed)).fit(features[rows]).transform(features)
    return np.asarray(reduced, np.float32)
