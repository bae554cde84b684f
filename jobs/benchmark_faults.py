"""What `benchmark.py chaos` does to a run: processes killed, a disk and an object store filled, a node cut off.

A *place* is where the command runs: alone with a Ray of its own, or on a small cluster. Only its processes are
touched: those below what was started there, and those that name its folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray  # noqa: F401  (it ships psutil, and puts it on the path)

# isort: split
import psutil
import pyarrow.parquet as pq

TITLES = {
    "encoder": "EncodeChunk",
    "trainer": "RayTrainWorker",
    "trial": "PopulationTrial",
}  # within Ray's process titles
COMMAND = """
import sys
from mmkt_ray.cli import main
sys.exit(next((status for word in sys.argv[1].split(",") if (status := main([word, *sys.argv[2:]]))), 0))
"""
STORE_BYTES = 200 * 1024**2  # of each node of a cluster
SMALL_DISK_BYTES = 64 * 1024**2
STORE_FULL_S = 20  # as long as the neighbour that filled the object store stays
FILL_STORE = """
import os, sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
kept = []
for size in (4 << 20, 1 << 18):
    while True:
        try:
            kept.append(ray.put(os.urandom(size)))
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
            break
print("full", len(kept), flush=True)
time.sleep(float(sys.argv[1]))
"""


# --- processes --------------------


def title(process: psutil.Process) -> str:
    """How it calls itself; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they run no more; their parents learn of it."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    end = time.monotonic() + 30
    while any(map(runs, processes)) and time.monotonic() < end:
        time.sleep(0.02)


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def family(*processes: psutil.Process | subprocess.Popen[bytes]) -> list[psutil.Process]:
    """They and all below them."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            found += [*top.children(recursive=True), top]
    return found


def remains(scratch: str) -> list[psutil.Process]:
    """What still runs of the Ray whose folder this is."""
    return family(*(process for process in psutil.process_iter() if scratch in title(process)))


# --- places --------------------


@dataclass
class Place:
    """Where the command runs."""

    root: Path  # of its files
    runs: Path  # run_root
    scratch: str  # Ray's files; short, as socket paths end at 107 characters
    prefix: list[str] = field(default_factory=list)  # of the command
    environment: dict[str, str] = field(default_factory=dict)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # of a cluster, the head first
    node_prefix: list[str] = field(default_factory=list)  # of what runs on the second host
    data: Path | None = None  # shards of its own, of which one may go or change; None: those that the config names

    def start(self, words: list[str], config: Path, log: Path) -> subprocess.Popen[bytes]:
        """`mmkt` with each of these subcommands, one after the other, in one process; what it says goes to `log`."""
        command = [*self.prefix, sys.executable, "-c", COMMAND, ",".join(words), str(config)]
        command += ["--set", f"run_root={self.runs}"]
        command += ["--set", f"data_root={self.data}"] if self.data else []
        with log.open("ab") as sink:
            return subprocess.Popen(command, env=self.variables(), stdout=sink, stderr=subprocess.STDOUT)

    def ray_start(self, prefix: list[str], *words: str) -> subprocess.Popen[bytes]:
        """A node, when it says that it runs."""
        program = str(Path(sys.executable).with_name("ray"))
        command = [*prefix, program, "start", "--block", "--temp-dir", self.scratch, *words]
        command += ["--object-store-memory", str(STORE_BYTES), "--dashboard-agent-listen-port", str(free_port())]
        process = subprocess.Popen(
            command, env=self.variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        said = b""
        while b"Ray runtime started" not in said:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"no Ray node: {said.decode(errors='replace')}")
            said += line
        return process

    def variables(self) -> dict[str, str]:
        """The environment of all that starts here."""
        patient = {"RAY_raylet_start_wait_time_s": "120", "RAY_agent_register_timeout_ms": "120000"}  # on busy machines
        own = patient | {"RAY_TMPDIR": self.scratch, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return kept | own | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"} | self.environment


def free_port(given: set[int] = set()) -> int:  # noqa: B006  (one set for all calls)
    """A port that is free, and was not given to anybody else here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    if port in given:
        return free_port()
    given.add(port)
    return port


@contextmanager
def alone(root: Path) -> Iterator[Place]:
    """A Ray of the command's own."""
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    try:
        yield Place(root, root / "runs", scratch)
    finally:
        kill(remains(scratch))
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def on_cluster(
    root: Path,
    num_nodes: int = 2,
    hosts: tuple[list[str], list[str]] = ([], []),
    address: str = "127.0.0.1",
    **options: str,
) -> Iterator[Place]:
    """A cluster of its own, whose nodes count 4 CPUs each. hosts: what runs a command on either of two hosts."""
    with alone(root) as place:
        port = free_port()
        place.prefix, place.node_prefix = hosts
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        ports = ["--ray-client-server-port", str(free_port()), "--include-dashboard", "false"]
        words += [f"--port={port}", f"--node-ip-address={address}"]
        try:
            place.nodes.append(place.ray_start(hosts[0], "--head", "--num-cpus=4", *ports, *words))
            place.environment["RAY_ADDRESS"] = f"{address}:{port}"
            if num_nodes == 2:
                place.nodes.append(place.ray_start(hosts[1], f"--address={address}:{port}", "--num-cpus=4"))
            yield place
        finally:
            kill(family(*place.nodes))


@contextmanager
def on_two_hosts(root: Path) -> Iterator[Place]:
    """The same, but each node has a network of its own (Linux namespaces), with one wire between them."""
    with ExitStack() as stack:
        pids = []
        for _ in range(2):
            sleep = ["unshare", "--net", "--kill-child", "--fork", "sleep", "infinity"]
            process = stack.enter_context(subprocess.Popen(sleep))
            stack.callback(kill, family(process))
            time.sleep(0.5)
            pids.append(psutil.Process(process.pid).children()[0].pid)
        enter = [["nsenter", f"--target={pid}", "--net"] for pid in pids]
        subprocess.run(
            [*enter[0], "ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(pids[1])],
            check=True,
        )
        for number, prefix in enumerate(enter, start=1):
            for words in (f"address add 10.213.8.{number}/24 dev wire", "link set lo up", "link set wire up"):
                subprocess.run([*prefix, "ip", *words.split()], check=True)
            subprocess.run([*prefix, *f"ip route add default via 10.213.8.{3 - number}".split()], check=True)
        yield stack.enter_context(on_cluster(root, hosts=(enter[0], enter[1]), address="10.213.8.1"))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 MiB, mounted at `folder`."""
    folder.mkdir(parents=True)
    options = f"size={SMALL_DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def on_small_disk(root: Path) -> Iterator[Place]:
    """Alone, with the run folder on a small disk."""
    with small_disk(root / "disk") as disk, alone(root) as place:
        place.runs = disk / "runs"
        yield place


@contextmanager
def with_own_shards(root: Path) -> Iterator[Place]:
    """Alone, with a copy of the shards that lie beside the round's folder."""
    with alone(root) as place:
        place.data = Path(shutil.copytree(root.parent / "data", root / "data"))
        yield place


@contextmanager
def with_small_store(root: Path) -> Iterator[Place]:
    """A cluster of one node, whose object store spills to a small disk."""
    with small_disk(root / "spilled") as disk, on_cluster(root, 1, object_spilling_directory=str(disk)) as place:
        yield place


# --- faults --------------------


def kill_driver(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """The command itself; its Ray ends with it."""
    kill([psutil.Process(process.pid)])
    return True


def first_of(role: str, place: Place, process: subprocess.Popen[bytes]) -> psutil.Process | None:
    """A process of that role, as soon as there is one; None if the command ends before."""
    while process.poll() is None:
        if found := [p for p in family(process, *place.nodes) if TITLES[role] in title(p)]:
            return found[0]
        time.sleep(0.05)
    return None


def kill_one(role: str) -> Callable[[Place, subprocess.Popen[bytes]], bool]:
    """A process of that role, as soon as there is one."""

    def strike(place: Place, process: subprocess.Popen[bytes]) -> bool:
        found = first_of(role, place, process)
        kill([found] if found else [])
        return found is not None

    return strike


def kill_head(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """The process that knows what the cluster is (GCS)."""
    while process.poll() is None:
        if found := [p for p in family(process) if "gcs_server" in title(p)]:
            kill(found)
            return True
        time.sleep(0.05)
    return False


def kill_raylet(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """The second node's."""
    kill([p for p in family(place.nodes[1]) if "/raylet" in title(p).split(" ")[0]])
    return True


def cut_off(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """The second node's network goes down: its processes live on, alone."""
    subprocess.run([*place.node_prefix, "ip", "link", "set", "wire", "down"], check=True)
    return True


def fill_disk(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """Not a byte is left where the run folder is, until the command has ended."""
    disk = os.statvfs(place.runs.parent)
    with (place.runs.parent / "filler").open("wb") as file, suppress(OSError):
        file.write(bytes(disk.f_bavail * disk.f_frsize))
        file.write(bytes(1 << 20))
    return True


def fill_store(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """A neighbour on the same cluster fills the object store and the disk that it spills to,
    and goes after a while."""
    command = [*place.prefix, sys.executable, "-c", FILL_STORE, str(STORE_FULL_S)]
    filler = subprocess.Popen(command, env=place.variables(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert filler.stdout is not None
    return any(line.startswith(b"full") for line in filler.stdout)


def delete_shard(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """The second shard is gone until the command has ended."""
    shard = _second_shard(place)
    shard.rename(place.root / shard.name)
    return True


def replace_shard(place: Place, process: subprocess.Popen[bytes]) -> bool:
    """The second shard has half of its rows, and other labels, until the command has ended."""
    shard = _second_shard(place)
    table = pq.read_table(shard)
    shard.rename(place.root / shard.name)
    labels = table["colour"].slice(1, table.num_rows // 2)
    changed = table.slice(0, table.num_rows // 2).set_column(table.schema.get_field_index("colour"), "colour", labels)
    pq.write_table(changed, place.root / "changed")
    (place.root / "changed").rename(shard)
    return True


def _shards(place: Place) -> Path:
    """Their folder."""
    assert place.data is not None
    return place.data / "shapes"


def _second_shard(place: Place) -> Path:
    return _shards(place) / "1.parquet"


@dataclass(frozen=True)
class Fault:
    """What happens, and where."""

    place: Callable[[Path], Any]
    strike: Callable[[Place, subprocess.Popen[bytes]], bool]  # whether it met the run
    role: str | None = None  # it can only strike while there is such a process
    changes_data: bool = False  # a good end may be that of other data: once it is mended the command is given again


FAULTS = {
    "driver": Fault(alone, kill_driver),
    "encoder": Fault(alone, kill_one("encoder"), "encoder"),
    "trainer": Fault(alone, kill_one("trainer"), "trainer"),
    "trial": Fault(alone, kill_one("trial"), "trial"),
    "raylet": Fault(on_cluster, kill_raylet),
    "head": Fault(alone, kill_head),
    "disk full": Fault(on_small_disk, fill_disk),
    "store full": Fault(with_small_store, fill_store),
    "node cut off": Fault(on_two_hosts, cut_off),
    "shard deleted": Fault(with_own_shards, delete_shard, changes_data=True),
    "shard replaced": Fault(with_own_shards, replace_shard, changes_data=True),
}
NEED_ROOT = {"disk full", "store full", "node cut off"}  # mounts and networks


def impossible(name: str) -> str | None:
    """Why this machine can't make that fault; None if it can."""
    if name not in NEED_ROOT:
        return None
    if os.geteuid() != 0:
        return "needs root, for a small disk or a network of its own"
    program = ["unshare", "--net", "true"] if name == "node cut off" else ["unshare", "--mount", "true"]
    allowed = subprocess.run(program, capture_output=True, text=True)
    return f"not allowed here: {allowed.stderr.strip()}" if allowed.returncode else None


def mend(place: Place) -> None:
    """Undo what keeps the next command from success."""
    (place.runs.parent / "filler").unlink(missing_ok=True)
    if place.data is not None:
        for shard in place.root.glob("*.parquet"):
            shard.rename(_shards(place) / shard.name)
