"""A cluster of three hosts reached by ssh alone: `ray up` on the on-premise file, jobs with logs and exit status,
`ray down`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml

from tests.cluster.conftest import LOGIN, ROOT, STORAGE, Host
from tests.configs import raw_config
from tests.shapes import SHAPES, write_shard

import psutil  # isort: skip  (Ray ships it)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

JOBS_ADDRESS = "http://127.0.0.1:8265"
# What a login finds after the environment steps, which alone of the file would need other networks.
# Raylets wait for their
# agents longer than 30 s, because the machine is busy with all the others, and for a lost head 20 s instead of 60.
# Workers take turns with what runs beside them: at Ray's niceness of 15 they wait for it to end.
RAY_SETTINGS = "RAY_agent_register_timeout_ms=120000 RAY_gcs_rpc_server_reconnect_timeout_s=20 RAY_worker_niceness=0"
VARIABLES = f'PATH="{sys.prefix}/bin:$PATH" OMP_NUM_THREADS=1 {RAY_SETTINGS}'
ENVIRONMENT = f"echo 'export {VARIABLES}' >> ~/.bashrc"
SMALL_NODE = "ray start --object-store-memory=100000000"


def cluster_file(storage: Path, hosts: list[Host]) -> str:
    """jobs/cluster/onprem.yaml for these hosts, where they see it. Nodes are small, workers count two CPUs."""
    cluster = yaml.safe_load((ROOT / "jobs" / "cluster" / "onprem.yaml").read_text())
    head, *workers = [host.address for host in hosts]
    del cluster["file_mounts"]["~/requirements.lock"]
    cluster |= {
        "cluster_name": f"mmkt-test-{os.getpid()}",
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "auth": cluster["auth"] | {"ssh_user": LOGIN.pw_name},
        "setup_commands": [ENVIRONMENT],
    }
    for key, start in (
        ("head_start_ray_commands", SMALL_NODE),
        ("worker_start_ray_commands", f"{SMALL_NODE} --num-cpus=2"),
    ):
        cluster[key] = [command.replace("ray start", start) for command in cluster[key]]
    (storage / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return f"{STORAGE}/cluster.yaml"


def job_config(storage: Path) -> str:
    """Drawn shapes and a small model, where all hosts see them:
    three training workers, of which a host has room for two.

    n-grams, because single words take code that each process of a job compiles first;
    and no studies: they need no host.
    """
    for k in range(3):
        write_shard(storage / "data" / "shapes" / f"{k}.parquet", 40 * k, 40)
    config = raw_config({"colour": "multiclass"}, SHAPES, "shapes/*.parquet") | {
        "name": "shapes",
        "data_root": f"{STORAGE}/data",
        "run_root": f"{STORAGE}/runs",
        "modalities": {
            "image": {"kind": "image", "encoder": {"name": "pixels", "image_size": 16}},
            "text": {"kind": "text", "encoder": {"name": "tfidf", "ngram_range": [1, 2]}},
        },
        "model": {"hidden_dim": 16, "experts": False},
        "training": {"epochs": 2, "num_workers": 3, "auto": []},
        "extract": {"chunk_rows": 16, "num_actors": 1},
        "evaluation": {"studies": [], "baselines": False, "bootstrap_samples": 100},
    }
    (storage / "shapes.yaml").write_text(yaml.safe_dump(config))
    return f"{STORAGE}/shapes.yaml"


def wait_for(wanted: str, ask: Callable[[], str], timeout_s: float = 300) -> None:
    """Ask until the answer holds what is wanted. Raises: AssertionError with the last answer."""
    end = time.monotonic() + timeout_s
    while wanted not in (answer := ask()):
        assert time.monotonic() < end, f"no {wanted!r} in {timeout_s:g} s, but:\n{answer}"
        time.sleep(2)


def ray_processes(host: Host) -> str:
    return host.run("pgrep", "--list-name", "raylet|gcs_serv", check=False).stdout


@pytest.fixture
def other_ray(ray_local) -> Iterator[None]:
    """A Ray that was here before, and must be here afterwards: a raylet of another number would be another Ray."""

    def raylets() -> list[int]:
        return [child.pid for child in psutil.Process().children() if child.name() == "raylet"]

    before = raylets()
    assert before
    yield
    assert raylets() == before
    assert ray.get(ray.remote(lambda: "answered").remote(), timeout=60) == "answered"


@pytest.fixture
def cluster(other_ray, storage, desk_and_hosts) -> Iterator[tuple[Host, list[Host], str]]:
    """Desk, hosts and cluster file of a running cluster, with the tunnel to its job server."""
    desk, hosts = desk_and_hosts
    file = cluster_file(storage, hosts)
    desk.run("ray", "get-auth-token", "--generate")
    desk.run("ray", "up", "--yes", "--no-config-cache", file)
    status = "RAY_AUTH_MODE=token ray status; tail -n 20 /tmp/ray/session_latest/logs/monitor.log"
    wait_for("/4.0 CPU", lambda: desk.run("ray", "exec", file, status).stdout)  # two workers of two
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tunnel = subprocess.Popen(desk.command("ray", "dashboard", file), **quiet)
    try:
        open_it = "exec 3<>/dev/tcp/127.0.0.1/8265 && echo open"
        wait_for("open", lambda: desk.run("bash", "-c", open_it, check=False).stdout)
        yield desk, hosts, file
    finally:
        tunnel.kill()
        tunnel.wait()


def submit(desk: Host, *entrypoint: str) -> "subprocess.CompletedProcess[str]":
    options = ["--address", JOBS_ADDRESS, "--working-dir", "."]
    words = ["RAY_AUTH_MODE=token", "ray", "job", "submit", *options, "--", *entrypoint]
    return desk.run(*words, check=False, timeout_s=900)


def test_jobs_on_three_hosts_from_up_to_down(cluster, storage):
    """Catches an on-premise file whose workers do not join, a job that leaves its cluster or whose status is lost,
    training workers that do not find each other from host to host, and a `ray down` that leaves nodes running or ends
    the Ray of others."""
    desk, hosts, file = cluster
    config = job_config(storage)

    done = submit(desk, "python", "jobs/run.py", config)
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    assert "colour" in done.stdout  # the table of results, out of the followed log
    assert all(f"(ip={host.address}, pid=" in done.stdout for host in hosts[1:])  # where the training workers were
    metrics = list((storage / "runs" / "shapes" / "models").glob("*/metrics.json"))
    assert metrics
    assert json.loads(metrics[0].read_text())

    failed = submit(desk, "python", "jobs/run.py", config, "--set", "training.epoch=2")
    assert failed.returncode == 1, failed.stdout
    assert "epochs" in failed.stdout  # the name that was meant, out of the failed job's log

    sessions = hosts[0].run("find", "/tmp/ray", "-maxdepth", "1", "-type", "d", "-name", "session_*").stdout.split()
    assert len(sessions) == 1  # the drivers, who ran there, started no Ray of their own

    assert all(ray_processes(host) for host in hosts)
    desk.run("ray", "down", "--yes", file)
    assert not ray_processes(hosts[0])
    wait_for("none", lambda: "".join(ray_processes(host) for host in hosts) or "none")  # workers end without their head
