"""Modalities, their encoders and reducers; tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from mmkt_ray.encoders.base import CustomEncoder, EncoderSection
from mmkt_ray.encoders.catalog import ENCODERS
from mmkt_ray.encoders.reduce import REDUCERS, ReduceSection
from mmkt_ray.kinds.modalities import MODALITY_KINDS, ModalityKind
from mmkt_ray.section import Once, OneOf, Section

EncoderConfig = Annotated[EncoderSection, OneOf("encoder", ENCODERS, elsewhere=CustomEncoder)]
ReduceConfig = Annotated[ReduceSection, OneOf("reducer", REDUCERS)]


class ModalityConfig(Section):
    """One modality: what it is, how it is encoded, how its features are reduced."""

    kind: Annotated[ModalityKind, OneOf("kind of modality", MODALITY_KINDS)] = Field(
        description="what the column holds: " + "; ".join(f"{name}: {kind.holds}" for name, kind in MODALITY_KINDS.items())
    )
    encoder: EncoderConfig = Field(description="raw values -> feature vectors")
    reduce: ReduceConfig | None = Field(
        None, description="features -> fewer features: " + "; ".join(f"{name}: {r.does}" for name, r in REDUCERS.items())
    )
    hidden_dim: int | None = Field(
        None, ge=1, description="tower width under sharing: separate; null: from the features' width"
    )

    @field_validator("encoder")
    @classmethod
    def _of_this_kind(cls, encoder: EncoderSection, info: ValidationInfo) -> EncoderSection:
        """The encoder knows what it reads."""
        return encoder.for_kind(info.data["kind"].name) if "kind" in info.data else encoder


class TaskConfig(Section):
    """One label column to predict."""

    kind: Literal["multiclass", "binary", "multilabel"] = Field(
        "multiclass",
        description="one of several classes, one of two (the later in sorted order is the positive one), or any number of "
        "classes per sample (a list in the source, or a string split at `separator`)",
    )
    separator: str = Field("|", min_length=1, description="multilabel: what separates the classes in a string")
    inputs: Annotated[tuple[str, ...] | None, Once] = Field(None, description="modalities that the task may read; null: all")
    label_frac: float | None = Field(
        None, gt=0, le=1, description="share of the task's train labels that is used; null: training.label_frac"
    )
    loss_weight: float = Field(1.0, gt=0, description="factor of the task's loss")
