"""Ctrl-C and SIGTERM: both end a command as KeyboardInterrupt, wherever it is,
and give it the exit status of a shell."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 0.1  # until an interrupt that was lost in a finalizer is raised again
SAME_S = 0.5  # a terminal and a wrapper may both send one: what comes so soon is no second
GRACE_S = 15.0  # for the command to leave off, before it is ended wherever it is


@dataclass
class Interrupt:
    """What has come so far, and the end that follows."""

    signum: int | None = None
    said: str = "interrupted: the same command goes on from here"
    _ending: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """Say it, end the Ray that the command has started, and the process: no C code that hangs can hold it up."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        with suppress(OSError):  # whoever read it is gone
            sys.stdout.flush()
            print(self.said, file=sys.stderr, flush=True)
        if local := sys.modules.get("mmkt_ray.cluster.local"):
            local.kill_local()
        os._exit(128 + (self.signum or signal.SIGINT))  # 130 after Ctrl-C, 143 after SIGTERM


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it each signal raises KeyboardInterrupt, also where Python would print it and go on. A second one, or
    GRACE_S, ends the process wherever its main thread is."""
    found = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield found  # no signal comes here
        return

    def on_signal(signum: int, _: Any) -> None:
        found.signum = signum
        raise KeyboardInterrupt

    def on_lost(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN_S, os.kill, (os.getpid(), found.signum or signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(lost)

    receiver, sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {signum: signal.signal(signum, on_signal) for signum in SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, on_lost
    wakeup = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, args=(receiver, found), daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(sender)  # ends the watcher
        sys.unraisablehook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler)


def watch(receiver: int, found: Interrupt) -> None:
    """End the process at the second signal, or GRACE_S after the first. The kernel's handler tells of each here at
    once, Python's own waits for the main thread."""
    first_s: float | None = None
    while True:
        left_s = None if first_s is None else first_s + GRACE_S - time.monotonic()
        if left_s is not None and left_s <= 0:
            found.end()
        if not select.select([receiver], [], [], left_s)[0]:
            continue
        numbers = os.read(receiver, 64)
        if not numbers:
            os.close(receiver)
            return
        for number in set(numbers) & set(SIGNALS):
            found.signum = found.signum or number
            if first_s is not None and time.monotonic() - first_s > SAME_S:
                found.end()
            first_s = first_s or time.monotonic()
