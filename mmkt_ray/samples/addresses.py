"""Cells that are http(s) addresses, fetched in the tasks that read shards.

An address may lead to the public internet alone, unless the source says otherwise: a row must not make the cluster
ask its own network. The check is of the numbers that a name stands for, at the moment of connecting,
and of every redirect as well.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from mmkt_ray.config.samples_config import SourceConfig
from mmkt_ray.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp

USER_AGENT = "mmkt_ray (batch feature extraction)"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between tries
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _Again(Exception):
    """What another try may mend. after_s: the pause that the server asks for."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


def is_address(cell: str) -> bool:
    """Whether a cell is an http(s) address."""
    return cell[:8].lower().startswith(("http://", "https://"))


def find_addresses(cells: Iterable[Any]) -> list[str]:
    """The addresses among cells, also in lists of them, each once."""
    flat = (inner for cell in cells for inner in (cell if isinstance(cell, list | tuple) else [cell]))
    return list(dict.fromkeys(cell for cell in flat if isinstance(cell, str) and is_address(cell)))


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet,
    also behind the forms that carry an IPv4 address in IPv6."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner: list[ipaddress.IPv4Address | None] = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(found is not None and not found.is_global for found in inner):
            return False
        if ip.ipv4_mapped is not None:
            return not ip.ipv4_mapped.is_multicast
    return ip.is_global and not ip.is_multicast


def refuse_private(host: str, numbers: Iterable[str]) -> None:
    """Raises: ValueError if a host's numeric address is not public."""
    for number in numbers:
        if not is_public(number):
            raise ValueError(
                f"'{host}' leads to {number}, which is not on the public internet: set allow_private_addresses: true "
                "for the source if that is meant"
            )


class Fetcher:
    """Fetches addresses, a few at once, over connections that stay open as long as it is."""

    def __init__(self, source: SourceConfig) -> None:
        self.limits, self.allow_private = source.http, source.allow_private_addresses

    def __enter__(self) -> Fetcher:
        self.runner = asyncio.Runner()
        self.runner.__enter__()
        self.session: aiohttp.ClientSession = self.runner.run(
            _open_session(self.limits.concurrency, self.allow_private)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.runner.run(self.session.close())
        finally:
            self.runner.__exit__(kind, error, trace)

    def fetch(self, addresses: list[str]) -> dict[str, bytes | ValueError]:
        """What is at each address, or why it could not be fetched."""
        return dict(zip(addresses, self.runner.run(self._fetch_all(addresses)), strict=True)) if addresses else {}

    async def _fetch_all(self, addresses: list[str]) -> list[bytes | ValueError]:
        return await asyncio.gather(*(self._fetch(address) for address in addresses))

    async def _fetch(self, address: str) -> bytes | ValueError:
        for attempt in range(self.limits.num_retries + 1):
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    return await self._follow(address)
            except ValueError as error:
                return ValueError(f"cannot fetch '{without_secrets(address)}': {error}")
            except TimeoutError:
                reason, after_s = f"no answer within {self.limits.timeout_s:g} s", 0.0
            except _Again as error:
                reason, after_s = str(error), error.after_s
            if attempt < self.limits.num_retries:
                # apart, so that many do not come back at once
                pause = FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(min(max(pause, after_s), LONGEST_PAUSE_S))
        return ValueError(
            f"cannot fetch '{without_secrets(address)}': {reason}, after {self.limits.num_retries + 1} tries"
        )

    async def _follow(self, address: str) -> bytes:
        """The bytes behind an address and its redirects. Raises: ValueError, _Again."""
        import aiohttp

        for _ in range(self.limits.max_redirects + 1):
            self._check(address)
            try:
                async with self.session.get(address, allow_redirects=False) as answer:
                    if answer.status not in REDIRECTS or "Location" not in answer.headers:
                        return await self._read(answer)
                    address = urljoin(address, answer.headers["Location"])
            except aiohttp.InvalidURL:
                raise ValueError("it is no valid address") from None
            except aiohttp.ClientError as error:
                if (refused := _refused(error)) is not None:
                    raise refused from None
                raise _Again(f"{type(error).__name__}: {error}"[:200]) from None
        raise ValueError(f"more than {self.limits.max_redirects} redirects")

    def _check(self, address: str) -> None:
        """Raises: ValueError for an address that is not asked. Names are checked as they are looked up."""
        parts = urlsplit(address)
        if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
            raise ValueError(f"it leads to '{without_secrets(address)}', which is no http(s) address")
        if parts.username or parts.password:
            raise ValueError("it holds a name or a password")
        if not self.allow_private and (number := _as_number(parts.hostname)):
            refuse_private(parts.hostname, [number])

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        if answer.status in TRY_AGAIN:
            asked = answer.headers.get("Retry-After", "")
            raise _Again(f"HTTP {answer.status}", float(asked) if asked.isdecimal() else 0.0)
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}")
        data = bytearray()
        too_long = ValueError(f"more than {self.limits.max_bytes:,} bytes (http.max_bytes)")
        if (answer.content_length or 0) > self.limits.max_bytes:
            raise too_long
        async for part in answer.content.iter_chunked(1 << 16):
            data += part
            if len(data) > self.limits.max_bytes:
                raise too_long
        return bytes(data)


async def _open_session(concurrency: int, allow_private: bool) -> aiohttp.ClientSession:
    """Raises: ConfigError if aiohttp is not installed; Ray brings it."""
    try:
        import aiohttp
        from aiohttp.abc import AbstractResolver, ResolveResult
    except ImportError as error:
        raise ConfigError(f"allow_http needs aiohttp ({error}): pip install aiohttp") from None

    class PublicResolver(AbstractResolver):
        """The system's, for names that lead to public addresses only:
        the numbers that are checked are connected to."""

        def __init__(self) -> None:
            self.system = aiohttp.ThreadedResolver()

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            found = await self.system.resolve(host, port, family)
            if not allow_private:
                refuse_private(host, [result["host"] for result in found])
            return found

        async def close(self) -> None:
            await self.system.close()

    connector = aiohttp.TCPConnector(limit=concurrency, resolver=PublicResolver())
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),  # ours counts
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        auto_decompress=False,  # a small answer may be a large one, packed
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


def _refused(error: BaseException | None) -> ValueError | None:
    """The refusal of an address among an error's causes."""
    causes: Iterator[BaseException | None] = iter((error, getattr(error, "os_error", None)))
    for cause in causes:
        while cause is not None:
            if isinstance(cause, ValueError):
                return ValueError(str(cause))
            cause = cause.__cause__ or cause.__context__
    return None


def _as_number(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host.split("%")[0]))
    except ValueError:
        return None


def without_secrets(address: str) -> str:
    """An address without what may be secret in it, at most 200 characters."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address[:20] + ".."
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if _port(parts) else ''}{parts.path}"[:200]


def _port(parts: Any) -> int | None:
    try:
        return int(parts.port) if parts.port else None
    except ValueError:
        return None
