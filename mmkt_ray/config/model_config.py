"""The model: fusion, sharing, missing modalities."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, model_validator

from mmkt_ray.errors import unknown_name
from mmkt_ray.section import Once, Section, as_mapping

SCHEME_NAMES = ("separate", "architecture", "task", "modality", "task_modality", "cross_stitch", "mmoe")
MAX_DIM = 2**16  # of a layer; the largest language models have 2**14
FUSE_NAMES = ("concat", "sum", "gated", "low_rank_bilinear", "attention")
FUSION_NAMES = (*FUSE_NAMES, "hierarchical", "decision")
MissingStrategy: TypeAlias = Literal["mask", "drop", "mean", "zero", "token", "generate"]
MISSING_STRATEGIES: tuple[str, ...] = get_args(MissingStrategy)


class FusionConfig(Section):
    """How the modalities' representations become one."""

    name: str = Field("concat", description="fusion method: " + ", ".join(FUSION_NAMES))
    depth: int = Field(1, ge=1, le=16, description="levels of hierarchical fusion")
    fuse: str = Field("concat", description="what hierarchical fusion does at each level: " + ", ".join(FUSE_NAMES))
    rank: int = Field(16, ge=1, description="rank of low_rank_bilinear's tensor")
    num_heads: int = Field(4, ge=1, description="attention heads; must divide model.hidden_dim")
    combine: Literal["learned", "average", "product"] = Field(
        "learned", description="decision fusion: learned weights, mean of probabilities, product of experts"
    )

    @model_validator(mode="after")
    def _options_that_mean_something(self) -> FusionConfig:
        if self.name not in FUSION_NAMES:
            raise unknown_name("fusion", self.name, FUSION_NAMES)
        if self.fuse not in FUSE_NAMES:
            raise unknown_name("fuse of hierarchical fusion", self.fuse, FUSE_NAMES)
        inner = self.fuse if self.name == "hierarchical" else self.name
        belongs = {
            "depth": self.name == "hierarchical",
            "fuse": self.name == "hierarchical",
            "rank": inner == "low_rank_bilinear",
            "num_heads": inner == "attention",
            "combine": self.name == "decision",
        }
        for option, meant in belongs.items():
            if not meant and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} means nothing to {self.name} fusion; leave it out")
        return self


class ModelConfig(Section):
    """The fused, parameter-sharing model over the features."""

    modalities: Annotated[tuple[str, ...] | None, Once] = Field(
        None, min_length=1, description="modalities it reads; null: all"
    )
    tasks: Annotated[tuple[str, ...] | None, Once] = Field(
        None, min_length=1, description="tasks it predicts; null: all"
    )
    fusion: Annotated[FusionConfig, BeforeValidator(as_mapping)] = Field(FusionConfig(), description="fusion method")
    sharing: str | tuple[str, ...] = Field(
        "task", description="sharing scheme of the towers, or one per level, bottom to top: " + ", ".join(SCHEME_NAMES)
    )
    num_levels: int = Field(1, ge=0, le=16, description="tower levels; 0: features go straight into the fusion")
    mmoe_experts: int = Field(4, ge=1, le=64, description="experts of each mmoe level")
    hidden_dim: int = Field(256, ge=1, le=MAX_DIM, description="width of towers and fusion")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout in towers and fusion")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input features")
    modality_dropout: float = Field(
        0.2, ge=0, lt=1, description="chance of each present modality to be hidden in training; one always stays"
    )
    missing: MissingStrategy = Field(
        "mask",
        description="missing modalities: mask fuses what is there, drop trains on complete rows only, mean and zero "
        "fill features, token learns a stand-in (from train rows that lack the modality: where there are few, with "
        "modality_dropout), generate predicts the missing features from the present ones",
    )
    wide: bool = Field(
        True,
        description="also solve a linear model of the same features and add its logits, with a share that held-out "
        "rows choose (wide & deep); only where training.auto leaves settings open",
    )
    experts: bool = Field(
        True,
        description="also train models of fewer modalities, one of each alone among them; they answer the rows that "
        "lack the others, and rows that lack none where they are clearly better on held-out rows",
    )

    @model_validator(mode="after")
    def _known_schemes(self) -> ModelConfig:
        for scheme in self.schemes:
            if scheme not in SCHEME_NAMES:
                raise unknown_name("sharing scheme", scheme, SCHEME_NAMES)
        if len(self.schemes) != self.num_levels:
            raise ValueError(f"sharing names {len(self.schemes)} levels but num_levels is {self.num_levels}")
        fusion = self.fusion
        if "attention" in (fusion.name, fusion.fuse) and self.hidden_dim % fusion.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is no multiple of fusion.num_heads {fusion.num_heads}")
        return self

    @property
    def schemes(self) -> tuple[str, ...]:
        """One scheme per tower level, bottom to top."""
        return (self.sharing,) * self.num_levels if isinstance(self.sharing, str) else self.sharing
