"""The one typed, frozen description of a run, read from YAML or built in Python.

Unknown keys are errors that name the nearest known key. A choice with options of its own may be written as its bare
name (`fusion: concat`) or as a mapping (`fusion: {name: hierarchical, depth: 2}`).
Dimensions are derived, never stated.
"""

from mmkt_ray.config.modality_config import TaskConfig
from mmkt_ray.config.model_config import FUSE_NAMES, FUSION_NAMES, MISSING_STRATEGIES, SCHEME_NAMES, FusionConfig
from mmkt_ray.config.parsing import parse_override
from mmkt_ray.config.reading import describe_fields, load_config, seed_32
from mmkt_ray.config.run_config import Config, parse_config
from mmkt_ray.config.samples_config import JoinCombine, PairCombine, SourceConfig, UnionCombine
from mmkt_ray.config.search_config import ParameterConfig, SearchConfig
from mmkt_ray.config.training_config import AugmentConfig, EvaluationConfig, ObjectiveConfig, TransferConfig
from mmkt_ray.encoders.encoder import CustomEncoder
from mmkt_ray.section import SPLITS, Section, fingerprint

__all__ = [
    "FUSE_NAMES",
    "FUSION_NAMES",
    "MISSING_STRATEGIES",
    "SCHEME_NAMES",
    "SPLITS",
    "AugmentConfig",
    "Config",
    "CustomEncoder",
    "EvaluationConfig",
    "FusionConfig",
    "JoinCombine",
    "ObjectiveConfig",
    "PairCombine",
    "ParameterConfig",
    "SearchConfig",
    "Section",
    "SourceConfig",
    "TaskConfig",
    "TransferConfig",
    "UnionCombine",
    "describe_fields",
    "fingerprint",
    "load_config",
    "parse_config",
    "parse_override",
    "seed_32",
]
