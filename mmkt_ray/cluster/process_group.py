"""torch.distributed of training workers, with sockets on the addresses of their nodes alone:
127.0.0.1 on one machine.

By itself torch listens on all interfaces where the workers meet, and gloo on the address of the machine's name.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError
from ray.train import get_context
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

LEAVE_TIMEOUT_S = 30.0  # for workers to leave the group; their processes end after it in any case
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
held: list[dist.TCPStore] = []  # served by this process for as long as it lives


class NodeAddressConfig(TorchConfig):
    """For `TorchTrainer(torch_config=...)`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Who sets the group up."""
        return NodeAddressBackend


class NodeAddressBackend(Backend):
    """What Ray's own for torch does, but for where the workers meet."""

    share_cuda_visible_devices = True  # workers of a node see each other's GPUs, which NCCL needs

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """NCCL for workers with GPUs, gloo for others."""
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        host, port = worker_group.execute_single(0, serve_store)
        worker_group.execute(set_torchrun_variables)
        size = len(worker_group)
        place = (backend, host, port, size, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, join_group, rank, *place) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """A worker that hangs or has died leaves by its end."""
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave_group), timeout=LEAVE_TIMEOUT_S)


def set_torchrun_variables() -> None:
    """What `torchrun` sets: NCCL picks a GPU by LOCAL_RANK."""
    context = get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    os.environ["NODE_RANK"] = str(context.get_node_rank())
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())


def leave_group() -> None:
    """The end of what `join_group` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def serve_store() -> tuple[str, int]:
    """Open the store where the workers meet; its address."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    fd = listener.detach()
    held.append(dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd))
    return host, port


def join_group(rank: int, backend: str, host: str, port: int, world_size: int, timeout_s: float) -> None:
    """Meet the others, and talk over the interface that has this node's address,
    unless the environment names another."""
    if interface := interface_of(ray.util.get_node_ip_address()):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def interface_of(address: str) -> str | None:
    """The name of the interface with that IPv4 address; None if this machine knows of none."""
    if ipaddress.ip_address(address).is_loopback:
        address = "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
