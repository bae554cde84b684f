"""Models without towers: logistic regression, or ridge regression of numbers, solved to the optimum. Held-out rows
choose the penalty.

Features pass the model's input stage. Then each modality is scaled to rows of unit mean squared length, so that one
penalty is fair to 1,280 dense numbers and to ten words. Without this scaling the wider modality dominates:
cross-validated with the best penalty of each, OpenMoji's category is 78.4 % with it and 69.3 % without (HOG and
words), 87.4 % and 85.7 % with pretrained encoders.

Each task has a penalty of its own, from a path of about ten, strong to weak: the one with the lowest held-out log
loss (see heldout.py). The model then learns from train and val together.

Axes: N rows that are learnt from, H held-out rows, D features of a modality, C classes of one task.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkt_ray.config import Config
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.features.feature_table import TAKE_ROWS, FeatureTable, Growing
from mmkt_ray.inference.outputs import predict_logits
from mmkt_ray.inference.rows import readable, subsets
from mmkt_ray.inference.training_record import Epoch, LinearPath
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.linear_target import LinearTarget, NumberTarget
from mmkt_ray.models import MultimodalModel
from mmkt_ray.models.fusion import LinearHead
from mmkt_ray.models.imputation import mean_squared_norm
from mmkt_ray.scoring.heldout import Folds, HeldOut, as_train, make_folds, pattern_name
from mmkt_ray.training.batches import narrow
from mmkt_ray.training.logistic import FeatureBlock, Problem, make_block, minimise
from mmkt_ray.training.loop import FitResult
from mmkt_ray.training.setup import build_model, training_rows
from mmkt_ray.training.validation import summarise

STRONGEST = 0.1  # penalty, times the rows that are learnt from
FACTOR = 3.0  # from one penalty to the next
MAX_PENALTIES = 14
SCREENING_PARTS = 2  # held-out parts that penalties are scored on; models at the chosen one then hold out every part
PATH_TOLERANCE = 1e-5  # share of the loss; a smaller one would not change the choice
MAX_MODALITIES = 4  # with more, not every subset of them is predicted from
DEFAULT_L2 = 1.0  # where no row can be held out
Weights = tuple[dict[str, np.ndarray], np.ndarray]  # of a task: modality -> (D, C), and the bias (C,)


@dataclass(frozen=True)
class LinearFit:
    """A solved model, and how its penalties were chosen."""

    model: MultimodalModel  # in eval mode
    heldout: HeldOut  # logits at the chosen penalties
    l2: dict[str, float]  # task -> penalty
    path: list[dict[str, Any]]  # task, l2, log_loss and accuracy of the held-out rows; weighted by class where asked
    loss: float  # mean over the rows learnt from, summed over tasks, without the penalty
    num_rows: dict[str, int]  # task -> rows that it was learnt from
    seconds: float


def is_linear(config: Config) -> bool:
    """Whether the config's model is logistic regression and no training setting turns it into another problem."""
    model, training = config.model, config.training
    return (
        model.num_levels == 0
        and model.fusion.name == "concat"
        and model.missing in ("mask", "mean", "drop")
        and training.task_weighting == "sum"
        and training.augment == type(training.augment)()
        and training.transfer == type(training.transfer)()
        and not any((training.balance, training.generate, training.resample, training.logit_adjustment))
        and not any((training.label_smoothing, model.feature_dropout))
    )


def fit_linear(config: Config, table: FeatureTable) -> LinearFit:
    """Solve the config's model (see `is_linear`) on train and val; `training.l2` sets the penalty of all tasks.

    Rows without a label of a task, or with a class that train lacks, are left out for it.
    Raises: DataError as `fit`, ConfigError if the table lacks a modality or a task.
    """
    started = time.perf_counter()
    table = narrow(table, config.model_modalities, config.model_tasks)
    folds = make_folds(table, config.seed)
    learnt, rows = training_rows(config, as_train(table), {})
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        model = build_model(config, learnt).eval()
    solver = _Solver(config, model, learnt, rows, folds)
    tasks = {t: solver.solve(t, config.task_inputs(t)) for t in config.model_tasks}
    heldout = _hold_out(model, table, folds, {t: solved.by_fold for t, solved in tasks.items()})
    for t, solved in tasks.items():
        _set_weights(model, t, solved.weights)
    return LinearFit(
        model,
        heldout,
        {t: solved.l2 for t, solved in tasks.items()},
        [{"task": t, **record} for t, solved in tasks.items() for record in solved.path],
        sum(solved.loss for solved in tasks.values()),
        {t: solved.num_rows for t, solved in tasks.items()},
        time.perf_counter() - started,
    )


def linear_result(config: Config, table: FeatureTable) -> tuple[FitResult, HeldOut, LinearPath]:
    """`fit_linear` in the form of `fit` (one epoch, whose val scores are those of the held-out rows), and what the
    card adds."""
    found = fit_linear(config, table)
    labels = {t: table.labels[t][found.heldout.rows] for t in config.model_tasks}
    logits = found.heldout.logits[pattern_name(config.model_modalities)]
    tensors = {t: y.tensors() for t, y in labels.items()}
    tallies = {t: y.kind.tally(torch.from_numpy(logits[t]), y).numpy() for t, y in tensors.items()}
    val = summarise(tallies, table.kinds, found.heldout.on)
    scores = val if np.isfinite(val.score) else None
    epoch = Epoch(epoch=1, train_loss=found.loss, val=scores, seconds=found.seconds)
    path = {"l2": found.l2, "path": found.path, "on": found.heldout.on, "num_rows": found.num_rows}
    result = FitResult(found.model, [epoch], 1, scores, found.seconds)
    return result, found.heldout, LinearPath.model_validate(path)


def solve(features: Features, labels: Labels, num_classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression on features (N, D) as they are: weights (D, C) and bias (C,). labels: all known."""
    target: LinearTarget | NumberTarget = labels.kind.linear_target(labels, num_classes, False)
    problem = problem_of([make_block(features)], target, np.ones((len(labels), 1), bool))
    (weights,), bias = problem.original(minimise(problem, l2), 0)
    return target.expanded(weights, bias, num_classes)


def problem_of(blocks: Sequence[FeatureBlock], target: LinearTarget | NumberTarget, used: np.ndarray) -> Problem:
    """The problem of a task. used: (N, F) bool, the rows that each fit learns from."""
    return Problem(blocks, target.labels, used, target.class_weights, target.one_of, target.squared)


# --- one task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Solved:
    weights: Weights  # by standardised features
    by_fold: list[Weights]  # of models that leave out one part of the rows each
    l2: float
    path: list[dict[str, Any]]
    loss: float
    num_rows: int


class _Solver:
    """The rows that are learnt from, as the solver wants them; made once for all tasks."""

    def __init__(
        self, config: Config, model: MultimodalModel, table: FeatureTable, rows: np.ndarray, folds: Folds
    ) -> None:
        self.config, self.table, self.rows = config, table, rows
        self.fold, self.num_held = folds.fold[rows], folds.num_held
        self.blocks: dict[str, FeatureBlock] = {}
        self.scales: dict[str, float] = {}
        for m, features in table.features.items():
            stage = model.input_stage(m)
            x = standardised(features, table.present[m], rows, stage.mean.numpy(), stage.std.numpy())
            self.scales[m] = float((table.present[m][rows].mean() or 1.0) / mean_squared_norm(x)) ** 0.5
            x *= np.float32(self.scales[m])
            self.blocks[m] = make_block(x)

    def solve(self, task: str, inputs: tuple[str, ...]) -> _Solved:
        """Choose the penalty on held-out rows, then learn from all."""
        labels = self.table.labels[task][self.rows]
        known = labels.known & readable(self.table, inputs)[self.rows]
        blocks = [self.blocks[m] if known.all() else self.blocks[m].take(np.flatnonzero(known)) for m in inputs]
        num_classes, balanced = self.table.width(task), self.config.training.class_weights == "balanced"
        target: LinearTarget | NumberTarget = labels.kind.linear_target(labels[known], num_classes, balanced)
        fold = self.fold[known]
        l2, path, start = self._choose(blocks, target, fold)
        parts = problem_of(blocks, target, fold[:, None] != np.arange(self.num_held))
        by_fold = minimise(parts, l2 / target.weight, _spread(start, parts), PATH_TOLERANCE)
        whole = problem_of(blocks, target, np.ones((len(fold), 1), bool))
        best = minimise(whole, l2 / target.weight, _spread(by_fold, whole))
        losses = whole.evaluate(best)[0] / whole.total

        def unscaled(problem: Problem, weights: Tensor, fit: int) -> Weights:
            parts, bias = problem.original(weights, fit)
            full = [target.expanded(part, bias, num_classes) for part in parts]
            return {m: w * self.scales[m] for m, (w, _) in zip(inputs, full, strict=True)}, full[0][1]

        held_out = [unscaled(parts, by_fold, k) for k in range(self.num_held)]
        return _Solved(unscaled(whole, best, 0), held_out, l2, path, float(losses.mean()), len(fold))

    def _choose(
        self, blocks: Sequence[FeatureBlock], target: LinearTarget | NumberTarget, fold: np.ndarray
    ) -> tuple[float, list[dict[str, Any]], Tensor]:
        """The penalty, the path to it, and the weights of the models that it was chosen by."""
        given, num_parts = self.config.training.l2, min(SCREENING_PARTS, self.num_held)
        problem = problem_of(blocks, target, fold[:, None] != np.arange(num_parts))
        held = (fold >= 0) & (fold < num_parts)
        if given is not None or not held.any():
            return DEFAULT_L2 if given is None else given, [], problem.initial()
        part = replace(target, labels=target.labels[held])
        path: list[dict[str, Any]] = []
        best = weights = problem.initial()
        for l2 in (STRONGEST * len(fold) / FACTOR**k for k in range(MAX_PENALTIES)):
            weights = minimise(problem, l2 / target.weight, weights, PATH_TOLERANCE)
            loss, accuracy = part.score(problem.held_out(weights, np.clip(fold, 0, num_parts - 1))[held])
            path.append({"l2": l2, "log_loss": loss, "accuracy": accuracy})
            if len(path) > 1 and loss >= path[-2]["log_loss"]:
                return path[-2]["l2"], path, best
            best = weights
        return path[-1]["l2"], path, best


def _spread(weights: Tensor, problem: Problem) -> Tensor:
    """Initial weights for a problem from those of another: fit by fold where both have it, else the mean."""
    start = problem.initial()
    found = weights.view(len(weights), -1, problem.num_classes)  # (P, fits, K)
    whole = start.view(len(weights), -1, problem.num_classes)
    whole[:-1] = found[:-1].mean(dim=1, keepdim=True)
    if found.shape[1] <= whole.shape[1]:
        whole[:, : found.shape[1]] = found
    return start * problem.open + problem.initial() * ~problem.open


def standardised(
    features: Features, present: np.ndarray, rows: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> Features:
    """Some rows as the model's input stage sees them, float32; absent rows are zeros. Mapped from a file if large."""
    if not isinstance(features, np.ndarray):
        x = features[rows].astype(np.float32)
        x.data *= np.repeat(present[rows], np.diff(x.indptr)) / np.float32(std)
        return x
    grown = Growing()
    for start in range(0, max(1, len(rows)), TAKE_ROWS):
        some = rows[start : start + TAKE_ROWS]
        grown.add(np.where(present[some][:, None], (features[some] - mean) / std, np.float32(0)))
    return grown.array()


# --- into the model -------------------------------------------------------------------------------------------------


def _set_weights(model: MultimodalModel, task: str, weights: Weights) -> None:
    """Copy solved weights into the task's head."""
    head = model.head(task)
    assert isinstance(head, LinearHead)  # see `is_linear`
    with torch.no_grad():
        for m, values in weights[0].items():
            sparse = model.spec.modalities[m].sparse
            head.layer(m).weight.copy_(torch.from_numpy(values if sparse else values.T))
        head.bias.copy_(torch.from_numpy(weights[1]))


def _hold_out(
    model: MultimodalModel, table: FeatureTable, folds: Folds, weights: Mapping[str, list[Weights]]
) -> HeldOut:
    """Out-of-fold predictions of the folds' models. Logits of several modalities are the sums of those of each."""
    modalities = sorted(table.features)
    num = len(modalities)
    held = np.isin(folds.fold, range(folds.num_held)) & readable(table, modalities)
    rows = np.flatnonzero(held)
    sets = subsets(modalities, range(1, num + 1) if num <= MAX_MODALITIES else (1, num))
    shapes = {t: (len(rows), table.width(t)) for t in weights}
    logits = {pattern_name(s): {t: np.zeros(shape, np.float32) for t, shape in shapes.items()} for s in sets}
    for part in range(folds.num_held):
        for t, by_fold in weights.items():
            _set_weights(model, t, by_fold[part])
        own = folds.held(part)[rows]
        if not own.any():
            continue
        some = table.take(rows[own])
        alone = {m: predict_logits(model, some, drop=[other for other in modalities if other != m]) for m in modalities}
        for t, by_fold in weights.items():
            bias = by_fold[part][1]
            for s in sets:
                logits[pattern_name(s)][t][own] = bias + sum(alone[m][t] - bias for m in s)
    return HeldOut(folds.on, rows, logits)
