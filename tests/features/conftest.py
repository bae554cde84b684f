"""A finished extraction that tests share; and runs that stand alone: one that took over what another beside it has
finished would show nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkt_ray.features.extract import extract
from tests.shapes import shapes_config, write_shards


@pytest.fixture(autouse=True)
def runs_stand_alone() -> Iterator[None]:
    """With a patch of its own: tests undo theirs on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkt_ray.features.siblings._other_runs", lambda _: [])
        yield


@pytest.fixture(scope="session")
def extracted_once(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of shapes, and the run folder of `make_config()` in which they are extracted."""
    folder = tmp_path_factory.mktemp("extracted")
    write_shards(folder)
    config = shapes_config(folder)
    extract(config, f"{config.run_root}/{config.name}")
    return folder


@pytest.fixture
def extracted(extracted_once: Path, tmp_path: Path) -> Path:
    """A copy of it for one test, as `shapes` is: with the times of all files,
    so that `make_config()` is up to date there."""
    return shutil.copytree(extracted_once, tmp_path, dirs_exist_ok=True)
