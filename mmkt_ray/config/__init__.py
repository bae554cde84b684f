"""The one typed, frozen description of a run, read from YAML or built in Python.

Unknown keys are errors that name the nearest known key. A choice with options of its own may be written as its bare
name (`fusion: concat`) or as a mapping (`fusion: {name: hierarchical, depth: 2}`). Dimensions are derived, never stated.
"""

from mmkt_ray.config.modalities import TaskConfig
from mmkt_ray.config.model import FUSES, FUSIONS, MISSING_STRATEGIES, SCHEMES, FusionConfig
from mmkt_ray.config.parsing import parse_override
from mmkt_ray.config.reading import describe_fields, load_config, seed_32
from mmkt_ray.config.run import Config, parse_config
from mmkt_ray.config.samples import JoinCombine, PairCombine, SourceConfig, UnionCombine
from mmkt_ray.config.search import ParameterConfig, SearchConfig
from mmkt_ray.config.training import AugmentConfig, EvaluationConfig, ObjectiveConfig, TransferConfig
from mmkt_ray.encoders.base import CustomEncoder
from mmkt_ray.section import SPLITS, Section, fingerprint

__all__ = [
    "FUSES",
    "FUSIONS",
    "MISSING_STRATEGIES",
    "SCHEMES",
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
