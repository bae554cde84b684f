"""Images that a decoder does not survive, and what makes them so: real crashes, in the process that decodes.

Loaded by sitecustomize.py, which Python imports when it starts.
"""

import ctypes
import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAGIC = b"poison:"


def poison(how: str, *arguments: str, rest: bytes = b"") -> bytes:
    """An image at which the decoder does what the function below of the name `how` does;
    `rest` is opened after that."""
    return MAGIC + " ".join([how, *arguments]).encode() + b"\n" + rest


def segfault() -> None:
    ctypes.string_at(0)


def loop() -> None:
    """In C, without a look at signals."""
    sum(iter(int, 1))


def deaf_loop() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    loop()


def eat_memory() -> None:
    meals = []
    while True:
        meals.append(np.empty(1 << 26, np.uint8))


def leave(code: str) -> None:
    os._exit(int(code))


def be_killed_once(flag: str) -> None:
    """As a machine that runs out of memory does: the next time it goes well."""
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def chatter() -> None:
    """Print as a library may."""
    print("warning: something", flush=True)
    os.write(1, b"\0" * 1000)


def seep_in() -> None:
    """From now on this process opens such images."""
    open_image = Image.open

    def open_poisoned(fp: Any, *args: Any, **kwargs: Any) -> Image.Image:
        data = fp.getvalue()
        if not data.startswith(MAGIC):
            return open_image(fp, *args, **kwargs)
        line, _, rest = data.removeprefix(MAGIC).partition(b"\n")
        how, *arguments = line.decode().split()
        globals()[how](*arguments)
        return open_image(io.BytesIO(rest), *args, **kwargs)

    Image.open = open_poisoned
