"""What a wheel brings, asked of the build backend: nothing is built, nothing is fetched."""

from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from mmkt_ray.config.reading import SHIPPED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files() -> set[str]:
    """Where the files of the wheel lie once it is installed."""
    return {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}


@pytest.mark.parametrize("suffix", [".py", ".j2", ".typed"])
def test_every_file_of_the_package_is_in_the_wheel(files, suffix):
    """Catches a template, or the mark for type checkers, that a checkout has and an installation lacks."""
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmkt_ray").rglob(f"*{suffix}")}
    assert here
    assert here <= files


def test_the_configs_lie_where_they_are_looked_for(files):
    """Catches `mmkt run openmoji` that works in a checkout only."""
    place = SHIPPED[0].relative_to(ROOT).as_posix()
    assert {f"{place}/{path.name}" for path in (ROOT / "jobs" / "configs").glob("*.yaml")} <= files


def test_nothing_else_is_in_the_wheel(files):
    """Catches tests, data or runs that travel along."""
    assert {file.split("/")[0] for file in files} == {"mmkt_ray"}
    assert not [file for file in files if file.endswith((".pyc", ".parquet", ".html"))]
