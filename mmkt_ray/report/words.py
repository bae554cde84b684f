"""Numbers as people say them. Scores are told in percent."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """0.912 -> `91.2 %`."""
    return "–" if value is None else f"{100 * value:.1f} %"


def count(value: int) -> str:
    """12345 -> `12,345`."""
    return f"{value:,}"


def seconds(value: float | None) -> str:
    """A duration as people say it."""
    if value is None:
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
