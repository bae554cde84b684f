"""`training: auto`: settings chosen by data, on held-out rows, from a small fixed set that is trained as one stack.

The set is CANDIDATES; its first one was level with the best on four of five development sets (see docs/methods.md). All
candidates train at once (see population.py), each once for each part of the rows that is held out, on the other rows alone.
One is taken instead of the first if its held-out log loss is lower by more than one standard error. What the chosen settings
then say of every held-out row, also with modalities hidden, is kept: models are compared, calibrated and routed by it.

Axes: N rows of a table, P members (a candidate and the part it may not see), B rows of a batch, C classes of one task.

Sources: horizontally fused training, Wang et al. 2021 (https://arxiv.org/abs/2102.02344); the one-standard-error rule,
Breiman et al. 1984, 3.4.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from mmkt_ray.config import Config
from mmkt_ray.evaluation.calibration import fit_temperature
from mmkt_ray.evaluation.heldout import Folds, HeldOut, as_train, make_folds, pattern_name
from mmkt_ray.evaluation.inference import model_inputs
from mmkt_ray.evaluation.rows import readable, subsets
from mmkt_ray.features.store import FeatureTable
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.batches import Batch, World, narrow
from mmkt_ray.training.learner import Logits
from mmkt_ray.training.loop import Fitting, build_objective, seed_of, spec_of, training_rows
from mmkt_ray.training.optimizer import rate
from mmkt_ray.training.population import MEMBER_KEYS, Population, StackedObjective, _column

BASE: dict[str, float] = {
    "training.lr": 6e-3,
    "training.weight_decay": 0.02,
    "training.label_smoothing": 0.1,
    "training.steps": 1.0,  # times `base_steps`
    "model.dropout": 0.5,
    "model.feature_dropout": 0.3,
    "model.modality_dropout": 0.2,
}
CANDIDATES: tuple[dict[str, float], ...] = (
    {},
    {"training.steps": 3.0, "model.feature_dropout": 0.5},
    {"training.steps": 3.0, "training.label_smoothing": 0.02, "model.dropout": 0.2, "model.modality_dropout": 0.1},
)
MIN_STEPS, MIN_EPOCHS = 150, 5  # of the first candidate
SCREENING_PARTS = 2  # parts that all candidates are judged on; the chosen one then holds out every part
SCREENING_ROWS = 10_000  # train rows that candidates learn from at most
BATCH_SIZES = ((10_000, 128), (50_000, 256), (math.inf, 512))  # up to so many train rows
STACK_BYTES = 1.5e9  # weights, gradients and averages of the members that train at once
MAX_HIDDEN = 4  # of more modalities not every subset is asked for, see `given_subsets`


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    settings: dict[str, Any]  # dotted key -> value, for `Config.with_overrides`
    candidates: list[dict[str, Any]]  # each: settings, loss (held-out, relative to the class frequencies'), chosen
    on: str  # cv | val
    num_rows: int  # held-out rows that the candidates were judged on

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"settings": self.settings, "candidates": self.candidates, "on": self.on, "num_rows": self.num_rows}


def is_plain(config: Config) -> bool:
    """Whether models of this config can be trained in a stack and on held-out parts: none of its methods acts on gradients,
    mixes rows, makes new ones, asks other models or stops by the val score."""
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


def plain(config: Config) -> Config:
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
    """Whose settings are chosen: the model by itself, whatever its seed and its number of workers."""
    alone = {"model.experts": False, "training.seed": None, "training.num_workers": 1}
    return plain(config).with_overrides({**alone, "training.auto": list(config.training.auto)})


def batch_size(config: Config, num_rows: int) -> int:
    """Rows of a step: the config's, or if it is to be chosen by the number of train rows."""
    if "training.batch_size_per_worker" not in config.training.auto:
        return config.training.batch_size_per_worker
    return next(size for limit, size in BATCH_SIZES if num_rows < limit)


def settings_of(config: Config, candidate: Mapping[str, float], num_rows: int) -> dict[str, Any]:
    """A candidate's values of the keys that the config leaves open, for so many train rows."""
    values: dict[str, Any] = {**BASE, **candidate}
    rows_per_step = batch_size(config, num_rows)
    base_steps = max(MIN_STEPS, MIN_EPOCHS * math.ceil(num_rows / rows_per_step))
    values["training.steps"] = round(values["training.steps"] * base_steps)
    values["training.batch_size_per_worker"] = rows_per_step
    if len(config.model_modalities) == 1:
        values["model.modality_dropout"] = 0.0
    return {key: values[key] for key in config.training.auto} | without_meaning(config)


def usual_settings(config: Config) -> dict[str, Any]:
    """Those of the first candidate for what the config leaves open, where nothing is chosen by data: for all but the batch
    size, and for steps at least MIN_STEPS."""
    steps = {"training.steps": MIN_STEPS} if "training.steps" in config.training.auto else {}
    return {key: BASE[key] for key in config.training.auto if key in MEMBER_KEYS} | steps | without_meaning(config)


def without_meaning(config: Config) -> dict[str, Any]:
    """The open settings that a task of the model can't have, label smoothing of a number say, as none."""
    refused = {f"training.{setting}" for kind in config.task_kinds.values() for setting in kind.cannot}
    return {key: 0.0 for key in config.training.auto if key in refused}


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with nothing left to choose."""
    return config.with_overrides({**settings, "training.auto": []})


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(config: Config, table: FeatureTable, device: torch.device = torch.device("cpu")) -> Choice:  # noqa: B008
    """Choose the settings that `training.auto` leaves open.

    Raises: DataError as `fit`.
    """
    config = screening_config(config)
    table = narrow(table, config.model_modalities, config.model_tasks)
    folds = make_folds(table, config.seed)
    whole = as_train(table)
    num_rows = len(training_rows(config, whole, {})[1])
    candidates = unique([settings_of(config, c, num_rows) for c in CANDIDATES])
    parts = range(min(SCREENING_PARTS, folds.num_held))
    if len(candidates) == 1 or not any(folds.held(p).any() for p in parts):
        return Choice(candidates[0], [], folds.on, 0)
    whole = drawn(whole, folds, SCREENING_ROWS)
    stack_rows = len(training_rows(config, whole, {})[1])
    tried = unique([settings_of(config, c, stack_rows) for c in CANDIDATES])
    found = heldout_logits(config, whole, folds, tried, parts, device, subsets_too=False)
    losses = np.stack([row_losses(config, table, folds, parts, logits[pattern_name(list(table.features))]) for logits in found])
    best = choose_candidate(losses)
    means = losses.mean(axis=1)
    records = [
        {"settings": s, "loss": float(mean), "chosen": i == best}
        for i, (s, mean) in enumerate(zip(candidates, means, strict=True))
    ]
    return Choice(candidates[best], records, folds.on, losses.shape[1])


def unique(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without repetitions, in their order."""
    return [s for i, s in enumerate(settings) if s not in settings[:i]]


def choose_candidate(losses: np.ndarray) -> int:
    """Which candidate's row losses (candidates, rows) are chosen: the lowest mean, if by more than one standard error of the
    paired difference to the first; else the first. Candidates that diverged (NaN) are out."""
    means = np.where(np.isfinite(losses).all(axis=1), losses.mean(axis=1), np.inf)
    if not np.isfinite(means[0]):
        return int(means.argmin())
    gains = [losses[0] - row for row in losses]
    clear = [i for i, g in enumerate(gains) if np.isfinite(means[i]) and g.mean() > g.std() / math.sqrt(len(g))]
    return min(clear, key=lambda i: means[i], default=0)


def row_losses(
    config: Config, table: FeatureTable, folds: Folds, parts: Sequence[int], logits: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Log loss (H,) of each held-out row that some task can use, at the temperature that suits a task best, as a share of
    the loss of the class frequencies; the mean over a row's tasks. logits: task -> (N, C)."""
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
    """The table with at most so many rows in train beside the first held-out part."""
    rest = np.flatnonzero((table.split == "train") & ~np.isin(folds.fold, range(min(SCREENING_PARTS, folds.num_held))))
    if len(rest) <= most:
        return table
    split = table.split.copy()
    split[np.random.default_rng(0).permutation(rest)[most:]] = "excluded"
    return replace(table, split=split)


# --- held-out predictions --------------------------------------------------------------------------------------------


def hold_out(
    config: Config, table: FeatureTable, device: torch.device = torch.device("cpu")  # noqa: B008
) -> HeldOut | None:
    """What models of this config, nothing left to choose, say of rows that they have not learnt from.

    None where no row of train or val can be held out.
    """
    table = narrow(table, config.model_modalities, config.model_tasks)
    folds = make_folds(table, config.seed)
    held = np.isin(folds.fold, range(folds.num_held)) & readable(table, list(table.present))
    rows = np.flatnonzero(held)
    if not len(rows):
        return None
    own = {key: value_of(config, key) for key in (*MEMBER_KEYS, "training.steps")}
    found = heldout_logits(config, as_train(table), folds, [own], range(folds.num_held), device)[0]
    return HeldOut(folds.on, rows, {given: {t: z[rows] for t, z in by.items()} for given, by in found.items()})


def value_of(config: Config, key: str) -> Any:
    """A key's value in a config."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def given_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of modalities that held-out rows are predicted from: every one, of more than MAX_HIDDEN all and each alone."""
    num = len(modalities)
    sizes = range(1, num + 1) if num <= MAX_HIDDEN else (1, num)
    return subsets(sorted(modalities), sizes)


def heldout_logits(
    config: Config,
    table: FeatureTable,
    folds: Folds,
    candidates: Sequence[Mapping[str, Any]],
    parts: Sequence[int],
    device: torch.device,
    subsets_too: bool = True,
) -> list[dict[str, dict[str, np.ndarray]]]:
    """For each candidate: modalities given -> task -> logits (N, C), rows outside the parts zero.

    table: its train split is what is learnt from, less each member's part. Members train in stacks of STACK_BYTES.
    """
    given = given_subsets(list(table.features)) if subsets_too else [tuple(sorted(table.features))]
    num_rows = len(table.split)
    found: list[dict[str, dict[str, np.ndarray]]] = [
        {pattern_name(g): {t: np.zeros((num_rows, len(c)), np.float32) for t, c in table.class_names.items()} for g in given}
        for _ in candidates
    ]
    members = [(i, part) for i in range(len(candidates)) for part in parts if folds.held(part).any()]
    size = max(1, int(STACK_BYTES // (20 * sum(p.numel() for p in MultimodalModel(spec_of(config, table)).parameters()))))
    for start in range(0, len(members), size):
        chunk = members[start : start + size]
        stack = FoldStack(config, table, folds, [candidates[i] for i, _ in chunk], [p for _, p in chunk], device)
        stack.train_all()
        for j, (i, part) in enumerate(chunk):
            rows = np.flatnonzero(folds.held(part))
            for g in given:
                for t, values in stack.predict(j, rows, g).items():
                    found[i][pattern_name(g)][t][rows] = values
    return found


class FoldStack(Population):
    """Members that each leave one part of the rows out of their losses and have a number of steps of their own."""

    def __init__(
        self,
        config: Config,
        table: FeatureTable,
        folds: Folds,
        settings: Sequence[Mapping[str, Any]],
        parts: Sequence[int],
        device: torch.device,
    ) -> None:
        """table: its train split is what is learnt from; settings, parts: of each member."""
        num_rows = len(training_rows(config, table, {})[1])
        config = with_settings(config, {"training.batch_size_per_worker": batch_size(config, num_rows)})
        self.config = config
        self.values = {key: _column(config, settings, key).to(device) for key in MEMBER_KEYS}
        self.run = Fitting(config, table, World(device=device))
        run = self.run
        epochs = config.training.epochs * run.batches.num_steps
        self.steps = [int(s.get("training.steps") or epochs) for s in settings]
        self.stacked_objective = StackedObjective.of(build_objective(config, run.table, run.train_rows, run.world))
        self.fold, self.parts = torch.from_numpy(folds.fold).to(device), torch.tensor(list(parts), device=device)
        start = torch.cat([p.detach().flatten() for _, p in self._layout()])
        self.weights = start.expand(len(parts), -1).clone()  # (P, N)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)

    def train_all(self) -> None:
        """Every member to its last step; members that are done drop out of the stack."""
        order = np.argsort([-s for s in self.steps], kind="stable")  # the longest first, so that the stack ends early
        done = torch.empty_like(self.weights)
        alive, step, epoch = list(order), 0, 0
        live = self._of(alive)
        while alive:
            epoch += 1
            torch.manual_seed(seed_of(self.config.training_seed, epoch, 0))
            for rows in self.run.batches.order(epoch)[:, 0]:
                ended = [i for i in alive if self.steps[i] <= step]
                if ended:
                    done[ended] = live.weights[[alive.index(i) for i in ended]]
                    keep = [j for j, i in enumerate(alive) if i not in ended]
                    alive = [alive[j] for j in keep]
                    if not alive:
                        break
                    live = live._of(keep)
                live._step(rows, step)
                step += 1
        self.weights = done

    def _of(self, members: Sequence[int]) -> FoldStack:
        """Some of the members, in this order."""
        part = object.__new__(FoldStack)
        index = torch.tensor([int(i) for i in members], device=self.weights.device)
        flat = {name: getattr(self, name)[index] for name in ("weights", "mean", "square", "parts")}
        values = {key: v[index] for key, v in self.values.items()}
        part.__dict__ |= self.__dict__ | flat | {"values": values, "steps": [self.steps[i] for i in members]}
        return part

    def _step(self, rows: np.ndarray, step: int) -> None:
        """One step on these rows, of each member less its part."""
        model, batch = self.run.model.train(), self.run.batches.read(rows)
        stack = {name: p.requires_grad_() for name, p in self._views(self.weights).items()}
        seen = (self.fold[torch.from_numpy(rows).to(self.fold.device)] != self.parts[:, None]).float()  # (P, B)
        objective = self.stacked_objective.with_smoothing(self.values["training.label_smoothing"])
        logits = self._forward(model, stack, batch.features, batch.present)
        losses = objective.losses(logits, batch.labels, self._totals(objective, batch, seen), seen)
        total = torch.stack(list(losses.values())).sum()
        schedule = torch.tensor([rate(step, num) for num in self.steps], device=self.weights.device)
        self._update(torch.autograd.grad(total, list(stack.values())), step, schedule)

    def _totals(self, objective: StackedObjective, batch: Batch, seen: Tensor) -> dict[str, Tensor]:
        """What each member's sum is divided by, task -> (P,); see `Objective.total_weights`."""
        return {t: (weights * seen).sum(dim=1) for t, weights in objective.row_weights(batch.labels).items()}

    @torch.no_grad()
    def predict(self, member: int, rows: np.ndarray, given: Sequence[str]) -> dict[str, np.ndarray]:
        """One member's logits of some rows, task -> (R, C), from these modalities alone."""
        model, found = self.run.model.eval(), dict[str, list[np.ndarray]]()
        state = {n: p[member] for n, p in self._views(self.weights).items()}
        hidden = set(model.spec.modalities) - set(given)
        for start in range(0, len(rows), 1024):
            inputs = model_inputs(
                self.run.table, rows[start : start + 1024], model.spec.modalities, self.run.world.device, hidden
            )
            logits: Logits = functional_call(model, state, inputs)
            for t, z in logits.items():
                found.setdefault(t, []).append(z.cpu().numpy())
        return {t: np.concatenate(z) for t, z in found.items()}
