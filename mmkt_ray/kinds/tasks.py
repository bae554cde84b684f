"""The kinds of task that there are: a new one is a class, see task_kind.py, and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmkt_ray.errors import ConfigError, nearest, unknown_name
from mmkt_ray.kinds.multiclass import Binary, Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.kinds.ordinal import Ordinal
from mmkt_ray.kinds.regression import Regression
from mmkt_ray.kinds.task_kind import TaskKind

TASK_KINDS: dict[str, type[TaskKind]] = {
    "multiclass": Multiclass,
    "binary": Binary,
    "multilabel": Multilabel,
    "ordinal": Ordinal,
    "regression": Regression,
}


def task_kind(given: Any) -> TaskKind:
    """The kind of a name, or of what `as_json` gave; a kind as it is. Raises: ConfigError if there is none."""
    if isinstance(given, TaskKind):
        return given
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in TASK_KINDS:
        raise unknown_name("kind of task", str(name), TASK_KINDS)
    known = [field.name for field in fields(TASK_KINDS[name])]
    if unknown := [str(option) for option in options if option not in known]:
        raise ConfigError(f"kind of task '{name}' has no option '{unknown[0]}': {nearest(unknown[0], known)}")
    try:
        return TASK_KINDS[name](**options)
    except TypeError as error:
        raise ConfigError(f"kind of task '{name}': {error}") from None
