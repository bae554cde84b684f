"""Manifests and cards of stores and models that a test writes itself."""

from collections.abc import Mapping
from typing import Any

from mmkt_ray.features.manifest import Manifest, ModalityFeatures
from mmkt_ray.inference.model_card import Card
from mmkt_ray.inference.training_record import Training
from mmkt_ray.scoring.results import ResultsFile

FEATURES = {"sparse": False, "kind": "image", "encoder": {}, "reduce": None, "fingerprint": "f", "folders": []}
COUNTS = {"rows": 0, "by_split": {}, "by_task": {}, "missing": {}}
ABOUT: dict[str, Any] = {
    "fingerprint": "drawn",
    "parts": [],
    "checksums": {},
    "units": [],
    "layout": "",
    "source": None,
    "combine": {"name": "union"},
    "synthetic_pairs": False,
    "modalities": {},
    "tasks": {},
    "reject_reasons": {},
    "unmapped": {},
    "cleaned": {},
}


def make_features(**about: Any) -> ModalityFeatures:
    """A modality's entry in a manifest, filled in the same way."""
    return ModalityFeatures.model_validate(FEATURES | about)


def make_manifest(counts: Mapping[str, Any] | None = None, **about: Any) -> Manifest:
    """A manifest with what a test does not care about filled in; modalities and tasks too may be given in part."""
    value = ABOUT | about
    value["modalities"] = {m: FEATURES | given for m, given in value["modalities"].items()}
    value["tasks"] = {t: {"kind": "multiclass"} | given for t, given in value["tasks"].items()}
    return Manifest.model_validate({**value, "counts": COUNTS | dict(counts or {})})


def make_training(**about: Any) -> Training:
    """What a card says of a training that nobody asks about."""
    given = {
        "fingerprint": "f00",
        "best_epoch": 1,
        "val": None,
        "seconds": 1.0,
        "num_params": 1,
        "num_params_by_part": {},
    }
    return Training.model_validate({**given, "num_workers": 1, "device": "cpu", "history": [], **about})


def make_card(**about: Any) -> Card:
    """A card of no model in particular."""
    given = {"spec": {}, "class_names": {}, "encoders": {}, "config": {}, "checksums": {}, "store": None}
    return Card.model_validate({**given, "versions": {"mmkt_ray": "0", "torch": "0", "python": "0"}, **about})


def make_results(**about: Any) -> ResultsFile:
    """What a comparison of no models and no tasks leaves, but for what is given."""
    empty: dict[str, Any] = {"run": "r", "split": "test", "confidence": 0.95, "models": {}, "tasks": {}, "notes": []}
    return ResultsFile(**{**empty, "recommended": None, "main": None, **about})
