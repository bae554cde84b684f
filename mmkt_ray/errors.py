"""Errors that a user can act on: what is wrong, what was got, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mmkt_ray.terminal import plain


class UserError(ValueError):
    """Base of everything the user can mend; the CLI prints it without a traceback and exits with 2.

    Its text has control characters spelled out, in a user's own program too: names in it come from the data.
    """

    def __str__(self) -> str:
        return plain(super().__str__())


class ConfigError(UserError):
    """The config is wrong: unknown key or name, wrong type, impossible combination."""


class DataError(UserError):
    """The data is not as the config says: missing path, missing column, too many rejected rows."""


class OtherVersionError(DataError):
    """A file is of another schema version than this program reads."""


class ResourceError(UserError):
    """The cluster or the storage cannot do what is asked: not enough CPUs or GPUs, unwritable folder."""


def nearest(name: str, known: Iterable[str]) -> str:
    """One phrase for an unknown `name`: the nearest known one, then all known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known) or '(none)'}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a `kind` (encoder, fusion, ...) called `name` that does not exist."""
    return ConfigError(f"unknown {kind} '{name}': {nearest(name, known)}")
