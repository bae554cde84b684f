"""Where models of one modality each contradict one another, and who is right then.

Axes: N rows that all of them predicted, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from mmkt_ray import storage
from mmkt_ray.inference.rows import read_predictions
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.studies.insight import DifferingRow, Disagreement, FusedOnDiffering, Prediction

NUM_EXAMPLES = 8


def disagreements(run_uri: str, results: ResultsFile, task: str) -> Disagreement | None:
    """The best model of each single modality beside the others; None for numbers, or where there are fewer than two
    or no common row.

    The examples are the rows whose probabilities lie farthest apart (mean absolute deviation over models and
    classes).
    """
    if not task_kind(results.tasks[task].kind).classes:
        return None
    chosen = _single_models(results, task)
    frames = {m: predictions_of(run_uri, results, name, task) for m, name in chosen.items()}
    rows = sorted(set.intersection(*(set(f.index) for f in frames.values()))) if len(frames) > 1 else []
    if not rows:
        return None
    frames = {m: f.loc[rows] for m, f in frames.items()}
    labels, kind = next(iter(frames.values()))["label"].tolist(), task_kind(results.tasks[task].kind)
    right = {m: _same(f["pred"], labels) for m, f in frames.items()}
    differ = np.array([len(set(preds)) > 1 for preds in zip(*(f["pred"] for f in frames.values()), strict=True)])
    share = binomtest(int(differ.sum()), len(rows)).proportion_ci(results.confidence, method="wilson")
    fused_name = results.tasks[task].best_fused
    fused = predictions_of(run_uri, results, fused_name, task)["pred"] if fused_name else pd.Series()
    fused_texts = fused.map(kind.tell).to_dict()
    fused = fused.reindex(rows)
    return Disagreement(
        models=chosen,
        num_rows=len(rows),
        differ_frac=Interval(value=float(differ.mean()), low=float(share.low), high=float(share.high)),
        right_when_differ={m: _share(r[differ]) for m, r in right.items()},
        none_right_frac=_share(~np.any(list(right.values()), axis=0)[differ]),
        fused=FusedOnDiffering(model=fused_name, right_when_differ=_share(_same(fused, labels)[differ]))
        if fused_name
        else None,
        examples=[
            DifferingRow(
                sample_id=rows[i],
                label=kind.tell(labels[i]),
                predictions={
                    m: Prediction(pred=kind.tell(f["pred"].iloc[i]), proba=float(f["proba"].iloc[i].max()))
                    for m, f in frames.items()
                },
                fused=fused_texts.get(rows[i]),
            )
            for i in _farthest_apart(frames, differ)
        ],
    )


def _single_models(results: ResultsFile, task: str) -> dict[str, str]:
    """modality -> the model that reads it alone: trained before baselines, then the best on held-out rows."""
    chosen: dict[str, tuple[bool, float, str]] = {}
    main = task_kind(results.tasks[task].kind).main
    for row in results.tasks[task].rows:
        if len(row.reads) == 1:
            held_out = row.val_accuracy if row.val_accuracy is not None else row.interval(main)["value"]
            key = results.models[row.model].kind == "trained", held_out, row.model
            chosen[row.reads[0]] = max(chosen.get(row.reads[0], key), key, key=lambda k: k[:2])
    return {modality: key[2] for modality, key in sorted(chosen.items())}


def predictions_of(run_uri: str, results: ResultsFile, name: str, task: str) -> pd.DataFrame:
    """Columns label, pred and proba of `read_predictions` of one of the run's models."""
    about = results.models[name]
    uri = storage.join(run_uri, about.folder, f"predictions-{results.split}.parquet")
    model = about.name if about.kind == "baseline" else None
    return read_predictions(uri, task, task_kind(results.tasks[task].kind), model, ("label", "pred", "proba"))


def _farthest_apart(frames: dict[str, pd.DataFrame], differ: np.ndarray) -> list[int]:
    proba = np.stack([np.stack(f["proba"]) for f in frames.values()])  # (M, N, C)
    distance = np.where(differ, np.abs(proba - proba.mean(axis=0)).sum(axis=(0, 2)), -1)
    return [int(i) for i in np.argsort(-distance, kind="stable")[:NUM_EXAMPLES] if differ[i]]


def _same(pred: Sequence[Any], labels: Sequence[Any]) -> np.ndarray:
    return np.array([p == y for p, y in zip(pred, labels, strict=True)])


def _share(mask: np.ndarray) -> float | None:
    return float(mask.mean()) if len(mask) else None
