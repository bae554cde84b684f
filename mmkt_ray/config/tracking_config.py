"""Where results are also written, for the tools that teams keep them in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmkt_ray.section import Section


class TrackingConfig(Section):
    """Settings, metrics and the report's place of each model, besides the run folder.
    Local folders; nothing is sent anywhere."""

    mlflow: str | None = Field(None, description="folder of an MLflow file store; package mlflow-skinny; null: none")
    tensorboard: str | None = Field(None, description="folder for TensorBoard event files; null: none")
    wandb: Literal["offline"] | None = Field(
        None, description="offline: Weights & Biases files in <run>/wandb, for `wandb sync`; package wandb; null: none"
    )
