"""What the cluster can place is checked before anything is started."""

import fcntl
import socket
import threading
from pathlib import Path

import pytest
import ray

from mmkt_ray.cluster import Resources, check_answers, check_fits, gpu_places, local
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.fit import FAN_IN, merge_in_tree


def test_actor_pools_leave_one_cpu_for_reading() -> None:
    """A pipeline that waits for itself for ever: all CPUs held by encoders, none left to read for them."""
    check_fits(Resources(4, 0), num_actors=3, cpus_each=1, gpus_each=0)
    with pytest.raises(ResourceError, match="at most 3"):
        check_fits(Resources(4, 0), num_actors=4, cpus_each=1, gpus_each=0)


def test_gpus_that_are_not_there_are_refused() -> None:
    """A job that waits for a GPU that no node has."""
    with pytest.raises(ResourceError, match=r"need 1 GPUs, the cluster has 0.*0 runs on CPUs"):
        check_fits(Resources(8, 0), num_actors=1, cpus_each=1, gpus_each=1)


def test_a_share_of_a_gpu_lies_within_one() -> None:
    """Five actors of 0.4 GPU on two GPUs, of which one waits for ever; ten of 0.1 GPU that rounding refuses."""
    assert [gpu_places(Resources(8, 2), share) for share in (0.1, 0.25, 0.4, 0.6, 1, 2)] == [20, 8, 4, 2, 2, 1]
    check_fits(Resources(8, 2), num_actors=4, cpus_each=1, gpus_each=0.4)
    with pytest.raises(ResourceError, match="room for 4"):
        check_fits(Resources(8, 2), num_actors=5, cpus_each=1, gpus_each=0.4)


def _chain(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("num", [1, FAN_IN, FAN_IN * FAN_IN + 3])
def test_tree_merges_all_in_order_and_leaves_out_none(num: int) -> None:
    """Statistics lost or doubled at the edge of a group; an order that depends on what finishes first."""
    calls = [lambda i=i: None if i % 5 == 4 else [i] for i in range(num)]
    assert merge_in_tree(calls, _chain) == [i for i in range(num) if i % 5 != 4]
    assert merge_in_tree([lambda: None] * num, _chain) is None


@pytest.mark.parametrize("kind", ["nobody", "silent", "a web server"])
def test_a_dead_address_is_told_soon(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """14 minutes of waiting for a head that is gone, or for another server on its old port."""
    monkeypatch.setattr("mmkt_ray.cluster.ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if kind == "nobody":
            server.close()
        if kind == "a web server":
            threading.Thread(
                target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True
            ).start()
        with pytest.raises(ResourceError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
            check_answers(address)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:\u00b2", "\x1b[31m", "10.0.0.1:6379x"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    """A traceback for a RAY_ADDRESS without a port."""
    with pytest.raises(ResourceError, match="it is not HOST:PORT"):
        check_answers(address)


@pytest.mark.usefixtures("ray_local")
def test_a_living_head_answers() -> None:
    """A cluster that is refused because its first words are not as expected."""
    check_answers(ray.get_runtime_context().gcs_address)
    check_answers("auto")


def test_the_token_is_private_before_ray_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that others read in the seconds until Ray has started, made now or left open by an earlier Ray."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"
    local.keep_token_private()
    made = token.read_text()
    assert (token.stat().st_mode & 0o777, len(made)) == (0o600, 64)
    token.chmod(0o644)
    local.keep_token_private()
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o600, made)


def test_only_folders_without_an_owner_are_removed(tmp_path: Path) -> None:
    """The session of a run that goes on removed under it, or gigabytes that stay after each `kill -9`."""
    for name in ("left", "used", "foreign"):
        (tmp_path / f"{local.PREFIX}{name}").mkdir()
    for name in ("left", "used"):
        (tmp_path / f"{local.PREFIX}{name}" / local.LOCK).touch()
    with open(tmp_path / f"{local.PREFIX}used" / local.LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        local.remove_left(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{local.PREFIX}foreign", f"{local.PREFIX}used"]


def test_a_ray_that_starts_too_slowly_is_told() -> None:
    """Catches 'unexpected Exception' and a traceback on a machine that is busy;
    Ray's other errors stay what they are."""
    slow = "The current node timed out during startup. This could happen because the GCS has become overloaded."
    with pytest.raises(ResourceError, match="too busy"), local.told_if_slow():
        raise Exception(slow)
    with pytest.raises(KeyError), local.told_if_slow():
        raise KeyError("another")
