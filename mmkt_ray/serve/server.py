"""A server of a model: uvicorn in this process, or replicas on Ray Serve."""

from __future__ import annotations

import importlib
import ipaddress
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING

from mmkt_ray.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from mmkt_ray.serve.limits import ServerLimits  # of starlette, which may not be installed

log = logging.getLogger(__name__)

APP = "mmkt"  # what Ray Serve calls it
ADVICE = "run pip install '.[serve]' in the project's folder"


def require_serve() -> None:
    """Raises: ConfigError if a package of the extra `serve` is not installed."""
    for module in ("fastapi", "uvicorn", "python_multipart"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"mmkt serve needs {module} ({error}): {ADVICE}") from None


def model_name(model_uri: str) -> str:
    """What pages and answers call the model: its folder's name, and its run's where it lies in one."""
    parts = model_uri.rstrip("/").split("/")
    return f"{parts[-3]}/{parts[-1]}" if len(parts) > 2 and parts[-2] == "models" else parts[-1]


def allowed_hosts(host: str) -> list[str] | None:
    """Names that requests may ask for: on loopback its own ones only;
    else any, as the machine's names are not known."""
    from mmkt_ray.serve.app import LOOPBACK

    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    return [*LOOPBACK, host] if is_local else None


def listen(host: str, port: int) -> socket.socket:
    """A socket bound there. Raises: ResourceError if it is taken, or no address of this machine."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from None
    return listener


def log_address(model_uri: str, host: str, port: int, how: str = "") -> None:
    """Where the model answers, and to whom."""
    address = f"[{host}]" if ":" in host else host
    log.info("serving %s on http://%s:%d%s; Ctrl-C ends it", model_name(model_uri), address, port, how)
    if allowed_hosts(host) is None:
        log.warning(
            "there is no login: anyone who reaches %s can ask this model; put a proxy with a login before it", address
        )


def serve(model_uri: str, host: str, port: int, limits: ServerLimits, *, trust_code: bool = False) -> None:
    """Serve until the process is stopped. Raises: ConfigError, DataError, ResourceError if the port is taken."""
    with listen(host, port) as listener:
        import uvicorn

        from mmkt_ray.api.model import load  # torch: after what may be refused at once
        from mmkt_ray.serve.app import create_app

        app = create_app(load(model_uri, trust_code=trust_code), model_name(model_uri), limits, allowed_hosts(host))
        log_address(model_uri, host, listener.getsockname()[1])
        config = uvicorn.Config(
            app, log_level="warning", timeout_keep_alive=5, limit_concurrency=200, server_header=False, access_log=False
        )
        uvicorn.Server(config).run(sockets=[listener])


def serve_on_ray(
    model_uri: str, host: str, port: int, limits: ServerLimits, replicas: int, *, trust_code: bool = False
) -> None:
    """Serve by Ray Serve, each replica with a model of its own, until the process is stopped.

    Attaches to the cluster in RAY_ADDRESS, else starts a Ray on this machine.
    The model folder must be readable on all nodes.
    Raises: as `serve`.
    """
    try:
        from ray import serve as ray_serve
    except ImportError as error:
        raise ConfigError(f"mmkt serve --ray needs Ray Serve ({error}): {ADVICE}") from None
    from fastapi import FastAPI
    from ray.serve.schema import LoggingConfig

    from mmkt_ray import cluster, ray_private, storage
    from mmkt_ray.api.model import load

    if replicas < 1:
        raise ConfigError(f"--replicas {replicas}: at least one must answer")
    uri, name, hosts = storage.absolute(model_uri), model_name(model_uri), allowed_hosts(host)
    with listen(host, port) as free:
        port = free.getsockname()[1]  # 0 stands for any
    load(uri, trust_code=trust_code)  # what is wrong with it is said here, in one sentence

    def build() -> FastAPI:
        from mmkt_ray.serve.app import create_app

        ray_private.keep_replica_on_its_node()
        return create_app(load(uri, trust_code=trust_code), name, limits, hosts)

    cluster.connect()
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    options = {"name": "model", "num_replicas": replicas, "logging_config": quiet}
    deployment = ray_serve.deployment(ray_serve.ingress(build)(), **options)
    try:
        ray_serve.run(deployment.bind(), name=APP, route_prefix="/")
        log_address(model_uri, host, port, f" from {replicas} process{'es' if replicas > 1 else ''}")
        threading.Event().wait()
    finally:
        if os.environ.get("RAY_ADDRESS"):  # a Ray of our own ends with all that runs on it
            ray_serve.delete(APP)
