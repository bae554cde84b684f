"""What a model folder may hold; all of them predict alike and tell their `modalities`, `tasks`,
`kinds` and `inputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from mmkt_ray.models.ensemble import EnsembleModel, EnsembleSpec
from mmkt_ray.models.expert_model import ExpertModel, ExpertSpec
from mmkt_ray.models.multimodal import MultimodalModel
from mmkt_ray.models.spec import ModelSpec

Predictor: TypeAlias = MultimodalModel | EnsembleModel | ExpertModel
PredictorSpec: TypeAlias = ModelSpec | EnsembleSpec | ExpertSpec


def fused_part(model: Predictor) -> MultimodalModel | EnsembleModel:
    """The model without its experts: what it knows by itself of rows that lack a modality."""
    return model.fused if isinstance(model, ExpertModel) else model


def model_of_spec(raw: Mapping[str, Any]) -> Predictor:
    """The untrained model of a spec's JSON-able form."""
    if "members" in raw:
        return EnsembleModel(EnsembleSpec.from_dict(raw))
    return ExpertModel(ExpertSpec.from_dict(raw)) if "experts" in raw else MultimodalModel(ModelSpec.from_dict(raw))
