"""Transferability scores of a run's feature stores, and how well they predicted the trained results.

Scores are of the train rows that have a label and every modality of the set in question. Before they stand side by
side, each modality is divided by the root mean square length of its features, so that none counts more for its unit.

Axes: N train rows, D features, K target columns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from scipy.stats import spearmanr, weightedtau

from mmkt_ray import storage
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.rows import subsets
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.studies.scores_results import (
    Cka,
    FeatureSet,
    Leep,
    RankCorrelation,
    Skipped,
    TaskTransferability,
    TrainedScore,
    Transferability,
)
from mmkt_ray.studies.transferability import Moments, h_score, leep, linear_cka, logme

MAX_WIDTH = 4096  # D x D matrices up to here take seconds
BLOCK_ROWS = 4096
SCORES = ("logme", "h_score")


def transferability(run_uri: str, stores: Mapping[str, Store]) -> Transferability:
    """Score every modality and set of modalities of every store for every task;
    `stores` maps variant -> its features.

    Needs no trained model. Where the run has results already, they stand beside the scores, with the rank correlation
    between the two. Writes `<run>/transferability.json` and returns what is in it.
    """
    started = time.perf_counter()
    results = ResultsFile.read_or_none(storage.join(run_uri, "report", "results.json"))
    found = _Found()
    for uri in dict.fromkeys(s.uri for s in stores.values()):
        variants = [name for name, s in stores.items() if s.uri == uri]
        _score_store(stores[variants[0]], found, results, variants)
    trained = [m.folder for m in results.models.values() if m.kind == "trained"] if results else []
    scored = Transferability(
        tasks={
            task: TaskTransferability(sets=sets, predicted={score: _rank_correlation(sets, score) for score in SCORES})
            for task, sets in found.sets.items()
        },
        cka=found.cka,
        leep=_leep_cells(run_uri, results) if results else [],
        skipped=found.skipped,
        about=provenance.about(run_uri, trained, (s.manifest.fingerprint for s in stores.values())),
        seconds=time.perf_counter() - started,
    )
    scored.write(storage.join(run_uri, "transferability.json"))
    return scored


@dataclass
class _Found:
    """What was found so far, store by store."""

    sets: dict[str, list[FeatureSet]] = field(default_factory=dict)  # by task
    cka: list[Cka] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def _score_store(store: Store, found: _Found, results: ResultsFile | None, variants: Sequence[str]) -> None:
    """Add one store's scores to `found`."""
    name = store.uri.rstrip("/").rpartition("/")[2]
    about = store.manifest.modalities
    groups, scale = _survey(store)
    for subset in _sets(sorted(about)):
        width = sum(store.dim(m) for m in subset)
        if width > MAX_WIDTH:
            reason = f"{width:,} features wide, the limit is {MAX_WIDTH:,}: set modalities.<name>.reduce"
            found.skipped.append(Skipped(store=name, modalities=list(subset), reason=reason))
            continue
        moments: Moments | None = None
        for tasks in groups:
            moments, columns = _collect(store, subset, tasks, scale)
            if moments is None:
                reason = f"no train row labelled for {tasks[0]} has it all"
                found.skipped.append(Skipped(store=name, modalities=list(subset), reason=reason))
                continue
            for task in tasks:
                features = FeatureSet(
                    store=name,
                    modalities=list(subset),
                    encoders={m: about[m].encoder["name"] for m in subset},
                    num_rows=moments.num_rows,
                    dim=width,
                    logme=logme(moments, columns[task]),
                    h_score=h_score(moments, columns[task], store.kind(task).exclusive),
                    trained=_trained_score(task, subset, name, results, variants),
                )
                found.sets.setdefault(task, []).append(features)
        if len(subset) == 2:
            moments, _ = _collect(store, subset, (), scale)
            if moments is not None:
                value = linear_cka(moments, store.dim(subset[0]))
                pair = Cka(store=name, modalities=list(subset), num_rows=moments.num_rows, value=value)
                found.cka.append(pair)


def _sets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Each modality alone, then together: every set of up to four modalities, of more than four only all."""
    sizes = range(1, len(modalities) + 1) if len(modalities) <= 4 else (1, len(modalities))
    return sorted(subsets(modalities, sizes), key=len)


def _survey(store: Store) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Tasks of classes that are labelled on the same train rows, group by group,
    and each modality's root mean square length."""
    modalities = sorted(store.manifest.modalities)
    tasks = [t for t in sorted(store.manifest.tasks) if store.kind(t).classes]
    masks: dict[str, list[np.ndarray]] = {t: [] for t in tasks}
    squares, rows = dict.fromkeys(modalities, 0.0), dict.fromkeys(modalities, 0)
    for table in store.tables(modalities, tasks):
        train = table.take(table.rows("train"))
        for t in tasks:
            masks[t].append(train.labels[t].labelled)
        for m in modalities:
            features = train.features[m]
            values = features if isinstance(features, np.ndarray) else features.data
            squares[m] += float((values.astype(np.float64) ** 2).sum())
            rows[m] += int(train.present[m].sum())
    groups: dict[bytes, list[str]] = {}
    for t in tasks:
        groups.setdefault(np.packbits(np.concatenate(masks[t])).tobytes(), []).append(t)
    return [tuple(g) for g in groups.values()], {m: (squares[m] / max(rows[m], 1)) ** 0.5 or 1.0 for m in modalities}


def _collect(
    store: Store, subset: Sequence[str], tasks: Sequence[str], scale: Mapping[str, float]
) -> tuple[Moments | None, dict[str, slice]]:
    """Moments of the train rows that have the whole subset and a label for each of the tasks,
    and each task's columns."""
    sizes = [store.kind(t).width(store.manifest.tasks[t].classes) for t in tasks]
    ends = np.cumsum(sizes, dtype=int).tolist()
    columns = {t: slice(end - size, end) for t, end, size in zip(tasks, ends, sizes, strict=True)}
    moments: Moments | None = None
    for table in store.tables(subset, tasks):
        wanted = (table.split == "train") & np.all([table.present[m] for m in subset], axis=0)
        for t in tasks:
            wanted &= table.labels[t].labelled
        rows = np.flatnonzero(wanted)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = table.take(rows[start : start + BLOCK_ROWS])
            part = Moments.partial(_side_by_side(block, subset, scale), _targets(block, tasks))
            moments = part if moments is None else Moments.merge([moments, part])
    return moments, columns


def _side_by_side(table: FeatureTable, subset: Sequence[str], scale: Mapping[str, float]) -> Features:
    blocks = [table.features[m].astype(np.float64) / scale[m] for m in subset]
    return sp.hstack(blocks, format="csr") if any(map(sp.issparse, blocks)) else np.hstack(blocks)


def _targets(table: FeatureTable, tasks: Sequence[str]) -> np.ndarray:
    """(N, K) 0/1: the classes of all tasks side by side."""
    columns = [np.zeros((len(table.sample_id), 0))]
    for t in tasks:
        columns.append(table.kinds[t].indicators(table.labels[t], table.width(t)))
    return np.hstack(columns)


# --- beside the trained results -------------------------------------------------------------------------------------


def _trained_score(
    task: str, subset: Sequence[str], store: str, results: ResultsFile | None, variants: Sequence[str]
) -> TrainedScore | None:
    """The model that reads just this subset of this store: the trained one best on val, else logistic regression."""
    if results is None or task not in results.tasks:
        return None
    candidates = []
    for row in results.tasks[task].rows:
        about = results.models[row.model]
        here = row.model in variants or about.folder == f"baselines/{store}"
        if here and tuple(about.modalities) == tuple(subset):
            candidates.append((about.kind == "trained", row.val_accuracy or 0.0, row))
    if not candidates:
        return None
    row = max(candidates, key=lambda c: c[:2])[2]
    main = task_kind(results.tasks[task].kind).main
    return TrainedScore(model=row.model, accuracy=row.interval(main)["value"])


def _rank_correlation(sets: Sequence[FeatureSet], score: str) -> RankCorrelation | None:
    """Between a score and the trained accuracy over the sets;
    None for fewer than three, which have no order to speak of."""
    pairs = [({"logme": s.logme, "h_score": s.h_score}[score], s.trained.accuracy) for s in sets if s.trained]
    if len(pairs) < 3 or any(len({p[i] for p in pairs}) == 1 for i in (0, 1)):
        return None
    ours, theirs = zip(*pairs, strict=True)
    return RankCorrelation(
        num=len(pairs),
        spearman=float(spearmanr(ours, theirs).statistic),
        weighted_kendall=float(weightedtau(ours, theirs).statistic),
    )


def _leep_cells(run_uri: str, results: ResultsFile) -> list[Leep]:
    """LEEP from each task to each other one, by the predictions of every trained model of both,
    on the scored split."""
    cells = []
    for name, about in results.models.items():
        tasks = [t for t, found in results.tasks.items() if found.row(name)]
        if about.kind != "trained" or len(tasks) < 2:
            continue
        predictions = storage.join(run_uri, about.folder, f"predictions-{results.split}.parquet")
        for target in tasks:
            for source in (t for t in tasks if t != target):
                if not task_kind(results.tasks[source].kind).classes:
                    continue
                rows = storage.read_table(predictions, [f"{source}_proba", f"{target}_label"]).to_pandas().dropna()
                proba = np.stack(rows[f"{source}_proba"]) if len(rows) else np.zeros((0, 1))
                single = len(rows) and isinstance(rows[f"{target}_label"].iloc[0], str)
                if single and np.allclose(proba.sum(axis=1), 1, atol=1e-3):
                    names, codes = np.unique(rows[f"{target}_label"].to_numpy().astype(str), return_inverse=True)
                    value = leep(proba, codes, len(names))
                    cells.append(Leep(model=name, source=source, target=target, num_rows=len(rows), value=value))
    return cells
