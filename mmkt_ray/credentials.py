"""Credentials have no place in URIs and configs: they would be printed, logged and written to every result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmkt_ray.errors import ConfigError

_CREDENTIALS = re.compile(
    r"""(?<!abfs)(?<!abfss)://[^/@\s]*(?:@|%40)    # user@, user:password@, SECRET@ before the host or bucket
    | (?:(?<=abfs)|(?<=abfss))://(?!(?-i:[a-z0-9-]{3,63})@[\w.-]+\.dfs\.)[^/@\s]*(?:@|%40)  # not CONTAINER@ACCOUNT.dfs
    | ://[^/:@\s]*:(?!\d+/)[^@\s]*@              # a password with a slash in it, which is no port
    | (?:s3a?|gs|gcs|abfss?):/+[^/:@\s]*:[^@\s]*@    # nor have these a port; a slash may be missing
    | ://[^\s?\#]*[?\#](?:[^\s=]*&)?[\w.%-]+=     # a query string, a fragment: settings, signatures, keys""",
    re.VERBOSE | re.IGNORECASE,
)


_TOKENS = re.compile(
    r"""(?<![\w-])(?:
      hf_[A-Za-z0-9]{30,} | gh[oprsu]_[A-Za-z0-9]{36,} | github_pat_\w{30,} | glpat-[\w-]{20,}
    | sk-(?=\S*\d)(?=\S*[A-Z])[\w-]{32,} | xox[abeoprs]-[\w-]{10,} | A[KS]IA[0-9A-Z]{16}(?!\w)
    | eyJ[\w-]{10,}\.eyJ[\w-]{5,}                # a JSON web token
    )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | (?i:(?<!\w)(?:account|sharedaccess)key\s*=\s*\S    # of a DSN
      | [;\s](?:password|passwd|pwd|secret|token)\s*=\s*\S)""",
    re.VERBOSE,
)


def holds_secret(text: str) -> bool:
    """Whether there are credentials in a URI, a token of a well-known form, a private key,
    or a password of a connection."""
    return credentials_at(text) is not None or _TOKENS.search(text) is not None


def credentials_at(text: str) -> int | None:
    """Where in `text` a URI begins to hold credentials or settings; None: nowhere."""
    found = _CREDENTIALS.search(text)
    return found.start() if found else None


def refusal(text: str, at: int) -> str:
    """What to say of a URI with credentials, without showing them."""
    scheme = re.split(r"[^a-z0-9+]", text[:at].lower())[-1]
    return (
        f"the URI '{scheme}://...' has settings or keys in it, which would be written to every result: put them into "
        "the environment instead, e.g. AWS_ENDPOINT_URL=http://host:9000, AWS_REGION, AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY"
    )


def refuse_credentials(value: Any, where: str) -> None:
    """Look through texts, and mappings and lists of them, found at `where`. Raises: ConfigError."""
    if isinstance(value, str) and (at := credentials_at(value)) is not None:
        raise ConfigError(f"{where}: {refusal(value, at)}")
    if isinstance(value, str) and _TOKENS.search(value):
        raise ConfigError(
            f"{where}: there is a token, a key or a password, which would be written to every result: put it into "
            "the environment instead, e.g. HF_TOKEN"
        )
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_credentials(key, where)
            refuse_credentials(inner, f"{where}, {key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            refuse_credentials(inner, f"{where}, {number}")
