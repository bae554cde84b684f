"""Credentials have no place in URIs: they would be printed, logged and written to every result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmkt_ray.errors import ConfigError

_CREDENTIALS = re.compile(
    r"""://[^/@\s]*(?:@|%40)                     # user@, user:password@, SECRET@ before the host or bucket
    | ://[^/:@\s]*:(?!\d+/)[^@\s]*@              # a password with a slash in it, which is no port
    | (?:s3a?|gs|gcs|abfss?):/+[^/:@\s]*:[^@\s]*@    # nor have these a port; a slash may be missing
    | ://[^\s?\#]*[?\#](?:[^\s=]*&)?[\w.%-]+=     # a query string, a fragment: settings, signatures, keys""",
    re.VERBOSE | re.IGNORECASE,
)


def credentials_at(text: str) -> int | None:
    """Where in `text` a URI begins to hold credentials or settings; None: nowhere."""
    found = _CREDENTIALS.search(text)
    return found.start() if found else None


def refusal(text: str, at: int) -> str:
    """What to say of a URI with credentials, without showing them."""
    scheme = re.split(r"[^a-z0-9+]", text[:at].lower())[-1]
    return (
        f"the URI '{scheme}://...' has settings or keys in it, which would be written to every result: put them into the "
        "environment instead, e.g. AWS_ENDPOINT_URL=http://host:9000, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    )


def refuse_credentials(value: Any, where: str) -> None:
    """Look through texts, and mappings and lists of them, found at `where`. Raises: ConfigError."""
    if isinstance(value, str) and (at := credentials_at(value)) is not None:
        raise ConfigError(f"{where}: {refusal(value, at)}")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_credentials(key, where)
            refuse_credentials(inner, f"{where}, {key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            refuse_credentials(inner, f"{where}, {number}")
