"""Writes docs/config.md: every key of a config with its values, default and meaning, from the classes that check it.

    python docs/reference.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from mmkt_ray.config.reading import default_of, fields_of
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import TASK_KINDS
from mmkt_ray.section import OneOf

PAGE = Path(__file__).with_name("config.md")
HEAD = """\
# Config reference

<!-- Written by docs/reference.py; change the descriptions beside the fields instead. -->

A config is a YAML file. [The tutorial](tutorial.md) goes through one line by line, and [the concepts](concepts.md)
explain its words. `mmkt config` prints this list in a terminal. `mmkt config FILE` checks a file and prints it with
all defaults. An unknown key is an error that names the nearest known one.

In headings, `[]` stands for each item of a list, `.<name>` for each name in a mapping, and `(cnn)` for one of several
choices. A choice without options may be written as its bare name: `encoder: tfidf` means `encoder: {name: tfidf}`.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TYPES = {bool: "true, false", int: "whole number", float: "number", str: "text", Path: "path"}


def page() -> str:
    """The whole page as Markdown."""
    sections: dict[str, list[str]] = {"": []}
    for key, field in fields_of():
        section, _, own = key.rpartition(".")
        if own != "name" or len(get_args(field.annotation)) != 1:  # else it is the choice that the heading names
            sections.setdefault(section, []).append(_row(own, field))
    parts, top = [HEAD, "## The run\n"], ""
    for section, rows in sections.items():
        outermost = section.partition(".")[0]
        if outermost != top:
            top = outermost
            parts.append(f"## {top}\n")
        if section != top:
            parts.append(f"### `{section}`\n")
        parts += ["| key | values | default | meaning |\n|---|---|---|---|", *rows, ""]
    return "\n".join(parts).rstrip() + "\n"


def _row(key: str, field: FieldInfo) -> str:
    default = default_of(field)
    cells = (f"`{key}`", values_of(field), default if default == "required" or not default else f"`{default}`")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, field.description or "")) + " |"


def values_of(field: FieldInfo) -> str:
    """What a key may be set to, in words."""
    bounds = [
        f"{sign} {getattr(mark, name)}"
        for mark in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(mark, name)
    ]
    chosen = [mark for mark in field.metadata if isinstance(mark, OneOf)]
    told = list(dict.fromkeys(_values(chosen[0] if chosen else field.annotation)))
    return ", ".join(told) + (f" {', '.join(bounds)}" if bounds else "")


def _values(annotation: Any) -> Iterator[str]:
    if isinstance(annotation, OneOf):
        yield from (f"`{name}`" for name in annotation.entries)
        if annotation.elsewhere is not None:
            yield "`module:Class`"
        return
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from (f"`{value}`" if yaml.safe_load(str(value)) == value else f'`"{value}"`' for value in parts)
    elif origin in (tuple, dict):
        inner = ", ".join(
            dict.fromkeys(text for part in parts[-1 if origin is dict else 0 :] for text in _values(part))
        )
        yield ("list" if origin is tuple else "mapping") + (f" of {inner}" if inner else "")
    elif annotation is TaskKind:
        yield from (f"`{name}`" for name in TASK_KINDS)
    elif annotation in TYPES:
        yield TYPES[annotation]
    else:
        for part in [part for part in parts if isinstance(part, OneOf)] or parts:
            yield from _values(part)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
