"""Stands for a Ray worker towards Ray, which starts this file in place of its own `setup_worker.py`: the worker
itself is forked by fork_server.py. Where that cannot be, Ray's own file takes over. Imports the standard library
alone: it starts in 20 ms.
"""

import json
import os
import socket
import sys

SOCKET = "MMKT_FORK_SERVER"  # environment variable: path of the server's socket
OWN_SCRIPT = "MMKT_RAY_SETUP_WORKER"  # as in ray_private.py
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main() -> None:
    """Wait until the worker has ended: Ray takes this process for it until it has registered."""
    if forkable(sys.argv[1:]):
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(os.environ[SOCKET])
            request_worker(server)
            if server.recv(1):  # the worker is there
                server.recv(1)
                return
        except OSError:
            pass  # the server has ended
        server.close()
    os.execv(sys.executable, [sys.executable, os.environ[OWN_SCRIPT], *sys.argv[1:]])


def forkable(arguments: list[str]) -> bool:
    """Whether a fork does: a worker in Python, in this interpreter, with at most variables of its own."""
    context = context_of(arguments)
    own = not context.get("command_prefix") and not context.get("override_worker_entrypoint")
    python = not {a for a in arguments if a.startswith(LANGUAGE)} - {f"{LANGUAGE}PYTHON"}
    return own and python and context.get("py_executable", sys.executable) == sys.executable


def context_of(arguments: list[str]) -> dict[str, object]:
    """The runtime environment that Ray passes to `setup_worker.py`."""
    given = [a.removeprefix(CONTEXT) for a in arguments if a.startswith(CONTEXT)]
    found = json.loads(given[-1] or "{}") if given else {}
    return found if isinstance(found, dict) else {}


def request_worker(server: socket.socket) -> None:
    """Send what the worker takes over: arguments, environment, folder, priority, and the standard streams."""
    with open("/proc/self/oom_score_adj") as file:  # Ray has the kernel end workers first
        oom_score_adj = file.read()
    request = {
        "arguments": [a for a in sys.argv[1:] if not a.startswith((CONTEXT, LANGUAGE))],
        "environment": dict(os.environ),
        "variables": context_of(sys.argv[1:]).get("env_vars") or {},
        "folder": os.getcwd(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": oom_score_adj,
    }
    line = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(server, [line], [0, 1, 2])
    server.sendall(line[sent:])


if __name__ == "__main__":
    main()
