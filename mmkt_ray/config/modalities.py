"""Modalities, their encoders and reducers; tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, PlainValidator, Tag, model_validator

from mmkt_ray.config.section import Once, Section, name_in, named
from mmkt_ray.errors import unknown_name
from mmkt_ray.kinds.base import TaskKind
from mmkt_ray.kinds.tasks import Multiclass, task_kind


class CnnEncoder(Section):
    """Small convolutional network, trained here on one modality and one task, then frozen."""

    name: Literal["cnn"] = "cnn"
    pretrain: str = Field(description="the task it is trained on")
    image_size: int = Field(32, ge=9, le=256, description="side in pixels that images are resized to")
    width: int = Field(64, ge=8, description="channels of the first block; later blocks are multiples")
    epochs: int = Field(10, ge=1, description="passes over the train split")
    batch_size: int = Field(500, ge=2, description="images per optimiser step, over all workers")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: the recipe's")
    augment: Annotated[tuple[Literal["flip", "crop", "cutout"], ...], Once] = Field(
        ("flip", "crop"), description="training augmentation; cutout pays in longer runs"
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of training and encoding")
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 trains in one process on all its cores")


class PixelsEncoder(Section):
    """Shallow image features without training: colour thumbnail and oriented-gradient histograms."""

    name: Literal["pixels"] = "pixels"
    image_size: int = Field(32, ge=8, le=256, description="side in pixels that images are resized to")


class TfidfEncoder(Section):
    """TF-IDF with scikit-learn's options and results, fitted in one distributed pass."""

    name: Literal["tfidf"] = "tfidf"
    lowercase: bool = Field(True, description="lower-case before tokenising")
    ngram_range: tuple[int, int] = Field((1, 1), description="shortest and longest n-gram")
    min_df: int = Field(1, ge=1, description="drop terms in fewer documents")
    max_df: float = Field(1.0, gt=0, le=1, description="drop terms in more than this share of documents")
    max_features: int | None = Field(None, ge=1, description="keep the most frequent terms only")
    stop_words: Literal["english"] | None = Field(None, description="stop word list")
    sublinear_tf: bool = Field(False, description="1 + log(tf) in place of tf")
    norm: Literal["l1", "l2"] | None = Field("l2", description="row normalisation")


class LogMelCnnEncoder(Section):
    """Log-mel spectrogram as an image for a small convolutional network, trained here on one modality and one task."""

    name: Literal["logmel_cnn"] = "logmel_cnn"
    pretrain: str = Field(description="the task it is trained on")
    sample_rate: int = Field(8000, ge=1000, le=192_000, description="samples per second that audio is resampled to")
    seconds: float = Field(1.0, gt=0, le=60, description="length that clips are cut or padded to")
    image_size: int = Field(32, ge=9, le=256, description="mel bands, and time steps that the clip is divided into")
    width: int = Field(32, ge=8, description="channels of the first block; later blocks are multiples")
    epochs: int = Field(10, ge=1, description="passes over the train split")
    batch_size: int = Field(128, ge=2, description="clips per optimiser step, over all workers")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: the recipe's")
    augment: Annotated[tuple[Literal["crop", "cutout"], ...], Once] = Field(
        ("crop",), description="training augmentation: shift in time and pitch, cutout"
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of training and encoding")
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 trains in one process on all its cores")


class TorchvisionEncoder(Section):
    """Any torchvision classification backbone, frozen; its penultimate features."""

    name: Literal["torchvision"] = "torchvision"
    architecture: str = Field("resnet18", description="name in torchvision.models, e.g. resnet18, vit_b_16")
    weights: str = Field(
        "download", description="a .safetensors or .pth state dict (weights only), or download: torchvision's default"
    )
    image_size: int = Field(224, ge=32, le=1024, description="side in pixels that images are resized to")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of encoding")


class EfficientNetLite0Encoder(Section):
    """EfficientNet-Lite0 of ImageNet, its weights from an installed package; extra `pretrained`."""

    name: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    image_size: int = Field(128, ge=32, le=1024, description="side in pixels that images are resized to")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")


class MinilmEncoder(Section):
    """all-MiniLM-L6-v2 sentence encoder, its weights from an installed package; extra `pretrained`."""

    name: Literal["minilm"] = "minilm"
    max_tokens: int = Field(128, ge=4, le=512, description="texts are cut to this many tokens")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")


class HuggingFaceEncoder(Section):
    """A BERT-like text encoder from a Hugging Face folder with safetensors, mean-pooled; extra `pretrained`."""

    name: Literal["huggingface"] = "huggingface"
    folder: str = Field(description="folder with config.json, tokenizer.json and model.safetensors")
    max_tokens: int = Field(128, ge=4, le=512, description="texts are cut to this many tokens")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")


class CustomEncoder(Section):
    """An encoder of the user's, named `module:Class`."""

    name: str = Field(description="module:Class, importable on every node")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of its constructor")


KINDS = {  # every encoder that comes with the project, and what it reads
    "cnn": "image",
    "pixels": "image",
    "tfidf": "text",
    "logmel_cnn": "audio",
    "torchvision": "image",
    "efficientnet-lite0": "image",
    "minilm": "text",
    "huggingface": "text",
}


def _encoder_tag(value: Any) -> str:
    name = name_in(value)
    if name not in KINDS and ":" not in name:
        raise unknown_name("encoder", name, [*KINDS, "your.module:Class"])
    return "custom" if ":" in name else name


EncoderConfig = Annotated[
    Annotated[CnnEncoder, Tag("cnn")]
    | Annotated[PixelsEncoder, Tag("pixels")]
    | Annotated[TfidfEncoder, Tag("tfidf")]
    | Annotated[LogMelCnnEncoder, Tag("logmel_cnn")]
    | Annotated[TorchvisionEncoder, Tag("torchvision")]
    | Annotated[EfficientNetLite0Encoder, Tag("efficientnet-lite0")]
    | Annotated[MinilmEncoder, Tag("minilm")]
    | Annotated[HuggingFaceEncoder, Tag("huggingface")]
    | Annotated[CustomEncoder, Tag("custom")],
    Discriminator(_encoder_tag),
    BeforeValidator(named),
]


class ReduceConfig(Section):
    """Linear reduction of one modality's features, fitted exactly on the train split."""

    name: Literal["pca", "svd", "standardize"] = Field(
        description="pca (centred), svd (uncentred, sparse input too), standardize (no change of width)"
    )
    dim: int | None = Field(None, ge=1, description="features kept (pca and svd)")

    @model_validator(mode="after")
    def _dim_where_it_means_something(self) -> ReduceConfig:
        if (self.name == "standardize") != (self.dim is None):
            raise ValueError("pca and svd need dim; standardize takes none")
        return self


class ModalityConfig(Section):
    """One modality: what it is, how it is encoded, how its features are reduced."""

    kind: Literal["image", "text", "audio"] = Field(
        description="what the column holds: image and audio = encoded bytes of a file, text = string"
    )
    encoder: EncoderConfig = Field(description="raw values -> feature vectors")
    reduce: Annotated[ReduceConfig, BeforeValidator(named)] | None = Field(
        None, description="features -> fewer features"
    )
    hidden_dim: int | None = Field(
        None, ge=1, description="tower width under sharing: separate; null: from the features' width"
    )


class TaskConfig(Section):
    """One label column to predict."""

    kind: Annotated[
        TaskKind, PlainValidator(task_kind), PlainSerializer(lambda kind: kind.as_json(), return_type=Any)
    ] = Field(
        Multiclass(),
        description="one of several classes, one of two (the later in sorted order is the positive one), or any number of "
        "classes per sample (a list in the source, or a string split at `separator`)",
    )
    separator: str = Field("|", min_length=1, description="multilabel: what separates the classes in a string")
    inputs: Annotated[tuple[str, ...] | None, Once] = Field(None, description="modalities that the task may read; null: all")
    label_frac: float | None = Field(
        None, gt=0, le=1, description="share of the task's train labels that is used; null: training.label_frac"
    )
    loss_weight: float = Field(1.0, gt=0, description="factor of the task's loss")
