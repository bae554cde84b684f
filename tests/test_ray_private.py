"""What we use of Ray beyond its documented interface is there in the installed version,
and does what we use it for."""

import importlib
import inspect
import logging
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray
from ray._private import node, ray_constants, services, utils, worker
from ray.serve._private import replica
from ray.train.torch import TorchTrainer
from ray.train.v2.api import data_parallel_trainer
from ray.util.placement_group import placement_group, placement_group_table

from mmkt_ray import ray_private

import psutil  # isort: skip  (Ray ships it, and puts it on the path)


def test_loggers_and_texts_are_those_of_this_ray() -> None:
    """Catches lines on the terminal at every start, and a traceback where Ray started too slowly."""
    assert all(find_spec(name) for name in ray_private.TALKATIVE)
    assert ray_private.STARTED_TOO_SLOWLY in inspect.getsource(node)
    ray_private.quieten()
    assert {logging.getLogger(name).level for name in ray_private.TALKATIVE} == {logging.ERROR}
    state = importlib.import_module(ray_private.TOLD_TWICE)
    assert "logger.error(error_message, exc_info=e)\n            raise e" in inspect.getsource(state)
    assert not state.logger.isEnabledFor(logging.ERROR)


@pytest.mark.slow
def test_no_escape_code_ends_a_command() -> None:
    """Catches a code on the last line of a terminal, also where Ray's own colours are loaded only after it was asked
    for none."""
    code = (
        "from mmkt_ray import ray_private; ray_private.quieten(); import ray.autoscaler._private.cli_logger; "
        "print('done')"
    )
    receiver, sender = pty.openpty()
    with open(receiver, "rb") as terminal:
        subprocess.run([sys.executable, "-c", code], stdout=sender, stderr=sender, check=True, timeout=120)
        os.close(sender)
        assert terminal.read1().strip() == b"done"


def test_patches_are_where_ray_looks_and_are_taken_back() -> None:
    """Catches a constant or a function that Ray no longer reads, so that a patch of it does nothing."""
    assert "ENABLE_RAY_CLUSTER" in inspect.getsource(services)
    assert "utils.set_sigterm_handler(" in inspect.getsource(worker.init)
    assert "self.start_api_server(" in inspect.getsource(node.Node.start_head_processes)
    assert "self.start_monitor(" in inspect.getsource(node.Node.start_head_processes)
    assert "_global_node.kill_all_processes(" in inspect.getsource(worker.shutdown)
    assert "services.start_raylet(" in inspect.getsource(node.Node.start_raylet)
    assert {"setup_worker_path", "env_updates"} <= inspect.signature(services.start_raylet).parameters.keys()
    assert "utils.get_dashboard_dependency_error()" in inspect.getsource(services.start_raylet)
    assert f'add_port_to_grpc_server(self._server, "{ray_private.EVERYWHERE}:0")' in inspect.getsource(replica)
    raylet = Path(services.RAYLET_EXECUTABLE).read_bytes()
    assert all(name.removeprefix("RAY_").encode() in raylet for name in ray_private.NONE_AHEAD)

    def state() -> tuple[object, ...]:
        patched = (
            node.Node.start_api_server,
            node.Node.start_monitor,
            utils.set_sigterm_handler,
            services.start_raylet,
        )
        return ray_constants.ENABLE_RAY_CLUSTER, *patched, utils.get_dashboard_dependency_error

    before, handler = state(), signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with (
            ray_private.loopback_alone(),
            ray_private.without_dashboard(),
            ray_private.keep_signals(),
            ray_private.workers_from("script", {}),
        ):
            assert ray_constants.ENABLE_RAY_CLUSTER is False
            assert not [now for now, then in zip(state()[1:], before[1:], strict=True) if now is then]
        assert state() == before
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_lines_of_workers_come_through_without_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an error at each run that is none, and words of workers that are lost with it;
    a level that stays set."""
    assert "print_to_stdstream" in inspect.getsource(worker.connect)
    assert "connect(" in inspect.getsource(worker.init)
    data = {"is_err": True, "pid": 1, "ip": "", "lines": ["a word", f"[E] Actor x {ray_private.NOISE}. If", "another"]}
    with ray_private.without_noise():
        worker.print_to_stdstream(data, ignore_prefix=True)
        worker.print_to_stdstream(data | {"lines": data["lines"][1:2]}, ignore_prefix=True)
    assert capsys.readouterr().err.split() == ["a", "word", "another"]
    assert ray_private.LOG_LEVEL not in os.environ


def test_standard_error_loses_the_noise_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches an error of C++ code that is lost as a driver connects, and standard error that stays away after it."""

    def fail() -> None:
        os.write(2, b"one\nsome noise here\ntwo\n")
        raise KeyError

    with pytest.raises(KeyError), ray_private.standard_error_without("noise"):
        fail()
    os.write(2, b"three\n")
    assert capfd.readouterr().err == "one\ntwo\nthree\n"


@pytest.mark.usefixtures("ray_local")
def test_what_the_trainer_does_by_itself_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a handler of another name, which would swallow Ctrl-C again,
    and an actor that dies with a traceback."""
    trainer = ray_private.trainer_class()(lambda: None)
    (ours,) = set(vars(type(trainer))) & {name for name in dir(TorchTrainer) if "sigint" in name}
    for called in (ours, "_create_default_callbacks"):
        assert f"self.{called}(" in inspect.getsource(data_parallel_trainer)
    assert not ray_private.has_dashboard()
    bare = [type(c).__name__ for c in trainer._create_default_callbacks()]
    monkeypatch.setattr(worker._global_node, "_webui_url", "127.0.0.1:8265")
    assert ray_private.has_dashboard()
    assert [n for c in trainer._create_default_callbacks() if (n := type(c).__name__) not in bare] == [
        ray_private.CLEANER
    ]


@pytest.mark.usefixtures("ray_local")
def test_ray_s_processes_are_called_as_we_think() -> None:
    """Catches servers that are killed before the others, an own dashboard, and a node that other machines reach."""
    ray.get(ray.remote(lambda: None).remote())
    titles = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # ended meanwhile
            titles[process] = process.cmdline()
    assert {p.name() for p in titles} >= ray_private.SERVERS
    assert any(words[:1] and words[0].startswith(ray_private.WORKER_TITLE) for words in titles.values())
    assert not [words for words in titles.values() if {"dashboard.py", "monitor.py"} & {Path(w).name for w in words}]
    assert ray.util.get_node_ip_address() == "127.0.0.1"


@pytest.mark.usefixtures("ray_local")
def test_a_placement_group_is_given_back_by_its_id() -> None:
    """Catches CPUs that stay taken after a training that failed as it started."""
    before = set(placement_group_table())
    group = placement_group([{"CPU": 1}])
    assert group.wait(60)
    (group_id,) = set(placement_group_table()) - before
    ray_private.remove_groups([group_id])
    end = time.monotonic() + 60
    while placement_group_table()[group_id]["state"] != "REMOVED":
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("ray_local")
def test_a_task_knows_that_it_was_tried_before() -> None:
    """Catches a shard that kills its reader each time, as no reader takes care."""

    @ray.remote(max_retries=1)
    def die_first() -> int:
        return ray_private.attempt_number() or os._exit(1)

    assert ray_private.attempt_number() == 0
    assert ray.get(die_first.remote(), timeout=120) == 1


def test_files_are_those_that_ray_uploads(tmp_path: Path) -> None:
    """Catches ignore files that are no longer read, or a walk into folders that are held back."""
    for name in ("kept", "ignored", "excluded", "held/back"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".rayignore").write_text("ignored\n")
    taken: list[str] = []
    ray_private.walk(tmp_path, ["excluded"], lambda path: path.name == "held", lambda path: taken.append(path.name))
    assert sorted(taken) == sorted([".rayignore", "kept", tmp_path.name])
