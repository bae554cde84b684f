"""requirements.lock pins all that pyproject.toml asks for, and names no place to download from."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
# An option, an address, a file, a host.
PLACE = re.compile(r"(?:^|\s)-|://|\bhttps?\b|\.whl|(?<![\w.-])(?:[\w-]+\.)+(?:org|com|io|net|dev)\b", re.I)


def pins(lock: str) -> dict[str, list[Version]]:
    """Package -> its pinned versions: several where the version depends on Python or the platform."""
    found: dict[str, list[Version]] = {}
    for line in lock.splitlines():
        if line and not line.startswith(("#", " ")):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            found.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    return found


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


def test_the_lock_names_no_place(lock):
    assert not [line for line in lock.splitlines() if PLACE.search(line)]


@pytest.mark.parametrize(
    "line",
    [
        "-f ../wheels",
        "#    uv pip compile pyproject.toml --find-links ../wheels",
        "# from packages.example.org",
        "torch @ file:///wheels/torch-2.0-py3-none-any.whl",
    ],
)
def test_a_place_would_be_seen(line):
    assert PLACE.search(line)


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_every_dependency_is_pinned_within_its_bounds(lock, asked):
    versions = pins(lock).get(canonicalize_name(asked.name))
    assert versions, f"{asked.name} is not in requirements.lock: run `make lock`"
    assert all(version in asked.specifier for version in versions)


def test_no_local_build_is_pinned(lock):
    assert not [name for name, versions in pins(lock).items() if any(version.local for version in versions)]


def test_the_lock_says_how_it_is_made(lock):
    assert "make lock" in lock.splitlines()[1]
