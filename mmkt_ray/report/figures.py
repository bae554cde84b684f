"""Figures as files beside the page and as data in it."""

from __future__ import annotations

import base64
from collections.abc import Callable

from mmkt_ray import storage
from mmkt_ray.report.plots import DARK, LIGHT, Theme


class Figures:
    """Draws each figure for light and dark pages; writes the light one as a file beside the page."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def add(self, name: str, title: str, alt: str, draw: Callable[[Theme], bytes]) -> dict[str, str]:
        """What the template needs to show a figure: title, alt text, light and dark data URIs."""
        light, dark = draw(LIGHT), draw(DARK)
        storage.write_bytes(storage.join(self.folder, f"{file_name(name)}.png"), light)
        return {"title": title, "alt": alt, "light": _data_uri(light), "dark": _data_uri(dark)}


def file_name(name: str) -> str:
    """The name with only what every file system takes."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
