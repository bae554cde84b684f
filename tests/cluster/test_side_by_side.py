"""Calls that run at once: what comes back, in what order they begin,
and what a user's error or a dead worker does."""

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkt_ray.cluster import side_by_side as module
from mmkt_ray.cluster.side_by_side import Call, SideBySide, side_by_side
from mmkt_ray.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_local")


def about(value: int) -> tuple[int, int, int, np.ndarray]:
    logging.getLogger("mmkt_ray.somewhere").info("call %d", value)
    return value, os.getpid(), torch.get_num_threads(), np.zeros(300_000)


def write(path: str, text: str) -> None:
    time.sleep(0.3)
    Path(path).write_text(text)


def read(path: str) -> str:
    return Path(path).read_text()


def refuse(reason: str) -> None:
    raise DataError(reason)


def die_once(path: str) -> str:
    if not Path(path).exists():
        Path(path).write_text("died")
        os._exit(1)
    return "done"


def test_values_threads_and_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Values under other names, fits that fight for the same cores, lines that end in a worker's file, read-only
    arrays; and `--quiet`, of which calls knew nothing."""
    monkeypatch.setattr(module, "cores", lambda: 4)
    with caplog.at_level(logging.INFO):
        found = side_by_side({name: Call(about, (i,)) for i, name in enumerate("ab")})
        with caplog.at_level(logging.WARNING, "mmkt_ray"):
            side_by_side({name: Call(about, (i,)) for i, name in enumerate("ab", start=2)})
    assert {name: value[0] for name, value in found.items()} == {"a": 0, "b": 1}
    assert all(value[1] != os.getpid() and value[2] == 2 for value in found.values())
    assert sorted(r.getMessage() for r in caplog.records if r.name == "mmkt_ray.somewhere") == ["call 0", "call 1"]
    found["a"][3][0] = 1


def wait_for(path: str) -> str:
    logging.getLogger("mmkt_ray.somewhere").info("begun")
    for _ in range(300):
        if Path(path).exists():
            return "seen"
        time.sleep(0.1)
    return "never"


def test_what_a_call_logs_is_seen_while_it_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches hours of training whose epochs are shown when it is over."""
    logger, handler = logging.getLogger("mmkt_ray.somewhere"), logging.Handler()
    handler.emit = lambda record: (tmp_path / "go").touch()
    logger.addHandler(handler)
    try:
        calls = {name: Call(wait_for, (str(tmp_path / "go"),)) for name in "ab"}
        with caplog.at_level(logging.INFO):
            assert side_by_side(calls) == {"a": "seen", "b": "seen"}
    finally:
        logger.removeHandler(handler)


def test_one_call_runs_here_with_the_threads_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a run that gets other threads, and with them other last bits, than in the whole run."""
    monkeypatch.setattr(module, "cores", lambda: 4)
    before = torch.get_num_threads()
    assert side_by_side({"a": Call(about, (7,))}, of=2)["a"][:3] == (7, os.getpid(), 2)
    assert torch.get_num_threads() == before


def test_a_call_waits_for_those_it_comes_after(tmp_path: Path) -> None:
    """A fused model that looks for an expert before that is there."""
    path = str(tmp_path / "expert")
    calls = {"expert": Call(write, (path, "weights")), "fused": Call(read, (path,), after=["expert", "done before"])}
    assert side_by_side(calls) == {"expert": None, "fused": "weights"}


def test_a_users_error_is_the_users(tmp_path: Path) -> None:
    """Ray's traceback in place of the sentence."""
    with pytest.raises(DataError, match=r"^row 3 is empty$"):
        side_by_side({"bad": Call(refuse, ("row 3 is empty",)), "other": Call(about, (1,))})


def test_a_call_whose_worker_dies_is_made_again(tmp_path: Path) -> None:
    """A run that ends because the kernel took a worker's memory."""
    calls = {"dies": Call(die_once, (str(tmp_path / "seen"),)), "other": Call(read, (__file__,))}
    assert dict(SideBySide(calls))["dies"] == "done"


def busy(path: str) -> int:
    """How many of these calls run, this one included, at the most that it sees."""
    folder, own = Path(path), Path(path) / str(os.getpid())
    own.touch()
    seen = 0
    for _ in range(10):
        seen = max(seen, len(list(folder.iterdir())))
        time.sleep(0.05)
    own.unlink()
    return seen


def test_no_more_at_once_than_memory_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a machine of many cores that holds a table of features for each of them, and a call too large for any
    node that waits for ever."""
    monkeypatch.setattr(module, "cores", lambda: 4)
    calls = {name: Call(busy, (str(tmp_path),)) for name in "abc"}
    assert {value for _, value in SideBySide(calls, num_bytes=1 << 60)} == {1}
