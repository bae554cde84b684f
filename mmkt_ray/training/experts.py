"""`model.experts`: models of fewer modalities beside the fused one, and which model predicts which rows.

An expert is trained like a variant that reads its modalities alone: without teachers, and with their part of
`training.transfer.init`. So the variants of a run share experts, and a variant of one modality serves as its expert.

Axes: N rows of a table, R held-out rows, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.stats import binomtest, ttest_rel

from mmkt_ray.config import Config, fingerprint
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import predict_logits
from mmkt_ray.inference.rows import readable, subsets
from mmkt_ray.models import ExpertModel, ExpertSpec, MultimodalModel
from mmkt_ray.scoring.calibration import fit_temperature
from mmkt_ray.scoring.heldout import HeldOut, pattern_name
from mmkt_ray.training.fingerprint import has_experts, model_identity
from mmkt_ray.training.fold_stack import given_subsets
from mmkt_ray.training.setup import can_learn

FUSED = ""  # the fused model among the experts, whose names are never empty
ALPHA = 0.1  # significance level at which a model replaces the default one
MIN_PATTERN_ROWS, PATTERN_SHARE = 20, 0.02  # least rows, and share of rows, of a set of modalities that has an expert


def fused_tasks(config: Config, modalities: Collection[str]) -> list[str]:
    """The tasks that read all of these modalities and others."""
    return [t for t in config.model_tasks if {*modalities} < {*config.task_inputs(t)}]


def expert_configs(config: Config, table: FeatureTable) -> dict[str, Config]:
    """Name -> the config of an expert, for the tasks that also read other modalities and can be learnt from its own.

    Each modality has an expert, and so has each larger set, if at least PATTERN_SHARE of the train and val rows (and
    MIN_PATTERN_ROWS) have exactly these of the model's modalities.
    """
    found = {}
    for modalities in expert_sets(config, table):
        sparse = {m: sp.issparse(table.features[m]) for m in modalities}
        every = fused_tasks(config, modalities)
        tasks = [t for t in every if can_learn(expert_config(config, modalities, [t], sparse), table)]
        if tasks:
            found[pattern_name(modalities)] = expert_config(config, modalities, tasks, sparse)
    return found


def expert_sets(config: Config, table: FeatureTable) -> list[tuple[str, ...]]:
    """The sets of modalities that have experts, see `expert_configs`."""
    singles = [(m,) for m in config.model_modalities]
    rows = np.isin(table.split, ("train", "val"))
    present = {m: table.present[m][rows] for m in config.model_modalities}
    larger = []
    for part in subsets(config.model_modalities, range(2, len(config.model_modalities))):
        alone = np.logical_and.reduce([present[m] == (m in part) for m in present])
        if alone.sum() >= max(MIN_PATTERN_ROWS, PATTERN_SHARE * rows.sum()):
            larger.append(part)
    return singles + larger


def expert_fits(config: Config) -> dict[str, list[str]]:
    """Variant -> modalities whose experts are trained with it: those that no earlier variant or expert covers."""
    known: set[str] = set()
    found: dict[str, list[str]] = {}
    for name, variant in config.expand_variants().items():
        known.add(_identity(variant))
        modalities = variant.model_modalities if has_experts(variant) else ()
        experts = {
            m: expert_config(variant, (m,), tasks, {m: False})
            for m in modalities
            if (tasks := fused_tasks(variant, [m]))
        }
        identities = {m: _identity(expert) for m, expert in experts.items()}
        found[name] = [m for m, identity in identities.items() if identity not in known]
        known.update(identities.values())
    return found


def _identity(config: Config) -> str:
    """Equal for configs of equal models, as far as this is known without features."""
    parts = {
        "samples": config.samples.model_dump(mode="json"),
        "modalities": {m: config.modalities[m].model_dump(mode="json") for m in config.model_modalities},
        "tasks": {t: config.tasks[t].model_dump(mode="json") for t in config.model_tasks},
        "model": model_identity(config),
        "training": config.training.model_dump(mode="json"),
        "seed": [config.seed, config.training_seed],
    }
    return fingerprint(parts)


def expert_config(config: Config, modalities: Sequence[str], tasks: list[str], sparse: Mapping[str, bool]) -> Config:
    """The config of a model of these tasks from these modalities, whose features are sparse or dense."""
    transfer = config.training.transfer
    init = {m: source for m, source in transfer.init.items() if m in modalities}
    overrides: dict[str, Any] = {
        "model.modalities": list(modalities),
        "model.tasks": tasks,
        "model.experts": False,
        "training.balance": None,
        "training.transfer": {"init": init, "tuning": transfer.tuning} if init else {},
    }
    if len(modalities) == 1:
        overrides["model.fusion"] = "concat"
    if all(sparse.values()):
        overrides["training.augment.noise"] = 0.0
    if not any(sparse.values()):
        overrides["training.augment.word_dropout"] = 0.0
    if len(tasks) == 1:
        overrides["training.task_weighting"] = "sum"
    return chosen_as_before(config, config.with_overrides(overrides))


def single_configs(variants: Mapping[str, Config], table: FeatureTable) -> dict[str, Config]:
    """Modality -> the config of a model of it alone, made like an expert's, for all tasks that can be learnt from it.

    variants: models over the same features. Settings are those of the first variant with the most modalities. A
    modality is left out if some variant reads it alone for all these tasks.
    """
    widest = max(variants.values(), key=lambda config: len(config.model_modalities))
    found = {}
    for m in widest.model_modalities:
        sparse = {m: sp.issparse(table.features[m])}
        reading = [t for t in widest.model_tasks if m in widest.task_inputs(t)]
        tasks = [t for t in reading if can_learn(expert_config(widest, (m,), [t], sparse), table)]
        there = [v for v in variants.values() if v.model_modalities == (m,) and {*v.model_tasks} >= {*tasks}]
        if tasks and not there:
            found[m] = expert_config(widest, (m,), tasks, sparse)
    return found


def chosen_as_before(config: Config, changed: Config) -> Config:
    """The changed config, with the same settings left to `training.auto` as in `config`."""
    return changed.with_overrides({"training.auto": list(config.training.auto)})


# --- which model predicts which rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutModel:
    """A trained model and its held-out predictions."""

    model: MultimodalModel
    heldout: HeldOut


def with_heldout(model: MultimodalModel, heldout: HeldOut | None, table: FeatureTable) -> HeldOutModel:
    """A model with its held-out predictions; default: its predictions for the val rows."""
    if heldout is None:
        rows = np.flatnonzero((table.split == "val") & readable(table, list(model.spec.modalities)))
        part, logits = table.take(rows), {}
        for given in given_subsets(list(model.spec.modalities)):
            hidden = set(model.spec.modalities) - set(given)
            logits[pattern_name(given)] = predict_logits(model, part, drop=hidden) if len(rows) else {}
        heldout = HeldOut("val", rows, logits)
    return HeldOutModel(model, heldout)


def join_experts(
    fused: HeldOutModel, experts: Mapping[str, HeldOutModel], table: FeatureTable
) -> tuple[MultimodalModel | ExpertModel, HeldOut]:
    """The fused model joined with the experts that `choose_routes` picks, and its held-out predictions."""
    routes = choose_routes(fused, experts, table)
    asked = {name for by_pattern in routes.values() for name in by_pattern.values()}
    if not asked:
        return fused.model, fused.heldout
    chosen = {name: experts[name] for name in sorted(asked)}
    spec = ExpertSpec(fused.model.spec, {name: e.model.spec for name, e in chosen.items()}, routes)
    whole = ExpertModel(spec, fused.model, {name: e.model for name, e in chosen.items()}).eval()
    return whole, joint_heldout(fused, chosen, routes, table)


def choose_routes(
    fused: HeldOutModel, experts: Mapping[str, HeldOutModel], table: FeatureTable
) -> dict[str, dict[str, str]]:
    """Task -> {the task's modalities that a row has, joined by +: the expert that predicts it}; without the fused
    model.

    Each set of modalities that a row may have has a default model: for all modalities the fused one, for a part of
    them the expert of exactly these, or the fused one where there is no such expert. Another model replaces the
    default if it is clearly better (see `clearly_better`) on the held-out rows that have the set, with all other
    modalities hidden, at its part of ALPHA (see `levels`); of several, the best is taken. One that fuses may have a
    score that is lower by chance, if its losses are clearly less.
    """
    routes: dict[str, dict[str, str]] = {}
    for t, inputs in fused.model.spec.inputs.items():
        reads = {name: {*e.model.spec.modalities} for name, e in experts.items() if t in e.model.spec.tasks}
        for part in subsets(inputs)[1:]:
            pattern = pattern_name(part)
            able = {FUSED: fused} | {
                name: experts[name] for name, own in reads.items() if own <= {*part} and own < {*inputs}
            }
            given = {name: part if name == FUSED else tuple(reads[name]) for name in able}
            scores = {name: row_scores_of(able[name], table, t, given[name]) for name in able}
            has = table.labels[t].labelled & np.logical_and.reduce([table.present[m] for m in part])
            default = pattern if pattern in able else FUSED
            better = {}
            for name, alpha in levels({name: len(given[name]) for name in able.keys() - {default}}).items():
                rows = has & np.isfinite(scores[default]).all(axis=0) & np.isfinite(scores[name]).all(axis=0)
                slack = float(name != FUSED and len(given[name]) > 1)
                if clearly_better(scores[name][:, rows], scores[default][:, rows], alpha, slack):
                    better[name] = float((scores[name][0] - scores[default][0])[rows].mean())
            chosen = max(sorted(better), key=lambda name: better[name], default=default)
            if chosen != FUSED:
                routes.setdefault(t, {})["+".join(part)] = chosen
    return routes


def levels(num_modalities: Mapping[str, int]) -> dict[str, float]:
    """Model -> its part of ALPHA. One half is shared by those that read most modalities, the other by the rest: a
    rare modality more is best left to the model of all others, and many models of fewer must not hide that one."""
    most = max(num_modalities.values(), default=0)
    first = sum(num == most for num in num_modalities.values())
    rest = len(num_modalities) - first
    half = ALPHA / 2 if rest else ALPHA
    return {name: half / first if num == most else half / rest for name, num in num_modalities.items()}


def clearly_better(ours: np.ndarray, theirs: np.ndarray, alpha: float, slack: float = 0.0) -> bool:
    """Whether a model is shown to be better than another on the same rows.

    ours, theirs: (2, R) each row's score, see `TaskKind.row_scores`, and its log loss. The mean score must not be
    lower by more than `slack` standard errors, and one of two one-sided tests must reject at alpha: of the scores, an
    exact McNemar test where they are right or wrong, else a paired t test; of the losses, a paired t test.
    """
    gain, num = ours[0] - theirs[0], ours.shape[1]
    if num < 2 or gain.mean() < -slack * gain.std(ddof=1) / np.sqrt(num):
        return False
    if np.isin([ours[0], theirs[0]], (0, 1)).all():
        wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
        p = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    else:
        p = ttest_rel(ours[0], theirs[0], alternative="greater").pvalue if np.ptp(gain) > 0 else 1.0
    less = theirs[1] - ours[1]
    p_loss = ttest_rel(theirs[1], ours[1], alternative="greater").pvalue if np.ptp(less) > 0 else 1.0
    return bool(min(p, p_loss) < alpha)


def row_scores_of(held: HeldOutModel, table: FeatureTable, task: str, given: Sequence[str]) -> np.ndarray:
    """(2, N) each held-out row's score, see `TaskKind.row_scores`, and its log loss; NaN for all other rows.

    Logits are scaled by the best temperature. The loss of a class that train lacks is 0. given: modalities that are
    not hidden from the model."""
    found = np.full((2, len(table.split)), np.nan)
    known = held.heldout.logits.get(pattern_name(given), {})
    if task not in known:
        return found
    able = readable(table, [m for m in given if m in held.model.spec.inputs[task]] or list(given))[held.heldout.rows]
    rows, logits = held.heldout.rows[able], known[task][able]
    labels, kind = table.labels[task][rows], held.model.spec.kinds[task]
    found[0, rows] = kind.row_scores(labels, kind.predict(kind.outputs_of(logits)))
    found[1, rows] = 0.0
    known_class = labels.known
    if known_class.any():
        scaled = logits[known_class] / fit_temperature(logits[known_class], labels[known_class])
        found[1, rows[known_class]] = kind.each_loss(scaled, labels[known_class])
    return found


def joint_heldout(
    fused: HeldOutModel,
    experts: Mapping[str, HeldOutModel],
    routes: Mapping[str, Mapping[str, str]],
    table: FeatureTable,
) -> HeldOut:
    """The joined model's predictions for the fused model's held-out rows, each by the model that it is routed to."""
    rows, logits = fused.heldout.rows, dict[str, dict[str, np.ndarray]]()
    for given, by_task in fused.heldout.logits.items():
        logits[given] = dict(by_task)
        for t, by_pattern in routes.items():
            if t not in by_task:  # there is no held-out row
                continue
            values = by_task[t].copy()
            inputs = fused.model.spec.inputs[t]
            seen = {m: table.present[m][rows] & (m in given.split("+")) for m in inputs}
            for pattern, name in by_pattern.items():
                here = np.logical_and.reduce([seen[m] == (m in pattern.split("+")) for m in inputs])
                expert = experts[name].heldout
                own = expert.logits.get(name, {}).get(t)
                if own is None or not here.any():
                    continue
                _, at, there = np.intersect1d(rows[here], expert.rows, return_indices=True)
                values[np.flatnonzero(here)[at]] = own[there]
            logits[given][t] = values
    return HeldOut(fused.heldout.on, rows, logits)
