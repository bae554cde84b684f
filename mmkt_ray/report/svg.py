"""matplotlib's SVG, made fit to stand in a page: small, in the page's colours and letters, values on hover.

Text stays text. What the reader may point at has a `<title>`, which browsers show and screen readers tell.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import Any

from mmkt_ray.report.colors import with_variables

_WITH_TEXT = frozenset({"text", "tspan"})
_TIPS = "tips:"
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML has no way to write
_LONG = re.compile(r"(-?\d+\.\d{2})\d+")
_REFERENCE = re.compile(r"#([\w-]+)")
_FONT = re.compile(r"font-family: [^;]*;? ?")


def tip(artist: Any, *texts: str) -> None:
    """What is shown on hover over what an artist draws: one text, or one for each of its points."""
    artist.set_gid(_TIPS + json.dumps(texts))


def for_page(raw: str) -> str:
    """An `<svg>` element for a page, of what matplotlib has written.
    Of the same figure it is always the same text."""
    root = ET.fromstring(_NO_XML.sub("\ufffd", raw))
    for element in list(root.iter()):
        element.tag = element.tag.partition("}")[2]
        for key in [k for k in element.attrib if "}" in k]:
            element.attrib[key.partition("}")[2]] = element.attrib.pop(key)
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    for name in ("metadata", "style"):
        _drop(root, name)
    used = {
        ref for e in root.iter() for k in ("href", "clip-path", "style") for ref in _REFERENCE.findall(e.get(k, ""))
    }
    for element in list(root.iter()):
        _own(element, used)
    _flatten(root)
    return with_variables(ET.tostring(root, encoding="unicode"))


def _drop(root: ET.Element, name: str) -> None:
    for parent in list(root.iter()):
        for child in parent.findall(name):
            parent.remove(child)


def _own(element: ET.Element, used: Iterable[str]) -> None:
    """Ids that something refers to, titles for tips, short numbers, the page's font."""
    element.text = element.text if element.tag in _WITH_TEXT else None
    element.tail = None
    name = element.attrib.get("id", "")
    if name not in used:
        element.attrib.pop("id", None)
    if name.startswith(_TIPS):
        _entitle(element, json.loads(name.removeprefix(_TIPS)))
    for key in ("d", "x", "y", "transform", "width", "height"):
        if key in element.attrib:
            element.attrib[key] = " ".join(_LONG.sub(r"\1", element.attrib[key]).split())
    if "style" in element.attrib:
        element.attrib["style"] = _FONT.sub("", element.attrib["style"]).replace(": ", ":").replace("; ", ";")


def _entitle(group: ET.Element, texts: list[str]) -> None:
    elements = [group]
    if len(texts) > 1:  # a collection: matplotlib writes its points one by one, many of them as uses of one path
        elements = list(group.iter("use")) or [e for e in group.iter("path") if e.get("id") is None]
    for element, text in zip(elements, texts, strict=True):
        title = ET.Element("title")
        title.text = _NO_XML.sub("\ufffd", text)
        element.insert(0, title)


def _flatten(element: ET.Element) -> None:
    """Without groups that say nothing."""
    children = []
    for child in element:
        _flatten(child)
        plain = child.tag in ("g", "defs") and not child.attrib and child.find("title") is None
        children += list(child) if plain and (child.tag == "g" or not len(child)) else [child]
    element[:] = children
