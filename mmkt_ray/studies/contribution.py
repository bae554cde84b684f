"""What each modality contributes to a fused model: its exact Shapley value over all subsets of the modalities.

The value v(S) of a subset is the model's score over the same labelled rows when it is given only the modalities in S;
rows that have none of S are predicted from the train split's class frequencies, and so is every row for the empty
subset. The values of the modalities add up to v(all) - v(none); a modality that never changes a prediction has 0.

Sources: Shapley 1953, A Value for n-Person Games; for modalities: Hu et al. 2022, https://arxiv.org/abs/2205.00302
Axes: N rows, C classes, M modalities, S = 2^M subsets (bit i of a subset's number: modality i is in it), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import parse_config
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import load_rows, readable, subsets
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.ranking import none_if_nan
from mmkt_ray.models import fused_part
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.intervals import difference_bounds, percentiles, resampled_scores
from mmkt_ray.studies.disagreement import disagreements
from mmkt_ray.studies.insight import Insight, Shapley, Shares, TaskInsight

MAX_MODALITIES = 8  # 2^8 passes over the test rows


def insights(run_uri: str, stores: Mapping[str, Store]) -> Insight:
    """What each modality knows, in numbers and plain sentences; `stores` maps variant -> its features.

    Reads the evaluated run and writes `<run>/insight.json`, which it returns.

    Raises: DataError if nothing was evaluated.
    """
    results = compare(run_uri)
    notes = [
        f"{task}: no two trained variants differ by a modality, so logistic regression on the same features answers."
        for task, found in results.tasks.items()
        if any(answer.source == "baseline" for answer in found.answers)
    ]
    shares: dict[str, dict[str, Shapley]] = {}
    for name in sorted({t.best_fused for t in results.tasks.values() if t.best_fused}):
        if len(results.models[name].modalities) > MAX_MODALITIES:
            notes.append(f"{name} reads more than {MAX_MODALITIES} modalities: too many subsets for Shapley values.")
        elif name in stores:
            folder = storage.join(run_uri, results.models[name].folder)
            shares[name] = shapley_values(folder, stores[name], results.split)
    tasks = {
        task: TaskInsight(
            answers=found.answers,
            disagreement=disagreements(run_uri, results, task),
            shapley=shares.get(found.best_fused or "", {}).get(task),
        )
        for task, found in results.tasks.items()
    }
    models = results.models.values()
    about = provenance.about(run_uri, (m.folder for m in models if m.kind == "trained"), (m.store for m in models))
    insight = Insight(split=results.split, confidence=results.confidence, notes=notes, tasks=tasks, about=about)
    insight.write(storage.join(run_uri, "insight.json"))
    return insight


def shapley_values(model_uri: str, store: Store, split: str = "test") -> dict[str, Shapley]:
    """By task, over the modalities that it reads.

    The model without its experts predicts the split once per subset. Tasks with fewer than two modalities or no
    labelled row are left out.
    """
    model, card = load_model(model_uri)
    model = fused_part(model)  # an expert would answer for what the fused model knows
    config = parse_config(card.config)
    inputs = {t: config.task_inputs(t) for t in config.model_tasks if len(config.task_inputs(t)) > 1}
    if not inputs:
        return {}
    data = load_rows(store, config.model_modalities, config.model_tasks, card.class_names, model.spec.kinds)
    train, part = data.table.take(data.table.rows("train")), data.take(data.readable(split)).table
    given = {}
    for subset in subsets(config.model_modalities)[1:]:
        proba = predict_table(model, part, drop={*config.model_modalities} - {*subset})
        given[subset] = {t: part.kinds[t].predict(p) for t, p in proba.items()}
    found = {}
    for task, modalities in inputs.items():
        labels = part.labels[task]
        prior = labels.kind.constant(train.labels[task], part.width(task))
        rows = np.flatnonzero(labels.labelled & readable(part, modalities))
        predictions = [np.broadcast_to(prior, labels.values.shape)]
        for subset in subsets(modalities)[1:]:
            predictions.append(given[subset][task].copy())
            predictions[-1][~readable(part, subset)] = prior
        if len(rows):
            shares = contributions(
                labels[rows],
                [pred[rows] for pred in predictions],
                modalities,
                part.width(task),
                num_resamples=config.evaluation.bootstrap_samples,
                confidence=config.evaluation.confidence,
                seed=config.seed,
            )
            found[task] = Shapley(model=model_uri.rstrip("/").rpartition("/")[2], num_rows=len(rows), shares=shares)
    return found


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
    labels: Labels,
    predictions: Sequence[np.ndarray],
    modalities: Sequence[str],
    width: int,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Shares]:
    """Shapley values of the modalities with intervals, by metric that the kind reports.

    Rows are resampled jointly over the subsets, so what makes a row hard for all of them cancels out.

    Args:
        labels: of N rows, all labelled.
        predictions: one for each of `subsets(modalities)`, shaped like the labels' values.
    """
    weights = shapley_weights(len(modalities))
    found = {}
    for metric, drawn in resampled_scores(labels, predictions, width, num_resamples, seed).items():
        bounds = difference_bounds(labels.kind, metric)
        shares = [percentiles(values, confidence, len(labels), bounds) for values in weights @ drawn]
        scores = [none_if_nan(v) for v in drawn[:, 0]]
        found[metric] = Shares(
            full=scores[-1],
            empty=scores[0],
            values=dict(zip(modalities, shares, strict=True)),
            subsets={"+".join(s): v for s, v in zip(subsets(modalities), scores, strict=True) if s},
        )
    return found
