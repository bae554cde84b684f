"""The model folder: weights and everything needed to use them.

    <model>/model.safetensors   the model's state
    <model>/config.json         its card, published last: a folder without it is no model; evaluation adds
                                `temperatures` and `margins`

Nothing in it is a pickle. The card has a checksum of itself and of the weights: whoever changes it writes it with
`write_card`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mmkt_ray import __version__, storage
from mmkt_ray.config import Config
from mmkt_ray.errors import DataError, UserError
from mmkt_ray.features.manifest import Manifest
from mmkt_ray.inference.model_card import CARD, Card, Versions, check_card, read_card, write_card
from mmkt_ray.inference.training_record import AnyTraining
from mmkt_ray.models import Predictor, model_of_spec

WEIGHTS = "model.safetensors"


def save_model(
    uri: str,
    model: Predictor,
    config: Config,
    manifest: Manifest,
    training: AnyTraining,
    fingerprint: str | None = None,
) -> None:
    """Publish a model. manifest: of the store that it learnt from; fingerprint: of all that decided its weights."""
    spec = model.spec
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = save_tensors(weights)
    card = Card(
        checksums={WEIGHTS: storage.checksum(data)},
        spec=spec.to_dict(),
        class_names={t: list(manifest.tasks[t].classes) for t in spec.tasks},
        store=manifest.fingerprint,
        encoders={m: manifest.modalities[m] for m in spec.modalities},
        config=config.model_dump(mode="json"),
        versions=Versions(mmkt_ray=__version__, torch=str(torch.__version__), python=platform.python_version()),
        fingerprint=fingerprint,
        training=training,
    )
    storage.remove(storage.join(uri, CARD))  # an older model's card must never stand beside new weights
    storage.write_bytes(storage.join(uri, WEIGHTS), data)
    write_card(uri, card)


def copy_model(source: str, target: str) -> None:
    """Publish a model at another place too, where none of another fingerprint may lie."""
    for name in ("heldout.safetensors", WEIGHTS, CARD):
        if name != "heldout.safetensors" or storage.exists(storage.join(source, name)):
            storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def save_calibration(uri: str, model: Predictor) -> None:
    """Put the model's temperatures and margins into its card, for prediction to use from now on."""
    card, own = read_card(uri), (dict(model.temperatures), dict(model.margins))
    if card is not None and (card.temperatures or {}, card.margins or {}) != own:
        write_card(uri, card.replaced(temperatures=own[0], margins=own[1]))


def load_model(uri: str) -> tuple[Predictor, Card]:
    """The model in eval mode, on the CPU, and its card.

    Raises: DataError if the folder is missing, unfinished, damaged, or of another schema version.
    """
    try:
        card = Card.read(storage.join(uri, CARD))
    except FileNotFoundError:
        raise DataError(
            f"'{uri}' is no finished model folder (no config.json): run `mmkt train` with the same config"
        ) from None
    check_card(uri, card)
    if isinstance(samples := card.config.get("samples"), dict):
        samples.setdefault("decode", "exact")  # as it was before a config could tell
    try:
        weights = storage.join(uri, WEIGHTS)
        data = storage.read_bytes(weights)
        storage.check_bytes(weights, data, card.checksums.get(WEIGHTS, ""))
        model = _with_weights(card.spec, load_tensors(data))
    except UserError:
        raise
    except FileNotFoundError:
        raise DataError(f"'{uri}' has no model.safetensors: remove the folder and train again") from None
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        why = str(error).split("\n")[0]
        raise DataError(f"'{uri}' is damaged ({why}): remove the folder and train again") from None
    model.temperatures = dict(card.temperatures or {})
    model.margins = dict(card.margins or {})
    return model.eval(), card


def _with_weights(spec: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Predictor:
    """The model of a spec with its weights. Raises: ValueError or RuntimeError if they do not fit,
    before memory is taken."""
    with torch.device("meta"):  # shapes alone: what the spec states may be of any size
        expected = {name: (value.shape, value.dtype) for name, value in model_of_spec(spec).state_dict().items()}
    if {name: (value.shape, value.dtype) for name, value in weights.items()} != expected:
        differing = [n for n in {*expected, *weights} if n not in weights or n not in expected]
        raise ValueError(
            f"the weights are not those of the model's spec: {', '.join(sorted(differing)[:3]) or 'shapes'}"
        )
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError("there are NaN or infinite weights")
    model = model_of_spec(spec)
    model.load_state_dict(weights)
    return model
