"""`mmkt submit`: a job on a cluster, through Ray's job server; its log is followed and its exit code passed on.

The job is `python jobs/<command>.py CONFIG ...` in a copy of the current folder. A submission id makes the command
safe to repeat: one that runs is followed again, the end of one that is over is shown, and no job is started twice.

Nothing of Ray is imported before `match_authentication`: Ray reads the mode once, when it is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkt_ray.config import Config, load_config, parse_override
from mmkt_ray.errors import ConfigError, ResourceError
from mmkt_ray.upload import choose_files, packed

SUBMITTED = ("run", "extract", "train", "evaluate", "search", "doctor")
STAYS_HERE = ("/data/", "/runs/", ".git", ".venv", "venv", "__pycache__", "*.pyc", ".*_cache/", ".hypothesis/")
STOPPED = 143  # what a shell says of a process that was asked to end: 128 + SIGTERM
POLL_S = 1.0
PATIENCE_S = 120.0  # for a job server that does not answer while its job is followed


@dataclass(frozen=True)
class Job:
    """What is submitted, from where."""

    folder: Path
    config: Config
    command: str
    entrypoint: str  # for a shell

    @property
    def excludes(self) -> list[str]:
        """What the copy of the folder leaves out besides what .gitignore and .rayignore name,
        as lines of a .gitignore."""
        roots = [Path(root).expanduser() for root in (self.config.data_root, self.config.run_root)]
        inside = [f"/{root.relative_to(self.folder)}/" for root in roots if root.is_relative_to(self.folder)]
        return [*STAYS_HERE, *(pattern for pattern in inside if pattern != "/./")]


def submit_command(args: argparse.Namespace) -> int:
    """What the parsed command line asks for; the exit status."""
    job = prepare(args.config, args.overrides, args.job, Path.cwd())
    return submit(job, args.address, args.submission_id, wait=not args.no_wait)


def prepare(config_path: str, overrides: Sequence[str], command: str, folder: Path) -> Job:
    """Check on this side what would fail on the other. Raises: ConfigError."""
    config = load_config(folder / config_path, dict(parse_override(text) for text in overrides))
    path = (folder / config_path).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"'{config_path}' is outside of '{folder}', which is what the cluster gets: copy it into it")
    script = Path("jobs", f"{command}.py")
    if not (folder / script).is_file():
        raise ConfigError(f"no {script} in '{folder}': submit from the project's folder")
    for name in ("data_root", "run_root"):
        root = getattr(config, name)
        if "://" not in root and not Path(root).expanduser().is_absolute():
            raise ConfigError(
                f"{name} '{root}' is relative, and the job's copy of this folder is removed after it: give a place "
                f"that all nodes see, e.g. --set {name}=s3://bucket/folder or --set {name}=/shared/folder"
            )
    words = ["python", str(script), str(path.relative_to(folder.resolve()))]
    words += [word for text in overrides for word in ("--set", text)]
    return Job(folder, config, command, shlex.join(words))


def submit(job: Job, address: str, submission_id: str | None = None, wait: bool = True) -> int:
    """Submit the job, or find it under its id, and follow it. Returns the exit status: 0 done (without `wait`:
    submitted), the job's own where it failed (1 if that is unknown), STOPPED where it was stopped.

    Raises: ResourceError if the cluster does not answer or refuses the token; ConfigError for an id of another job
    and for a folder that is too large.
    """
    client = job_client(address)
    name = submission_id or f"{job.config.name}-{job.command}-{uuid.uuid4().hex[:8]}"
    with told_if_lost(address, name):
        known = {info.submission_id: info for info in client.list_jobs()}.get(name)
    if known is None:
        upload = choose_files(job.folder, job.excludes)
        say(str(upload))
        with packed(upload) as package, told_if_lost(address, name):
            client.submit_job(
                entrypoint=job.entrypoint, submission_id=name, runtime_env={"working_dir": str(package)}
            )
        say(f"submitted as {name}; the same command with --submission-id {name} follows it again")
    elif known.entrypoint != job.entrypoint:
        raise ConfigError(f"submission id '{name}' is taken by another job, `{known.entrypoint}`: choose another")
    elif known.status.is_terminal():
        return tell_result(known)
    else:
        say(f"{name} runs already; following it")
    if not wait:
        return 0
    return tell_result(follow(client, name))


@contextmanager
def told_if_lost(address: str, name: str) -> Iterator[None]:
    """Raises: ResourceError with the job's id if a connection breaks off: the server may have the job already."""
    try:
        yield
    except OSError as error:  # as those of the library that Ray's client uses are
        raise ResourceError(
            f"the connection to the job server at {address} broke off ({error}); the same command with "
            f"--submission-id {name} follows the job, or submits it if the server does not have it"
        ) from None


def job_client(address: str) -> Any:
    """A client of the job server at `address`. Raises: ResourceError if it does not answer or refuses the token."""
    match_authentication(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would win over what was asked for
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every closed connection
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ResourceError(
            f"the cluster at {address} refuses the token: put the cluster's own into ~/.ray/auth_token, or name its "
            "file in RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(f"no job server at {address}: {error}") from None


def match_authentication(address: str) -> None:
    """Have Ray's client send the user's token if the cluster asks for one, and to no other:
    Ray leaves this to the user."""
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address '{address}' is no URL of a job server, e.g. http://10.0.0.1:8265")
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/authentication_mode", timeout=30) as answer:
            mode = json.load(answer)["authentication_mode"]
    except urllib.error.HTTPError:  # a Ray that knows no tokens
        mode = "disabled"
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"no job server answers at {address} ({error}): it is the head's port 8265; from outside forward it, "
            "e.g. `ray dashboard cluster.yaml`"
        ) from None
    assert "ray" not in sys.modules or os.environ.get("RAY_AUTH_MODE", "disabled") == mode, "Ray has read another mode"
    os.environ["RAY_AUTH_MODE"] = mode


def follow(client: Any, name: str) -> Any:
    """Print the job's log until it has ended; what Ray knows of it then. A lost connection is made anew.

    Raises: ResourceError if the job server stays away; the job may go on.
    """
    import aiohttp

    printed = 0
    lost_at: float | None = None

    async def print_new() -> None:
        nonlocal printed
        position = 0  # the log comes from its beginning each time
        async for text in client.tail_job_logs(name):
            sys.stdout.write(text[max(0, printed - position) :])
            sys.stdout.flush()
            position += len(text)
            printed = max(printed, position)

    while True:
        try:
            asyncio.run(print_new())
            job = client.get_job_info(name)
            lost_at = None
            if job.status.is_terminal():
                return job
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > PATIENCE_S:
                raise ResourceError(
                    f"the job server has not answered for {PATIENCE_S:.0f} s ({error}); the job may go on: the same "
                    f"command with --submission-id {name} follows it again"
                ) from None
        time.sleep(POLL_S)


def tell_result(job: Any) -> int:
    """Say how an ended job ended, and what to do; its exit status."""
    name, again = job.submission_id, "the same command with another --submission-id"
    if job.status == "SUCCEEDED":
        say(f"{name} is done")
        return 0
    if job.status == "STOPPED":
        say(f"{name} was stopped; {again} goes on from there")
        return STOPPED
    code = exit_status(job.driver_exit_code)
    say(f"{name} failed with exit code {code}: {job.message}\n{again} runs it again, from where it broke off")
    return code


def exit_status(driver_exit_code: int | None) -> int:
    """As a shell says it: a driver that a signal ended has a negative code, one that never ran none."""
    if not driver_exit_code:
        return 1
    return driver_exit_code if driver_exit_code > 0 else 128 - driver_exit_code


def say(text: str) -> None:
    """To the user, apart from the job's own output."""
    print(f"mmkt: {text}", file=sys.stderr)
