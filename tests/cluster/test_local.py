"""A Ray of our own: where its folder lies, and how its processes end."""

import subprocess
import sys
import time

import pytest

from mmkt_ray.cluster import local
from mmkt_ray.cluster.local import psutil  # Ray's
from mmkt_ray.errors import ResourceError

LONG = "/scratch/users/somebody/jobs/1234567"


def test_a_long_temporary_folder_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of Ray's where a batch system sets a TMPDIR below which no path of a socket fits."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", LONG)
    assert local.session_parent() == "/tmp"
    monkeypatch.setenv("TMPDIR", "/scratch/1234567")
    assert local.session_parent() == "/scratch/1234567"
    monkeypatch.setenv("RAY_TMPDIR", LONG)
    with pytest.raises(ResourceError, match=f"RAY_TMPDIR is '{LONG}'.* at most {local.MAX_PARENT} characters"):
        local.session_parent()


def test_an_end_that_nobody_asks_for_is_not_waited_for() -> None:
    """Catches 20 s at the end of each command in a container whose first process does not reap what it is left."""
    code = (
        "import subprocess, sys, time;"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True);"  # whose exit status it never asks for
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        started = time.monotonic()
        local.kill([orphan], timeout_s=30)
        assert time.monotonic() - started < 15
        assert orphan.status() == psutil.STATUS_ZOMBIE
        local.kill([psutil.Process(parent.pid)])
    assert not psutil.pid_exists(parent.pid)
