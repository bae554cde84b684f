"""Bounds of a request: bytes of its body, how long it may take, how many wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

THREADS = 2  # that predict at a time
MAX_WAITING = 64  # requests that are predicted or wait for that; more are turned away


@dataclass(frozen=True)
class ServerLimits:
    """What a server puts up with."""

    body_bytes: int = 20_000_000
    timeout_s: float = 30.0


class TooLarge(Exception):
    """The body has more bytes than allowed."""


class BodyLimit:
    """ASGI middleware: a body of more bytes is answered with 413,
    by its stated length or as soon as that many have come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        num_bytes, started = 0, False

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except TooLarge:
            if not started:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the body is larger than {self.max_bytes} bytes: send fewer rows, or smaller files"
        await JSONResponse({"error": text}, 413, headers={"connection": "close"})(scope, receive, send)


class Busy(Exception):
    """Too many requests wait."""


class Work:
    """Runs blocking functions on a few threads; one that takes too long is given up,
    and its thread freed when it ends."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s, self.waiting = timeout_s, 0
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="predict")

    async def run(self, function: Callable[[], Any]) -> Any:
        """What the function returns. Raises: Busy, TimeoutError, what the function raises."""
        if self.waiting >= MAX_WAITING:
            raise Busy
        self.waiting += 1
        loop, future = asyncio.get_running_loop(), self.pool.submit(function)
        future.add_done_callback(lambda _: self._ended(loop))
        return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s)

    def _ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count down in the loop's own thread, unless the loop has ended."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._one_less)

    def _one_less(self) -> None:
        self.waiting -= 1
