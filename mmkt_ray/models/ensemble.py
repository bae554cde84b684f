"""Several models as one: the weighted mean of their probabilities, each counted where it can read the row.

Axes: B batch, E members, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models.containers import ModuleList
from mmkt_ray.models.multimodal import MultimodalModel
from mmkt_ray.models.spec import InputSpec, ModelSpec
from mmkt_ray.models.towers import FeatureBatch


@dataclass(frozen=True)
class EnsembleSpec:
    """The members and how often each was picked; towards others it looks like the spec of one model."""

    members: tuple[ModelSpec, ...]
    picks: tuple[int, ...]

    @property
    def modalities(self) -> dict[str, InputSpec]:
        """What some member reads."""
        return {m: i for spec in self.members for m, i in spec.modalities.items()}

    @property
    def tasks(self) -> dict[str, int]:
        """task -> C, the same for all members."""
        return self.members[0].tasks

    @property
    def kinds(self) -> dict[str, TaskKind]:
        """task -> kind, the same for all members."""
        return self.members[0].kinds

    @property
    def inputs(self) -> dict[str, list[str]]:
        """task -> the modalities that some member reads for it."""
        return {t: sorted({m for spec in self.members for m in spec.inputs[t]}) for t in self.tasks}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"members": [spec.to_dict() for spec in self.members], "picks": list(self.picks)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EnsembleSpec:
        """The inverse."""
        return cls(tuple(map(ModelSpec.from_dict, raw["members"])), tuple(raw["picks"]))


class EnsembleModel(nn.Module):
    """Predicts as one model does; for prediction only."""

    def __init__(self, spec: EnsembleSpec, members: Sequence[MultimodalModel] | None = None) -> None:
        """members: trained models of the spec's members; null: new ones, to load weights into."""
        super().__init__()
        self.spec = spec
        self.members: ModuleList[MultimodalModel] = ModuleList(members or [MultimodalModel(s) for s in spec.members])
        self.temperatures: dict[str, float] = {}  # task -> what divides its logits before they become probabilities
        self.margins: dict[str, dict[str, float]] = {}  # task of numbers -> see inference/conformal.py

    def forward(self, features: Mapping[str, FeatureBatch], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See MultimodalModel. Logits whose probabilities are the mean of the members'."""
        logits = [member(features, present) for member in self.members]
        found = {}
        for t, kind in self.spec.kinds.items():
            reads = torch.stack([_readable(s.inputs[t], present) for s in self.spec.members])  # (E, B)
            reads = reads | ~reads.any(dim=0)  # a row that nobody can read has the prediction that all make of nothing
            weight = reads * reads.new_tensor(self.spec.picks, dtype=torch.float32)[:, None]
            proba = torch.stack([kind.outputs(each[t]) for each in logits])  # (E, B, C)
            mean = (proba * (weight / weight.sum(dim=0))[:, :, None]).sum(dim=0)
            found[t] = kind.logits(mean)
        return found

    if TYPE_CHECKING:
        __call__ = forward


def _readable(modalities: Sequence[str], present: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([present[m] for m in modalities]).any(dim=0)
