"""Pretrained encoders that may be trained on one modality and one task before they are frozen.

Axes: B values, N values of a set, D features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import EncoderSection, EncoderTraining, check_array
from mmkt_ray.encoders.pretrained.weights import FixedWeights
from mmkt_ray.lazy import lazy
from mmkt_ray.section import Once, Section

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from mmkt_ray.encoders.pretrained import adapt_training, adapted_weights
    from mmkt_ray.kinds.labels import Labels
else:
    np, torch = lazy("numpy"), lazy("torch")
    adapt_training = lazy("mmkt_ray.encoders.pretrained.adapt_training")
    adapted_weights = lazy("mmkt_ray.encoders.pretrained.adapted_weights")

How = Literal["lora", "last_layers", "full"]


class Adapt(Section):
    """How an encoder is trained on a task. A head on its features is fitted first, then both are trained together."""

    task: str = Field(description="the task that it is trained on, of any kind")
    how: How = Field(
        "lora",
        description="lora: low-rank changes of the linear layers; last_layers: the last blocks and what follows "
        "them; full: all",
    )
    epochs: int = Field(3, ge=1, description="passes over the train split at most")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate; null: 1e-3 for lora, 1e-4 for last_layers, 3e-5 for full"
    )
    batch_size: int = Field(32, ge=1, description="values per optimiser step, over all workers")
    accumulate: int = Field(1, ge=1, description="forward passes that a worker's share of a step is divided into")
    rank: int = Field(8, ge=1, description="lora: rank of the changes")
    num_layers: int = Field(2, ge=1, description="last_layers: how many blocks")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, of AdamW")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of the target that is spread over all classes; numbers and grades have none"
    )
    augment: Annotated[tuple[Literal["flip", "crop", "cutout"], ...], Once] = Field(
        ("flip", "crop"),
        description="of images: mirror, shift up to a twelfth, blank a square; [] where left and right differ",
    )
    patience: int = Field(
        2, ge=1, description="stop after so many epochs without a lower loss on val; the best one is kept"
    )
    folds: int = Field(
        1,
        ge=1,
        le=20,
        description="more than 1: so many networks, each trained without one part of train. A train value gets the "
        "features of the one that did not learn it, any other the mean of all: so that a model can trust the "
        "features of its train rows",
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 trains in one process on all its cores")


class AdaptableSection(EncoderSection):
    """Base of the sections of such encoders."""

    adapt: Adapt | None = Field(
        None, description="train it on one task first; its features are cached as ever. null: as it is"
    )
    later: ClassVar[frozenset[str]] = frozenset({"adapt"})

    @property
    def task(self) -> str | None:
        return self.adapt.task if self.adapt else None

    @property
    def epochs(self) -> int:
        """Passes over the train split at most."""
        return self.adapt.epochs * self.adapt.folds if self.adapt else 0

    @property
    def num_workers(self) -> int:
        """Ray Train workers."""
        return self.adapt.num_workers if self.adapt else 1


class Adaptable(FixedWeights):
    """Weights that lie elsewhere and, where they are adapted, what of them is changed:
    that alone is the encoder's state."""

    dim: int
    held_out_rows: ClassVar[bool] = True  # training takes rows of val too, to know when to stop
    weight_changes: dict[str, np.ndarray]
    sets: Sequence[dict[str, Tensor]] = ()  # of several folds: the weights that differ between them
    learnt: np.ndarray | None = None  # of several folds: hashes of the values that they were trained on, sorted

    @property
    @abstractmethod
    def prepared_shape(self) -> tuple[int, ...]:
        """Of a prepared value."""

    @abstractmethod
    def forward_features(self, batch: Tensor) -> Tensor:
        """Prepared values (B, ..) on the device -> features (B, D), through which gradients go."""

    @abstractmethod
    def encode_as_is(self, values: Sequence[Any]) -> np.ndarray:
        """As `encode`, by the weights that the network has now."""

    def augmented(self, batch: Tensor, seed: Sequence[int]) -> Tensor:
        """Prepared values (B, ..) as a training step sees them: changed in ways that leave the class as it is."""
        return batch

    def contents(self, values: Sequence[Any]) -> list[bytes]:
        """What values are told apart by, whether prepared or as `encode` takes them."""
        return [np.ascontiguousarray(value).tobytes() for value in values]

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Values (B,), prepared where their kind has a decoder -> (B, D) float32."""
        self.load()
        if not self.sets:
            return self.encode_as_is(values)
        assert self.learnt is not None
        hashes = adapted_weights.hashes_of(self.contents(values))
        seen, fold = np.isin(hashes, self.learnt), adapted_weights.fold_of(hashes, len(self.sets))
        features = np.zeros((len(values), self.dim), dtype=np.float32)
        for number, weights in enumerate(self.sets):
            rows = np.flatnonzero(~seen | (fold == number))
            if len(rows):
                self._take(weights)
                share = np.where(seen[rows], 1, 1 / len(self.sets)).astype(np.float32)
                features[rows] += share[:, None] * self.encode_as_is([values[row] for row in rows.tolist()])
        return features

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)

    def train(
        self, values: np.ndarray, labels: Labels, class_names: list[str], training: EncoderTraining
    ) -> dict[str, np.ndarray]:
        """See `encoder.Trained`. Returns the tensors that differ from the pretrained ones."""
        self.device = training.device
        return adapt_training.adapt(self, values, labels, labels.kind.width(class_names), training)

    def rest_of_state(self, class_names: list[str]) -> dict[str, Any]:
        """What the changes belong to."""
        self.load()
        return {"weights_sha256": self.digest, "class_names": class_names}

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if self.config.adapt is None:
            return super().state()
        return self.weight_changes, self.rest_of_state(self.class_names)

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Raises: DataError for other weights; ValueError for changes that do not fit them."""
        self.model = None  # changes are added to what was read
        super().load_state({}, rest)
        if self.config.adapt is None:
            return
        self.weight_changes, self.class_names = tensors, [str(name) for name in rest["class_names"]]
        own = dict(self.model.named_parameters())
        sets = []
        for changes in adapted_weights.by_fold(tensors, self.config.adapt.folds):
            sets.append(adapted_weights.changed_weights(changes, own, self.config.adapt))
            for name, value in sets[-1].items():
                check_array(name, value.numpy(), "float32", tuple(own[name].shape))
        if len(sets) == 1:
            self._take(sets[0])
        else:
            self.sets, self.learnt = (
                sets,
                check_array(adapted_weights.LEARNT, tensors[adapted_weights.LEARNT], "uint64", (None,)),
            )
