"""What a local run opens to others: nothing beyond this machine, and nothing without its token."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmkt_ray.cluster import run_on_workers
from tests.inference.fuzz_models import make_config, write_folder

import psutil  # isort: skip  (Ray ships it)

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

SECRET = "planted-key-of-an-object-store"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# A driver as `mmkt` starts it, with a worker; it tells every TCP port that it or a process of its Ray listens on.
DRIVER = """
import json, sys
from mmkt_ray import cluster
cluster.connect()
import psutil, ray
answer = ray.get(ray.remote(lambda: "answered").options(num_cpus=1).remote(), timeout=60)
tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
ports = [(p.name(), *c.laddr) for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
gcs, pids = ray.get_runtime_context().gcs_address, [p.pid for p in tree[1:]]
told = {"gcs": gcs, "ports": ports, "pids": pids, "answer": answer}
print(json.dumps(told), flush=True)
sys.stdin.read()
"""
STRANGER = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).get_all_node_info())"


def environment(home: Path, **changes: str) -> dict[str, str]:
    """Of a user with that home, who says nothing of how Ray authenticates."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return {**kept, "HOME": str(home), **changes}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.fixture(scope="module")
def driver(home: Path) -> Iterator[dict[str, Any]]:
    """What the driver told; it runs on. At the end its Ray must be gone with it."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", DRIVER]
        own = environment(home, RAY_TMPDIR=scratch, AWS_SECRET_ACCESS_KEY=SECRET)
        with subprocess.Popen(command, env=own, **pipes) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "Ray turned the driver or its worker away"
            told = {**json.loads(line), "scratch": scratch}
            yield told
            process.communicate()
        assert not any(map(lives, told["pids"]))


def test_workers_know_the_token_that_ray_turns_on_by_itself(driver: dict[str, Any]) -> None:
    """Catches workers that Ray turns away, while the driver waits for ever: most tests run with tokens turned off."""
    assert driver["answer"] == "answered"


def test_every_port_is_on_the_loopback(driver: dict[str, Any]) -> None:
    """Catches a Ray that other machines of the network reach: its workers run what they are sent."""
    assert len(driver["ports"]) > 5  # driver, control store, raylet, agents, worker
    assert [port for port in driver["ports"] if port[1] not in LOOPBACK] == []


def test_who_has_no_token_is_refused(driver: dict[str, Any], home: Path) -> None:
    """Catches a Ray on which other users of this machine run code, and a token that they can read."""

    def ask(**changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STRANGER, driver["gcs"]]
        return subprocess.run(command, env=environment(home, **changes), capture_output=True, text=True, timeout=60)

    for changes in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}):
        refused = ask(**changes)
        assert refused.returncode != 0
        assert "uthenticat" in refused.stderr, refused.stderr[-500:]
    assert ask(RAY_AUTH_MODE="token").returncode == 0
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_no_log_of_ray_has_a_secret(driver: dict[str, Any], home: Path) -> None:
    """Catches keys of the environment, or the token, in files that others may read or are asked to send."""
    logs = [path for path in Path(driver["scratch"]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    secrets = (SECRET.encode(), (home / ".ray" / "auth_token").read_bytes().strip())
    assert [path for path in logs if any(secret in path.read_bytes() for secret in secrets)] == []


@pytest.mark.usefixtures("ray_local")
def test_training_workers_listen_on_the_loopback() -> None:
    """Catches torch's meeting point on all interfaces, and gloo on the address of the machine's name:
    neither has a token."""

    def look(job: None, rank: int, world_size: int, device: Any) -> list[tuple[int, list[str]]]:
        import ray  # noqa: F401  (it ships psutil)

        # isort: split
        import psutil
        import torch.distributed as dist

        connections = psutil.Process().net_connections("inet")
        own = (rank, [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN])
        assert os.environ["LOCAL_RANK"] == str(rank)  # as Ray sets it, for NCCL
        told: list[Any] = [None] * world_size
        dist.all_gather_object(told, own)
        return told

    told = run_on_workers(look, None, 2)
    assert [rank for rank, _ in told] == [0, 1]
    assert [address for _, addresses in told for address in addresses if address not in LOOPBACK] == []
    assert len(told[0][1]) > len(told[1][1]) > 1  # rank 0 also serves the store; both talk to Ray and to each other


def test_replicas_of_a_served_model_listen_here_alone(tmp_path: Path) -> None:
    """Catches the gRPC server of a replica, which unpickles what anybody sends, on all interfaces; a server that does
    not answer or does not end; and lines of Ray Serve between ours."""
    write_folder(tmp_path / "model", make_config(tmp_path), "experts")
    command = [sys.executable, "-m", "mmkt_ray", "serve", str(tmp_path / "model"), "--ray", "--port", "0"]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not (lines and ("Ctrl-C" in lines[-1] or not lines[-1])):
                lines.append(process.stderr.readline())
            address = re.search(r"http://127\.0\.0\.1:\d+", lines[-1])
            assert address, lines
            assert all(re.match(r"[\d:]+ start: ", line) for line in lines[:-1]), lines
            request = urllib.request.Request(f"{address[0]}/predict", b'{"rows": [{"text": "a red car"}]}')
            request.add_header("content-type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["rows"][0]["predictions"]["thing"]["prediction"]
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            ports = [(p.name(), c.laddr.ip) for p in tree for c in p.net_connections("inet") if c.status == "LISTEN"]
            assert any("ServeRepl" in name for name, _ in ports), ports
            assert {host for _, host in ports} <= LOOPBACK, ports
        finally:
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert process.wait(60) == 130
    assert said.splitlines() == ["stopped"]
