"""Three hosts and a desk on one machine: each has network, processes, /tmp and home of its own (Linux namespaces).

    desk 10.213.7.1 -- bridge -- 10.213.7.11, .12, .13     the bridge is inside the desk's network: no way out of it

A host is its first process, a shell that reads until its input ends. When the tests end, or are killed, that input
ends, and the kernel takes every process, address and mount of the host away.
"""

import os
import pwd
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NETWORK = "10.213.7"
STORAGE = Path("/mnt")  # where every host sees the folder that they share
LOGIN = pwd.getpwuid(os.getuid())
HOME = Path(LOGIN.pw_dir)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A host has these folders to itself, empty but for what runs the tests.
OWN_FOLDERS = (Path("/tmp"), Path("/run"), Path("/dev/shm"), HOME)
KEPT = (Path(sys.prefix), Path(sys.base_prefix), ROOT)
ADDRESSES = {name: f"{NETWORK}.{n}" for name, n in (("desk", 1), ("host1", 11), ("host2", 12), ("host3", 13))}
# Nobody else is asked for names: torch and Ray want that of every address, and would wait 10 s for no answer. As on
# Debian, a host's own name stands for 127.0.1.1.
NAMES = "\n".join(
    ["127.0.0.1 localhost", f"127.0.1.1 {socket.gethostname()}"]
    + [f"{address} {name}" for name, address in ADDRESSES.items()]
)
SSHD_OPTIONS = ("UsePAM=no", "StrictModes=no", "PermitRootLogin=prohibit-password", "PidFile=none", "UseDNS=no")


@dataclass(frozen=True)
class Host:
    """A host, by the address that the others know."""

    address: str
    shell: subprocess.Popen[str]
    first_pid: int  # of its first process, as this machine counts; inside it is number 1

    def command(self, *words: str) -> list[str]:
        """What runs `words` in this host, from the repository's folder, in an environment of a fresh login."""
        path = f"PATH={sys.prefix}/bin:{SYSTEM_PATH}"
        enter = ["nsenter", f"--target={self.first_pid}", "--mount", "--net", "--pid"]
        return [*enter, "env", "--ignore-environment", f"--chdir={ROOT}", path, f"HOME={HOME}", "LANG=C.UTF-8", *words]

    def run(self, *words: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run it, with standard error in its output. Raises:
        AssertionError with that output if it fails and `check`."""
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(self.command(*words), text=True, errors="replace", timeout=timeout_s, **pipes)
        assert not (check and done.returncode), f"{shlex.join(words)}: exit status {done.returncode}\n{done.stdout}"
        return done


def what_is_missing() -> str | None:
    """Why this machine can't have such hosts, with what to do; None if it can."""
    if os.geteuid() != 0:
        return "hosts with addresses of their own need root"
    programs = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "rsync")
    missing = [name for name in programs if not shutil.which(name, path=SYSTEM_PATH)]
    if missing:
        return f"no {', '.join(missing)}: install the packages iproute2, util-linux, openssh-server, rsync"
    needed = "mount -t tmpfs none /mnt && ip link add one type veth peer name two && ip link add three type bridge"
    command = ["unshare", "--net", "--pid", "--mount", "--fork", "sh", "-c", needed]
    allowed = subprocess.run(command, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True)
    return f"such namespaces are not allowed here: {allowed.stderr.strip()}" if allowed.returncode else None


def become_host(storage: Path) -> str:
    """The script of a host's first process: folders and names of its own, the shared storage,
    then wait for the end of the input.

    bash, because as process number 1 it also buries the daemons that Ray leaves to it;
    `ray stop` waits for their end.
    """
    lines = ["set -e", f"mount --bind {shlex.quote(str(storage))} {STORAGE}", "mount -t tmpfs none /media"]
    for own in OWN_FOLDERS:
        kept = [path for path in KEPT if path.is_relative_to(own)]
        for k, path in enumerate(kept):
            lines += [f"mkdir -p /media/{k}", f"mount --bind {shlex.quote(str(path))} /media/{k}"]
        lines += [f"mount -t tmpfs none {own}"]
        for k, path in enumerate(kept):
            lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --move /media/{k} {shlex.quote(str(path))}"]
    lines += [f"printf '%s\\n' {shlex.quote(NAMES)} > /run/hosts", "mount --bind /run/hosts /etc/hosts"]
    lines += ["test ! -e /etc/resolv.conf || mount --bind /dev/null /etc/resolv.conf"]
    return "\n".join([*lines, "umount /media", f"touch {HOME}/.bashrc", "echo ready", "read -r"])


@contextmanager
def host_with(address: str, storage: Path) -> Iterator[Host]:
    """A host without a network yet; its end is the end of all that ran in it."""
    own = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([*own, "bash", "-c", become_host(storage)], text=True, **pipes) as shell:
        said = shell.stdout.readline() if shell.stdout else ""
        assert said == "ready\n", f"no host {address}: {said}{shell.communicate(timeout=10)[0]}"
        first_pid = int(Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text())
        namespace = os.readlink(f"/proc/{first_pid}/ns/pid")
        try:
            yield Host(address, shell, first_pid)
        finally:
            shell.communicate(timeout=30)  # closes its input
    assert not processes_in(namespace), f"{address} left processes behind"


def processes_in(namespace: str) -> list[int]:
    """The processes of this machine in that namespace of process numbers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns" / "pid") == namespace:
                found.append(int(process.name))
        except OSError:
            pass  # ended meanwhile, or a process that nobody may look into
    return found


def connect(desk: Host, hosts: list[Host]) -> None:
    """A bridge at the desk, a wire from each host to it, and the desk as the way to everywhere (where it ends)."""
    desk.run("ip", "link", "add", "bridge", "type", "bridge")
    desk.run("ip", "address", "add", f"{ADDRESSES['desk']}/24", "dev", "bridge")
    for link in ("lo", "bridge"):
        desk.run("ip", "link", "set", link, "up")
    for k, host in enumerate(hosts):
        wire = ["ip", "link", "add", f"host{k}", "type", "veth", "peer", "name", "eth0", "netns", str(host.first_pid)]
        subprocess.run(["nsenter", f"--target={desk.first_pid}", "--net", *wire], check=True)
        desk.run("ip", "link", "set", f"host{k}", "master", "bridge", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            host.run("ip", "link", "set", link, "up")
        # Ray asks for this route to learn its own address
        host.run("ip", "route", "add", "default", "via", ADDRESSES["desk"])


def start_sshd(host: Host, public_key: str) -> None:
    """Whoever has the key may log in there."""
    host.run("mkdir", "-p", "/run/sshd")
    host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/host_key")
    host.run("sh", "-c", 'echo "$1" > /run/authorized_keys', "sh", public_key)
    options = [f"ListenAddress={host.address}", "HostKey=/run/host_key", "AuthorizedKeysFile=/run/authorized_keys"]
    words = [word for option in (*options, *SSHD_OPTIONS) for word in ("-o", option)]
    host.run("/usr/sbin/sshd", "-f", "/dev/null", *words)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A folder that all hosts see as /mnt."""
    folder = tmp_path / "storage"
    folder.mkdir()
    return folder


@pytest.fixture
def desk_and_hosts(storage: Path) -> Iterator[tuple[Host, list[Host]]]:
    """A desk and three hosts that it reaches by ssh, with the key ~/.ssh/id_ed25519."""
    reason = what_is_missing()
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        desk, *hosts = [stack.enter_context(host_with(address, storage)) for address in ADDRESSES.values()]
        connect(desk, hosts)
        desk.run("mkdir", "-p", f"{HOME}/.ssh")
        desk.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/.ssh/id_ed25519")
        public_key = desk.run("cat", f"{HOME}/.ssh/id_ed25519.pub").stdout.strip()
        for host in hosts:
            start_sshd(host, public_key)
        yield desk, hosts
