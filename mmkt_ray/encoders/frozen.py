"""What encoders that run a frozen network share: where it runs; and the CNN that is trained here.

Axes: B values, S side of a square image, D features, C classes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmkt_ray.encoders.encoder import EncoderTraining, ListedEncoder, check_array
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from mmkt_ray.encoders import cnn, cnn_training
    from mmkt_ray.encoders import device as devices
    from mmkt_ray.encoders.cnn import SmallCNN
    from mmkt_ray.encoders.cnn_training import CNNRecipe
    from mmkt_ray.kinds.labels import Labels
else:
    np, torch = lazy("numpy"), lazy("torch")
    cnn, cnn_training = lazy("mmkt_ray.encoders.cnn"), lazy("mmkt_ray.encoders.cnn_training")
    devices = lazy("mmkt_ray.encoders.device")


class FrozenNetwork(ListedEncoder):
    """A network over prepared images (3, S, S) uint8: where it runs, and how many images a forward pass takes."""

    concurrent = True
    model: Any = None  # None until trained or loaded

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.device = torch.device("cpu")
        self.encode_batch_size = 256
        self._lock = threading.Lock()
        self._forwards: dict[Callable[[Tensor], Tensor], devices.Forward] = {}
        self._forwards_of: Any = None  # the network that they were made for

    def to(self, device: torch.device, encode_batch_size: int) -> None:
        """Move to a device and say how many images a forward pass takes."""
        self.device, self.encode_batch_size = device, encode_batch_size
        self._forwards = {}
        if self.model is not None:
            self.model.to(device, memory_format=torch.channels_last)

    def _apply(self, function: Callable[[Tensor], Tensor], values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """`function` of the images (B, 3, S, S)."""
        with self._lock:
            if self._forwards_of is not self.model:
                self._forwards, self._forwards_of = {}, self.model
            if function not in self._forwards:
                self._forwards[function] = devices.Forward(
                    function, self.device, self.config.precision, self.encode_batch_size
                )
            forward = self._forwards[function]
        return forward(values)


class TrainedCnn(FrozenNetwork):
    """Penultimate features of a `SmallCNN` that was trained on one task; D = 4 * width.
    A subclass says how to `prepare`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.class_names: list[str] = []

    @property
    def dim(self) -> int:
        return int(4 * self.config.width)

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(3, S, S)."""
        return (3, self.config.image_size, self.config.image_size)

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared values (B, 3, S, S) -> (B, D) float32."""
        return self._apply(self._trained().features, values)

    def _trained(self) -> SmallCNN:
        if self.model is None:
            raise DataError(
                f"the {self.config.name} encoder is not trained yet: run `mmkt extract` first, which trains it"
            )
        return self.model

    def recipe(self, seed: int) -> CNNRecipe:
        """The training recipe that the config asks for."""
        asked = self.config.model_dump(
            include={"epochs", "batch_size", "width", "image_size", "augment", "precision", "lr"}
        )
        return cnn_training.CNNRecipe(**{k: v for k, v in asked.items() if v is not None}, seed=seed)

    def train(
        self, values: np.ndarray, labels: Labels, class_names: list[str], training: EncoderTraining
    ) -> dict[str, np.ndarray]:
        """See `encoder.Trained`; values: (N, 3, S, S) uint8."""
        model = cnn_training.fit_cnn(
            values, labels.values, len(class_names), self.recipe(training.seed),
            device=training.device, rank=training.rank, world_size=training.world_size,
            state=training.checkpoint, on_epoch=training.on_epoch,
        )  # fmt: skip
        return {k: v.detach().cpu().numpy() for k, v in model.state_dict().items()}

    def rest_of_state(self, class_names: list[str]) -> dict[str, Any]:
        """How the network is built, and its classes."""
        return {"options": self._options(class_names), "class_names": class_names}

    def _options(self, class_names: list[str]) -> dict[str, int]:
        return {"num_classes": len(class_names), "image_size": self.config.image_size, "width": self.config.width}

    def adopt(self, model: SmallCNN, class_names: list[str]) -> None:
        """Take a trained network."""
        self.model, self.class_names = model.eval(), class_names

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if self.model is None:
            return {}, {}
        tensors = {k: v.detach().cpu().numpy() for k, v in self.model.state_dict().items()}
        return tensors, {"options": self.model.options, "class_names": self.class_names}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        num_classes, width = len(rest["class_names"]), self.config.width
        options = self._options(rest["class_names"])
        if rest["options"] != options:
            raise ValueError(f"the network was built with {rest['options']}, the config and the classes say {options}")
        # before memory is taken
        check_array("head.weight", tensors["head.weight"], "float32", (num_classes, 4 * width))
        model = cnn.SmallCNN(**options)
        model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise ValueError("the network has NaN or infinite weights")
        self.adopt(model.to(memory_format=torch.channels_last), rest["class_names"])
