"""`huggingface`: texts, images and sounds through a network in a local folder, which says itself what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import EncoderSection, ListedEncoder
from mmkt_ray.encoders.pretrained.adaptable import AdaptableSection
from mmkt_ray.encoders.pretrained.folder import read_config_json
from mmkt_ray.encoders.pretrained.weights import require
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    from mmkt_ray.encoders.pretrained import folder_images, sound_networks, text_networks
    from mmkt_ray.kinds.modality_kind import ModalityKind
else:
    folder_images, sound_networks, text_networks = (
        lazy(f"mmkt_ray.encoders.pretrained.{name}") for name in ("folder_images", "sound_networks", "text_networks")
    )


class HuggingFaceEncoder(ListedEncoder):
    """Chooses the network by the modality's kind and by `model_type` in the folder's config.json."""

    kinds: ClassVar[tuple[str, ...]] = ("text", "image", "audio")

    class Section(AdaptableSection):
        """A network from a local Hugging Face folder with safetensors, frozen: text (BERT, E5, ModernBERT, .., pooled
        as the folder's modules.json says), image (ViT, DINOv2, DINOv3, ..), sound (Whisper, wav2vec 2.0, HuBERT, ..),
        or a tower of CLIP, SigLIP or CLAP; extra `pretrained`."""

        name: Literal["huggingface"] = "huggingface"
        folder: str = Field(
            description="folder with config.json, model.safetensors, and tokenizer.json or preprocessor_config.json"
        )
        max_tokens: int = Field(128, ge=4, le=32_768, description="texts are cut to this many tokens")
        precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")
        prefix: str | None = Field(
            None,
            description="put before each text, e.g. 'query: ' for E5; null: the folder's own default, if it has one",
        )
        seconds: float = Field(10.0, gt=0, le=600, description="sounds are cut to the middle of this length")
        reads: Literal["text", "image", "audio"] = Field("text", description="set by itself: the modality's kind")

        later: ClassVar[frozenset[str]] = frozenset({"prefix", "seconds", "reads", "adapt"})

        @property
        def files(self) -> dict[str, str]:
            return {"folder": self.folder}

        def of_kind(self, kind: ModalityKind) -> EncoderSection:
            known = kind.name in HuggingFaceEncoder.kinds
            return self.model_copy(update={"reads": kind.name}) if known else self

    @classmethod
    def of(cls, config: Any) -> Any:
        require(config.name, "transformers", "tokenizers")
        model_type = str(read_config_json(Path(config.folder)).get("model_type"))
        if config.reads == "image":
            return folder_images.HuggingFaceImageEncoder(config)
        if config.reads == "audio":
            return sound_networks.network_of(model_type, config)
        aligned = model_type in text_networks.ALIGNED
        return (text_networks.AlignedTextNetwork if aligned else text_networks.TextNetwork)(config)
