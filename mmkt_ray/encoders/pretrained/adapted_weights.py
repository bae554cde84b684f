"""Which weights of a pretrained network an adaptation changes, and what of them its state keeps.

Called by adaptable.py and adapt_training.py.

Axes: R rank.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Own, in a few lines, as the package for it brings two more and
renames the layers, and what we keep is the product alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmkt_ray.errors import ConfigError

LORA_SCALE = 2.0  # alpha / R
LEARNT = "learnt"  # tensor of the state: hashes of the train values, where there are several folds


class LowRank(nn.Module):
    """A weight plus a product of two narrow matrices, of which one begins as zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        narrow = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        self.a = nn.Parameter(narrow.to(weight.device))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + LORA_SCALE * (self.b @ self.a)


def make_trainable(model: nn.Module, section: Any, seed: int) -> dict[str, nn.Parameter]:
    """Make the weights trainable that `section` asks for; returns them by name.
    Raises: ConfigError if there are none."""
    model.requires_grad_(False)
    if section.how == "full":
        model.requires_grad_(True)
    elif section.how == "last_layers":
        first = f"{blocks_of(model)}.{max(0, _num_blocks(model) - section.num_layers)}."
        names = [name for name, _ in model.named_parameters()]
        start = next(i for i, name in enumerate(names) if name.startswith(first))
        for _, parameter in list(model.named_parameters())[start:]:
            parameter.requires_grad_(True)
    else:
        generator = torch.Generator().manual_seed(seed)
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        for _, layer in layers:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, section.rank, generator))
            layer.get_parameter("parametrizations.weight.original").requires_grad_(False)
        if not layers:
            raise ConfigError(
                "adapt.how: lora changes linear layers, and this network has none: use last_layers or full"
            )
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def blocks_of(model: nn.Module) -> str:
    """Name of the list of a network's blocks: the one with the most parameters among those of several members."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    if not lists:
        raise ConfigError("adapt.how: last_layers: this network has no list of blocks: use lora or full")
    inner = {id(child) for _, m in lists for child in m.modules() if child is not m}
    outer = [(n, m) for n, m in lists if id(m) not in inner]
    return max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))[0]


def _num_blocks(model: nn.Module) -> int:
    blocks = model.get_submodule(blocks_of(model))
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    return len(blocks)


def kept(trained: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors of a state: changed weights under their names; of LoRA `<layer>.lora_a` and `.lora_b`."""
    renamed = {_lora_name(name): value for name, value in trained.items()}
    return {name: value.detach().float().cpu().numpy() for name, value in renamed.items()}


def _lora_name(name: str) -> str:
    for part in ("a", "b"):
        name = name.replace(f".parametrizations.weight.0.{part}", f".lora_{part}")
    return name


def changed_weights(
    tensors: dict[str, np.ndarray], weights: dict[str, nn.Parameter], section: Any
) -> dict[str, Tensor]:
    """Weights as they are after the adaptation, by name. Raises: ValueError for one that the network lacks."""
    if section.how != "lora":
        changed = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    else:
        changed = {}
        for layer in sorted({name.rsplit(".", 1)[0] for name in tensors}):
            a, b = (torch.from_numpy(np.array(tensors[f"{layer}.lora_{part}"])) for part in ("a", "b"))
            name = f"{layer}.weight"
            if name in weights:
                changed[name] = weights[name].detach().cpu() + LORA_SCALE * (b @ a)
            else:
                changed[name] = b @ a
    if unknown := sorted(changed.keys() - weights.keys()):
        raise ValueError(f"the adapted weight '{unknown[0]}' is none of the network's")
    return changed


def hashes_of(contents: Sequence[bytes]) -> np.ndarray:
    """(N,) uint64."""
    return np.array([xxhash.xxh64_intdigest(content) for content in contents], dtype=np.uint64)


def fold_of(hashes: np.ndarray, num_folds: int) -> np.ndarray:
    """The fold (N,) that leaves a value out: equal ones are in one fold, and stay there when others are added."""
    return (hashes % np.uint64(num_folds)).astype(np.int64)


def by_fold(tensors: Mapping[str, np.ndarray], num_folds: int) -> list[dict[str, np.ndarray]]:
    """The changes of each fold. Raises: ValueError if there are none of one."""
    if num_folds == 1:
        return [dict(tensors)]
    starts = [f"fold{number}/" for number in range(num_folds)]
    found = [{k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)} for start in starts]
    if any(not changes or changes.keys() != found[0].keys() for changes in found):
        raise ValueError(f"the state does not hold the changes of {num_folds} folds")
    return found
