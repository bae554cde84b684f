"""How a sentence encoder makes one vector of a text's tokens, as its folder says.

Axes: B texts, L tokens of a text, D features. Files as sentence-transformers writes them (https://sbert.net):
modules.json lists the steps, `1_Pooling/config.json` says which tokens count,
`2_Dense` is a linear layer behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmkt_ray import storage
    from mmkt_ray.encoders.pretrained import weights
else:
    torch, nn, storage = lazy("torch"), lazy("torch.nn"), lazy("mmkt_ray.storage")
    weights = lazy("mmkt_ray.encoders.pretrained.weights")

OLD_MODES = {  # flags of older files, in the order in which several are put side by side
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {"Identity": "Identity", "Tanh": "Tanh", "ReLU": "ReLU", "GELU": "GELU"}


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling."""

    uri: str
    in_features: int
    out_features: int
    bias: bool
    activation: str

    def build(self) -> nn.Module:
        """With its weights. Raises: DataError if they are not there or do not fit."""
        file = f"{self.uri}/model.safetensors"
        state = {name.removeprefix("linear."): value for name, value in weights.read_weights(file).items()}
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias)
        try:
            layer.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(f"'{file}' is not the layer that '{self.uri}/config.json' describes: {error}") from None
        return nn.Sequential(layer, getattr(nn, self.activation)())


@dataclass(frozen=True)
class Sentences:
    """What happens behind the network; by default the mean over the tokens, at unit length."""

    modes: tuple[str, ...] = ("mean",)
    dense: tuple[Dense, ...] = ()
    unit_length: bool = True
    prompt: str = ""  # put before each text
    files: tuple[Path, ...] = ()  # that say so, and hold the weights

    def width(self, hidden_dim: int) -> int:
        """D."""
        return self.dense[-1].out_features if self.dense else hidden_dim * len(self.modes)

    @property
    def is_default(self) -> bool:
        """Whether texts are encoded as if no file said how."""
        return self.modes == ("mean",) and not self.dense and self.unit_length and not self.prompt


def read_sentences(folder: Path) -> Sentences:
    """What a folder's files say. Raises: DataError if they are damaged, or name a step that is not known here."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return Sentences()
    modes: tuple[str, ...] = ()
    dense: list[Dense] = []
    files, unit_length = [listed], False
    try:
        for module in sorted(storage.read_json(str(listed)), key=lambda m: m["idx"]):
            step, place = str(module["type"]).rsplit(".", 1)[-1], folder / str(module["path"])
            if folder.resolve() not in [place.resolve(), *place.resolve().parents]:
                raise DataError(f"'{listed}' names a folder outside of its own, '{module['path']}'")
            if step == "Pooling":
                files.append(place / "config.json")
                modes = _modes(storage.read_json(str(files[-1])), files[-1])
            elif step == "Dense":
                files += [place / "config.json", place / "model.safetensors"]
                dense.append(_dense(storage.read_json(str(place / "config.json")), place))
            elif step == "Normalize":
                unit_length = True
            elif step != "Transformer":
                raise DataError(f"'{listed}' has a step '{step}': known: Transformer, Pooling, Dense, Normalize")
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"'{listed}', or a file that it names, is damaged or missing ({error}): copy the folder again"
        ) from error
    return Sentences(modes or ("mean",), tuple(dense), unit_length, _prompt(folder), tuple(files))


def _modes(card: dict[str, Any], file: Path) -> tuple[str, ...]:
    modes = card.get("pooling_mode") or [mode for flag, mode in OLD_MODES.items() if card.get(flag)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if unknown := set(modes) - set(OLD_MODES.values()):
        raise DataError(f"'{file}' pools by {sorted(unknown)}: known: {', '.join(OLD_MODES.values())}")
    if not card.get("include_prompt", True):
        raise DataError(
            f"'{file}' leaves the prompt out of the pooling (include_prompt: false), which is not supported"
        )
    return modes


def _dense(card: dict[str, Any], place: Path) -> Dense:
    activation = str(card.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in ACTIVATIONS:
        raise DataError(f"'{place}/config.json' has the activation '{activation}': known: {', '.join(ACTIVATIONS)}")
    return Dense(
        str(place), int(card["in_features"]), int(card["out_features"]), bool(card.get("bias", True)), activation
    )


def _prompt(folder: Path) -> str:
    """The prompt that sentence-transformers puts before every text unless it is told another."""
    file = folder / "config_sentence_transformers.json"
    card = storage.read_json(str(file)) if file.is_file() else {}
    name = card.get("default_prompt_name")
    return str((card.get("prompts") or {}).get(name, "")) if name else ""


def pool(hidden: Tensor, mask: Tensor, modes: tuple[str, ...]) -> Tensor:
    """Token vectors (B, L, D) and which of them are the text's (B, L),
    padded at the end -> (B, D * number of modes)."""
    weight = mask.unsqueeze(2).to(hidden.dtype)
    length = weight.sum(1)
    pooled = {
        "cls": lambda: hidden[:, 0],
        "max": lambda: hidden.masked_fill(weight == 0, -1e9).amax(1),
        "mean": lambda: (hidden * weight).sum(1) / length,
        "mean_sqrt_len_tokens": lambda: (hidden * weight).sum(1) / length.sqrt(),
        "weightedmean": lambda: _weighted_mean(hidden, weight),
        "lasttoken": lambda: hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1],
    }
    return torch.cat([pooled[mode]() for mode in modes], dim=1)


def _weighted_mean(hidden: Tensor, weight: Tensor) -> Tensor:
    """Later tokens count more: the first once, the second twice (Muennighoff 2022,
    https://arxiv.org/abs/2202.08904)."""
    weight = weight * torch.arange(1, weight.shape[1] + 1, device=weight.device).view(1, -1, 1)
    return (hidden * weight).sum(1) / weight.sum(1)
