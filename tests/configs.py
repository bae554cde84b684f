"""Configs of images and texts in Parquet shards, for tests that say only what matters to them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mmkt_ray.config import Config, parse_config

IMAGE_AND_TEXT = {"image": {"kind": "image", "encoder": "pixels"}, "text": {"kind": "text", "encoder": "tfidf"}}


def raw_config(
    tasks: Mapping[str, str], columns: Mapping[str, str] | None = None, path: str = "*.parquet", **sections: Any
) -> dict[str, Any]:
    """A config as YAML has it. tasks: name -> kind; columns: as the source's, None: called as here; sections: further
    ones, or others in the place of these."""
    named = {c: c for c in ("image", "text", *tasks)} if columns is None else dict(columns)
    return {
        "name": "test",
        "samples": {"sources": [{"reader": "parquet", "path": path, "columns": named}]},
        "modalities": deepcopy(IMAGE_AND_TEXT),
        "tasks": {task: {"kind": kind} for task, kind in tasks.items()},
        **sections,
    }


def build_config(raw: Mapping[str, Any], **overrides: Any) -> Config:
    """The config, with overrides such as `training__epochs=2` or `**{"training.epochs": 2}`."""
    return parse_config(raw).with_overrides({key.replace("__", "."): value for key, value in overrides.items()})
