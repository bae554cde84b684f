"""The space of candidates: architectures that Tune proposes, and within one the values by which its members differ.

A candidate is a mapping of dotted config keys to values. Its *architecture* is what decides shapes and data, its
*member* keys (learning rate, dropout, ..) may differ within one stacked population.

Source of the members' draws: scrambled Sobol sequences, Owen 1998 (https://doi.org/10.1023/A:1008923215028).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy.stats import qmc

from mmkt_ray.config import Config, ParameterConfig, describe_fields
from mmkt_ray.config.search_config import DEFAULT_SPACE
from mmkt_ray.errors import ConfigError, UserError, nearest
from mmkt_ray.training.model_stack import MEMBER_KEYS

MAX_CHECKED = 5000  # architectures that are tried out before a search starts
MANY_VALUES = 8  # of so long an integer range, these try the ends and the middle
FUSION = "model.fusion.name"
UNSEARCHED = ("training.transfer", "training.num_workers", "training.exclude", "training.objective")

Overrides = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class Space:
    """What can be chosen, and the config that it is chosen for."""

    config: Config  # without search and variants
    architecture: dict[str, ParameterConfig]  # a key comes after those that its `when` names
    members: dict[str, ParameterConfig]

    @property
    def parameters(self) -> dict[str, ParameterConfig]:
        """All keys that are searched over."""
        return {**self.architecture, **self.members}

    def applies(self, key: str, chosen: Mapping[str, Any]) -> bool:
        """True if the key's `when` holds, given what is chosen already."""
        for other, wanted in self.parameters[key].when.items():
            if other in self.parameters:
                value = chosen.get(other)
            else:
                value = read_dotted(self.config, other)
            if value not in (wanted if isinstance(wanted, list | tuple) else [wanted]):
                return False
        return True

    def configure(self, overrides: Mapping[str, Any]) -> Config:
        """The config of a candidate. A chosen `X.name` starts with that choice's own defaults.

        Raises: ConfigError if the combination is impossible.
        """
        fresh = {k.removesuffix(".name"): {"name": v} for k, v in overrides.items() if k.endswith(".name")}
        return self.config.with_overrides({**fresh, **overrides})

    def architectures(self, thin: bool = False) -> Iterator[Overrides]:
        """All architectures; of continuous ranges, and if `thin` of long ones too, only the ends and the middle."""

        def extend(keys: Sequence[str], chosen: Overrides) -> Iterator[Overrides]:
            if not keys:
                yield chosen
            elif not self.applies(keys[0], chosen):
                yield from extend(keys[1:], chosen)
            else:
                for value in parameter_values(self.architecture[keys[0]], thin):
                    yield from extend(keys[1:], {**chosen, keys[0]: value})

        return extend(list(self.architecture), {})

    def some_architectures(self) -> Iterator[Overrides]:
        """As many as can be tried out before a search."""
        return islice(self.architectures(thin=True), MAX_CHECKED)

    @property
    def countable(self) -> bool:
        """True if `architectures` yields all of them."""
        return all(p.float is None and p.loguniform is None for p in self.architecture.values())

    def draw_members(self, architecture: Mapping[str, Any], num: int, seed: Sequence[int]) -> list[Overrides]:
        """`num` draws of the member keys, spread evenly; one empty draw where there is nothing to differ in. The same
        seed gives the same draws."""
        keys = [k for k in self.members if self.applies(k, architecture)]
        if not keys:
            return [{}]
        generator = np.random.default_rng(list(seed))
        points = qmc.Sobol(len(keys), scramble=True, rng=generator).random_base2(math.ceil(math.log2(max(2, num))))[
            :num
        ]
        return [
            {key: value_at(self.members[key], float(u)) for key, u in zip(keys, point, strict=True)} for point in points
        ]

    def references(self) -> dict[str, Overrides]:
        """What the winner is to be compared with: plain concatenation first, then each modality alone; at the
        config's values."""
        modalities = self.config.model_modalities
        found: dict[str, Overrides] = {"concat": {FUSION: "concat"}} if len(modalities) > 1 else {}
        found |= {m: {"model.modalities": [m], FUSION: "concat"} for m in modalities}
        return {name: overrides for name, overrides in found.items() if self._fault(overrides) is None}

    def check(self) -> None:
        """Try out the architectures, of a large space MAX_CHECKED of them. Raises: ConfigError with the reason."""
        for overrides in self.some_architectures():
            if fault := self._fault(overrides):
                raise ConfigError(
                    f"search.space holds an impossible combination, {label_of(overrides)}: {fault}; give the key a "
                    "`when`, or leave the value out"
                )

    def _fault(self, overrides: Overrides) -> UserError | None:
        try:
            self.configure(overrides)
        except UserError as error:
            return error
        return None


def build_space(config: Config) -> Space:
    """The config's search space. Raises: ConfigError for unknown keys, circular conditions,
    impossible combinations."""
    search = config.search
    parameters = dict(search.space if search is not None and search.space is not None else DEFAULT_SPACE)
    base = config.model_copy(update={"search": None, "variants": {}})
    if search is not None and search.objective is not None:
        base = base.with_overrides({"training.objective": search.objective.model_dump(mode="json")})
    base = _with_all_of(base, parameters)
    known = searchable_keys(base)
    for key, parameter in parameters.items():
        if key not in known:
            raise ConfigError(f"search.space: can't search over '{key}': {nearest(key, known)}")
        for other in parameter.when:
            if other not in known:
                raise ConfigError(f"search.space.{key}.when: unknown key '{other}': {nearest(other, known)}")
            if other in parameters and other in MEMBER_KEYS:
                raise ConfigError(f"search.space.{key}.when: '{other}' differs within a population; name another key")
    architecture: dict[str, ParameterConfig] = {}
    waiting = {k: p for k, p in parameters.items() if k not in MEMBER_KEYS}
    while waiting:
        ready = {k: p for k, p in waiting.items() if not p.when.keys() & waiting.keys()}
        if not ready:
            raise ConfigError(f"search.space: these keys wait for each other in a circle: {', '.join(waiting)}")
        architecture |= ready
        waiting = {k: p for k, p in waiting.items() if k not in ready}
    space = Space(base, architecture, {k: p for k, p in parameters.items() if k in MEMBER_KEYS})
    for key, parameter in space.members.items():
        for value in (value_at(parameter, 0.0), value_at(parameter, 1.0)):
            base.with_overrides({key: value})
    space.check()
    return space


def _with_all_of(config: Config, parameters: Mapping[str, ParameterConfig]) -> Config:
    """The config with every modality and task that some candidate has,
    so that there are features and labels for each."""
    for key, own in (("model.modalities", config.model.modalities), ("model.tasks", config.model.tasks)):
        if key in parameters and own is not None:
            chosen = [value for value in parameter_values(parameters[key])]
            every = None if None in chosen else sorted({*own, *(name for names in chosen for name in names)})
            config = config.with_overrides({key: every})
    return config


def searchable_keys(config: Config) -> list[str]:
    """Keys that a candidate may set: those of model and training, and what leaves the features as they are."""
    keys = [
        key for key, _, _ in describe_fields(type(config)) if key.startswith(("model.", "training.")) and "<" not in key
    ]
    keys = [
        key for key in keys if not key.startswith(UNSEARCHED)
    ]
    keys += [f"modalities.{m}.hidden_dim" for m in config.modalities]
    keys += [f"tasks.{t}.{option}" for t in config.tasks for option in ("inputs", "loss_weight")]
    return ["seed", *keys]


def read_dotted(config: Config, key: str) -> Any:
    """The config's value of a dotted key, as plain data."""
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    return node


def parameter_values(parameter: ParameterConfig, thin: bool = False) -> list[Any]:
    """Its values; of a continuous range, and if `thin` of a long one too, both ends and the middle."""
    if parameter.choice is not None:
        return list(parameter.choice)
    if parameter.int is not None and not (thin and parameter.int[1] - parameter.int[0] >= MANY_VALUES):
        return list(range(parameter.int[0], parameter.int[1] + 1))
    return [value_at(parameter, u) for u in (0.0, 0.5, 1.0)]


def value_at(parameter: ParameterConfig, u: float) -> Any:
    """The value at share `u`, 0 to 1, of its range."""
    if parameter.float is not None:
        low, high = parameter.float
        return low + u * (high - low)
    if parameter.loguniform is not None:
        low, high = map(math.log, parameter.loguniform)
        return math.exp(low + u * (high - low))
    if parameter.int is not None:
        low_int, high_int = parameter.int
        return min(low_int + int(u * (high_int - low_int + 1)), high_int)
    values = parameter_values(parameter)
    return values[min(int(u * len(values)), len(values) - 1)]


def text_of(value: Any) -> str:
    """A choice as text: itself, or its JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def label_of(overrides: Mapping[str, Any]) -> str:
    """`model.fusion.name=concat, model.sharing=task`."""
    return ", ".join(f"{key}={text_of(value)}" for key, value in overrides.items()) or "(nothing is chosen)"
