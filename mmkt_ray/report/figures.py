"""Figures as files beside the page and as elements in it."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
from markupsafe import Markup

from mmkt_ray import storage
from mmkt_ray.report import colors

STYLE = "svg { font-family: 'DejaVu Sans', sans-serif; stroke-linejoin: round; }"


class Figures:
    """Draws figures; writes each as a file beside the page."""

    def __init__(self, folder: str, palette: str = "") -> None:
        """palette: the page's colours, as a style sheet."""
        self.folder, self.style = folder, f"{palette or colors.css({})}\n{STYLE}"

    def add(self, name: str, title: str, alt: str, draw: Callable[[], str]) -> dict[str, str]:
        """What the template needs to show a figure: title, alt text, the `<svg>` element."""
        with matplotlib.rc_context({"svg.hashsalt": name}):  # ids differ between figures, and not between runs
            svg = draw()
        tag, _, rest = svg.partition(">")
        start = f'<svg xmlns="http://www.w3.org/2000/svg"{tag.removeprefix("<svg")}><style>{self.style}</style>'
        storage.write_bytes(storage.join(self.folder, f"{file_name(name)}.svg"), (start + rest).encode())
        return {"title": title, "alt": alt, "svg": Markup(svg)}


def file_name(name: str) -> str:
    """The name with only what every file system takes."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
