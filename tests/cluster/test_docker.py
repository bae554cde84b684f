"""The Docker lines of docs/deployment.md, given to a real Docker: the image, a run in it, and a server of its model.

`make test-deploy` runs it where a Docker daemon answers: ten minutes, 8 GB of image and a package index that the
build can reach. MMKT_DOCKER_NETWORK=host is for a daemon without a bridge: each line gets `--network host`.
"""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import ROOT, text

NETWORK = os.environ.get("MMKT_DOCKER_NETWORK")


def answers() -> bool:
    """Whether a daemon is there."""
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not answers(), reason="no Docker daemon answers"),
]


def documented() -> list[str]:
    """The lines as they stand, with the network that was asked for."""
    found = [line.strip()[2:] for line in text("docs/deployment.md").splitlines() if line.startswith("$ docker ")]
    asked = f" --network {NETWORK}" if NETWORK else ""
    return [" ".join(line.split()[:2]) + asked + line[len(" ".join(line.split()[:2])) :] for line in found]


def give(line: str, folder: Path, timeout: int) -> str:
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """A folder that the image's user may write; containers of the image end with the test."""
    folder = tmp_path / "desk"
    folder.mkdir()
    os.chmod(folder, 0o777)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(parent, os.stat(parent).st_mode | 0o055)
    yield folder
    left = subprocess.run(["docker", "ps", "-q", "--filter", "ancestor=mmkt"], capture_output=True, text=True).stdout
    if left.split():
        subprocess.run(["docker", "kill", *left.split()], capture_output=True)


def test_the_image_is_built_and_does_what_the_page_says(served: Path) -> None:
    """Catches an image that lacks a file or a version, a user who cannot write, too little shared memory for Ray, and
    a server that nobody outside of the container reaches."""
    build, serve, run = documented()
    assert "docker build" in build
    give(build, ROOT, 2400)
    give(run.replace("mmkt run openmoji", "mmkt fetch openmoji --out data/openmoji"), served, 300)
    printed = give(run, served, 1200)
    assert "mmkt predict" in printed
    results = json.loads((served / "runs" / "openmoji" / "report" / "results.json").read_text())
    assert results["recommended"]
    server = subprocess.Popen(["bash", "-c", serve], cwd=served, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5) as answer:
                assert answer.status == 200
            break
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, server.stderr and server.stderr.read()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.5)
    body = json.dumps({"rows": [{"text": "grinning face"}]}).encode()
    asked = urllib.request.Request("http://127.0.0.1:8000/predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert "category" in answer.read().decode()
