"""The files of studies as records: what they refuse, and that reading and writing leaves them as they are."""

from pathlib import Path
from typing import Any

import pytest

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.features.audit import Audit
from mmkt_ray.record import Record
from mmkt_ray.studies.gallery_results import Gallery
from mmkt_ray.studies.insight import Insight
from mmkt_ray.studies.missing_results import MissingCurves
from mmkt_ray.studies.scores_results import Transferability
from mmkt_ray.studies.seeds_results import Seeds
from mmkt_ray.studies.transfer_results import Transfers

INTERVAL = {"value": 0.5, "low": 0.4, "high": 0.6}
ABOUT = {"models": {"models/a": None}, "stores": ["s"], "recipes": {}}
CURVE: dict[str, Any] = {"num_rows": 3, "accuracy": [[0.5, 0.4, 0.6], None]}
SEEDS = {"by_seed": [0.5], "val": 0.5}
FILES: dict[type[Record], dict[str, Any]] = {
    Insight: {
        "split": "test", "confidence": 0.95, "notes": [], "about": ABOUT,
        "tasks": {
            "t": {
                "answers": [], "disagreement": None,
                "shapley": {
                    "model": "a", "num_rows": 3,
                    "accuracy": {"full": 1.0, "empty": None, "values": {"m": INTERVAL}, "subsets": {"m": 0.5}},
                },
            }
        },
    },
    MissingCurves: {
        "model": "a", "split": "test", "confidence": 0.95, "num_seeds": 1, "modalities": ["m", "n"],
        "rates": [0.0, 1.0], "curves": {"any": {"t": CURVE}},
        "reference": {"any": {"t": CURVE | {"models": {"m": "a"}}}},
        "difference": {"any": {"t": CURVE | {"p_holm": [1.0, 1.0]}}}, "answers": [],
        "patterns": {"m+n": {"t": {"num_rows": 3, "accuracy": 1.0, "log_loss": None}}},
    },
    Transferability: {"tasks": {}, "cka": [], "leep": [], "skipped": [], "seconds": 1.5},
    Seeds: {
        "seeds": [0], "against": None,
        "tasks": {
            "t": {
                "num_rows": None, "reference": "a",
                "models": {
                    "a": {"accuracy": INTERVAL, "versus": None} | SEEDS,
                    "b": {"accuracy": None, "versus": {"accuracy": INTERVAL}} | SEEDS,
                },
            }
        },
    },
    Transfers: {"nodes": [], "label_fracs": [0.1], "seeds": 2, "confidence": 0.95, "targets": [], "cells": []},
    Gallery: {
        "split": "test",
        "tasks": {
            "t": {"right": [{"sample_id": "a", "label": "x", "pred": "x", "proba": None, "inputs": {"m": None}}]}
        },
    },
    Audit: {
        "num_rows": 3, "nulled": {},
        "suspects": {
            "num_rows": {"t": 3}, "num_suspects": {"t": {"label": 1, "modalities": 0}},
            "top": [
                {
                    "sample_id": "a", "task": "t", "kind": "label", "label": "x", "predicted": "y", "score": 0.9,
                    "m_confidence": None, "inputs": {},
                }
            ],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_written_as_it_was_read(kind: type[Record], tmp_path: Path) -> None:
    """Catches keys that a version adds, drops or moves: a run's files would change without anything having been
    computed."""
    first, again = str(tmp_path / "first.json"), str(tmp_path / "again.json")
    storage.write_json(first, FILES[kind])
    kind.read(first).write(again)
    assert storage.read_bytes(again) == storage.read_bytes(first)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_with_other_keys_is_refused_by_name(kind: type[Record], tmp_path: Path) -> None:
    """Catches a page that fails in a template, or shows nothing, where a file was written by another version."""
    uri = str(tmp_path / "found.json")
    storage.write_json(uri, FILES[kind] | {"acuracy": 1})
    with pytest.raises(
        DataError, match=r"found\.json.*unknown key 'acuracy'.*remove it and run the same command again"
    ):
        kind.read(uri)
