"""The assembled model: input stages, levels of towers, fusion, one head per task.

Axes: B batch, D features of one modality, C classes of one task.

Every row goes through every tower, absent ones masked afterwards, so shapes and graph never depend on the data: every
parameter gets a gradient in every step, as DistributedDataParallel and compilers like it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from mmkt_ray.config import Config
from mmkt_ray.models.fusion import FUSIONS
from mmkt_ray.models.sharing import SCHEMES, Pair, module_name, own_widths, shares_tasks
from mmkt_ray.models.towers import Features, InputStage, Level, Path, Width


@dataclass(frozen=True)
class InputSpec:
    """One modality as the model sees it."""

    dim: int  # D
    sparse: bool
    hidden_dim: int  # width of its towers where each modality has its own (sharing: separate)


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a MultimodalModel; plain values, so that it can be kept as JSON."""

    modalities: dict[str, InputSpec]
    tasks: dict[str, int]  # task -> C
    fusion: str
    depth: int
    schemes: tuple[str, ...]  # one per tower level, bottom to top
    hidden_dim: int
    dropout: float
    feature_dropout: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "schemes": list(self.schemes)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_dict` was called on. Raises: TypeError, KeyError if `raw` is none."""
        inputs = {m: InputSpec(**i) for m, i in raw["modalities"].items()}
        return cls(**{**raw, "modalities": inputs, "schemes": tuple(raw["schemes"])})


def build_spec(
    config: Config, dims: Mapping[str, int], sparse: Mapping[str, bool], num_classes: Mapping[str, int]
) -> ModelSpec:
    """The model that `config` describes over features of these widths (by modality) and these tasks' class counts."""
    model = config.model
    inputs = {
        m: InputSpec(dims[m], sparse[m], config.modalities[m].hidden_dim or min(model.hidden_dim, dims[m]))
        for m in config.model_modalities
    }
    return ModelSpec(
        modalities=inputs,
        tasks={t: num_classes[t] for t in config.model_tasks},
        fusion=model.fusion.name,
        depth=model.fusion.depth,
        schemes=model.schemes,
        hidden_dim=model.hidden_dim,
        dropout=model.dropout,
        feature_dropout=model.feature_dropout,
    )


class MultimodalModel(nn.Module):
    """Features of several modalities, any of them absent in any row -> logits of several tasks.

    Fusion parameters follow the top level's scheme: one fusion for all tasks where it shares towers over tasks, else
    one per task. Heads are per task always.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        modalities, tasks = sorted(spec.modalities), sorted(spec.tasks)
        self.inputs = nn.ModuleDict()
        self.paths: dict[Pair, Path] = {(t, m): (m,) for t in tasks for m in modalities}
        widths: dict[Path, Width] = {}
        for m in modalities:
            widths[m,] = Width(spec.modalities[m].dim, spec.modalities[m].sparse)
            self.inputs[module_name(m)] = InputStage(widths[m,], spec.feature_dropout)
        self.levels = nn.ModuleList()
        for scheme in spec.schemes:
            out_dims = {m: i.hidden_dim if own_widths(scheme) else spec.hidden_dim for m, i in spec.modalities.items()}
            level = Level(scheme, self.paths, widths, out_dims, spec.hidden_dim, spec.dropout)
            self.levels.append(level)
            self.paths, widths = level.paths, level.widths
        self.fusions, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for t in tasks:
            name = self._fusion_name(t)
            if name not in self.fusions:
                reads = {m: widths[self.paths[t, m]] for m in modalities}
                self.fusions[name] = FUSIONS[spec.fusion](reads, spec.hidden_dim, spec.depth, spec.dropout)
            fusion = self.fusions[name]
            self.heads[module_name(t)] = fusion.head(fusion.widths, spec.tasks[t])

    def _fusion_name(self, task: str) -> str:
        shared = bool(self.spec.schemes) and shares_tasks(self.spec.schemes[-1])
        return module_name() if shared else module_name(task)

    def forward(self, features: dict[str, Features], present: dict[str, Tensor]) -> dict[str, Tensor]:
        """features: modality -> (B, D_m) tensor or SparseBatch; present: modality -> (B,) bool.

        Returns task -> logits (B, C). What an absent modality's features hold has no influence.
        """
        modalities = sorted(self.spec.modalities)
        signals: dict[Path, Features] = {(m,): self.inputs[module_name(m)](features[m], present[m]) for m in modalities}
        for level in self.levels:
            signals = level(signals)
        present = {m: present[m] for m in modalities}
        fused: dict[Any, Any] = {}  # tasks that share the fusion and all it reads share the work too
        logits = {}
        for t in sorted(self.spec.tasks):
            name, reads = self._fusion_name(t), {m: self.paths[t, m] for m in modalities}
            work = (name, *reads.values())
            if work not in fused:
                fused[work] = self.fusions[name]({m: signals[path] for m, path in reads.items()}, present)
            logits[t] = self.heads[module_name(t)](*fused[work])
        return logits

    def tower(self, level: int, task: str, modality: str) -> nn.Module:
        """The tower that the pair owns at a level (0 is the lowest); the same object for pairs that share it."""
        return self.levels[level].towers[module_name(*SCHEMES[self.spec.schemes[level]](task, modality))]

    def num_parameters_by_part(self) -> dict[str, int]:
        """Trained numbers in `input` (adapters to shared towers), `level_1`, `level_2`, .., `fusion`, `heads`."""
        parts: dict[str, list[nn.Module]] = {"input": [level.adapters for level in self.levels]}
        parts |= {f"level_{i}": [level.towers] for i, level in enumerate(self.levels, start=1)}
        parts |= {"fusion": [self.fusions], "heads": [self.heads]}
        return {part: sum(p.numel() for m in modules for p in m.parameters()) for part, modules in parts.items()}
