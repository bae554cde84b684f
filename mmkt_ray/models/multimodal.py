"""The assembled model: input stages, levels of towers, fusion, one head per task.

Built and trained by training/loop.py; its towers are in towers.py and levels.py, the fusions in fusion.py.

Axes: B batch, D features of one modality, H width of a signal, C classes of one task.

Every row goes through every tower, absent ones masked afterwards, so shapes and graph never depend on the data: every
parameter gets a gradient in every step, as DistributedDataParallel and compilers like it, and models of one spec can
be stacked: called by `torch.func.functional_call` with parameters that have an axis P in front, the model returns the
logits of P members (`layers.py`; sparse features can't be stacked).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkt_ray.models.containers import ModuleDict, ModuleList
from mmkt_ray.models.dropout import Dropout
from mmkt_ray.models.fuses import Masks, Parts
from mmkt_ray.models.fusion import FUSIONS, Fusion, Head
from mmkt_ray.models.imputation import FILLS, Generators, fill_presence, hide_modalities
from mmkt_ray.models.levels import LEVELS, AnyLevel, Path
from mmkt_ray.models.sharing import Pair, module_name, shares_tasks
from mmkt_ray.models.spec import ModelSpec, generator_sources
from mmkt_ray.models.towers import FeatureBatch, InputStage, Width

Signals = Mapping[Pair, FeatureBatch]  # (task, modality) -> (B, H)


class MultimodalModel(nn.Module):
    """Features of several modalities, any of them absent in any row -> logits of several tasks.

    Fusions follow the top level's scheme. Where it gives tasks the same signals, those that read the same modalities
    share a fusion; else each task has its own. Each task has its own head.
    """

    modality_dropout: Tensor
    scales: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        modalities, tasks = sorted(spec.modalities), sorted(spec.tasks)
        self.reads = {t: tuple(sorted(spec.inputs[t])) for t in tasks}  # task -> modalities
        self.register_buffer("modality_dropout", torch.tensor(spec.modality_dropout), persistent=False)
        self.inputs: ModuleDict[InputStage] = ModuleDict()
        self.paths: dict[Pair, Path] = {(t, m): (m,) for t in tasks for m in self.reads[t]}
        raw: dict[str, Width] = {}
        widths: dict[Path, Width] = {}
        for m in modalities:
            raw[m] = Width(spec.modalities[m].dim, spec.modalities[m].sparse)
            stage = InputStage(raw[m], spec.missing if self.read_by(m) else "mask", spec.feature_dropout)
            self.inputs[module_name(m)], widths[m,] = stage, stage.width
        self.levels: ModuleList[AnyLevel] = ModuleList()
        for scheme in spec.schemes:
            level = LEVELS[scheme](scheme, self.paths, widths, spec)
            self.levels.append(level)
            self.paths, widths = level.paths, level.widths
        self.fusions: ModuleDict[Fusion] = ModuleDict()
        self.heads: ModuleDict[Head] = ModuleDict()
        for t in tasks:
            name = self._fusion_name(t)
            if name not in self.fusions:
                reads = {m: widths[self.paths[t, m]] for m in self.reads[t]}
                fusion = FUSIONS[spec.fusion["name"]](reads, spec.hidden_dim, spec.dropout, spec.fusion)
                self.fusions[name] = fusion
            self.heads[module_name(t)] = self.fusions[name].build_head(spec.tasks[t], spec.kinds[t])
        self.generators = Generators(raw, generator_sources(spec))
        self.wide: MultimodalModel | None = None
        if spec.wide is not None:
            self.add_wide(MultimodalModel(spec.wide), dict.fromkeys(tasks, (1.0, 1.0)))
        self.temperatures: dict[str, float] = {}  # task -> what divides its logits before they become probabilities
        self.margins: dict[str, dict[str, float]] = {}  # task of numbers -> see inference/conformal.py

    def add_wide(self, linear: MultimodalModel, scales: Mapping[str, tuple[float, float]]) -> None:
        """Add a linear model of the same tasks and modalities, for prediction only. scales: task -> what the
        network's logits and the linear model's are multiplied by."""
        self.spec = replace(self.spec, wide=linear.spec)
        device = self.modality_dropout.device
        self.wide = linear.to(device)
        self.register_buffer("scales", torch.tensor([scales[t] for t in self.reads], device=device))  # (T, 2)

    def input_stage(self, modality: str) -> InputStage:
        """What brings a modality's features to unit scale."""
        return self.inputs[module_name(modality)]

    def head(self, task: str) -> Head:
        """What predicts a task."""
        return self.heads[module_name(task)]

    def read_by(self, modality: str) -> list[str]:
        """The tasks that read a modality."""
        return [t for t, modalities in self.reads.items() if modality in modalities]

    def _fusion_name(self, task: str) -> str:
        """Name of a task's fusion; tasks with the same name share it."""
        shared = bool(self.spec.schemes) and shares_tasks(self.spec.schemes[-1])
        return module_name(*self.reads[task]) if shared else module_name(task)

    def fit_generators(self, features: Mapping[str, Any], present: Mapping[str, np.ndarray]) -> None:
        """Prepare `missing: generate`, before training and after `set_statistics`;
        nothing to do for other strategies.

        Args:
            features: modality -> raw features of the train rows (N, D), a NumPy array or a SciPy CSR matrix.
            present: modality -> (N,) bool.

        Raises: DataError if there are no rows to learn from.
        """
        needed = {m for target, sources in self.generators.sources.items() for m in (target, *sources)}
        scaled = {}
        for m in sorted(needed):
            mean, std = (x.cpu().numpy() for x in (self.input_stage(m).mean, self.input_stage(m).std))
            scaled[m] = features[m] / std if self.spec.modalities[m].sparse else (features[m] - mean) / std
        self.generators.fit(scaled, present)

    def forward(self, features: Mapping[str, FeatureBatch], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """features: modality -> (B, D_m) tensor or SparseBatch; present: modality -> (B,) bool.

        Returns task -> logits (B, C), of a stack (P, B, C). What an absent modality's features hold has no influence.
        """
        logits = self.decide(*self.encode(features, present))
        if self.wide is None:
            return logits
        linear, scales = self.wide(features, present), dict(zip(self.reads, self.scales, strict=True))
        return {t: scales[t][0] * z + scales[t][1] * linear[t] for t, z in logits.items()}

    if TYPE_CHECKING:
        __call__ = forward

    def encode(
        self, features: Mapping[str, FeatureBatch], present: Mapping[str, Tensor]
    ) -> tuple[Signals, dict[str, Tensor]]:
        """What the towers hand to the fusion, and which modalities count as present there: modality -> (B,) bool.

        Missing modalities are treated as the strategy says, and in training some are hidden. Pairs that share all
        towers have the same signal, the same object. Without levels, signals are the input stage's, dense or sparse.
        """
        present = {m: present[m] for m in sorted(self.spec.modalities)}
        if self.training:
            present = hide_modalities(present, self.modality_dropout, self.reads.values())
        scaled = {m: self.input_stage(m).standardize(features[m], present[m]) for m in present}
        generated = self.generators(scaled, present)
        signals: Mapping[Path, FeatureBatch] = {
            (m,): self.input_stage(m)(scaled[m], present[m], generated.get(m)) for m in present
        }
        for level in self.levels:
            signals = level(signals)
        filled = fill_presence(present) if self.spec.missing in FILLS else present
        return {pair: signals[path] for pair, path in self.paths.items()}, filled

    def decide(self, signals: Signals, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Task -> logits (B, C), of what `encode` returned or of a changed copy."""
        # tasks that share the fusion and all it reads share the work too
        fused: dict[Hashable, tuple[Parts, Masks]] = {}
        logits = {}
        for t, modalities in self.reads.items():
            name, reads = self._fusion_name(t), {m: signals[t, m] for m in modalities}
            work = (name, *map(id, reads.values()))
            if work not in fused:
                fused[work] = self.fusions[name](reads, {m: present[m] for m in modalities})
            logits[t] = self.head(t)(*fused[work])
        return logits

    def tower(self, level: int, task: str, modality: str) -> nn.Module:
        """The tower of a pair at a level (0 is the lowest). Pairs that share it get the same object."""
        return self.levels[level].tower((task, modality))

    def modality_parameters(self, modality: str) -> list[list[str]]:
        """Names in `state_dict` of what a modality's signal passes through: its input stage, level 1, .., level L.

        What it shares with other modalities is included. Fusions, heads and generators belong to no single modality.
        """
        prefixes = [[f"inputs.{module_name(modality)}."]]
        for i, level in enumerate(self.levels):
            prefixes.append([f"levels.{i}.{name}." for name in level.modules_of(modality)])
        names = list(self.state_dict())
        return [[name for name in names if name.startswith(tuple(stage))] for stage in prefixes]

    def parts(self) -> list[nn.Module]:
        """All that is trained, from bottom to top: input stages, levels, fusions, heads."""
        return [self.inputs, *self.levels, self.fusions, self.heads]

    def dropout_rates(self) -> dict[str, str]:
        """The buffers that hold dropout rates: name -> the field of the spec that it comes from."""
        of_features = set(self.inputs.modules())
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, Dropout)}
        found = {f"{n}.rate": "feature_dropout" if d in of_features else "dropout" for n, d in layers.items()}
        return {"modality_dropout": "modality_dropout", **found}

    def num_parameters_by_part(self) -> dict[str, int]:
        """Number of trained parameters in `input` (tokens, adapters to shared towers), `level_1`, `level_2`, ..,
        `fusion`, `heads`, and `wide`, if there is a linear model beside the network."""
        adapters = sum(count_parameters(level.adapters) for level in self.levels)
        parts = {"input": count_parameters(self.inputs) + adapters}
        for i, level in enumerate(self.levels, start=1):
            parts[f"level_{i}"] = count_parameters(level) - count_parameters(level.adapters)
        parts |= {"fusion": count_parameters(self.fusions), "heads": count_parameters(self.heads)}
        return parts | ({"wide": count_parameters(self.wide)} if self.wide else {})


def count_parameters(module: nn.Module) -> int:
    """Number of trained parameters of a module."""
    return sum(p.numel() for p in module.parameters())
