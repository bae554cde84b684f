"""An S3 server in a process of its own: moto's, behind a layer that fails requests the ways object stores do.

    python tests/cluster/s3_server.py      binds to a free port of 127.0.0.1, prints it, ends when its stdin is closed

Faults are set by POST and read by GET at /faults, as JSON (`Faults`).
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wsgi import get_input_stream

Environ = dict[str, Any]
Reply = Iterable[bytes]
TRANSIENT = ("slow_down", "internal", "refuse", "lose", "cut")
STATUS = {
    "slow_down": ("503 Slow Down", "SlowDown"),
    "internal": ("500 Internal Server Error", "InternalError"),
    "deny": ("403 Forbidden", "AccessDenied"),
}


@dataclass
class Faults:
    """What to do to requests from now on, and what was done.

    slow_down, internal: an error that asks to try again. refuse: the connection closed before anything is done; lose:
    done, and closed before the reply; cut: closed in the middle of the reply. deny: an error that no retry mends.
    """

    share: float = 0.0  # of the requests that fail in one of the transient ways
    seed: int = 0
    deny_put: str = ""  # puts of keys that contain this are denied ...
    deny_after: int = 0  # ... after so many that were not
    done: Counter[str] = field(default_factory=Counter)  # requests, and faults by kind
    writes: list[str] = field(default_factory=list)  # "PUT key" and "DELETE key", in order, faulty ones aside


class FaultyApp:
    """WSGI: S3 with faults."""

    def __init__(self, app: Callable[..., Reply]) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.set(Faults())

    def set(self, faults: Faults) -> None:
        """From the next request on."""
        self.faults, self.random = faults, random.Random(faults.seed)

    def __call__(self, environ: Environ, start: Callable[..., Any]) -> Reply:
        """See WSGI."""
        if environ["PATH_INFO"] == "/faults":
            return self._control(environ, start)
        with self.lock:
            kind = self._choose(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if kind in STATUS:
            get_input_stream(environ).read()
            status, code = STATUS[kind]
            start(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{kind}</Message></Error>".encode()]
        if kind == "refuse":
            return hang_up(environ)
        if kind == "lose":
            b"".join(self.app(environ, lambda *_: None))
            return hang_up(environ)
        reply = self.app(environ, start)
        return cut(environ, b"".join(reply)) if kind == "cut" else reply

    def _choose(self, method: str, path: str) -> str:
        faults = self.faults
        faults.done["requests"] += 1
        kind = ""
        if faults.deny_put and method == "PUT" and faults.deny_put in path:
            faults.done["puts"] += 1
            kind = "deny" if faults.done["puts"] > faults.deny_after else ""
        if not kind and self.random.random() < faults.share:
            kind = self.random.choice(TRANSIENT)
        if kind:
            faults.done[kind] += 1
        elif method in ("PUT", "DELETE"):
            faults.writes.append(f"{method} {path.lstrip('/')}")
        return kind

    def _control(self, environ: Environ, start: Callable[..., Any]) -> Reply:
        if environ["REQUEST_METHOD"] == "POST":
            self.set(Faults(**json.loads(get_input_stream(environ).read())))
        start("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(vars(self.faults)).encode()]


def hang_up(environ: Environ) -> Reply:
    """Close the connection without a reply."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError


def cut(environ: Environ, body: bytes) -> Iterator[bytes]:
    """Half of the reply (of none nothing), then the connection closes."""
    yield body[: len(body) // 2]
    hang_up(environ)


def serve() -> None:
    """Serve until stdin ends."""
    app = FaultyApp(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    print(server.port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve()
