"""The fused, parameter-sharing model over features: torch only, no Ray, no files."""

from mmkt_ray.models.ensemble import EnsembleSpec, Predictor, build_model
from mmkt_ray.models.multimodal import MultimodalModel, to_proba
from mmkt_ray.models.sparse import SparseBatch
from mmkt_ray.models.spec import InputSpec, ModelSpec, build_spec
from mmkt_ray.models.towers import Features

__all__ = [
    "EnsembleSpec",
    "Features",
    "InputSpec",
    "ModelSpec",
    "MultimodalModel",
    "Predictor",
    "SparseBatch",
    "build_model",
    "build_spec",
    "to_proba",
]
