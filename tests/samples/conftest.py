"""Builders of small configs and shards for the tests of the readers, as fixtures that are functions."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mmkt_ray.config import Config, parse_config
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Reject
from mmkt_ray.samples.shards import list_shards

ENCODERS = {"image": "pixels", "text": "tfidf"}


def _make_config(
    root: Path | str, *sources: dict[str, Any], samples: dict[str, Any] | None = None, **more: Any
) -> Config:
    filled = {column for source in sources for column in source["columns"]}
    return parse_config(
        {
            "name": "t",
            "data_root": str(root),
            "samples": {"sources": list(sources), **(samples or {})},
            "modalities": {m: {"kind": m, "encoder": e} for m, e in ENCODERS.items() if m in filled},
            "tasks": {"label": {}},
            **more,
        }
    )


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """make_config(root, *sources, samples={}, **more): `image` and `text` as filled, task `label`."""
    return _make_config


@pytest.fixture
def read_all() -> Callable[[Config], tuple[pa.Table, list[Reject]]]:
    """All samples and rejects of all shards, after checking what must hold for every sequence of chunks."""

    def read(config: Config) -> tuple[pa.Table, list[Reject]]:
        tables, rejects = [], []
        for shard in list_shards(ReadingPlan.of(config)):
            chunks = list(read_chunks(ReadingPlan.of(config), shard))
            assert [c.index for c in chunks] == list(range(len(chunks)))
            assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
            tables += [c.table for c in chunks]
            rejects += [r for c in chunks for r in c.rejects]
        return pa.concat_tables(tables), rejects

    return read


@pytest.fixture
def png() -> Callable[..., bytes]:
    """png(grey, size): a tiny PNG of one grey."""

    def build(grey: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full(size, grey, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    return build


@pytest.fixture
def write_tar() -> Callable[..., None]:
    """write_tar(path, entries, mode): entries are (name, content) pairs or bare headers (links, devices)."""

    def write(path: Path, entries: list[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w") -> None:
        with tarfile.open(path, mode) as tar:
            for entry in entries:
                if isinstance(entry, tarfile.TarInfo):
                    tar.addfile(entry)
                else:
                    info = tarfile.TarInfo(entry[0])
                    info.size = len(entry[1])
                    tar.addfile(info, io.BytesIO(entry[1]))

    return write
