"""Tiny random networks in Hugging Face folders, as `save_pretrained` writes them."""

import importlib
from pathlib import Path
from typing import Any

import torch

WORDS = (
    *("a", "cat", "sits", "on", "the", "mat", "kitten", "is", "sitting", "rug"),
    *("interest", "rates", "fell", "again", "query", ":", "!"),
)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def transformers() -> Any:
    return importlib.import_module("transformers")


def save(model: Any, folder: Path) -> Path:
    """A network with random weights, none of which is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, **options: Any) -> None:
    """Words as tokens; [CLS] and [SEP] around each text."""
    tokenizers = importlib.import_module("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", **options,
    )  # fmt: skip
    fast.save_pretrained(folder)


def text_folder(folder: Path, kind: str = "Bert") -> Path:
    """BERT, RoBERTa or ModernBERT."""
    options: dict[str, Any] = {"vocab_size": 32, "max_position_embeddings": 66, "pad_token_id": 0, **SMALL}
    if kind == "ModernBert":
        options |= {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
        options |= {"bos_token_id": 2, "eos_token_id": 3}
    config = getattr(transformers(), f"{kind}Config")(**options)
    save(getattr(transformers(), f"{kind}Model")(config), folder)
    save_tokenizer(folder)
    return folder


def image_folder(folder: Path, kind: str) -> Path:
    """A network over images of 24 x 24 pixels with the processor that belongs to its kind."""
    library = transformers()
    size = {"image_size": 24, "patch_size": 8}
    cropped = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True}
    if kind in ("CLIP", "Siglip"):
        text = {
            "vocab_size": 32,
            "max_position_embeddings": 12,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "bos_token_id": 2,
        }
        extra = {"projection_dim": 10} if kind == "CLIP" else {"vision_use_head": True}
        parts = {"text_config": {**SMALL, **text}, "vision_config": {**SMALL, **size, **extra}}
        if kind == "CLIP":
            parts["text_config"]["projection_dim"] = 10
        config = getattr(library, f"{kind}Config")(**parts, **({"projection_dim": 10} if kind == "CLIP" else {}))
        save(getattr(library, f"{kind}Model")(config), folder)
        processor = library.CLIPImageProcessor(**cropped) if kind == "CLIP" else None
        (processor or library.SiglipImageProcessor(size={"height": 24, "width": 24})).save_pretrained(folder)
        save_tokenizer(folder)
        return folder
    if kind == "ConvNext":
        config = library.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], image_size=32)
        save(library.ConvNextModel(config), folder)
        cropped |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
        library.BitImageProcessor(**cropped).save_pretrained(folder)
        return folder
    config = getattr(library, f"{kind}Config")(**SMALL, **size)
    save(getattr(library, f"{kind}Model")(config), folder)
    own = (
        library.ViTImageProcessor(size={"height": 24, "width": 24})
        if kind == "ViT"
        else library.BitImageProcessor(**cropped)
    )
    own.save_pretrained(folder)
    return folder


def sound_folder(folder: Path, kind: str) -> Path:
    """Whisper, Wav2Vec2 or Clap."""
    library = transformers()
    if kind == "Whisper":
        config = library.WhisperConfig(
            vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=20,
            max_source_positions=100,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
            begin_suppress_tokens=None,
        )  # fmt: skip
        save(library.WhisperModel(config), folder)
        library.WhisperFeatureExtractor(feature_size=20, chunk_length=2).save_pretrained(folder)
    elif kind == "Wav2Vec2":
        convolutions = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
        settings = library.Wav2Vec2Config(
            **SMALL, **convolutions, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=12
        )
        save(library.Wav2Vec2Model(settings), folder)
        library.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    else:
        audio = {
            "spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "hidden_size": 16,
            "num_attention_heads": [2, 2], "window_size": 4, "patch_size": 4, "patch_stride": [4, 4],
            "projection_dim": 10, "enable_fusion": False, "num_classes": 2,
        }  # fmt: skip
        text = {"vocab_size": 32, "max_position_embeddings": 40, "projection_dim": 10, "pad_token_id": 0, **SMALL}
        save(library.ClapModel(library.ClapConfig(text_config=text, audio_config=audio, projection_dim=10)), folder)
        extractor = library.ClapFeatureExtractor(
            feature_size=16, sampling_rate=8000, hop_length=80, fft_window_size=256, max_length_s=1,
            frequency_max=4000, truncation="rand_trunc", padding="repeatpad",
        )  # fmt: skip
        extractor.save_pretrained(folder)
        save_tokenizer(folder)
    return folder
