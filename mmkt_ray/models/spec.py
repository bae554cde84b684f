"""What a model is, as plain values: enough to build it, and kept as JSON beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.models.sharing import own_widths


@dataclass(frozen=True)
class InputSpec:
    """One modality as the model sees it."""

    dim: int  # D
    sparse: bool
    hidden_dim: int  # width of its towers where each modality has its own (sharing: separate)


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a MultimodalModel."""

    modalities: dict[str, InputSpec]
    tasks: dict[str, int]  # task -> C
    kinds: dict[str, TaskKind]
    inputs: dict[str, tuple[str, ...]]  # task -> the modalities that it reads
    fusion: dict[str, Any]  # the config's fusion section
    schemes: tuple[str, ...]  # one per tower level, bottom to top
    mmoe_experts: int  # of each mmoe level
    hidden_dim: int
    dropout: float
    feature_dropout: float
    modality_dropout: float
    missing: str  # one of config.MISSING_STRATEGIES
    wide: ModelSpec | None = None  # of the linear model beside the network

    def tower_dim(self, scheme: str, modality: str) -> int:
        """Width of what a level of this scheme makes of a modality's signals."""
        return self.modalities[modality].hidden_dim if own_widths(scheme) else self.hidden_dim

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        inputs = {t: list(modalities) for t, modalities in self.inputs.items()}
        kinds = {t: kind.as_json() for t, kind in self.kinds.items()}
        wide = self.wide.to_dict() if self.wide else None
        return {**asdict(self), "kinds": kinds, "schemes": list(self.schemes), "inputs": inputs, "wide": wide}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_dict` was called on. Raises: TypeError, KeyError if `raw` is none."""
        modalities = {m: InputSpec(**i) for m, i in raw["modalities"].items()}
        inputs = {t: tuple(names) for t, names in raw["inputs"].items()}
        wide = cls.from_dict(raw["wide"]) if raw["wide"] else None
        plain = {"modalities": modalities, "inputs": inputs, "schemes": tuple(raw["schemes"]), "wide": wide}
        return cls(**{**raw, **plain, "kinds": {t: task_kind(kind) for t, kind in raw["kinds"].items()}})


def build_spec(
    config: Config,
    dims: Mapping[str, int],
    sparse: Mapping[str, bool],
    num_classes: Mapping[str, int],
    kinds: Mapping[str, TaskKind] | None = None,
) -> ModelSpec:
    """The model that `config` describes over features of these widths (by modality) and these tasks' class counts.
    kinds: of the tasks, with what they know of the train labels.

    Raises: ConfigError if `missing: generate` would have to predict sparse features.
    """
    model = config.model
    inputs = {
        m: InputSpec(dims[m], sparse[m], config.modalities[m].hidden_dim or min(model.hidden_dim, dims[m]))
        for m in config.model_modalities
    }
    spec = ModelSpec(
        modalities=inputs,
        tasks={t: num_classes[t] for t in config.model_tasks},
        kinds={t: (kinds or {}).get(t, config.tasks[t].kind) for t in config.model_tasks},
        inputs={t: config.task_inputs(t) for t in config.model_tasks},
        fusion=model.fusion.model_dump(mode="json"),
        schemes=model.schemes,
        mmoe_experts=model.mmoe_experts,
        hidden_dim=model.hidden_dim,
        dropout=model.dropout,
        feature_dropout=model.feature_dropout,
        modality_dropout=model.modality_dropout,
        missing=model.missing if len(inputs) > 1 else "mask",  # a row without the only modality has no prediction
    )
    for target in generator_sources(spec):
        if spec.modalities[target].sparse:
            raise ConfigError(
                f"model.missing: generate predicts dense features, those of '{target}' are sparse: add "
                f"modalities.{target}.reduce, e.g. {{name: svd, dim: 256}}, or choose model.missing: mask or token"
            )
    return spec


def generator_sources(spec: ModelSpec) -> dict[str, list[str]]:
    """For `missing: generate`: target -> the other modalities that every task which reads the target reads too.

    Only these: a generated feature must carry nothing to a task from what the task may not read. Empty for all other
    strategies; a modality without such a source is not in it, and is filled with the mean.
    """
    if spec.missing != "generate":
        return {}
    sources = {}
    for target in sorted(spec.modalities):
        read = [set(modalities) for modalities in spec.inputs.values() if target in modalities]
        common = sorted(set.intersection(*read) - {target}) if read else []
        if common:
            sources[target] = common
    return sources
