"""Texts in one form: what must change changes and is told, nothing else does."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkt_ray.kinds.content import normalise_text, normalise_texts

TOKEN = re.compile(r"(?u)\b\w\w+\b")  # scikit-learn's


@pytest.mark.parametrize(
    ("raw", "clean", "changes"),
    [
        ("plain\ttext\nof two lines", "plain\ttext\nof two lines", []),
        ("na\u00efve \u4e2d\u6587 \U0001f600", "na\u00efve \u4e2d\u6587 \U0001f600", []),
        ("e\u0301", "\u00e9", ["Unicode form"]),
        ("\ufeffa\ufeffb", "a\ufeffb", ["byte order mark"]),  # inside a text it is a character as any other
        ("a\r\nb", "a\nb", ["line ends"]),
        ("a\x00b\x1b[1m\x7f\x85c", "a b [1m  c", ["control characters"]),
        ("a\rb", "a b", ["control characters"]),
    ],
)
def test_what_is_normalised(raw, clean, changes):
    """Catches compatibility forms that change meaning (NFKC), emoji and tabs lost, and changes that go untold."""
    assert normalise_text(raw) == (clean, changes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\x00\u0301 a"))))
def test_columns_equal_single_texts(texts):
    """Catches rows passed over by the quick look at bytes, and rows shifted by nulls or by a slice."""
    for start in (0, 2):
        column, changed = normalise_texts(pa.array(["\x00", None, *texts], pa.large_string()).slice(start))
        expected = [None if t is None else normalise_text(t) for t in ["\x00", None, *texts][start:]]
        assert column.to_pylist() == [None if e is None else e[0] for e in expected]
        assert changed == {i: e[1] for i, e in enumerate(expected) if e is not None and e[1]}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="latin-1")))
def test_words_of_latin_1_texts_stay(text):
    """Catches words joined where a control character stood between them: another vocabulary than scikit-learn's."""
    assert TOKEN.findall(normalise_text(text)[0].lower()) == TOKEN.findall(text.lower())
    assert unicodedata.is_normalized("NFC", normalise_text(text)[0])


def test_samples_tell_what_was_cleaned(make_config, read_all, tmp_path):
    """Catches normalisation in one reader only, a text of control characters alone as a sample, untold changes."""
    texts = ["a\x01b", "plain", "\x00\x00", "e\u0301"]
    pq.write_table(pa.table({"text": texts, "label": ["x"] * 4}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{t},x\n" for t in texts))
    for reader, path in (("parquet", "a.parquet"), ("manifest", "a.csv")):
        source = {"reader": reader, "path": path, "columns": {"text": "text", "label": "label"}}
        table, rejects = read_all(make_config(tmp_path, source))
        assert table["text"].to_pylist() == ["a b", "plain", "\u00e9"]
        assert table["cleaned"].to_pylist() == [["text: control characters"], None, ["text: Unicode form"]]
        assert [r.reason for r in rejects] == ["no modality is present"]


def test_20news_keeps_its_vocabulary(make_config, data_dir):
    """Catches normalisation that moves the known 130,107 terms of the train split;
    the first 2,000 posts stand for all."""
    import tarfile

    with tarfile.open(data_dir / "20news-bydate.tar.gz") as archive:
        files = (archive.extractfile(m).read() for m in archive if m.isfile())
        posts = [next(files).decode("latin-1") for _ in range(2000)]
    cleaned, changed = normalise_texts(pa.array(posts, pa.large_string()))
    for raw, clean in zip(posts, cleaned.to_pylist(), strict=True):
        assert raw == clean or Counter(TOKEN.findall(raw.lower())) == Counter(TOKEN.findall(clean.lower()))
    assert 0 < len(changed) < 40
