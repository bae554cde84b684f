"""Two commands at one folder: the second one is told who is there, and takes over from one that was killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mmkt_ray import locks
from mmkt_ray.errors import ResourceError
from mmkt_ray.locks import hold_by_signature, locked

HOLD = """
import sys
from mmkt_ray import locks
locks.SETTLE_S, locks.HEARTBEAT_S = 0.0, 0.05
with getattr(locks, sys.argv[1])(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""
HOLDS: list[tuple[str, Callable[[str], AbstractContextManager[None]]]] = [
    ("locked", locked),
    ("hold_by_signature", lambda uri: hold_by_signature(uri)),
]


@pytest.fixture
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder, or the object of this name."""
    command = [sys.executable, "-c", HOLD, request.param, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize(("holder", "hold"), HOLDS, indirect=["holder"], ids=["kernel", "signature"])
def test_the_second_command_is_told_and_takes_over_from_a_killed_one(
    holder: subprocess.Popen[str],
    hold: Callable[[str], AbstractContextManager[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches two commands that write one folder, and a folder that stays locked after `kill -9`."""
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    told = rf"is in use by process {holder.pid} on {socket.gethostname()}, since \d{{4}}-.*: wait for it to end"
    for _ in range(2):
        with pytest.raises(ResourceError, match=told), hold(str(tmp_path / "run")):
            pytest.fail("both are in")
    holder.kill()
    holder.wait()
    with hold(str(tmp_path / "run")):
        pass
    with hold(str(tmp_path / "run")):  # and gives it back
        pass


def test_a_process_may_hold_a_folder_again(tmp_path: Path) -> None:
    """Catches a run that waits for itself at its second step, or gives its folder away after the first."""
    uri = str(tmp_path / "a" / "run")
    with locked(uri):
        with locked(f"{uri}/"):
            pass
        with pytest.raises(ResourceError, match=f"process {os.getpid()}"), locks.hold_by_kernel(f"{uri}/{locks.NAME}"):
            pytest.fail("given away")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\x1b",
        "[1]",
        "{}",
        '{"pid": null}',
        '{"at": "x"}',
        '{"at": NaN}',
        '{"since": 1e30}',
        '{"pid": -1}',
        '{"host": 1}',
    ],
)
def test_a_signature_that_is_none_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Catches a traceback, or a folder that nobody can use again,
    for what a full disk or another program left there."""
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    whole = {"token": "x", "pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "at": time.time()}
    if text.startswith('{"'):
        text = json.dumps(whole | json.loads(text))
    for hold, name in ((hold_by_signature, "object"), (locks.hold_by_kernel, "file")):
        (tmp_path / name).write_text(text)
        with hold(str(tmp_path / name)):
            pass
    with locks.hold_by_kernel(str(tmp_path / "file")):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ResourceError, match="another process"), locks.hold_by_kernel(str(tmp_path / "file")):
            pytest.fail("both are in")


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "loop"])
def test_a_lock_that_is_no_file_is_told_and_left(tmp_path: Path, what: str) -> None:
    """Catches a file of the user's that is emptied because a run folder from elsewhere has a link to it as its
    lock."""
    place, other = tmp_path / locks.NAME, tmp_path / "other"
    other.write_text("precious")
    if what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    else:
        place.symlink_to(other if what == "link" else place)
    with pytest.raises(ResourceError, match=r"\.lock' is a link, a folder or a pipe"), locked(str(tmp_path)):
        pytest.fail("held")
    assert other.read_text() == "precious"


def test_a_signature_of_another_machine_is_believed_as_long_as_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lock that is never free again after its machine was lost,
    and one that is taken from a living process."""
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    uri = str(tmp_path / "lock")
    other = {"token": "x", "pid": os.getpid(), "host": "elsewhere", "since": 0.0}
    Path(uri).write_text(json.dumps(other | {"at": time.time() - locks.STALE_S + 60}))
    with pytest.raises(ResourceError, match="on elsewhere"), hold_by_signature(uri):
        pytest.fail("taken from a living one")
    Path(uri).write_text(json.dumps(other | {"at": time.time() - locks.STALE_S - 1}))
    with hold_by_signature(uri):
        assert json.loads(Path(uri).read_text())["pid"] == os.getpid()
    assert not Path(uri).exists()


def test_of_two_that_begin_together_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two commands that both found no signature, and both signed."""
    uri = str(tmp_path / "lock")
    other = {"token": "x", "pid": 1, "host": "elsewhere", "since": 0.0, "at": time.time()}
    monkeypatch.setattr(locks.time, "sleep", lambda _: Path(uri).write_text(json.dumps(other)))  # meanwhile it signs
    with pytest.raises(ResourceError, match="process 1 on elsewhere"), hold_by_signature(uri):
        pytest.fail("both are in")
    assert json.loads(Path(uri).read_text()) == other
