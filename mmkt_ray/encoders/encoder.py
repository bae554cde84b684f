"""What an encoder and a reducer are.

Axes: B values in a batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import Field, model_serializer

from mmkt_ray.lazy import lazy
from mmkt_ray.section import Choice, without_later

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp
    import torch

    from mmkt_ray.kinds.labels import Labels
    from mmkt_ray.kinds.modality_kind import ModalityKind
else:
    np = lazy("numpy")

Features: TypeAlias = "np.ndarray | sp.csr_matrix"  # (B, D) float32
Fit = Literal["none", "statistics", "training"]


class EncoderSection(Choice):
    """Base of the config section of an encoder; the `name` of each is its entry in ENCODERS."""

    # options that were added after features were made without them: see `without_later`
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_later(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return without_later(self, handler(self), self.later)

    @property
    def task(self) -> str | None:
        """The task that it is trained on; such an encoder is `Trained`."""
        return None

    def of_kind(self, kind: ModalityKind) -> EncoderSection:
        """The section of a modality of this kind: with what the kind says of the values. Raises: ConfigError."""
        return self

    @property
    def files(self) -> dict[str, str]:
        """Option -> the file or folder that it names, which a model's folder does not hold."""
        return {}


class CustomEncoder(EncoderSection):
    """An encoder of the user's, named `module:Class`."""

    name: str = Field(description="module:Class, importable on every node")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of its constructor")


@runtime_checkable
class Encoder(Protocol):
    """Raw values -> features. Built as `Class(config_section)`; a user's class as `Class(**options)`.

    Optional: `prepare(value)`, run where a value is decoded, e.g. to resize an image (H, W, 3) uint8 before it
    travels (encode then gets what prepare returned); `input_size`, a `kinds.images.InputSize`, of images that are
    resized to it and nothing else, in the process that decodes them (encode then gets one array (B, 3, height,
    width)); `to(device, encode_batch_size)` for encoders that can use a GPU; `refused(values)`: row -> why a value
    cannot be encoded, which encode then does not get; `changes(values)`: by value what of it encode does not read,
    for the audit; `feature_names`: what each feature is of, once fitted;
    `concurrent`: True if several threads may encode at once.
    """

    version: int  # raised by whoever changes what encode returns

    @property
    def dim(self) -> int:
        """D, known once fitted."""
        ...

    def encode(self, values: Sequence[Any]) -> Features:
        """Present values only: images as RGB uint8 (H, W, 3), audio as kinds.sounds.Clip, either also as `prepare`
        returns it; texts as str; of another kind what its class in kinds/modalities.py says. (B, D) float32."""
        ...

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Fitted state: tensors and JSON-able rest, whose `found` the manifest tells.
        Empty for a stateless encoder."""
        ...

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Take a fitted state back."""
        ...


class ListedEncoder:
    """Base of an encoder with an entry in ENCODERS: it has its config section beside it,
    and by default nothing is fitted.

    One that is `Mergeable` is fitted from statistics; one whose section names a task,
    on that task's labels (`Trained`).
    """

    Section: ClassVar[type[EncoderSection]]
    kinds: ClassVar[tuple[str, ...]]  # of the modalities that it reads
    sparse: ClassVar[bool] = False  # encode returns CSR matrices
    concurrent: bool = False  # several threads may encode at once
    # of a Trained one: type of a prepared value; whether rows of val are given too, to decide when to stop
    prepared_dtype: ClassVar[str] = "uint8"
    held_out_rows: ClassVar[bool] = False
    version: int = 1  # raised by whoever changes what encode returns

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def of(cls, config: Any) -> Any:
        """The unfitted encoder of a config section."""
        return cls(config)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Nothing is fitted."""


@dataclass(frozen=True)
class EncoderTraining:
    """Where an encoder is trained: one of `world_size` processes that share the work."""

    seed: int
    device: torch.device
    rank: int
    world_size: int
    checkpoint: dict[str, Any] | None  # what the last epoch's `state_fn` gave; None at the start
    on_epoch: Callable[[int, dict[str, float], Any], None]  # epoch, metrics, state_fn
    held_out: np.ndarray | None = None  # (N,) bool: values of val, for encoders with `held_out_rows`


@runtime_checkable
class Trained(Protocol):
    """An encoder that Ray Train trains on the labels of `Section.task`; its section has `epochs` and `num_workers`.

    With `held_out_rows` values of val are among those it is trained with, not `known` where train lacks their class.
    """

    prepared_dtype: ClassVar[str]
    held_out_rows: ClassVar[bool]

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """Of a prepared value."""
        ...

    def prepare(self, value: Any) -> np.ndarray:
        """A value -> what is trained on; and encoded, where the modality's kind has a decoder."""
        ...

    def train(
        self, values: np.ndarray, labels: Labels, class_names: list[str], training: EncoderTraining
    ) -> dict[str, np.ndarray]:
        """Prepared values (N, ..) and their labels -> fitted tensors."""
        ...

    def rest_of_state(self, class_names: list[str]) -> dict[str, Any]:
        """What `load_state` takes beside these tensors."""
        ...


def fit_of(encoder: Any) -> Fit:
    """How an encoder is fitted: not at all, from statistics of the train split that merge,
    or by training on a task."""
    if getattr(getattr(encoder, "config", None), "task", None) is not None:
        return "training"
    return "statistics" if isinstance(encoder, Mergeable) else "none"


def check_array(name: str, value: np.ndarray, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of a fitted state as it is. shape: None where any length is right.

    Raises: ValueError for another type or shape, NaN or infinity.
    """
    if value.dtype != dtype or len(value.shape) != len(shape):
        raise ValueError(f"{name} is {value.dtype} with {value.ndim} axes, not {np.dtype(dtype)} with {len(shape)}")
    if any(wanted is not None and wanted != got for wanted, got in zip(shape, value.shape, strict=True)):
        raise ValueError(f"{name} has shape {value.shape}, not {tuple('any' if n is None else n for n in shape)}")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} has NaN or infinite values")
    return value


@runtime_checkable
class Mergeable(Protocol):
    """A fit from statistics that merge associatively, so that it can run over shards in any order and as a tree."""

    def partial(self, values: Any) -> Any:
        """Statistics of one chunk (an encoder's: raw values as `encode` takes; a reducer's: features (B, D))."""
        ...

    def merge(self, parts: list[Any]) -> Any:
        """Statistics of the chunks together; merge([merge([a, b]), c]) equals merge([a, b, c])."""
        ...

    def finish(self, total: Any) -> None:
        """Become fitted."""
        ...
