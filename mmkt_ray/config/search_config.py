"""What `mmkt search` tries: the space of candidates, and how much of it."""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import Field, model_validator

from mmkt_ray.config.training_config import ObjectiveConfig
from mmkt_ray.errors import ConfigError
from mmkt_ray.section import Section

IntRange: TypeAlias = tuple[int, int]
FloatRange: TypeAlias = tuple[float, float]


class ParameterConfig(Section):
    """The values of one key: exactly one of `choice`, `int`, `float`, `loguniform`."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="any of these values")
    int: IntRange | None = Field(None, description="a whole number, both ends included")
    float: FloatRange | None = Field(None, description="a number, evenly")
    loguniform: FloatRange | None = Field(None, description="a number above 0, evenly on a log scale")
    when: dict[str, Any] = Field(
        default_factory=dict, description="only where these keys have this value, or one of these values"
    )

    @model_validator(mode="after")
    def _one_kind_in_order(self) -> ParameterConfig:
        kinds = [k for k in ("choice", "int", "float", "loguniform") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ConfigError(f"a parameter has exactly one of choice, int, float, loguniform; got {kinds or 'none'}")
        if kinds != ["choice"]:
            low, high = getattr(self, kinds[0])
            if low >= high or (kinds == ["loguniform"] and low <= 0):
                above = " above 0" if kinds == ["loguniform"] else ""
                raise ConfigError(f"{kinds[0]}: [{low}, {high}] is no range: give a lower and a higher end{above}")
        return self


FUSION = "model.fusion.name"
DEFAULT_SPACE = {
    FUSION: ParameterConfig(choice=("concat", "gated", "attention", "hierarchical", "decision")),
    "model.fusion.depth": ParameterConfig(int=(1, 4), when={FUSION: "hierarchical"}),
    "model.sharing": ParameterConfig(choice=("separate", "architecture", "task", "modality", "task_modality")),
    "training.lr": ParameterConfig(loguniform=(1e-4, 1e-1)),
    "training.weight_decay": ParameterConfig(loguniform=(1e-6, 1e-2)),
}


class SearchConfig(Section):
    """Which candidates are tried, how they are chosen, and when the search ends."""

    space: dict[str, ParameterConfig] | None = Field(
        None,
        min_length=1,
        description="dotted key of this config -> its values; null: fusion, its depth, sharing, lr and weight_decay",
    )
    objective: ObjectiveConfig | None = Field(
        None, description="what candidates, and the epochs of finalists, are chosen by; null: training.objective"
    )
    population: int = Field(64, ge=1, description="candidates stacked into one model")
    max_candidates: int = Field(10_000, ge=1, description="stop after about so many")
    time_budget_s: float | None = Field(600.0, gt=0, description="stop after so many seconds of search; null: never")
    eta: int = Field(3, ge=2, description="successive halving: the best 1/eta of a stack train on")
    rungs: int = Field(3, ge=1, description="times that candidates are compared, at epochs/eta^2, epochs/eta, epochs")
    finalists: int = Field(3, ge=1, description="best candidates that are trained anew, with several seeds each")
    seeds: int = Field(3, ge=1, description="seeds of each finalist")
    ensemble: int = Field(0, ge=0, description="greedy ensemble of so many picks among the best candidates; 0: none")
    trials_per_gpu: int = Field(4, ge=1, description="trials that share a GPU; without GPUs each has a CPU")
