"""How the tasks' losses become one: their sum, weighted by learned uncertainties, or for an equal pace of all.

Axes: T tasks, in sorted order.

With several ranks the losses are this rank's parts of the step's losses, which sum to them (see `Criterion.losses`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.batches import Worker


class TaskWeighting(nn.Module):
    """Base, and `sum`: every task counts alike."""

    def __init__(self, num_classes: Mapping[str, int], kinds: Mapping[str, TaskKind], worker: Worker) -> None:
        """num_classes: task -> K; kinds: of the tasks."""
        super().__init__()
        self.tasks, self.worker = sorted(num_classes), worker

    def factors(self) -> Tensor:
        """(T,) what each task's loss is multiplied by."""
        return torch.ones(len(self.tasks), device=self.worker.device)

    def forward(self, losses: Mapping[str, Tensor], labelled: Mapping[str, Tensor], model: MultimodalModel) -> Tensor:
        """The loss () to minimise. labelled: task -> () bool, the step has labels of it, on whatever rank."""
        return torch.stack([losses[t] for t in self.tasks]) @ self.factors()

    if TYPE_CHECKING:
        __call__ = forward


class Uncertainty(TaskWeighting):
    """Sum over tasks of exp(-s) loss + s / 2, s = log sigma^2 learned along with the model, 0 to begin with.

    A task counts the less, the less certain the model is of it; s / 2 keeps s from growing without end. A task
    without labels in the step leaves its s alone. Source: Kendall et al.
    2018 (https://arxiv.org/abs/1705.07115), for classification.
    """

    def __init__(self, num_classes: Mapping[str, int], kinds: Mapping[str, TaskKind], worker: Worker) -> None:
        super().__init__(num_classes, kinds, worker)
        self.log_variances = nn.Parameter(torch.zeros(len(self.tasks)))

    def factors(self) -> Tensor:
        """See TaskWeighting."""
        return torch.exp(-self.log_variances)

    def forward(self, losses: Mapping[str, Tensor], labelled: Mapping[str, Tensor], model: MultimodalModel) -> Tensor:
        """See TaskWeighting."""
        there = torch.stack([labelled[t] for t in self.tasks])
        # of all ranks together
        penalty = torch.where(there, self.log_variances / 2, 0.0).sum() / self.worker.world_size
        return super().forward(losses, labelled, model) + penalty


class GradNorm(TaskWeighting):
    """Weights that make the gradients of the tasks' losses on the topmost shared parameters equally large, but larger
    for tasks that lag behind: towards n_t w_t = mean(n w) r_t^alpha, where n_t is the gradient's norm and r_t the
    task's loss over its loss at chance level, relative to the mean of that over tasks.

    Each step moves w down the gradient of sum |n_t w_t - target_t|, the n scaled to a mean of 1, then scales w to a
    mean of 1. A task without labels in the step is left out of it. Source: Chen et al. 2018
    (https://arxiv.org/abs/1711.02257).
    """

    ALPHA, RATE, SMALLEST = 1.5, 0.025, 0.01
    chance_losses: Tensor
    weights: Tensor

    def __init__(self, num_classes: Mapping[str, int], kinds: Mapping[str, TaskKind], worker: Worker) -> None:
        super().__init__(num_classes, kinds, worker)
        if len(self.tasks) < 2:
            raise ConfigError(
                "training.task_weighting: gradnorm balances several tasks, and the model has one: use sum"
            )
        chance = [kinds[t].chance_loss(num_classes[t]) for t in self.tasks]
        self.register_buffer("chance_losses", torch.tensor(chance), persistent=False)
        self.register_buffer("weights", torch.ones(len(self.tasks)))
        self.shared: list[nn.Parameter] = []  # found in the first step

    def factors(self) -> Tensor:
        """See TaskWeighting."""
        return self.weights.clone()  # the loss keeps these while the weights move on

    def forward(self, losses: Mapping[str, Tensor], labelled: Mapping[str, Tensor], model: MultimodalModel) -> Tensor:
        """See TaskWeighting."""
        loss = super().forward(losses, labelled, model)
        self.shared = self.shared or shared_parameters(model, losses)
        norms = self._norms(losses)
        values = torch.stack([losses[t].detach() for t in self.tasks])
        if self.worker.world_size > 1:
            dist.all_reduce(values)
        there = torch.stack([labelled[t] for t in self.tasks])
        moved = move_weights(self.weights, norms, values / self.chance_losses, there, self.ALPHA, self.RATE)
        self.weights.copy_(moved.clamp(min=self.SMALLEST))
        return loss

    def _norms(self, losses: Mapping[str, Tensor]) -> Tensor:
        """(T,) norms of the gradients of the whole step's losses."""
        norms = []
        for t in self.tasks:
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses[t], self.shared, retain_graph=True)])
            if self.worker.world_size > 1:
                dist.all_reduce(gradient)
            norms.append(gradient.norm())
        return torch.stack(norms)


def move_weights(weights: Tensor, norms: Tensor, progress: Tensor, there: Tensor, alpha: float, rate: float) -> Tensor:
    """One step of GradNorm's weights. weights, norms, progress (loss / loss at the start): (T,); there: (T,) bool."""

    def mean(x: Tensor) -> Tensor:
        return torch.where(there, x, 0.0).sum() / there.sum().clamp(min=1)

    norms = norms / mean(norms).clamp(min=1e-12)
    pace = (progress / mean(progress).clamp(min=1e-12)).pow(alpha)
    gap = weights * norms - mean(weights * norms) * pace
    moved = torch.where(there, weights - rate * gap.sign() * norms, weights).clamp(min=0)
    return moved * len(moved) / moved.sum()


def shared_parameters(model: MultimodalModel, losses: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """The weight matrices of the topmost part of the model that every task's loss depends on.

    Raises: ConfigError if the tasks share no parameters.
    """
    for part in reversed(model.parts()):
        matrices = [p for p in part.parameters() if p.requires_grad and p.ndim >= 2]
        reached = [
            torch.autograd.grad(losses[t], matrices, retain_graph=True, allow_unused=True) if matrices else ()
            for t in sorted(losses)
        ]
        gradients = zip(*reached, strict=True)  # of each matrix, by task
        shared = [p for p, gs in zip(matrices, gradients, strict=True) if all(g is not None for g in gs)]
        if shared:
            return shared
    raise ConfigError(
        "training.task_weighting: gradnorm compares the tasks' gradients on parameters that they share, and these "
        f"tasks share none (model.sharing {', '.join(model.spec.schemes) or 'without towers'}): share towers, or use "
        "uncertainty"
    )


TASK_WEIGHTINGS: dict[str, type[TaskWeighting]] = {
    "sum": TaskWeighting,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
}
