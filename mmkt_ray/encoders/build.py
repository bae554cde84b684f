"""Encoders and reducers by name, and their fitted state on disk: safetensors + JSON, never pickle."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mmkt_ray import storage
from mmkt_ray.encoders.catalog import ENCODERS, REDUCERS
from mmkt_ray.encoders.encoder import CustomEncoder, Encoder, EncoderSection
from mmkt_ray.encoders.reduce import ReduceSection
from mmkt_ray.errors import ConfigError, DataError, UserError
from mmkt_ray.record import IfAny, Record
from mmkt_ray.section import OneOf, Section, fingerprint

ENCODER_CARD = "encoder.json"
AGAIN = "remove the folder and extract again, or copy it again from where it is whole"
_OF_DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError)  # of states that do not fit


class EncoderCard(Record, frozen=True, strict=True):
    """What `encoder.json` holds: of a fitted encoder, or of a reducer."""

    config: dict[str, Any]  # the config's section
    version: int  # of its code
    rest: dict[str, Any]  # of its state, beside the tensors
    dim: int
    sparse: bool
    fingerprint: str
    units: list[str]  # shards that it was fitted on
    trained_s: IfAny[float] = None  # seconds, of an encoder that was adapted

    @property
    def found(self) -> dict[str, Any]:
        """What a fit found out of the values, for people: `columns` of a table, `selected` features."""
        found = self.rest.get("found")
        return found if isinstance(found, dict) else {}


def build_encoder(config: EncoderSection) -> Encoder:
    """An unfitted encoder. Raises: ConfigError if a user's class can't be imported or refuses its options."""
    if not isinstance(config, CustomEncoder):
        return cast(Encoder, ENCODERS[config.name].of(config))
    try:
        return _load(config.name)(**config.options)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"cannot build encoder '{config.name}': {error}; it must be importable on every node that runs the job"
        ) from None


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build_reducer(config: ReduceSection) -> Any:
    """An unfitted reducer for its config section; what it can do: encoders/reduce.py."""
    return REDUCERS[config.name](config)


def save_fitted(
    fitted: Any, config: Section, uri: str, units: Sequence[str] = (), trained_s: float | None = None
) -> EncoderCard:
    """Write `state.safetensors`, then `encoder.json`. units, trained_s: see `EncoderCard`."""
    tensors, rest = fitted.state()
    data = save_tensors({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    section = config.model_dump(mode="json")
    card = EncoderCard(
        config=section,
        version=fitted.version,
        rest=rest,
        dim=fitted.dim,
        sparse=getattr(fitted, "sparse", False),
        fingerprint=_fingerprint(section, fitted.version, rest, tensors),
        units=list(units),
        trained_s=trained_s,
    )
    storage.write_bytes(storage.join(uri, "state.safetensors"), data)
    card.write(storage.join(uri, ENCODER_CARD))
    return card


def _fingerprint(
    config: dict[str, Any], version: int, rest: dict[str, Any], tensors: Mapping[str, np.ndarray]
) -> str:
    """Of what decides the features. Tensors count by content, not by the file's bytes:
    their order in it is not promised."""
    digests = {n: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for n, v in sorted(tensors.items())}
    return fingerprint([{"config": config, "version": version, "rest": rest}, digests])


def read_encoder_card(uri: str) -> EncoderCard:
    """That of a folder. Raises: DataError if there is none, or it is damaged."""
    path = storage.join(uri, ENCODER_CARD)
    try:
        return EncoderCard.from_dict(storage.read_json(path), path, AGAIN)
    except FileNotFoundError:
        raise DataError(f"no fitted encoder in '{uri}': run `mmkt extract` (or `mmkt run`) first") from None


def load_fitted(fitted: Any, uri: str) -> Any:
    """Give a freshly built encoder or reducer its fitted state.

    Raises: DataError if there is none, if it is damaged, or was fitted by another version of the encoder.
    """
    card = read_encoder_card(uri)
    if card.version != fitted.version:
        raise DataError(
            f"the encoder in '{uri}' is of version {card.version}, this one is {fitted.version}, which makes other "
            "features: use a new run folder, or the version that it was fitted with"
        )
    try:
        tensors = load_tensors(storage.read_bytes(storage.join(uri, "state.safetensors")))
        if _fingerprint(card.config, card.version, card.rest, tensors) != card.fingerprint:
            raise ValueError("state.safetensors and encoder.json do not agree with their fingerprint")
        fitted.load_state(tensors, card.rest)
        if (fitted.dim, getattr(fitted, "sparse", False)) != (card.dim, card.sparse):
            raise ValueError(f"features are {card.dim} wide by encoder.json, {fitted.dim} by the state")
    except UserError:
        raise
    except (FileNotFoundError, SafetensorError, *_OF_DAMAGE) as error:
        raise _damaged(uri, f"{error}") from error
    return fitted


def load_reducer(uri: str) -> Any:
    """A fitted reducer, built as its own card says. Raises: as `load_fitted`;
    ConfigError if the card names no reducer."""
    try:
        section: Any = OneOf("reducer", REDUCERS).check(read_encoder_card(uri).config)
    except ValidationError as error:
        raise ConfigError(f"'{uri}/encoder.json' describes no reducer: {error}") from None
    return load_fitted(build_reducer(section), uri)


def _damaged(uri: str, why: str) -> DataError:
    return DataError(f"the encoder in '{uri}' is damaged ({why}): {AGAIN}")
