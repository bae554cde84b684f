"""What a command shows while it works."""

import io
import logging
import os
import pty
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from mmkt_ray import progress
from mmkt_ray.progress import Lines, Stage
from mmkt_ray.terminal import PlainStream


def test_a_stage_says_how_far_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rate or a time that is upside down."""
    stage = Stage("encode", total=10, unit="shards", done=4)
    monkeypatch.setattr(time, "monotonic", lambda: stage.start + 2)
    assert str(stage) == "encode: 4 of 10 shards, 2 s, 2.0 shards/s, about 3 s left"
    monkeypatch.setattr(time, "monotonic", lambda: stage.start + 40)
    assert str(stage) == "encode: 4 of 10 shards, 40 s, 10 s for one, about 60 s left"
    assert str(Stage("report\x1b", start=stage.start)) == r"report\x1b: 40 s"


Event = Callable[[Lines, PlainStream, float], object]


def said_until(monkeypatch: pytest.MonkeyPatch, end: int, events: dict[int, Event]) -> list[str]:
    """What lines say in so many seconds from a command's start.
    events: second -> what happens, given the start's time."""
    out, now = io.StringIO(), time.monotonic()
    stream = PlainStream(out)
    lines = Lines(stream)  # type: ignore[arg-type]
    lines.last = stream.last_write = lines.stages[0].start = now
    for seconds in range(1, end):
        monkeypatch.setattr(time, "monotonic", lambda s=seconds: now + s)
        if seconds in events:
            events[seconds](lines, stream, now)
        lines.tick()
    return [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]


def test_silence_is_broken_and_talk_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that says nothing for more than 5 s, and lines between those that come anyway."""

    def begin(lines: Lines, _: PlainStream, now: float) -> None:
        lines.began(Stage("train", start=now + 4))
        lines.began(Stage("models", total=3, unit="models", start=now + 4))

    said = said_until(monkeypatch, 18, {5: begin, 11: lambda _, stream, __: stream.write("INFO of a library\n")})
    assert said == ["start: 4 s", "models: 0 of 3 models, 4 s", "of a library", "models: 0 of 3 models, 11 s"]


def test_a_command_that_has_spoken_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that says for ever that it starts."""
    said = said_until(monkeypatch, 20, {10: lambda _, stream, __: stream.write("INFO serving\n")})
    assert said == ["start: 4 s", "start: 8 s", "serving"]


def test_lines_of_a_command_that_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a watcher that outlives its command, and stages shown where nobody asked."""
    with progress.stage("quiet") as stage:
        stage.advance()
    with progress.shown(), progress.stage("loud", total=2, unit="rows") as stage:
        stage.start -= 3
        stage.advance(2)
    said = capsys.readouterr().err
    assert "quiet" not in said
    assert "loud: 2 of 2 rows, 3 s, 2 s for one, done" in said


def test_live_lines_on_a_terminal() -> None:
    """Catches control sequences that are spelled out, and log lines that tear the live ones."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        stream = PlainStream(terminal)
        handler = logging.StreamHandler(stream)  # type: ignore[arg-type]
        logging.getLogger().addHandler(handler)
        try:
            with progress.shown(stream), progress.stage("encode", total=2, unit="shards") as stage:  # type: ignore[arg-type]
                logging.getLogger("mmkt_ray").warning("[red]careful[/red]\x1b")
                stage.advance(2)
        finally:
            logging.getLogger().removeHandler(handler)
    parts = []
    with suppress(OSError):  # EIO: all was read
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    os.close(leader)
    said = b"".join(parts).decode()
    assert "\x1b[" in said
    assert r"[red]careful[/red]\x1b" in said
    assert "encode" in said
    assert "2/2\x1b[0m shards" in said
