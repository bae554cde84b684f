"""The fused, parameter-sharing model over features: torch only, no Ray, no files."""

from mmkt_ray.models.expert_model import ExpertModel, ExpertSpec
from mmkt_ray.models.multimodal import MultimodalModel
from mmkt_ray.models.predictor import Predictor, PredictorSpec, fused_part, model_of_spec
from mmkt_ray.models.sparse import SparseBatch
from mmkt_ray.models.spec import InputSpec, ModelSpec, build_spec
from mmkt_ray.models.towers import FeatureBatch

__all__ = [
    "ExpertModel",
    "ExpertSpec",
    "FeatureBatch",
    "InputSpec",
    "ModelSpec",
    "MultimodalModel",
    "Predictor",
    "PredictorSpec",
    "SparseBatch",
    "build_spec",
    "fused_part",
    "model_of_spec",
]
