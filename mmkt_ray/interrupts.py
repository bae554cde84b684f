"""Ctrl-C and SIGTERM: both end a command as KeyboardInterrupt, wherever it is, and give it the exit status of a shell."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 0.1  # until an interrupt that was lost in a finalizer is raised again


@dataclass
class Interrupt:
    """What has come so far."""

    signum: int | None = None

    @property
    def status(self) -> int:
        """The exit status: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signum or signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it each signal raises KeyboardInterrupt, also where Python would print it and go on. After one has come the
    next ends the process at once, with no cleaning up: what is left to do then is the end of Ray."""
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

    before = {signum: signal.signal(signum, on_signal) for signum in SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, on_lost
    try:
        yield found
    finally:
        sys.unraisablehook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler if found.signum is None else lambda *_: os._exit(found.status))
