"""How models are fitted and evaluated, and how shards stream."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmkt_ray.config.section import Section


class TrainingConfig(Section):
    """How the model is fitted."""

    epochs: int = Field(30, ge=1, description="passes over the train split at most")
    batch_size_per_worker: int = Field(256, ge=1, description="samples per step on each worker")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (AdamW, linear warm-up, cosine decay)")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Literal["balanced"] | None = Field(
        None, description="balanced: weight classes by inverse train frequency"
    )
    patience: int = Field(
        0,
        ge=0,
        description="stop after this many epochs without a better validation score; 0: never; the best epoch is kept",
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 runs in this process without ceremony")


class EvaluationConfig(Section):
    """How results are told."""

    bootstrap_samples: int = Field(1000, ge=100, description="resamples of the test rows for each interval")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="coverage of the intervals")
    baselines: bool = Field(True, description="majority class and logistic regression, each modality and concatenated")


class ExtractConfig(Section):
    """How raw shards stream through the encoders."""

    chunk_rows: int = Field(1024, ge=1, description="rows of one unit of work and of one Parquet part")
    chunk_bytes: int = Field(
        32_000_000, ge=1, description="raw bytes of one unit of work at most (one sample may exceed it)"
    )
    encode_batch_size: int = Field(256, ge=1, description="samples per forward pass; fixed, the last one is padded")
    num_actors: int | None = Field(
        None, ge=1, description="encoder actors; null: one per GPU, or one per two logical CPUs"
    )
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of each encoder actor; null: 1 if the cluster has any, else 0"
    )
