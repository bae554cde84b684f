"""What a command is doing, told while it does it: one line a stage, with how far it is, how fast and how long still.

Whoever works says `with stage("train", total=3, unit="models") as it: .. it.advance()`. Nothing is shown unless a
command does its work within `shown`: on a terminal as live lines, else as lines of text,
of which one comes at least every PERIOD_S.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from mmkt_ray.terminal import plain

PERIOD_S = 5.0  # nothing is silent for longer
START = "start"  # what a command does until its first stage or its first word: imports, mostly


@dataclass
class Stage:
    """A stage at work."""

    name: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    start: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""
        self.done += count
        _shown.changed(self)

    def __str__(self) -> str:
        """`train: 1 of 3 models, 12 s, about 24 s left`."""
        seconds = time.monotonic() - self.start
        parts = [f"{seconds:.0f} s"]
        if self.total is not None:
            parts.insert(0, f"{self.done:,} of {self.total:,} {self.unit}".rstrip())
            if self.done and seconds >= 1:
                rate = self.done / seconds
                pace = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.0f} s for one"
                parts.append(pace.replace(" /s", "/s"))
                if self.done < self.total:
                    parts.append(f"about {(self.total - self.done) / rate:.0f} s left")
        return plain(f"{self.name}: {', '.join(parts)}")


class Reporter(Protocol):
    """Shows stages."""

    def began(self, stage: Stage) -> None: ...
    def changed(self, stage: Stage) -> None: ...
    def ended(self, stage: Stage) -> None: ...


class Silent:
    """Shows nothing: for whoever uses the library."""

    def began(self, stage: Stage) -> None: ...
    def changed(self, stage: Stage) -> None: ...
    def ended(self, stage: Stage) -> None: ...


_shown: Reporter = Silent()


@contextmanager
def stage(name: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
    """A stage, shown while the block runs. total: units in all, None where that is not known."""
    it = Stage(name, total, unit)
    _shown.began(it)
    try:
        yield it
    finally:
        _shown.ended(it)


@contextmanager
def shown(stream: TextIO | None = None) -> Iterator[None]:
    """Within it stages are shown on `stream`, by default standard error."""
    global _shown
    out: Any = stream or sys.stderr
    before = _shown
    with _live(out) if out.isatty() else _lines(out) as _shown:
        try:
            yield
        finally:
            _shown = before


# --- lines of text --------------------


class Lines:
    """A line at the end of each stage, and where the stream was silent for PERIOD_S, how far the innermost one is."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.stages = stream, [Stage(START)]
        self.last = time.monotonic()

    def began(self, stage: Stage) -> None:
        self.stages = [other for other in self.stages if other.name != START] + [stage]

    def changed(self, stage: Stage) -> None:
        """The next line says so."""

    def ended(self, stage: Stage) -> None:
        if stage in self.stages:
            self.stages.remove(stage)
        if time.monotonic() - stage.start >= 1:
            self.write(f"{stage}, done" if sys.exc_info()[0] is None else str(stage))

    def write(self, text: str) -> None:
        self.stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self.stream.flush()
        self.last = time.monotonic()

    def tick(self) -> None:
        """Say something if nothing was said for long."""
        written = getattr(self.stream, "last_write", 0.0)
        if self.stages and self.stages[0].name == START and written > max(self.last, self.stages[0].start):
            del self.stages[0]
        silent = time.monotonic() - max(self.last, written)
        if self.stages and silent >= PERIOD_S - 1:
            self.write(str(self.stages[-1]))


@contextmanager
def _lines(stream: TextIO) -> Iterator[Reporter]:
    lines, over = Lines(stream), threading.Event()

    def watch() -> None:
        while not over.wait(1):
            lines.tick()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()


# --- live lines --------------------


class Live:
    """Lines that change in place, by Rich."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.tasks = progress, dict[int, Any]()
        self.start = progress.add_task(START, total=None, unit="")

    def started(self) -> None:
        """The command has said something, or begun a stage."""
        if self.start is not None:
            self.progress.remove_task(self.start)
            self.start = None

    def began(self, stage: Stage) -> None:
        self.started()
        self.tasks[id(stage)] = self.progress.add_task(plain(stage.name), total=stage.total, unit=stage.unit)

    def changed(self, stage: Stage) -> None:
        self.progress.update(self.tasks[id(stage)], completed=stage.done)

    def ended(self, stage: Stage) -> None:
        task = self.tasks.pop(id(stage))
        total = stage.total if stage.total is not None else 1
        self.progress.update(task, total=total, completed=stage.done if stage.total is not None else total)
        self.progress.stop_task(task)


class _ThroughConsole(logging.Handler):
    """Log lines above the live ones."""

    def __init__(self, live: Live, console: Any, formatter: logging.Formatter | None) -> None:
        super().__init__()
        self.live, self.console = live, console
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.live.started()
        self.console.print(plain(self.format(record)), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _live(stream: Any) -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=getattr(stream, "stream", stream))  # PlainStream would spell out what moves the cursor
    columns = (SpinnerColumn(finished_text="·"), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    more = (TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), TimeRemainingColumn())
    root = logging.getLogger()
    handlers = root.handlers[:]
    try:
        with Progress(*columns, *more, console=console) as progress:
            live = Live(progress)
            root.handlers = [_ThroughConsole(live, console, handlers[0].formatter if handlers else None)]
            yield live
    finally:
        root.handlers = handlers
