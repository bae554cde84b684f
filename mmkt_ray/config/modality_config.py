"""Modalities, their encoders and reducers; tasks."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from mmkt_ray.config.model_config import MAX_DIM
from mmkt_ray.encoders.catalog import ENCODERS, REDUCERS
from mmkt_ray.encoders.encoder import CustomEncoder, EncoderSection
from mmkt_ray.encoders.reduce import ReduceSection
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.section import Once, OneOf, Section

EncoderConfig = Annotated[EncoderSection, OneOf("encoder", ENCODERS, elsewhere=CustomEncoder)]
ReduceConfig = Annotated[ReduceSection, OneOf("reducer", REDUCERS)]


class ModalityConfig(Section):
    """One modality: what it is, how it is encoded, how its features are reduced."""

    kind: Annotated[ModalityKind, OneOf("kind of modality", MODALITY_KINDS)] = Field(
        description="what the column holds: "
        + "; ".join(f"{name}: {kind.holds}" for name, kind in MODALITY_KINDS.items())
    )
    encoder: EncoderConfig = Field(description="raw values -> feature vectors")
    reduce: ReduceConfig | None = Field(
        None,
        description="features -> fewer features: " + "; ".join(f"{name}: {r.does}" for name, r in REDUCERS.items()),
    )
    hidden_dim: int | None = Field(
        None, ge=1, le=MAX_DIM, description="tower width under sharing: separate; null: from the features' width"
    )

    @model_validator(mode="after")
    def _encoder_knows_the_kind(self) -> ModalityConfig:
        object.__setattr__(self, "encoder", self.encoder.of_kind(self.kind))  # frozen, and not given to anyone yet
        return self


class TaskConfig(Section):
    """One label column to predict."""

    kind: Annotated[
        TaskKind, PlainValidator(task_kind), PlainSerializer(lambda kind: kind.as_json(), return_type=Any)
    ] = Field(
        Multiclass(),
        description="multiclass: one of several classes; binary: of two, the later in sorted order is the positive "
        "one; multilabel: any number of classes per sample (a list in the source, or a string split at `separator`); "
        "ordinal: one of the grades in `order`, lowest first; regression: a number, with `transform` (none, log, sqrt, "
        "standardize, rank), `loss` (squared, absolute, huber, pinball) and the `quantile` of the latter",
    )
    separator: str = Field("|", min_length=1, description="multilabel: what separates the classes in a string")
    inputs: Annotated[tuple[str, ...] | None, Once] = Field(
        None, description="modalities that the task may read; null: all"
    )
    label_frac: float | None = Field(
        None, gt=0, le=1, description="share of the task's train labels that is used; null: training.label_frac"
    )
    loss_weight: float = Field(1.0, gt=0, description="factor of the task's loss")
