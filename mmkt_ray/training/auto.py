"""`training: auto`: settings chosen by data, on held-out rows, from a small fixed set that is trained as one stack.

The set is CANDIDATES, or NUMBER_CANDIDATES (docs/methods.md says how they were found). All are trained as one stack
(see fold_stack.py), each once for each held-out part of the rows, on the other rows. A candidate replaces the first
one if its held-out log loss is lower by more than one standard error. The held-out predictions of the chosen settings
are kept, also with modalities hidden: models are compared, calibrated and routed by them. Where rows are few, the
model itself, which learns from all of them, is one more member of that stack.

Axes: N rows of a table, P members (a candidate and the part it may not see), B rows of a batch,
C classes of one task.

Sources: horizontally fused training, Wang et al. 2021 (https://arxiv.org/abs/2102.02344); the one-standard-error
rule, Breiman et al. 1984, 3.4.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.rows import readable
from mmkt_ray.inference.training_record import ChosenSettings, Setting, Tried
from mmkt_ray.scoring.calibration import fit_temperature
from mmkt_ray.scoring.heldout import Folds, HeldOut, as_train, make_folds, pattern_name
from mmkt_ray.training.batches import narrow
from mmkt_ray.training.fold_stack import held_out_rows, heldout_logits
from mmkt_ray.training.model_stack import MEMBER_KEYS
from mmkt_ray.training.setup import training_rows

BASE: dict[str, float] = {
    "training.lr": 6e-3,
    "training.weight_decay": 0.02,
    "training.label_smoothing": 0.02,
    "training.steps": 1.0,  # times `base_steps`
    "model.dropout": 0.35,
    "model.feature_dropout": 0.3,
    "model.modality_dropout": 0.1,
}
SMALL_ROWS = 1_000  # with fewer train rows, SMALL regularises more
SMALL: dict[str, float] = {"training.label_smoothing": 0.1, "model.dropout": 0.5, "model.modality_dropout": 0.2}
CANDIDATES: tuple[dict[str, float], ...] = ({}, {"training.steps": 2.0, "model.dropout": 0.2})
# of models whose tasks are all numbers: hiding features costs them most, and they take longer to fit
NUMBER_CANDIDATES: tuple[dict[str, float], ...] = (
    {"training.steps": 2.0, "model.dropout": 0.2},
    {"training.steps": 8.0, "model.dropout": 0.2, "model.feature_dropout": 0.0},
)
# fusions that are trained by the settings of `concat`
LIKE_CONCAT = ("concat", "decision", "sum", "gated", "hierarchical")
DEEP_DROPOUT = 0.2
MIN_STEPS, MIN_EPOCHS = 150, 5  # of the first candidate
SCREENING_PARTS = 2  # held-out parts that all candidates are scored on; the chosen one then holds out every part
FEW_ROWS = 10_000  # train rows of a candidate, at most; a model with no more rows is trained in the stack too
BATCH_SIZES = ((10_000, 128), (50_000, 256), (math.inf, 512))  # up to so many train rows


def is_plain(config: Config) -> bool:
    """Whether models of this config can be trained in a stack with held-out parts: no method changes gradients, mixes
    rows, adds rows, uses other models or stops early."""
    training = config.training
    return not (
        training.balance
        or training.patience
        or training.task_weighting != "sum"
        or training.generate
        or training.transfer.init
        or training.transfer.teachers
        or training.augment != type(training.augment)()
    )


def plain_config(config: Config) -> Config:
    """The config without what `is_plain` refuses."""
    return config.with_overrides(
        {
            "training.balance": None,
            "training.patience": 0,
            "training.task_weighting": "sum",
            "training.generate": None,
            "training.transfer": {},
            "training.augment": {},
        }
    )


def screening_config(config: Config) -> Config:
    """The config whose settings are chosen: without experts, for any seed and number of workers, with the simplest
    sharing and fusion. So all models of the same modalities and tasks get the same choice."""
    alone: dict[str, Any] = {
        "model.experts": False,
        "model.wide": False,
        "training.seed": None,
        "training.num_workers": 1,
    }
    if config.model.num_levels:
        alone["model.sharing"] = "task"
        if config.model.fusion.name in LIKE_CONCAT:
            alone["model.fusion"] = "concat"
    return plain_config(config).with_overrides({**alone, "training.auto": list(config.training.auto)})


def is_screened(config: Config) -> bool:
    """Whether models of this config are the very models that its settings are chosen with."""
    asked = screening_config(config)
    own = {"model.experts": False, "model.wide": False, "training.seed": None, "training.num_workers": 1}
    alone = config.with_overrides({**own, "training.auto": list(config.training.auto)})
    return config.training_seed == config.seed and (alone.model, alone.training) == (asked.model, asked.training)


def batch_size(config: Config, num_rows: int) -> int:
    """Rows of a step: the config's, or, where it is to be chosen, by the number of train rows."""
    if "training.batch_size_per_worker" not in config.training.auto:
        return config.training.batch_size_per_worker
    return next(size for limit, size in BATCH_SIZES if num_rows < limit)


def candidates_of(config: Config) -> tuple[dict[str, float], ...]:
    """What is tried for the config's model."""
    kinds = [config.task_kinds[task] for task in config.model_tasks]
    return CANDIDATES if any(kind.classes for kind in kinds) else NUMBER_CANDIDATES


def settings_of(config: Config, candidate: Mapping[str, float], num_rows: int) -> dict[str, Setting]:
    """A candidate's values of the keys that the config leaves open. num_rows: of train."""
    values: dict[str, Setting] = {**BASE, **(SMALL if num_rows < SMALL_ROWS else {}), **candidate}
    rows_per_step = batch_size(config, num_rows)
    base_steps = max(MIN_STEPS, MIN_EPOCHS * math.ceil(num_rows / rows_per_step))
    values["training.steps"] = round(values["training.steps"] * base_steps)
    values["training.batch_size_per_worker"] = rows_per_step
    if len(config.model_modalities) == 1:
        values["model.modality_dropout"] = 0.0
    return {key: values[key] for key in config.training.auto} | without_meaning(config)


def for_depth(config: Config, settings: dict[str, Setting]) -> dict[str, Setting]:
    """Settings chosen for `screening_config`, adapted to the config's own model: fusion in several layers takes twice
    the steps and at most DEEP_DROPOUT in each layer."""
    fusion = config.model.fusion
    if fusion.name != "hierarchical" or fusion.depth < 2 or not config.model.num_levels:
        return settings
    changed = dict(settings)
    if "training.steps" in settings:
        changed["training.steps"] = 2 * settings["training.steps"]
    if "model.dropout" in settings:
        changed["model.dropout"] = min(settings["model.dropout"], DEEP_DROPOUT)
    return changed


def usual_settings(config: Config) -> dict[str, Setting]:
    """The first candidate's settings for what the config leaves open, without looking at data: MIN_STEPS for the
    steps, none for the batch size."""
    steps = {"training.steps": MIN_STEPS} if "training.steps" in config.training.auto else {}
    return {key: BASE[key] for key in config.training.auto if key in MEMBER_KEYS} | steps | without_meaning(config)


def without_meaning(config: Config) -> dict[str, Setting]:
    """Open settings that have no meaning for a task of the model, such as label smoothing of a number; they are 0."""
    refused = {f"training.{setting}" for kind in config.task_kinds.values() for setting in kind.cannot}
    return {key: 0.0 for key in config.training.auto if key in refused}


def with_settings(config: Config, settings: Mapping[str, Setting | None]) -> Config:
    """The config with nothing left to choose."""
    return config.with_overrides({**settings, "training.auto": []})


# --- choosing -------------------------------------------------------------------------------------------------------


def choose_settings(
    config: Config, table: FeatureTable, device: torch.device = torch.device("cpu")  # noqa: B008
) -> tuple[ChosenSettings, HeldOut | None]:
    """Choose the settings that `training.auto` leaves open. With them come held-out predictions of the chosen
    candidate, where it learnt from all other rows (None otherwise).

    Raises: DataError as `fit`.
    """
    config = screening_config(config)
    table = narrow(table, config.model_modalities, config.model_tasks)
    folds = make_folds(table, config.seed)
    whole = as_train(table)
    num_rows = len(training_rows(config, whole, {})[1])
    parts = range(min(SCREENING_PARTS, folds.num_held))
    tried = unique([settings_of(config, c, num_rows) for c in candidates_of(config)])
    if len(tried) == 1 or not any(folds.held(p).any() for p in parts):
        return ChosenSettings(settings=tried[0], candidates=[], on=folds.on, num_rows=0), None
    few = drawn(whole, folds, FEW_ROWS)
    stack_rows = len(training_rows(config, few, {})[1])
    stacked = unique([settings_of(config, c, stack_rows) for c in candidates_of(config)])
    settled = with_settings(config, {"training.batch_size_per_worker": batch_size(config, stack_rows)})
    found = heldout_logits(settled, few, folds, stacked, parts, device)
    every = pattern_name(list(table.features))
    losses = np.stack([row_losses(config, table, folds, parts, logits[every]) for logits in found])
    best = choose_candidate(losses)
    records = [
        Tried(settings=s, loss=float(mean), chosen=i == best)
        for i, (s, mean) in enumerate(zip(tried, losses.mean(axis=1), strict=True))
    ]
    heldout = None if few is not whole else held_out_rows(table, folds, parts, found[best])
    return ChosenSettings(settings=tried[best], candidates=records, on=folds.on, num_rows=losses.shape[1]), heldout


def unique(settings: Sequence[dict[str, Setting]]) -> list[dict[str, Setting]]:
    """Without repetitions, in their order."""
    return [s for i, s in enumerate(settings) if s not in settings[:i]]


def choose_candidate(losses: np.ndarray) -> int:
    """Index of the chosen candidate: the one of the lowest mean loss, if it beats the first by more than one standard
    error of the paired difference; else the first. Diverged candidates (NaN) are left out.

    losses: (candidates, rows)."""
    means = np.where(np.isfinite(losses).all(axis=1), losses.mean(axis=1), np.inf)
    if not np.isfinite(means[0]):
        return int(means.argmin())
    gains = [losses[0] - row for row in losses]
    clear = [i for i, g in enumerate(gains) if np.isfinite(means[i]) and g.mean() > g.std() / math.sqrt(len(g))]
    return min(clear, key=lambda i: means[i], default=0)


def row_losses(
    config: Config, table: FeatureTable, folds: Folds, parts: Sequence[int], logits: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Log loss (H,) of each held-out row with a label, relative to that of the class frequencies; the mean over a
    row's tasks. Each task's logits are scaled by their best temperature. logits: task -> (N, C)."""
    held = np.isin(folds.fold, list(parts))
    total, count = np.zeros(len(held)), np.zeros(len(held))
    for t, values in logits.items():
        labels = table.labels[t]
        rows = np.flatnonzero(held & labels.known & readable(table, config.task_inputs(t)))
        if not len(rows):
            continue
        if not np.isfinite(values[rows]).all():
            total[rows] = np.nan
            count[rows] += 1
            continue
        temperature = fit_temperature(values[rows], labels[rows])
        losses = labels.kind.each_loss(values[rows] / temperature, labels[rows])
        frequencies = labels.kind.log_frequencies(labels[rows], values.shape[1])
        prior = labels.kind.each_loss(np.broadcast_to(frequencies, values[rows].shape), labels[rows]).mean()
        total[rows] += losses / max(prior, 1e-9)
        count[rows] += 1
    return total[count > 0] / count[count > 0]


def drawn(table: FeatureTable, folds: Folds, most: int) -> FeatureTable:
    """The table with at most `most` train rows beside the parts that candidates are scored on."""
    rest = np.flatnonzero((table.split == "train") & ~np.isin(folds.fold, range(min(SCREENING_PARTS, folds.num_held))))
    if len(rest) <= most:
        return table
    split = table.split.copy()
    split[np.random.default_rng(0).permutation(rest)[most:]] = "excluded"
    return replace(table, split=split)
