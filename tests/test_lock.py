"""Lock files pin all that pyproject.toml asks for with the hashes of its files,
and name no place to download from."""

import re
import tomllib
from itertools import pairwise
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
LOCKS = ["requirements.lock", "docs/requirements.lock", "jobs/peers.lock"]
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
# An option, an address, a file, a host.
PLACE = re.compile(r"(?:^|\s)-|://|\bhttps?\b|\.whl|(?<![\w.-])(?:[\w-]+\.)+(?:org|com|io|net|dev)\b", re.I)


def pins(lock: str) -> dict[str, list[Version]]:
    """Package -> its pinned versions: several where the version depends on Python or the platform."""
    found: dict[str, list[Version]] = {}
    for line in lock.splitlines():
        if line and not line.startswith(("#", " ")):
            requirement = Requirement(line.removesuffix(" \\"))
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            found.setdefault(canonicalize_name(requirement.name), []).append(Version(pin.version))
    return found


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_names_no_place(name):
    assert not [
        line for line in (ROOT / name).read_text().splitlines() if PLACE.search(line) and not HASH.fullmatch(line)
    ]


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_hashes(name):
    """Catches a file that somebody has put in the place of another on its way."""
    lines = (ROOT / name).read_text().splitlines()
    assert not [line for line, after in pairwise(lines) if "==" in line and not HASH.fullmatch(after)]


@pytest.mark.parametrize("place", ["Makefile", "cluster.yaml", "jobs/cluster/onprem.yaml", "docs/cluster.md"])
def test_hashes_are_required_where_it_is_installed(place):
    """Catches an installer that reads the lock and skips its hashes; pip takes none from a constraint."""
    installs = [line for line in (ROOT / place).read_text().splitlines() if re.search(r"(pip sync|-r \S*lock)", line)]
    assert installs
    assert all("--require-hashes" in line for line in installs)


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
