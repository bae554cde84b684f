"""What a command writes is text: control characters in names, labels and errors are shown,
never obeyed by the terminal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# All but tab and line feed: C0 and C1, what turns the direction of text around, bytes that were no text.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with `\\x1b` and its like spelled out."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PlainStream:
    """A text stream that writes plain text to another, which does all else."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last_write = time.monotonic()

    def write(self, text: str) -> int:
        self.last_write = time.monotonic()
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(plain(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def plain_output() -> Iterator[None]:
    """Within it all that this process prints and logs is plain, by whichever library."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PlainStream(out), PlainStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
