"""Sharing schemes: which towers of the (task, modality) grid are the same parameters.

A hard scheme is a key function. Every pair (t, m) owns a tower at every level; at one level, pairs with equal keys
own the same tower. A new hard scheme is one line in `SCHEMES` (and its name in `config.SCHEME_NAMES`). The soft
schemes `cross_stitch` and `mmoe` are levels of their own, in `levels.py`.

Sources: hard parameter sharing is Caruana 1997 (https://doi.org/10.1023/A:1007379606734), surveyed in Ruder 2017
(https://arxiv.org/abs/1706.05098); one trunk for every modality and task as in Meta-Transformer
(https://arxiv.org/abs/2307.10802).
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

Pair = tuple[str, str]  # (task, modality)
Key = tuple[str, ...]

SCHEMES: dict[str, Callable[[str, str], Key]] = {
    "separate": lambda t, m: (t, m),  # and each modality has its own width
    "architecture": lambda t, m: (t, m),
    "task": lambda t, m: (m,),
    "modality": lambda t, m: (t,),
    "task_modality": lambda t, m: (),
}


def own_widths(scheme: str) -> bool:
    """True where each modality's towers have a width of their own; else all have `hidden_dim`."""
    return scheme == "separate"


def shares_tasks(scheme: str) -> bool:
    """True if two tasks get the same signal of a modality. Soft schemes give each task its own mixture."""
    key = SCHEMES.get(scheme)
    return key is not None and key("a", "m") == key("b", "m")


def module_name(*key: str) -> str:
    """Name of a key's module, injective and legal in any `nn.ModuleDict`: `[topic,image]`, `[image]`, `[]`."""
    return "[" + ",".join(quote(part, safe=" ").replace(".", "%2E") for part in key) + "]"


def without_key(name: str) -> str:
    """A parameter's name without the key of its module, the same for all that play the same part:
    `levels.0.towers.[topic,text].linear.weight` -> `levels.0.towers..linear.weight`."""
    start, end = name.find("["), name.rfind("]")
    return name if start < 0 else name[:start] + name[end + 1 :]
