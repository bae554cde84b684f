"""What the optimiser trains: the model, its task weighting, and how a step's gradient is computed.

Axes: B rows of a batch, C classes of one task, H width of a signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmkt_ray.errors import ConfigError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.models import FeatureBatch, MultimodalModel
from mmkt_ray.models.sharing import module_name
from mmkt_ray.training.batches import Batch, Worker
from mmkt_ray.training.criterion import Criterion
from mmkt_ray.training.methods.task_weighting import TaskWeighting

Logits = dict[str, Tensor]  # task -> (B, C)


class Learner(nn.Module):
    """Base: the model and the weights of its tasks, without balance between modalities."""

    def __init__(self, model: MultimodalModel, criterion: Criterion, weighting: TaskWeighting, worker: Worker) -> None:
        super().__init__()
        self.model, self.weighting = model, weighting
        self.criterion, self.worker = criterion, worker

    def forward(self, features: dict[str, FeatureBatch], present: dict[str, Tensor]) -> Any:
        """What `gradients` needs for a batch: here the logits. See `MultimodalModel.forward`."""
        return self.model(features, present)

    def gradients(self, net: nn.Module, batch: Batch) -> Tensor:
        """Leave the step's gradient in every parameter, the same on all ranks; this rank's part of the loss ().

        net: this learner, under DistributedDataParallel where there are several ranks.
        """
        return self.backward(self.criterion.of_batch(net(batch.features, batch.present), batch), batch)

    def backward(self, losses: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Weigh the tasks' losses and backpropagate their sum (), which is returned."""
        loss = self.weigh(losses, batch)
        # DDP takes the mean over ranks, the step's loss is the sum of their parts
        (loss * self.worker.world_size).backward()
        return loss.detach()

    def weigh(self, losses: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The weighted sum () of the tasks' losses."""
        labelled = {t: y.known.any() for t, y in batch.step_labels.items()}
        return self.weighting(losses, labelled, self.model)

    def begin_epoch(self, seed: int) -> None:
        """seed: the epoch's, the same on all ranks."""

    def end_epoch(self, epoch: int, table: FeatureTable, train_rows: np.ndarray, val_rows: np.ndarray) -> None:
        """Update state after an epoch (from 1)."""


class UnimodalHeads(Learner):
    """Base of learners with a linear head on each modality's signal beside the fused model."""

    def __init__(self, model: MultimodalModel, criterion: Criterion, weighting: TaskWeighting, worker: Worker) -> None:
        super().__init__(model, criterion, weighting, worker)
        spec = model.spec
        if not spec.schemes:
            raise ConfigError(
                "training.balance needs towers to balance, and model.num_levels is 0: set it to 1 or more"
            )
        self.modalities = sorted(m for m in spec.modalities if model.read_by(m))
        self.heads = nn.ModuleDict()
        for t in sorted(spec.tasks):
            for m in sorted(spec.inputs[t]):
                self.heads[module_name(t, m)] = nn.Linear(spec.tower_dim(spec.schemes[-1], m), spec.tasks[t])

    def forward(
        self, features: dict[str, FeatureBatch], present: dict[str, Tensor]
    ) -> tuple[Logits, dict[str, Logits], dict[str, Tensor]]:
        """The fused logits, the unimodal heads' (modality -> task -> (B, C)), and the presence masks of `encode`."""
        signals, seen = self.model.encode(features, present)
        alone: dict[str, Logits] = {m: {} for m in self.modalities}
        for (t, m), signal in signals.items():
            alone[m][t] = self.heads[module_name(t, m)](signal)
        return self.model.decide(signals, seen), alone, seen


def own_parameters(model: MultimodalModel) -> dict[str, list[nn.Parameter]]:
    """Modality -> the trained parameters that only its signals use. Raises: ConfigError if one has none."""
    parameters = dict(model.named_parameters())
    names = {
        m: {n for stage in model.modality_parameters(m) for n in stage}
        for m in model.spec.modalities
        if model.read_by(m)
    }
    own = {}
    for m in sorted(names):
        shared = set().union(*(names[other] for other in names if other != m))
        own[m] = [parameters[n] for n in sorted(names[m] - shared) if n in parameters]
        if not own[m]:
            raise ConfigError(
                f"training.balance acts on the parameters of each modality alone, and '{m}' has none: share towers "
                "between tasks only (model.sharing: task), with model.num_levels of 1 or more"
            )
    return own
