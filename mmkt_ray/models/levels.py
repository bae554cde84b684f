"""Levels of towers: hard sharing by key functions, cross-stitch units, mixtures of experts; all with one interface.

A level is built from its scheme, the signals that come in (`paths`, `widths`) and the model's spec, and says in
`paths` and `widths` which it hands on. Levels of all kinds stack in any order.
The level of a scheme is an entry of `LEVELS`.

Axes: B batch, D width of a signal that comes in, H hidden width, T tasks that read a modality, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from mmkt_ray.models.containers import ModuleDict, ModuleList
from mmkt_ray.models.layers import Linear
from mmkt_ray.models.sharing import SCHEMES, Pair, module_name
from mmkt_ray.models.sparse import SparseLinear
from mmkt_ray.models.spec import ModelSpec
from mmkt_ray.models.towers import FeatureBatch, Tower, Width, make_linear

Path = tuple[object, ...]  # (modality, key at level 1, key at level 2, ..): pairs with equal paths carry equal signals


class Level(nn.Module):
    """All towers of one hard scheme: one per key, each applied once to every distinct signal that reaches it.

    Where the signals that meet in one tower differ in width or kind, each modality gets a linear adapter to
    `hidden_dim` in front of that tower. It is shared by exactly the tasks that share the tower,
    so it leaks nothing between others.
    """

    def __init__(self, scheme: str, paths: dict[Pair, Path], widths: dict[Path, Width], spec: ModelSpec) -> None:
        """paths, widths: the signals that come in."""
        super().__init__()
        self.keys = {pair: SCHEMES[scheme](*pair) for pair in sorted(paths)}
        self.paths: dict[Pair, Path] = {pair: (*paths[pair], key) for pair, key in self.keys.items()}
        self.widths: dict[Path, Width] = {}
        self.steps: list[tuple[Path, str, str, Path]] = []  # signal in, adapter ("" for none), tower, signal out
        self.adapters: ModuleDict[Linear | SparseLinear] = ModuleDict()
        self.towers: ModuleDict[Tower] = ModuleDict()
        for key in sorted(set(self.keys.values())):
            sources = {self.paths[pair]: paths[pair] for pair in self.keys if self.keys[pair] == key}  # out -> in
            width = common_width({widths[source] for source in sources.values()})
            modality = next(pair[1] for pair in self.keys if self.keys[pair] == key)
            tower, out_dim = module_name(*key), spec.tower_dim(scheme, modality)
            self.towers[tower] = Tower(width or Width(spec.hidden_dim), out_dim, spec.dropout)
            for target, source in sources.items():
                adapter = "" if width else module_name(*key, str(source[0]))
                if adapter and adapter not in self.adapters:
                    self.adapters[adapter] = make_linear(widths[source], spec.hidden_dim)
                self.steps.append((source, adapter, tower, target))
                self.widths[target] = Width(out_dim)

    def forward(self, signals: Mapping[Path, FeatureBatch]) -> dict[Path, Tensor]:
        """signals: path -> (B, D). Returns this level's paths -> (B, H)."""
        outputs: dict[Path, Tensor] = {}
        for source, adapter, tower, target in self.steps:
            x = signals[source]
            outputs[target] = self.towers[tower](self.adapters[adapter](x) if adapter else x)
        return outputs

    if TYPE_CHECKING:
        __call__ = forward

    def tower(self, pair: Pair) -> Tower:
        """What works on the pair's signal; the same object for pairs that share it."""
        return self.towers[module_name(*self.keys[pair])]

    def modules_of(self, modality: str) -> list[str]:
        """Names of the submodules that the modality's signals pass, of whatever task; shared ones included."""
        steps = [(adapter, tower) for source, adapter, tower, _ in self.steps if source[0] == modality]
        adapters = {f"adapters.{adapter}" for adapter, _ in steps if adapter}
        return sorted(adapters | {f"towers.{tower}" for _, tower in steps})


class CrossStitch(nn.Module):
    """Mixes the signals of T tasks: y_t = sum over s of a_ts x_s, the matrix a learned.

    Starts near the identity, 0.9 on the diagonal and 0.1 shared by the others, as in the paper.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        start = torch.full((num_tasks, num_tasks), 0.1 / max(1, num_tasks - 1)).fill_diagonal_(0.9)
        self.weights = nn.Parameter(start.flatten())  # (T * T,): no matrix to weight decay, which would pull it to zero

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        return torch.unflatten(self.weights, -1, (x.shape[-2], x.shape[-2]))[..., None, :, :] @ x

    if TYPE_CHECKING:
        __call__ = forward


class CrossStitchLevel(Level):
    """A tower per (task, modality), all of one width; then each modality's signals are mixed across tasks.

    One matrix per modality and level, where Misra et al. 2016 (https://arxiv.org/abs/1604.03539) also try one per
    channel. A modality that only one task reads has nothing to be mixed with and passes as it is.
    """

    def __init__(self, scheme: str, paths: dict[Pair, Path], widths: dict[Path, Width], spec: ModelSpec) -> None:
        super().__init__("architecture", paths, widths, spec)
        readers = {m: [path for (_, modality), path in self.paths.items() if modality == m] for _, m in self.paths}
        self.readers = {m: found for m, found in sorted(readers.items()) if len(found) > 1}
        self.mixing: ModuleDict[CrossStitch] = ModuleDict(
            {module_name(m): CrossStitch(len(found)) for m, found in self.readers.items()}
        )

    def forward(self, signals: Mapping[Path, FeatureBatch]) -> dict[Path, Tensor]:
        outputs = super().forward(signals)
        for m, readers in self.readers.items():
            mixed = self.mixing[module_name(m)](torch.stack([outputs[path] for path in readers], dim=-2))
            outputs |= zip(readers, mixed.unbind(dim=-2), strict=True)
        return outputs

    def modules_of(self, modality: str) -> list[str]:
        """Of all tasks, since they mix."""
        mixing = [f"mixing.{module_name(modality)}"] if modality in self.readers else []
        return [*mixing, *super().modules_of(modality)]


class ExpertsLevel(nn.Module):
    """Multi-gate mixture of experts: y_tm = sum over e of softmax(V_tm x_tm)_e Expert_e(x_tm),
    E towers for all pairs.

    Each (task, modality) has its own gate on the signal that comes in. Where signals differ in width or kind, each
    modality has a linear adapter in front of the experts, not of the gate.

    Source: Ma et al. 2018 (https://doi.org/10.1145/3219819.3220007), where the pairs are tasks only.
    """

    def __init__(self, scheme: str, paths: dict[Pair, Path], widths: dict[Path, Width], spec: ModelSpec) -> None:
        super().__init__()
        hidden_dim = spec.hidden_dim
        self.sources = {pair: paths[pair] for pair in sorted(paths)}
        self.paths: dict[Pair, Path] = {pair: (*paths[pair], pair) for pair in self.sources}
        self.widths: dict[Path, Width] = dict.fromkeys(self.paths.values(), Width(hidden_dim))
        width = common_width({widths[path] for path in paths.values()})
        self.adapters: ModuleDict[Linear | SparseLinear] = ModuleDict()
        self.gates: ModuleDict[Linear | SparseLinear] = ModuleDict()
        for (_, m), source in self.sources.items():
            if width is None and module_name(m) not in self.adapters:
                self.adapters[module_name(m)] = make_linear(widths[source], hidden_dim)
        self.towers: ModuleList[Tower] = ModuleList(
            Tower(width or Width(hidden_dim), hidden_dim, spec.dropout) for _ in range(spec.mmoe_experts)
        )
        for pair, source in self.sources.items():
            self.gates[module_name(*pair)] = make_linear(widths[source], spec.mmoe_experts)

    def forward(self, signals: Mapping[Path, FeatureBatch]) -> dict[Path, Tensor]:
        """signals: path -> (B, D). Returns this level's paths -> (B, H)."""
        opinions: dict[Path, Tensor] = {}  # signal in -> (B, E, H)
        for source in dict.fromkeys(self.sources.values()):
            adapter, x = module_name(str(source[0])), signals[source]
            x = self.adapters[adapter](x) if adapter in self.adapters else x
            opinions[source] = torch.stack([tower(x) for tower in self.towers], dim=-2)
        outputs: dict[Path, Tensor] = {}
        for pair, source in self.sources.items():
            gate: Tensor = self.gates[module_name(*pair)](signals[source]).softmax(dim=-1)  # (B, E)
            outputs[self.paths[pair]] = (gate[..., None] * opinions[source]).sum(dim=-2)
        return outputs

    if TYPE_CHECKING:
        __call__ = forward

    def tower(self, pair: Pair) -> ModuleList[Tower]:
        """What works on the pair's signal: the experts, the same for all."""
        return self.towers

    def modules_of(self, modality: str) -> list[str]:
        """Names of the submodules that the modality's signals pass, of whatever task; shared ones included."""
        adapters = [f"adapters.{module_name(modality)}"] if module_name(modality) in self.adapters else []
        gates = [f"gates.{module_name(*pair)}" for pair in self.sources if pair[1] == modality]
        return [*adapters, *gates, "towers"]


def common_width(widths: set[Width]) -> Width | None:
    """The one width that all have; None where they differ and need adapters."""
    return next(iter(widths)) if len(widths) == 1 else None


AnyLevel: TypeAlias = Level | ExpertsLevel

LEVELS: dict[str, type[AnyLevel]] = {
    **dict.fromkeys(SCHEMES, Level),
    "cross_stitch": CrossStitchLevel,
    "mmoe": ExpertsLevel,
}
