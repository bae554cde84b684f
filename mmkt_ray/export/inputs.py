"""What an exported graph takes for each modality, and which part of the encoder is inside the graph.

An encoder whose work is tensor arithmetic goes into the graph. What is no such arithmetic (decoding a file, resizing,
splitting a text) happens before, in `GraphInputs.arrays`, and the graph's metadata says it in words. An encoder that
is not in `INPUTS` stays outside: its features are the input.

Axes: B rows, Z non-zero values of all rows, S side of a square image in pixels, L tokens of a text, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from mmkt_ray.models import FeatureBatch, SparseBatch
from mmkt_ray.models.sparse import sparse_matmul

Arrays = dict[str, np.ndarray]
Tensors = Mapping[str, Tensor]
ROWS = "rows"  # the batch axis, of any length


@dataclass(frozen=True)
class GraphInput:
    """One tensor that the graph takes. shape: lengths of the axes; a name for an axis of any length."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "meaning": self.meaning}


class GraphInputs(nn.Module):
    """Base: one modality's inputs, how raw values become them, and how the graph makes features of them."""

    inside = ""  # what of the encoder is in the graph, in words
    longest: Mapping[str, int] = {}  # of an axis of any length up to a limit

    def __init__(self, modality: str, encoder: Any) -> None:
        super().__init__()
        self.modality, self.encoder = modality, encoder

    @property
    def inputs(self) -> list[GraphInput]:
        """All but the presence, which every modality has."""
        raise NotImplementedError

    def arrays(self, values: Sequence[Any]) -> Arrays:
        """Decoded values (B,), None where a row has none -> the inputs."""
        raise NotImplementedError

    def forward(self, tensors: Tensors, present: Tensor) -> FeatureBatch:
        """The inputs, present (B,) bool -> features (B, D); what absent rows have does not matter."""
        raise NotImplementedError

    def vocabulary(self) -> dict[str, Any] | None:
        """What whoever makes the inputs needs beside the graph, JSON-able; None: nothing."""
        return None

    def name(self, part: str) -> str:
        """Name of an input."""
        return f"{self.modality}_{part}"


def prepared(encoder: Any, value: Any) -> Any:
    """A value as `encode` takes it, of one as decoded or as the decoding process has prepared it already."""
    size = getattr(encoder, "input_size", None)
    if isinstance(value, str):  # there is nothing to decode: `encode` takes texts as they are
        return value
    if not hasattr(encoder, "prepare") or (size is not None and value.shape == size.shape):
        return value
    return encoder.prepare(value)


class PixelInputs(GraphInputs):
    """Tensor arithmetic over images that were resized before; of sounds, over their spectrograms."""

    def __init__(self, modality: str, encoder: Any) -> None:
        super().__init__(modality, encoder)
        self.side, self.network = encoder.config.image_size, getattr(encoder, "model", None)
        self.inside = f"the encoder {encoder.config.name}, in float32"

    @property
    def inputs(self) -> list[GraphInput]:
        return [GraphInput(self.name("pixels"), "uint8", (ROWS, 3, self.side, self.side), self.meaning)]

    @property
    def meaning(self) -> str:
        """What the pixels are."""
        how = Resampling(self.encoder.input_size.resampling).name.lower()
        return (
            f"RGB, channels first, resized to {self.side} x {self.side} pixels whatever the aspect ratio "
            f"({how} with antialiasing, as Pillow does)"
        )

    def arrays(self, values: Sequence[Any]) -> Arrays:
        images = np.zeros((len(values), 3, self.side, self.side), np.uint8)
        for i, value in enumerate(values):
            if value is not None:
                images[i] = prepared(self.encoder, value)
        return {self.name("pixels"): images}

    def features(self, pixels: Tensor) -> Tensor:
        """The encoder's arithmetic."""
        found: Tensor = (self.encoder if self.network is None else self.network).features(pixels)
        return found

    def forward(self, tensors: Tensors, present: Tensor) -> FeatureBatch:
        return self.features(tensors[self.name("pixels")])


class SpectrogramInputs(PixelInputs):
    """Sounds: the spectrogram is made before."""

    @property
    def meaning(self) -> str:
        return (
            "log-mel spectrogram and its first two differences in time as three channels, mel bands by time steps, "
            f"as mmkt_ray.encoders.audio makes it at {self.encoder.config.sample_rate} samples per second"
        )


class BackboneInputs(PixelInputs):
    """A pretrained network over images, which are normalised in the graph."""

    def __init__(self, modality: str, encoder: Any) -> None:
        encoder.load()
        super().__init__(modality, encoder)

    def features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.encoder.features(self.encoder.normalised(pixels))
        return found


class TokenInputs(GraphInputs):
    """A pretrained network over tokens of texts; the tokenizer stays outside."""

    def __init__(self, modality: str, encoder: Any) -> None:
        super().__init__(modality, encoder)
        encoder.load()
        self.network = encoder.model
        self.longest = {f"{modality}_tokens": encoder.max_tokens}
        self.inside = f"the network of encoder {encoder.config.name}, in float32; its tokenizer is not"

    @property
    def inputs(self) -> list[GraphInput]:
        most, shape = self.encoder.max_tokens, (ROWS, f"{self.modality}_tokens")
        ids = f"token ids of the encoder's tokenizer.json, texts cut to {most} tokens and padded to the longest"
        return [
            GraphInput(self.name("ids"), "int64", shape, ids),
            GraphInput(self.name("mask"), "int64", shape, "1 for a token, 0 for padding; the first is 1 in every row"),
        ]

    def arrays(self, values: Sequence[Any]) -> Arrays:
        tokens = self.encoder.tokens(["" if value is None else value for value in values])
        ids = np.full((len(tokens), max(2, *map(len, tokens))), self.encoder.pad_token, np.int64)
        mask = np.zeros_like(ids)
        for row, own in enumerate(tokens):
            ids[row, : len(own)], mask[row, : max(1, len(own))] = own, 1
        return {self.name("ids"): ids, self.name("mask"): mask}

    def forward(self, tensors: Tensors, present: Tensor) -> FeatureBatch:
        features: Tensor = self.encoder.pooled(tensors[self.name("ids")], tensors[self.name("mask")])
        return features


class FeatureInputs(GraphInputs):
    """Features that an encoder makes outside the graph, dense rows."""

    def __init__(self, modality: str, encoder: Any) -> None:
        super().__init__(modality, encoder)
        self.inside = "nothing: the encoder's features are the input"

    @property
    def inputs(self) -> list[GraphInput]:
        return [GraphInput(self.name("features"), "float32", (ROWS, self.encoder.dim), self.meaning)]

    @property
    def meaning(self) -> str:
        """What the features are."""
        return f"what {type(self.encoder).__name__}.encode gives, zeros in rows without {self.modality}"

    def arrays(self, values: Sequence[Any]) -> Arrays:
        features = np.zeros((len(values), self.encoder.dim), np.float32)
        there = [i for i, value in enumerate(values) if value is not None]
        if there:
            features[there] = self.encoder.encode([values[i] for i in there])
        return {self.name("features"): features}

    def forward(self, tensors: Tensors, present: Tensor) -> FeatureBatch:
        return tensors[self.name("features")]


class SparseInputs(FeatureInputs):
    """Sparse features that an encoder makes outside the graph, value by value, in any order."""

    @property
    def inputs(self) -> list[GraphInput]:
        axis = (f"{self.modality}_values",)
        return [
            GraphInput(self.name("rows"), "int64", axis, "which row of the batch a value is of"),
            GraphInput(self.name("columns"), "int64", axis, f"which of the {self.encoder.dim} features it is"),
            GraphInput(self.name("values"), "float32", axis, f"non-zero values of {self.meaning}"),
        ]

    def arrays(self, values: Sequence[Any]) -> Arrays:
        there = np.array([i for i, value in enumerate(values) if value is not None], np.int64)
        features = self.encoder.encode([values[i] for i in there]).tocoo()
        rows, columns = there[features.row], features.col.astype(np.int64)
        return {self.name("rows"): rows, self.name("columns"): columns, self.name("values"): features.data}

    def forward(self, tensors: Tensors, present: Tensor) -> FeatureBatch:
        rows, columns, values = (tensors[self.name(part)] for part in ("rows", "columns", "values"))
        offsets = torch.zeros(present.shape[0] + 1, dtype=torch.int64)  # tell the number of rows alone
        return SparseBatch(columns, offsets, values, rows)


class TermInputs(SparseInputs):
    """TF-IDF weights of texts."""

    @property
    def meaning(self) -> str:
        return f"TF-IDF weights as vocabulary-{self.modality}.json says, none in rows without {self.modality}"

    def vocabulary(self) -> dict[str, Any]:
        """Terms in column order, their idf, and the options of scikit-learn's TfidfVectorizer."""
        return dict(self.encoder.vocabulary())


INPUTS: dict[str, type[GraphInputs]] = {
    "cnn": PixelInputs,
    "pixels": PixelInputs,
    "logmel_cnn": SpectrogramInputs,
    "torchvision": BackboneInputs,
    "efficientnet-lite0": BackboneInputs,
    "tfidf": TermInputs,
    "minilm": TokenInputs,
    "huggingface": TokenInputs,
}


def graph_inputs(modality: str, name: str, encoder: Any) -> GraphInputs:
    """The inputs of a modality whose encoder has this name in the config."""
    other = SparseInputs if getattr(encoder, "sparse", False) else FeatureInputs
    return INPUTS.get(name, other)(modality, encoder)


class LinearReduction(nn.Module):
    """A fitted reducer: (B, D) -> (B, K), (x - mean) W, or (x - mean) / scale."""

    mean: Tensor | None
    weight: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, reducer: Any) -> None:
        super().__init__()
        tensors, _ = reducer.state()
        mean, weight, scale = (tensors.get(name) for name in ("mean", "components", "scale"))
        for name, value in (("mean", mean), ("weight", weight), ("scale", scale)):
            self.register_buffer(name, None if value is None else torch.from_numpy(np.float32(value)))
        shift = None if mean is None or weight is None else -(mean @ weight)
        self.register_buffer("shift", None if shift is None else torch.from_numpy(np.float32(shift)))

    def forward(self, x: FeatureBatch) -> Tensor:
        if isinstance(x, SparseBatch):
            if self.weight is not None:
                product = sparse_matmul(x, self.weight)
                return product if self.shift is None else product + self.shift
            assert self.mean is not None, "a reducer has a mean or a weight"
            x = to_dense(x, self.mean.shape[0])
        x = x if self.mean is None else x - self.mean
        x = x if self.weight is None else x @ self.weight
        return x if self.scale is None else x / self.scale


class Selection(nn.Module):
    """A fitted `select` reducer: (B, D) -> (B, K) some columns, sparse where they were."""

    columns: Tensor
    place: Tensor

    def __init__(self, reducer: Any) -> None:
        super().__init__()
        tensors, rest = reducer.state()
        columns = torch.from_numpy(tensors["columns"])
        place = torch.full((rest["width"],), -1, dtype=torch.int64)
        place[columns] = torch.arange(len(columns))
        self.register_buffer("columns", columns)
        self.register_buffer("place", place)

    def forward(self, x: FeatureBatch) -> FeatureBatch:
        if not isinstance(x, SparseBatch):
            return x[:, self.columns]
        place = self.place[x.indices]
        # what is not chosen stays as a zero: how many values there are must not depend on them
        return SparseBatch(place.clamp(min=0), x.offsets, x.values * (place >= 0), x.rows)


def reduction(reducer: Any) -> nn.Module:
    """A fitted reducer in a graph."""
    return Selection(reducer) if "columns" in reducer.state()[0] else LinearReduction(reducer)


def to_dense(x: SparseBatch, width: int) -> Tensor:
    """(B, D) with zeros where X holds nothing."""
    assert x.rows is not None, "of an exported graph"
    flat = x.values.new_zeros((x.offsets.shape[0] - 1) * width)
    return flat.index_add(0, x.rows * width + x.indices, x.values).view(-1, width)
