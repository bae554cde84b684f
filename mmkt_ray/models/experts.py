"""A fused model with experts of one modality each, for rows that have nothing else.

What a fused model has learnt of one modality is at best what a model of that modality alone knows; where it is less, the
expert answers. So rows that lack all modalities but one are never worse off than without fusion.

Axes: B batch, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkt_ray.models.multimodal import MultimodalModel
from mmkt_ray.models.spec import InputSpec, ModelSpec
from mmkt_ray.models.towers import Features


@dataclass(frozen=True)
class ExpertSpec:
    """The fused model's spec and the experts'; towards others it looks like the spec of one model.

    routes: task -> the modalities whose expert answers rows that have that one of the task's modalities and no other.
    """

    fused: ModelSpec
    experts: Mapping[str, ModelSpec]
    routes: Mapping[str, tuple[str, ...]]

    @property
    def modalities(self) -> dict[str, InputSpec]:
        """What the fused model reads, and so all that the experts do."""
        return self.fused.modalities

    @property
    def tasks(self) -> dict[str, int]:
        """task -> C."""
        return self.fused.tasks

    @property
    def kinds(self) -> dict[str, str]:
        """task -> kind."""
        return self.fused.kinds

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """task -> modalities."""
        return self.fused.inputs

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "fused": self.fused.to_dict(),
            "experts": {m: spec.to_dict() for m, spec in self.experts.items()},
            "routes": {t: list(modalities) for t, modalities in self.routes.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ExpertSpec:
        """The inverse."""
        return cls(
            ModelSpec.from_dict(raw["fused"]),
            {m: ModelSpec.from_dict(spec) for m, spec in raw["experts"].items()},
            {t: tuple(modalities) for t, modalities in raw["routes"].items()},
        )


class ExpertModel(nn.Module):
    """Predicts as one model does; for prediction only."""

    def __init__(
        self,
        spec: ExpertSpec,
        fused: MultimodalModel | None = None,
        experts: Mapping[str, MultimodalModel] | None = None,
    ) -> None:
        """fused, experts: trained models of the spec's; None: new ones, to load weights into."""
        super().__init__()
        self.spec = spec
        self.fused = fused or MultimodalModel(spec.fused)
        self.experts = nn.ModuleDict(experts or {m: MultimodalModel(s) for m, s in spec.experts.items()})
        self.temperatures: dict[str, float] = {}  # task -> what divides its logits before they become probabilities

    def forward(self, features: dict[str, Features], present: dict[str, Tensor]) -> dict[str, Tensor]:
        """See MultimodalModel: logits (B, C) by task."""
        found = self.fused(features, present)
        for m, expert in self.experts.items():
            own = expert({m: features[m]}, {m: present[m]})
            for t, modalities in self.spec.routes.items():
                if m in modalities:
                    others = [present[o] for o in self.spec.inputs[t] if o != m]
                    alone = present[m] & ~torch.stack(others).any(dim=0)
                    found[t] = torch.where(alone[:, None], own[t], found[t])
        return found
