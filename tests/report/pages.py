"""A page as its elements, and names that a careless page would run as code."""

from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script>"
ATTRIBUTE = '"><img src=x onerror=alert(2)>'
THINGS = ("bird", "boat $x_{$", HOSTILE, ATTRIBUTE)


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text outside <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [a for t, a in self.tags if t == tag]
