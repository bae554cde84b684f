"""The model: fusion, sharing, missing modalities."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmkt_ray.config.section import Section, named
from mmkt_ray.errors import unknown_name

SCHEMES = ("separate", "architecture", "task", "modality", "task_modality")


class FusionConfig(Section):
    """How the modalities' representations become one."""

    name: Literal["concat", "hierarchical", "decision"] = Field(
        "concat", description="feature-level, level upon level, or per-modality decisions"
    )
    depth: int = Field(1, ge=1, le=16, description="levels of hierarchical fusion")

    @model_validator(mode="after")
    def _depth_is_hierarchical(self) -> FusionConfig:
        if self.name != "hierarchical" and self.depth != 1:
            raise ValueError(f"depth is for hierarchical fusion; {self.name} has none")
        return self


class ModelConfig(Section):
    """The fused, parameter-sharing model over the features."""

    modalities: tuple[str, ...] | None = Field(None, description="modalities it reads; null: all")
    tasks: tuple[str, ...] | None = Field(None, description="tasks it predicts; null: all")
    fusion: Annotated[FusionConfig, BeforeValidator(named)] = Field(FusionConfig(), description="fusion method")
    sharing: str | tuple[str, ...] = Field(
        "task", description="sharing scheme of the towers, or one per level, bottom to top: " + ", ".join(SCHEMES)
    )
    num_levels: int = Field(1, ge=0, le=16, description="tower levels; 0: features go straight into the fusion")
    hidden_dim: int = Field(256, ge=1, description="width of towers and fusion")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout in towers and fusion")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input features")

    @model_validator(mode="after")
    def _known_schemes(self) -> ModelConfig:
        for scheme in self.schemes:
            if scheme not in SCHEMES:
                raise unknown_name("sharing scheme", scheme, SCHEMES)
        if len(self.schemes) != self.num_levels:
            raise ValueError(f"sharing names {len(self.schemes)} levels but num_levels is {self.num_levels}")
        return self

    @property
    def schemes(self) -> tuple[str, ...]:
        """One scheme per tower level, bottom to top."""
        return (self.sharing,) * self.num_levels if isinstance(self.sharing, str) else self.sharing
