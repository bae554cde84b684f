"""Signals to whole runs: the command ends with their status, and its Ray,
its folders and its processes end with it."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray  # noqa: F401  (it ships psutil, and puts it on the path)
import yaml

from tests.shapes import shapes_config, write_shards

import psutil  # isort: skip

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
FOREIGN = ("core_worker.cc", "Traceback", "PlacementGroupCleaner", "TrainController", "\x1b")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and features of them; `long.yaml` trains on two workers for minutes, `short.yaml` for a moment."""
    root = tmp_path_factory.mktemp("interrupted")
    write_shards(root)
    for name, epochs in (("short", 2), ("long", 2000)):
        training = {"epochs": epochs, "batch_size_per_worker": 16, "num_workers": 2, "auto": []}
        config = shapes_config(root, training=training, model__hidden_dim=16, evaluation__bootstrap_samples=100)
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return root


@pytest.fixture
def temporary() -> Iterator[Path]:
    """An empty folder for all temporary files; its path is short, as Ray's sockets need it."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """A test that fails leaves no command behind; its Ray ends with it."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("config", "command", "sign", "signum", "status"),
    [
        ("long", "train", ": loss ", signal.SIGINT, 130),
        ("long", "train", ": loss ", signal.SIGTERM, 143),
        ("short", "evaluate", "model model: best epoch", signal.SIGINT, 130),
    ],
)
def test_a_signal_with_several_workers(
    project: Path, temporary: Path, config: str, command: str, sign: str, signum: signal.Signals, status: int
) -> None:
    """Catches Ctrl-C that Ray Train swallows during and after training, a third one that ends an unfinished run with
    status 0, SIGTERM told as 15 or 1, and processes, folders or secrets that stay;
    and until then words of Ray's own that tell nothing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary)}
    words = [sys.executable, "-m", "mmkt_ray.cli", command, str(project / f"{config}.yaml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        subprocess.Popen(words, env=environment, text=True, start_new_session=True, **pipes) as process,
        killed(process),
    ):
        said = []
        for line in process.stdout:
            said.append(line)
            if sign in line:
                break
        assert sign in said[-1], "".join(said)
        assert not [line for line in said if any(word in line for word in FOREIGN)]
        family = psutil.Process(process.pid).children(recursive=True)
        private = [path for path in temporary.iterdir() if path.name.startswith("mmkt-ray-")]
        assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o700]
        os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
        rest = process.communicate(timeout=60)[0].splitlines()
    own = [line for line in rest if "(RayTrainWorker" not in line and "(TrainController" not in line]
    assert (process.returncode, own[-1:]) == (status, ["interrupted: the same command goes on from here"]), rest
    assert len(family) > 3
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not [path.name for path in temporary.iterdir() if path.name.startswith("mmkt")]
    assert not [line for line in rest if "SIGTERM received" in line]
