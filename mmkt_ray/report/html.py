"""Pages of one file: templates, style and script beside this file go into each page,
and nothing comes from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import colors, words
from mmkt_ray.scoring.tables import points

SCRIPT = resources.files("mmkt_ray.report").joinpath("page.js").read_text(encoding="utf-8")
STYLE = resources.files("mmkt_ray.report").joinpath("page.css").read_text(encoding="utf-8")


def render(template: str, context: Mapping[str, Any], models: Mapping[str, Sequence[str]] | None = None) -> str:
    """A page. models: name -> modalities, of those that have a colour. A page runs its own script and no other."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    own = {"policy": policy, "script": Markup(SCRIPT), "style": Markup(f"{colors.css(models or {})}\n{STYLE}")}
    return _environment().get_template(template).render({**context, **own})


@cache
def _environment() -> jinja2.Environment:
    """Autoescaping always: class names and texts come from the data. It compiles each template once."""
    loader = jinja2.PackageLoader("mmkt_ray.report", ".")
    environment = jinja2.Environment(
        autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters |= {
        "percent": words.percent,
        "score": words.score,
        "span": words.span,
        "points": points,
        "count": words.count,
        "seconds": words.seconds,
        "css": colors.with_variables,
        "metric_of": lambda metric, kind: task_kind(kind).called.get(metric, metric.replace("_", " ")),
    }
    return environment
