"""The fused, parameter-sharing model over features: torch only, no Ray, no files."""

from mmkt_ray.models.multimodal import InputSpec, ModelSpec, MultimodalModel, build_spec
from mmkt_ray.models.sparse import SparseBatch
from mmkt_ray.models.towers import Features

__all__ = ["Features", "InputSpec", "ModelSpec", "MultimodalModel", "SparseBatch", "build_spec"]
