"""Real signals to a real command; those with Ray behind them are in tests/cluster/test_interrupted_runs.py."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mmkt_ray import cli
from mmkt_ray.interrupts import Interrupt

ROOT = Path(__file__).parents[1]
SAID = "interrupted: the same command goes on from here\n"
LOST = """\
import os, signal, sys, time
from mmkt_ray.interrupts import interruptible
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0)
with interruptible() as interrupt:
    try:
        Finalized()
        time.sleep(60)
    except KeyboardInterrupt:
        interrupt.end()
"""
HANGS = """\
import ctypes
from mmkt_ray.interrupts import interruptible
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with interruptible():
    lock(mutex)
    while True:
        try:
            print("hangs", flush=True)
            lock(mutex)
        except KeyboardInterrupt:  # it came before the lock, in `print` say
            pass
"""


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_its_status(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    """Catches a traceback, and a scheduler that reads 0, 1 or 15 for a command that it has stopped."""
    fifo = tmp_path / "c.yaml"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "mmkt_ray.cli", "config", str(fifo)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(fifo, "w"):  # opens once the command is reading it, and then waits for more
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert err == SAID


@pytest.mark.parametrize(("command", "said"), [("serve", "stopped"), ("train", SAID.strip())])
def test_a_server_that_is_stopped_has_nothing_to_go_on_with(
    monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    """Catches Ctrl-C in `mmkt serve` that promises to go on."""
    told: list[str] = []

    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    monkeypatch.setattr(Interrupt, "end", lambda self: told.append(self.said))
    cli.main([command, "x"])
    assert told == [said]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_a_finalizer_is_not_lost(signum: signal.Signals, status: int) -> None:
    """Catches an interrupt that Python prints and forgets, because the main thread was in a `__del__`."""
    command = [sys.executable, "-c", LOST.format(name=signum.name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", SAID)


@pytest.mark.slow
def test_the_second_ctrl_c_ends_a_command_that_hangs() -> None:
    """Catches a command that cannot be ended from the keyboard,
    because its main thread waits in C code for a lock."""
    command = [sys.executable, "-c", HANGS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(100):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.6)
                break
        process.kill()  # only where it lives on
        assert (process.returncode, process.communicate()[1]) == (130, SAID)
