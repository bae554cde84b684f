"""A fused model with experts of fewer modalities, each of which answers the rows where it was clearly better.

Which rows these are is said by their presence pattern, the modalities that they have.
See `training.experts` for the choice.

Axes: B batch, C classes of one task, M modalities of one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models.containers import ModuleDict
from mmkt_ray.models.multimodal import MultimodalModel
from mmkt_ray.models.sharing import module_name
from mmkt_ray.models.spec import InputSpec, ModelSpec
from mmkt_ray.models.towers import FeatureBatch


@dataclass(frozen=True)
class ExpertSpec:
    """The fused model's spec and the experts'; towards others it looks like the spec of one model.

    Experts are named by what they read, e.g. "image" or "audio+image". routes: task -> {what a row has of the task's
    modalities, e.g. "audio+image": the expert that answers it}; all other rows are the fused model's.
    """

    fused: ModelSpec
    experts: Mapping[str, ModelSpec]
    routes: Mapping[str, Mapping[str, str]]

    @property
    def modalities(self) -> dict[str, InputSpec]:
        """What the fused model reads, and so all that the experts do."""
        return self.fused.modalities

    @property
    def tasks(self) -> dict[str, int]:
        """task -> C."""
        return self.fused.tasks

    @property
    def kinds(self) -> dict[str, TaskKind]:
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
            "routes": {t: dict(by_pattern) for t, by_pattern in self.routes.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ExpertSpec:
        """The inverse. Raises: TypeError, KeyError, ValueError if `raw` is none."""
        return cls(
            ModelSpec.from_dict(raw["fused"]),
            {m: ModelSpec.from_dict(spec) for m, spec in raw["experts"].items()},
            {t: dict(by_pattern) for t, by_pattern in raw["routes"].items()},
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
        experts = experts or {name: MultimodalModel(own) for name, own in spec.experts.items()}
        self.experts: ModuleDict[MultimodalModel] = ModuleDict(
            {module_name(n): expert for n, expert in experts.items()}
        )
        self.tables = {t: route_table(spec, t) for t in spec.routes}
        self.temperatures: dict[str, float] = {}  # task -> what divides its logits before they become probabilities
        self.margins: dict[str, dict[str, float]] = {}  # task of numbers -> see inference/conformal.py

    def forward(self, features: Mapping[str, FeatureBatch], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See MultimodalModel: logits (B, C) by task."""
        found = self.fused(features, present)
        answering = {t: self._answering(t, present) for t in self.tables}
        for i, (name, spec) in enumerate(self.spec.experts.items()):
            rows = {t: who == i for t, who in answering.items() if i in self.tables[t]}
            # most batches have complete rows only; an exported graph has no branches
            if torch.compiler.is_exporting() or any(mask.any() for mask in rows.values()):
                reads = spec.modalities
                own = self.experts[module_name(name)]({m: features[m] for m in reads}, {m: present[m] for m in reads})
                found |= {t: torch.where(mask[:, None], own[t], found[t]) for t, mask in rows.items()}
        return found

    if TYPE_CHECKING:
        __call__ = forward

    def _answering(self, task: str, present: Mapping[str, Tensor]) -> Tensor:
        """(B,) the number of the expert that answers each row, -1: the fused model."""
        inputs = self.spec.inputs[task]
        table = torch.tensor(self.tables[task], device=present[inputs[0]].device)
        return table[sum(present[m].long() * 2**i for i, m in enumerate(inputs))]


def route_table(spec: ExpertSpec, task: str) -> list[int]:
    """(2^M,) the number of the expert that answers rows with the modalities whose bit is set in the index;
    -1: none does."""
    inputs, experts = spec.inputs[task], list(spec.experts)
    names = ["+".join(m for i, m in enumerate(inputs) if code >> i & 1) for code in range(2 ** len(inputs))]
    return [experts.index(spec.routes[task][name]) if name in spec.routes[task] else -1 for name in names]
