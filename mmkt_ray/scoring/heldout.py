"""Held-out rows: which rows a choice is judged on, and what models that never saw them said of them.

Where rows are few, train and val together are dealt into FOLDS parts by a hash of the sample id, and a model for each
part learns from the others (cross-validation). As many parts are held out as make up ENOUGH_ROWS; where the val split
alone has so many, it is the one part.

Axes: N rows of a table, H held-out rows, C classes of one task.

Source: cross-validation, Stone 1974 (https://www.jstor.org/stable/2984809).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mmkt_ray import storage
from mmkt_ray.features.feature_table import FeatureTable

FOLDS = 5
ENOUGH_ROWS = 2500  # held-out rows: the standard error of an accuracy is at most one point
HELDOUT_FILE = "heldout.safetensors"


@dataclass(frozen=True)
class Folds:
    """How rows are held out in turn."""

    fold: np.ndarray  # (N,) int8 the part that a row belongs to, from 0; -1: of no part
    num_held: int  # parts 0 .. num_held - 1 are held out, one at a time
    on: str  # cv | val

    def held(self, part: int) -> np.ndarray:
        """(N,) bool: the rows of one part."""
        return np.asarray(self.fold == part)


@dataclass(frozen=True)
class HeldOut:
    """What models said of rows that they had not learnt from, given all or some of their modalities."""

    on: str  # cv: each row by the model of its fold; val: all by one model
    rows: np.ndarray  # (H,) indices of the store's rows, ascending
    logits: dict[str, dict[str, np.ndarray]]  # modalities given, joined by + -> task -> (H, C) float32


def make_folds(table: FeatureTable, seed: int) -> Folds:
    """The folds of the rows in train and val; the same for all models of a seed, whatever they read."""
    val, train = table.split == "val", table.split == "train"
    if val.sum() >= ENOUGH_ROWS:
        return Folds(np.where(val, 0, np.where(train, 1, -1)).astype(np.int8), 1, "val")
    hashes = (xxhash.xxh64_intdigest(f"{seed}/{i}".encode()) for i in table.sample_id)
    part = np.fromiter((h % FOLDS for h in hashes), np.int8, len(val))
    size = max(1, int((val | train).sum()) // FOLDS)
    return Folds(np.where(val | train, part, -1).astype(np.int8), min(FOLDS, -(-ENOUGH_ROWS // size)), "cv")


def as_train(table: FeatureTable) -> FeatureTable:
    """The table with its val rows in train: what a model is fitted on once its settings are chosen."""
    return replace(table, split=np.where(table.split == "val", "train", table.split).astype(object))


def pattern_name(modalities: Sequence[str]) -> str:
    """`image+text`: how a set of modalities is written."""
    return "+".join(sorted(modalities))


def save_heldout(uri: str, found: HeldOut) -> None:
    """Write heldout.safetensors into a model folder."""
    tensors = {f"/{found.on}": found.rows.astype(np.int64)}
    for given, by_task in found.logits.items():
        tensors |= {f"{task}/{given}": values.astype(np.float32) for task, values in by_task.items()}
    storage.write_bytes(storage.join(uri, HELDOUT_FILE), save(tensors))


def load_heldout(uri: str) -> HeldOut | None:
    """Read it from a model folder; None if there is none, or it is damaged."""
    try:
        tensors = load(storage.read_bytes(storage.join(uri, HELDOUT_FILE)))
    except (FileNotFoundError, SafetensorError):
        return None
    logits: dict[str, dict[str, np.ndarray]] = {}
    on, rows = "cv", np.zeros(0, np.int64)
    for name, values in tensors.items():
        task, _, given = name.rpartition("/")
        if not task:
            on, rows = given, values
        else:
            logits.setdefault(given, {})[task] = values
    return HeldOut(on, rows, logits)
