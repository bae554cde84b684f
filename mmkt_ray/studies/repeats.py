"""The same models from several seeds: how much of a difference is luck of the initialisation and the order of
batches.

Axes: S seeds, N labelled test rows, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError, nearest
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import readable
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models import Predictor
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.intervals import SHARE, Interval, agreeing, difference_bounds, paired_p, percentiles
from mmkt_ray.scoring.seeds import further_seed_scores, seed_scores
from mmkt_ray.studies.seeds_results import Seeds, SeedScores, TaskSeeds
from mmkt_ray.training.experts import single_configs
from mmkt_ray.training.variants import train_variants

log = logging.getLogger(__name__)


@dataclass
class VariantPredictions:
    """One variant's predictions of one task's labelled test rows."""

    labels: Labels  # of N rows
    able: np.ndarray  # (N,) rows that it can read: those that have one of its modalities
    width: int  # K
    pred: list[np.ndarray] = field(default_factory=list)  # by seed, as label values; of rows that it can read
    # the same as outputs (N, K), where the kind has `seed_metrics`
    proba: list[np.ndarray] = field(default_factory=list)
    val: list[float] = field(default_factory=list)  # by seed: accuracy on held-out rows; on test, where none tells


def repeat(
    config: Config, stores: Mapping[str, Store], run_uri: str, num_seeds: int, against: str | None = None
) -> Seeds:
    """Fit every variant with `num_seeds` seeds, score them on test, write `<run>/seeds.json`; goes on after a kill.

    The features stay as they are; `training.seed` alone differs. Variants are compared on rows that all of them can
    read (those that have one of the modalities), each with the variant `against`; None: with the single-modality
    variant that is best on val. A variant that can read no test row of a task is left out there.

    Raises: ConfigError if there is no variant `against`, and for less than one seed.
    """
    if num_seeds < 1:
        raise ConfigError(f"repeat needs at least one seed, got {num_seeds}")
    variants = config.expand_variants()
    stores = dict(stores)
    for name, (alone, like) in singles_of(variants, stores).items():
        variants, stores[name] = {name: alone, **variants}, stores[like]
    if against is not None and against not in variants:
        raise ConfigError(f"--against: no variant '{against}': {nearest(against, variants)}")
    seeds = [config.training_seed + i for i in range(num_seeds)]
    for seed in seeds:
        seeded = {name: variant.with_overrides({"training.seed": seed}) for name, variant in variants.items()}
        for name, _ in train_variants(seeded, stores, storage.join(run_uri, "seeds", str(seed))):
            log.info("repeat: %s from seed %d", name, seed)
    found: dict[str, dict[str, VariantPredictions]] = {}  # task -> variant
    for name, variant in variants.items():
        table = stores[name].table(variant.model_modalities, variant.model_tasks)
        for seed in seeds:
            uri = storage.join(run_uri, "seeds", str(seed), name)
            stores[name].copy_encoders(variant.model_modalities, run_uri, uri)
            model, card = load_model(uri)
            for task in variant.model_tasks:
                val = card.fit.val if card.fit else None
                held_out = val.metrics.get(model.spec.kinds[task].main, {}).get(task) if val else None
                _add_seed(model, table, task, variant, found.setdefault(task, {}), name, held_out)
    single = [n for n, variant in variants.items() if len(variant.model_modalities) == 1]
    candidates = [against] if against is not None else single
    result = Seeds(
        seeds=seeds,
        against=against,
        about=provenance.about(run_uri, (), (s.manifest.fingerprint for s in stores.values()), variants),
        tasks={t: compare_seeds(config, by_name, candidates) for t, by_name in sorted(found.items()) if by_name},
    )
    result.write(storage.join(run_uri, "seeds.json"))
    return result


def singles_of(variants: Mapping[str, Config], stores: Mapping[str, Store]) -> dict[str, tuple[Config, str]]:
    """`only:<modality>` -> the config of a model of that modality alone, and a variant over the same features.

    Those of the variants that no variant reads alone; where variants are over several stores, the first one's.
    """
    first = next(iter(variants))
    same = {name: v for name, v in variants.items() if stores[name].uri == stores[first].uri}
    modalities = sorted({m for v in same.values() for m in v.model_modalities})
    tasks = sorted({t for v in same.values() for t in v.model_tasks})
    found = single_configs(same, stores[first].table(modalities, tasks))
    return {f"only:{m}": (single, first) for m, single in found.items()}


def _add_seed(
    model: Predictor,
    table: FeatureTable,
    task: str,
    config: Config,
    by_name: dict[str, VariantPredictions],
    name: str,
    held_out: float | None,
) -> None:
    """Add one seed's predictions to a variant's, if there is a test row that it can read. held_out: its accuracy on
    held-out rows."""
    rows = {s: np.flatnonzero((table.split == s) & table.labels[task].labelled) for s in ("test", "val")}
    able = {s: readable(table, config.task_inputs(task))[r] for s, r in rows.items()}
    if not able["test"].any():
        return
    right = {}
    for split in [s for s in rows if able[s].any()]:
        part = table.take(rows[split][able[split]])
        proba, kind = predict_table(model, part)[task], model.spec.kinds[task]
        pred = kind.predict(proba)
        right[split] = float(kind.main_by_row(part.labels[task], pred).mean())
        if split == "test":
            labels = table.labels[task][rows[split]]
            own = by_name.setdefault(name, VariantPredictions(labels, able[split], table.width(task)))
            own.pred.append(pred)
            own.proba += [proba] if kind.seed_metrics else []
    own.val.append(right.get("val", right["test"]) if held_out is None else held_out)


def compare_seeds(config: Config, by_name: Mapping[str, VariantPredictions], candidates: list[str]) -> TaskSeeds:
    """One task's models over seeds; see `repeat`. candidates: variants of which the best on val is the reference."""
    every = list(by_name.values())
    common: np.ndarray | None = None
    if all(own.labels.same_as(every[0].labels) for own in every):  # else they are of different stores
        common = np.logical_and.reduce([own.able for own in every])
        common = common if common.any() else None
    reference = max((n for n in candidates if n in by_name), key=lambda n: np.mean(by_name[n].val), default=None)
    found: dict[str, SeedScores] = {}
    if common is not None:
        found = _compare(config, by_name, common, reference)
    else:
        for name, own in by_name.items():
            found |= _compare(config, {name: own}, own.able, None)
    return TaskSeeds(num_rows=int(common.sum()) if common is not None else None, reference=reference, models=found)


def _compare(
    config: Config, by_name: Mapping[str, VariantPredictions], rows: np.ndarray, reference: str | None
) -> dict[str, SeedScores]:
    """Variant -> scores on the same rows (N,) and differences to the reference."""
    first = next(iter(by_name.values()))
    labels, num_rows = first.labels[rows], int(rows.sum())
    preds = {n: np.stack([p[rows[own.able]] for p in own.pred]) for n, own in by_name.items()}
    evaluation = config.evaluation
    drawn = seed_scores(labels, list(preds.values()), first.width, evaluation.bootstrap_samples, config.seed)
    kind = labels.kind
    if kind.seed_metrics:
        probas = [np.stack([p[rows[own.able]] for p in own.proba]) for own in by_name.values()]
        drawn |= further_seed_scores(labels, probas, evaluation.bootstrap_samples, config.seed)
    by_model = {n: {m: drawn[m][i] for m in drawn} for i, n in enumerate(preds)}
    found: dict[str, SeedScores] = {}
    for name, scores in by_model.items():
        versus: dict[str, Interval | None] | None = None
        if reference is not None and name != reference:
            gains = {m: scores[m] - by_model[reference][m] for m in drawn}
            versus = {
                m: percentiles(g, evaluation.confidence, num_rows, difference_bounds(kind, m)) for m, g in gains.items()
            }
            ours, theirs = (np.mean([kind.main_by_row(labels, p) for p in preds[n]], axis=0) for n in (name, reference))
            if (difference := versus[kind.main]) is not None:
                versus[kind.main] = agreeing(difference, paired_p(ours - theirs), evaluation.confidence)
        found[name] = SeedScores(
            intervals={
                m: percentiles(scores[m], evaluation.confidence, num_rows, kind.bounds.get(m, SHARE)) for m in drawn
            },
            by_seed=[float(kind.main_by_row(labels, pred).mean()) for pred in preds[name]],
            val=float(np.mean(by_name[name].val)),
            versus=versus,
        )
    return found
