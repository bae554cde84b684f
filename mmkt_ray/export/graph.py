"""The whole of a model as one graph: encoders, reducers, the fused model with its experts, temperatures,
probabilities.

Axes: B rows, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, load_fitted, load_reducer
from mmkt_ray.export.inputs import INPUTS, ROWS, GraphInput, GraphInputs, graph_inputs, reduction
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models import Predictor, SparseBatch
from mmkt_ray.models.containers import ModuleList


class ExportGraph(nn.Module):
    """Inputs by name -> `<task>_proba` (B, C), or of a task of numbers `<task>_pred` (B, 1); NaN in rows that lack
    all that the task reads, as predictions are null there.

    There is no branch that depends on the data: all experts answer all rows, and masks select.
    """

    def __init__(
        self, model: Predictor, inputs: Mapping[str, GraphInputs], reducers: Mapping[str, Any], half: bool = False
    ) -> None:
        """inputs: by modality; reducers: fitted ones, of the modalities that have one;
        half: features are kept in float16."""
        super().__init__()
        self.model, self.stored_half = model.eval(), half
        self.modalities = sorted(model.spec.modalities)
        self.parts: ModuleList[GraphInputs] = ModuleList(inputs[m] for m in self.modalities)
        self.reducers = nn.ModuleList(
            reduction(reducers[m]) if m in reducers else nn.Identity() for m in self.modalities
        )
        self.tasks = sorted(model.spec.tasks)

    @property
    def inputs(self) -> list[GraphInput]:
        """All tensors that the graph takes, in their order."""
        found: list[GraphInput] = []
        for m, part in zip(self.modalities, self.parts, strict=True):
            found += part.inputs
            found.append(
                GraphInput(f"{m}_present", "bool", (ROWS,), f"whether the row has {m}; where not, the rest is ignored")
            )
        return found

    @property
    def outputs(self) -> list[str]:
        """Names of all that the graph gives, in their order."""
        return [output_name(t, self.model.spec.kinds[t]) for t in self.tasks]

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        present = {m: tensors[f"{m}_present"] for m in self.modalities}
        features = {}
        for m, part, reducer in zip(self.modalities, self.parts, self.reducers, strict=True):
            features[m] = self._kept(reducer(self._kept(part(tensors, present[m]))))
        logits = self.model(features, present)
        return {
            name: self._predictions(t, logits[t], present) for name, t in zip(self.outputs, self.tasks, strict=True)
        }

    def _kept(self, x: Any) -> Any:
        """Features as a store of float16 would give them back."""
        return x if isinstance(x, SparseBatch) or not self.stored_half else x.half().float()

    def _predictions(self, task: str, logits: Tensor, present: Mapping[str, Tensor]) -> Tensor:
        found = self.model.spec.kinds[task].outputs(logits / self.model.temperatures.get(task, 1.0))
        readable = torch.stack([present[m] for m in self.model.spec.inputs[task]]).any(dim=0)
        return torch.where(readable[:, None], found, torch.nan)


def output_name(task: str, kind: TaskKind) -> str:
    """What holds a task's predictions, named as the column of predictions.parquet."""
    return f"{task}_proba" if kind.classes else f"{task}_pred"


def build_graph(model: Predictor, config: Config, folders: Mapping[str, list[str]]) -> ExportGraph:
    """The graph of a model; folders: of each modality's encoder and, where it has one, its reducer."""
    inputs, reducers = {}, {}
    for m in sorted(model.spec.modalities):
        section = config.modalities[m].encoder
        if section.name in INPUTS and getattr(section, "precision", "fp32") != "fp32":
            section = section.model_copy(update={"precision": "fp32"})
        inputs[m] = graph_inputs(m, section.name, load_fitted(build_encoder(section), folders[m][0]))
        if len(folders[m]) > 1:
            reducers[m] = load_reducer(folders[m][1])
    return ExportGraph(model, inputs, reducers, config.extract.feature_dtype == "float16")
