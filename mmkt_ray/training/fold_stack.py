"""Models that each leave one part of the rows out, trained as one stack, and their predictions for that part.

Axes: N rows of a table, P members, B rows of a batch, C classes of one task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import model_inputs
from mmkt_ray.inference.rows import readable, subsets
from mmkt_ray.inference.training_record import Epoch
from mmkt_ray.models import MultimodalModel
from mmkt_ray.scoring.heldout import Folds, HeldOut, as_train, make_folds, pattern_name
from mmkt_ray.training.batches import narrow
from mmkt_ray.training.learner import Logits
from mmkt_ray.training.loop import FitResult, diverged, seed_of
from mmkt_ray.training.model_stack import MEMBER_KEYS, ModelStack
from mmkt_ray.training.optimizer import lr_factor
from mmkt_ray.training.setup import spec_of

WHOLE = -2  # the part of a member that leaves no row out
STACK_BYTES = 1.5e9  # weights, gradients and averages of the members that train at once
MAX_HIDDEN = 4  # modalities; with more, not every subset is predicted from, see `given_subsets`


def hold_out(
    config: Config,
    table: FeatureTable,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    known: HeldOut | None = None,
) -> HeldOut | None:
    """Out-of-fold predictions of models of this config, with nothing left to choose; None if no row can be held out.

    known: those of whole parts that are there already.
    """
    return _fit_parts(config, table, device, known, whole=False)[0]


def fit_and_hold_out(
    config: Config, table: FeatureTable, device: torch.device, known: HeldOut | None
) -> tuple[FitResult, HeldOut | None]:
    """`fit` on train and val, and `hold_out`, in one stack. Raises: as `fit`."""
    heldout, result = _fit_parts(config, table, device, known, whole=True)
    assert result is not None
    return result, heldout


def _fit_parts(
    config: Config, table: FeatureTable, device: torch.device, known: HeldOut | None, whole: bool
) -> tuple[HeldOut | None, FitResult | None]:
    """Train a model for each part that is not known yet. whole: also train one on all rows."""
    table = narrow(table, config.model_modalities, config.model_tasks)
    folds, learnt = make_folds(table, config.seed), as_train(table)
    every = [p for p in range(folds.num_held) if folds.held(p).any()]
    parts = every if known is None else [p for p in every if not (folds.fold[known.rows] == p).any()]
    own = {key: value_in(config, key) for key in (*MEMBER_KEYS, "training.steps")}
    logits = _no_logits(learnt, given_subsets(list(table.features)))
    result = None
    for (_, part), (stack, j) in trained(config, learnt, folds, [(own, p) for p in (*parts, *[WHOLE] * whole)], device):
        if part == WHOLE:
            result = stack.result(j)
        else:
            stack.predict_part(j, logits)
    if not every:
        return None, result
    if known is not None:
        for given, by_task in known.logits.items():
            for t, values in by_task.items():
                logits[given][t][known.rows] = values
    return held_out_rows(table, folds, every, logits), result


def held_out_rows(table: FeatureTable, folds: Folds, parts: Sequence[int], logits: Mapping[str, Any]) -> HeldOut | None:
    """The rows of these parts that can be read, out of logits of all rows."""
    rows = np.flatnonzero(np.isin(folds.fold, list(parts)) & readable(table, list(table.present)))
    if not len(rows):
        return None
    return HeldOut(folds.on, rows, {given: {t: z[rows] for t, z in by.items()} for given, by in logits.items()})


def _no_logits(table: FeatureTable, given: Sequence[tuple[str, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """Modalities given -> task -> zeros (N, C)."""
    widths = {t: table.width(t) for t in table.class_names}
    return {pattern_name(g): {t: np.zeros((len(table.split), k), np.float32) for t, k in widths.items()} for g in given}


def value_in(config: Config, key: str) -> Any:
    """A key's value in a config."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def given_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of modalities that held-out rows are predicted from: every set; with more than MAX_HIDDEN modalities,
    all together and each alone."""
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
) -> list[dict[str, dict[str, np.ndarray]]]:
    """For each candidate: modalities given -> task -> logits (N, C), rows outside the parts zero.

    config: settings that the candidates leave out, such as the batch size.
    table: members learn from its train split, each without its part.
    """
    found = [_no_logits(table, given_subsets(list(table.features))) for _ in candidates]
    members = [(i, part) for i in range(len(candidates)) for part in parts if folds.held(part).any()]
    for (i, _), (stack, j) in trained(config, table, folds, members, device, candidates):
        stack.predict_part(j, found[i])
    return found


def trained(
    config: Config,
    table: FeatureTable,
    folds: Folds,
    members: Sequence[tuple[Any, int]],
    device: torch.device,
    candidates: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[tuple[tuple[Any, int], tuple[FoldStack, int]]]:
    """Train members in stacks of at most STACK_BYTES; yields each member with its stack and its index there.

    members: settings (with `candidates`: the index of a candidate) and the part that is left out.
    """
    num_weights = sum(p.numel() for p in MultimodalModel(spec_of(config, table)).parameters())
    size = max(1, int(STACK_BYTES // (20 * num_weights)))
    for start in range(0, len(members), size):
        chunk = members[start : start + size]
        settings = [own if candidates is None else candidates[own] for own, _ in chunk]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            stack = FoldStack(config, table, folds, settings, [p for _, p in chunk], device)
            stack.train_all()
        yield from ((member, (stack, j)) for j, member in enumerate(chunk))


class FoldStack:
    """A stack whose members each leave one part of the rows out of their losses and have a number of steps of their
    own."""

    def __init__(
        self,
        config: Config,
        table: FeatureTable,
        folds: Folds,
        settings: Sequence[Mapping[str, Any]],
        parts: Sequence[int],
        device: torch.device,
    ) -> None:
        """table: members learn from its train split. settings, parts: of each member."""
        self.config = config
        self.stack = ModelStack.start(config, table, settings, device)
        num_steps = self.stack.run.batches.num_steps
        usual = config.training.steps or config.training.epochs * num_steps
        steps = [s.get("training.steps") or usual for s in settings]
        self.epochs = [max(1, math.ceil(num / num_steps)) for num in steps]  # rounded up, as in `fit`
        self.losses: list[list[float]] = [[] for _ in settings]  # of each member's epochs
        self.seconds: list[float] = []  # of each epoch, all members together
        self.fold, self.parts = torch.from_numpy(folds.fold).to(device), torch.tensor(list(parts), device=device)

    def train_all(self) -> None:
        """Train every member to its last epoch; members that are done leave the stack."""
        batches, done = self.stack.run.batches, torch.empty_like(self.stack.weights)
        num_steps, alive = batches.num_steps, list(range(len(self.epochs)))
        live = self.stack.select(alive)
        for epoch in range(1, max(self.epochs) + 1):
            started = time.perf_counter()
            torch.manual_seed(seed_of(self.config.training_seed, epoch, 0))
            total = torch.zeros(len(alive), device=done.device)
            for step, rows in enumerate(batches.order(epoch)[:, 0], start=(epoch - 1) * num_steps):
                total += self._step(live, alive, rows, step)
            for i, loss in zip(alive, total.tolist(), strict=True):
                self.losses[i].append(loss / num_steps)
            self.seconds.append(time.perf_counter() - started)
            ended = [j for j, i in enumerate(alive) if self.epochs[i] == epoch]
            if ended:
                done[[alive[j] for j in ended]] = live.weights[ended]
                keep = [j for j in range(len(alive)) if j not in ended]
                alive, live = [alive[j] for j in keep], live.select(keep)
        self.stack.weights = done

    def _step(self, live: ModelStack, members: Sequence[int], rows: np.ndarray, step: int) -> Tensor:
        """One step on these rows, each member without its part; the members' losses (P,). live: the stack of these
        members."""
        model, batch = live.run.model.train(), live.run.batches.read(rows)
        parameters, criterion = live.trainable(), live.criterion
        parts = self.parts[list(members)]
        seen = (self.fold[torch.from_numpy(rows).to(self.fold.device)] != parts[:, None]).float()  # (P, B)
        logits = live.forward(model, parameters, batch.features, batch.present)
        # what each member's sum is divided by, see `Criterion.total_weights`
        totals = {t: (weights * seen).sum(dim=1) for t, weights in criterion.row_weights(batch.labels).items()}
        losses = criterion.losses(logits, batch.labels, totals, seen)
        total = torch.stack(list(losses.values())).sum(dim=0)
        num_steps = live.run.batches.num_steps
        schedule = torch.tensor([lr_factor(step, self.epochs[i] * num_steps) for i in members], device=total.device)
        live.update(torch.autograd.grad(total.sum(), list(parameters.values())), step, schedule)
        return total.detach()

    @torch.no_grad()
    def predict(self, member: int, rows: np.ndarray, given: Sequence[str]) -> dict[str, np.ndarray]:
        """One member's logits of some rows, task -> (R, C), from these modalities alone."""
        run, found = self.stack.run, dict[str, list[np.ndarray]]()
        model = run.model.eval()
        state = {n: p[member] for n, p in self.stack.views(self.stack.weights).items()}
        hidden = set(model.spec.modalities) - set(given)
        for start in range(0, len(rows), 1024):
            inputs = model_inputs(
                run.table, rows[start : start + 1024], model.spec.modalities, run.worker.device, hidden
            )
            logits: Logits = functional_call(model, state, inputs)
            for t, z in logits.items():
                found.setdefault(t, []).append(z.cpu().numpy())
        return {t: np.concatenate(z) for t, z in found.items()}

    def predict_part(self, member: int, logits: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write a member's predictions for its part into `logits`: modalities given -> task -> (N, C)."""
        rows = np.flatnonzero((self.fold == self.parts[member]).cpu().numpy())
        for given, by_task in logits.items():
            for t, values in self.predict(member, rows, given.split("+")).items():
                by_task[t][rows] = values

    def result(self, member: int) -> FitResult:
        """One member as `fit` would return it. Raises: ConfigError if its loss is not finite."""
        losses = self.losses[member]
        if not np.isfinite(losses).all():
            raise diverged(self.config.training.lr, losses[-1], len(losses))
        weights = self.stack.weights
        model = self.stack.alone(self.config, weights, member).to(weights.device)
        epochs = [
            Epoch(epoch=i, train_loss=loss, val=None, seconds=s)
            for i, (loss, s) in enumerate(zip(losses, self.seconds, strict=False), start=1)
        ]
        return FitResult(model, epochs, len(epochs), None, sum(self.seconds))
