"""A page as its elements, names that a careless page would run as code, and what an audit finds."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

HOSTILE = "<script>alert(1)</script>"
ATTRIBUTE = '"><img src=x onerror=alert(2)>'
THINGS = ("bird", "boat $x_{$", HOSTILE, ATTRIBUTE)


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text outside <style>, <script> and figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside = ""  # the element whose text is left out
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if not self.inside and tag in ("style", "script", "svg"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data):
        if not self.inside:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [a for t, a in self.tags if t == tag]

    def figures(self) -> list[str]:
        """What is told of each figure to who cannot see it."""
        assert len(self.all("figure")) == len(self.all("svg"))
        return [a["aria-label"] for a in self.all("div") if a.get("role") == "img"]


def duplicates(*samples: dict) -> dict:
    groups = [{"splits": ["test", "train"], "num_rows": len(samples), "samples": list(samples)}] if samples else []
    counts = {"num_groups": len(groups), "num_rows": len(samples), "num_leaking": len(groups)}
    return counts | {"by_splits": {"test+train": 1} if groups else {}, "examples": groups}


def suspect(**changes) -> dict:
    """A suspect as audit.json has it, with an image and a text."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "png")
    image = {"kind": "image", "png": base64.b64encode(out.getvalue()).decode()}
    about = {"sample_id": "s7", "task": "thing", "kind": "label", "label": HOSTILE, "predicted": "bird", "score": 0.987}
    inputs = {"image": image, "text": {"kind": "text", "text": f"a caption of {HOSTILE}"}}
    return about | {"text_confidence": None, "inputs": inputs} | changes


def audit_of(num_suspects: int = 1) -> dict:
    """An audit of 500 rows: an image in two splits, a conflict of labels, suspects."""
    samples = [
        {"sample_id": f"{x}1", "split": x, "labels": {"thing": HOSTILE, "colour": None}} for x in ("test", "train")
    ]
    found = duplicates(*samples)
    return {
        "num_rows": 500,
        "modalities": {"image": found, "text": duplicates()},
        "samples": duplicates(),
        "conflicts": {"thing": {k: found[k] for k in ("num_groups", "num_rows", "examples")}},
        "suspects": {
            "num_rows": {"thing": 300},
            "num_suspects": {"thing": {"label": num_suspects, "modalities": 0}},
            "top": [suspect(sample_id=f"s{i}") for i in range(num_suspects)],
        },
    }
