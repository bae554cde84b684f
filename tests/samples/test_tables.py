"""Tables as other tools really write them: marks, encodings, quotes, missing values, doubled columns,
lists as text."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.cells import canonical, key_text, label_names, label_text, likely_encoding
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards

COLUMNS = {"text": "text", "label": "label"}
TEXTS = ["caf\xe9 one", 'two, "quoted"', "three\nlines"]


def manifest(path: str, **more: object) -> dict:
    return {"reader": "manifest", "path": path, "columns": COLUMNS, **more}


def read(make_config, root, source: dict, **more: object) -> list:
    """All chunks of the source's shards."""
    config = make_config(root, source, **more)
    return [
        chunk for shard in list_shards(ReadingPlan.of(config)) for chunk in read_chunks(ReadingPlan.of(config), shard)
    ]


# --- encodings --------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_every_unicode_encoding_is_read_as_pandas_reads_it(make_config, read_all, tmp_path, suffix, encoding):
    """Catches a first row or column lost to a byte order mark, and JSON lines that are split within a character."""
    frame = pd.DataFrame({"text": TEXTS, "label": ["a", "b", "a"]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False, encoding=encoding, quoting=1)
        expected = pd.read_csv(path, encoding=encoding)
    else:
        path.write_bytes(frame.to_json(orient="records", lines=True, force_ascii=False).encode(encoding))
        expected = pd.read_json(io.StringIO(path.read_bytes().decode(encoding)), lines=True)
    named = "utf-8" if encoding == "utf-8-sig" else encoding
    table, rejects = read_all(make_config(tmp_path, manifest(f"a.{suffix}", encoding=named)))
    assert rejects == []
    assert table.select(["text", "label"]).to_pylist() == expected.to_dict("records")


@pytest.mark.parametrize("named", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_mark_and_a_named_byte_order_agree(make_config, read_all, tmp_path, suffix, named):
    """Catches a mark that becomes a character of the first name where the source names the byte order, too."""
    content = "text,label\none,a\n" if suffix == "csv" else '{"text": "one", "label": "a"}\n'
    (tmp_path / f"a.{suffix}").write_bytes(content.encode("utf-16"))
    table, rejects = read_all(make_config(tmp_path, manifest(f"a.{suffix}", encoding=named)))
    assert (table["text"].to_pylist(), rejects) == (["one"], [])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_wrong_encoding_names_file_line_and_the_likely_one(make_config, tmp_path, suffix, encoding):
    """Catches thousands of rejects, or a table of zero bytes, where one sentence tells what to set."""
    content = "text,label\none,a\n" if suffix == "csv" else '{"text": "one", "label": "a"}\n'
    (tmp_path / f"a.{suffix}").write_bytes(content.encode(encoding))
    with pytest.raises(DataError, match=rf"'a.{suffix}', line 1: .* read as utf-8: set encoding: {encoding}"):
        read(make_config, tmp_path, manifest(f"a.{suffix}"))


def test_a_mark_outweighs_a_wrong_name(make_config, tmp_path):
    """Catches accents read as two characters each, as a source says latin-1 of a file that says UTF-8 itself."""
    (tmp_path / "a.csv").write_text("text,label\ncaf\xe9,a\n", encoding="utf-8-sig")
    with pytest.raises(DataError, match="begins as utf-8 and is read as latin-1"):
        read(make_config, tmp_path, manifest("a.csv", encoding="latin-1"))
    (tmp_path / "a.csv").write_text("text,label\ncaf\xe9,a\n", encoding="utf-16-be")
    with pytest.raises(DataError, match="set encoding: utf-16-be"):
        read(make_config, tmp_path, manifest("a.csv", encoding="utf-16"))


def test_bytes_of_windows_are_told_from_latin_1(make_config, read_all, tmp_path):
    """Catches advice to read curly quotes as latin-1, where they would be control characters."""
    (tmp_path / "a.csv").write_bytes(b"text,label\n\x93quoted\x94,a\ncaf\xe9,a\n")
    _, rejects = read_all(make_config(tmp_path, manifest("a.csv")))
    assert [r.sample_id for r in rejects] == ["a.csv#2", "a.csv#3"]
    assert ["encoding: cp1252" in rejects[0].reason, "encoding: latin-1" in rejects[1].reason] == [True, True]


def test_a_plain_text_is_of_no_wide_encoding():
    """Catches short or zero-holding texts taken for UTF-16."""
    assert [likely_encoding(data) for data in (b"", b"a", b"plain text", b"a\x00plain", "é".encode())] == [None] * 5


def test_a_mark_in_a_class_member_of_a_tar(make_config, read_all, write_tar, tmp_path):
    """Catches '1' with and without a byte order mark as two classes, and labels that ignore the source's encoding."""
    members = [("1.txt", b"t"), ("1.cls", b"\xef\xbb\xbf1"), ("2.txt", b"t"), ("2.cls", b"1\n")]
    write_tar(tmp_path / "a.tar", members)
    source = {"reader": "webdataset", "path": "a.tar", "columns": {"text": "txt", "label": "cls"}}
    assert read_all(make_config(tmp_path, source))[0]["label"].to_pylist() == ["1", "1"]
    write_tar(tmp_path / "a.tar", [("1.txt", b"t"), ("1.cls", b"caf\xe9")])
    assert read_all(make_config(tmp_path, {**source, "encoding": "latin-1"}))[0]["label"].to_pylist() == ["caf\xe9"]


# --- CSV quotes and cells --------------------


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (["a,1", '"b,1', "c,1", "d,1"], 3),  # in the first column
        (["a,1", "b,1", 'c,"x'], 4),  # in the last column of the last line
        (['"two', 'lines",1', '"one","open', "d,1"], 4),  # the second quoted cell of a row
        (['5" wide,1', '"a ""b"" c",1', '"open ""x"" , 1', "d,1"], 4),  # quotes that mean nothing
    ],
)
def test_an_open_quote_is_an_error_with_its_line(make_config, tmp_path, rows, line):
    """Catches the rest of a file that becomes one text; pandas refuses the same files."""
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    with pytest.raises(pd.errors.ParserError, match="EOF inside string"):
        pd.read_csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match=rf"'a.csv', line {line}: a quote opens here and is not closed"):
        read(make_config, tmp_path, manifest("a.csv"))


def test_an_open_quote_of_a_large_file_is_an_error_too(make_config, tmp_path, monkeypatch):
    """Catches millions of rows that count as one reject, as the row grew too long before the file ended."""
    monkeypatch.setattr("mmkt_ray.samples.manifests.MAX_ROW_BYTES", 1_000)
    (tmp_path / "a.csv").write_text('text,label\na,1\n"b,1\n' + "c,1\n" * 1_000 + '"d",1\n')
    with pytest.raises(DataError, match=r"'a.csv', line 3: a quote opens here"):
        read(make_config, tmp_path, manifest("a.csv"))


def test_quotes_that_pandas_reads_are_read_alike(make_config, read_all, tmp_path):
    """Catches a check of quotes that refuses good files: inches, text after a quote, no line end at the end."""
    content = 'text,label\n5" disk,a\n"a"b,a\n"x\ny",a\n\n"",a\n"say ""hi""","a"'
    (tmp_path / "a.csv").write_text(content)
    table, rejects = read_all(make_config(tmp_path, manifest("a.csv")))
    expected = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)["text"].tolist()
    assert table["text"].to_pylist() == [text for text in expected if text]
    assert [r.reason for r in rejects] == ["no modality is present"]


# --- missing values --------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_nan_is_null_for_every_kind(make_config, read_all, png, tmp_path, suffix):
    """Catches rows rejected, or files called `nan` looked for, where pandas wrote a missing value."""
    (tmp_path / "1.png").write_bytes(png(1))
    frame = pd.DataFrame(
        {"image": [np.nan, "1.png"], "text": ["one", np.nan], "label": [1.0, np.nan], "id": ["a", "b"]}
    )
    if suffix == "csv":
        frame.to_csv(tmp_path / "a.csv", index=False, na_rep="NaN")
    elif suffix == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    else:
        frame.to_parquet(tmp_path / "a.parquet")
    source = manifest(f"a.{suffix}", columns={**COLUMNS, "image": "image", "sample_id": "id"})
    table, rejects = read_all(make_config(tmp_path, source))
    assert rejects == []
    assert table.select(["sample_id", "image", "text"]).to_pylist() == [
        {"sample_id": "a", "image": None, "text": "one"},
        {"sample_id": "b", "image": png(1), "text": None},
    ]
    assert [canonical(label or "") for label in table["label"].to_pylist()] == ["1", ""]


def test_a_shard_without_any_image_that_pandas_made_float(make_config, read_all, tmp_path):
    """Catches a job that stops as one of its shards has no image at all; a column of numbers is still refused."""
    pd.DataFrame({"image": [np.nan] * 2, "text": ["a", "b"], "label": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("image").type == pa.float64()
    source = {"reader": "parquet", "path": "a.parquet", "columns": {**COLUMNS, "image": "image"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert (table["image"].null_count, table["text"].to_pylist(), rejects) == (2, ["a", "b"], [])
    pd.DataFrame({"image": [np.nan, 0.5], "text": ["a", "b"], "label": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'image' .double. cannot be read as image"):
        read(make_config, tmp_path, source)


# --- columns --------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_column_that_is_there_twice_is_refused_with_its_name(make_config, read_all, tmp_path, suffix):
    """Catches a traceback, or the last of two columns taken in silence;
    other columns may be there as often as they like."""
    names = ["text", "note", "label", "note", "text"]
    source = manifest(f"a.{suffix}")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 5, names=names), tmp_path / "a.parquet")
        source = {**source, "reader": "parquet"}
    elif suffix == "csv":
        (tmp_path / "a.csv").write_text(",".join(names) + "\nx,x,x,x,x\n")
    else:
        twice = '{"text": "a", "label": "x", "text": "b"}\n'
        once = json.dumps({"text": '"text" and "text"', "label": "x", "in": {"text": 1}})
        (tmp_path / "a.jsonl").write_text(twice + once)
        table, rejects = read_all(make_config(tmp_path, source))
        assert table.num_rows == 1
        assert [(r.sample_id, "column 'text' is there twice" in r.reason) for r in rejects] == [("a.jsonl#1", True)]
        return
    with pytest.raises(DataError, match=r"'a.* has 2 columns called 'text'"):
        read(make_config, tmp_path, source)


# --- lists --------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (str(["cat", "dog"]), ["cat", "dog"]),
        (json.dumps(["dog", "cat", None]), ["cat", "dog"]),
        (str(np.array(["cat", "a dog"])), ["a dog", "cat"]),
        (str(np.array([2.0, 1.0])), ["1", "2"]),
        (str(("cat",)), ["cat"]),
        (str({"cat"}), ["cat"]),
        ("[]", []),
        ("['it''s', \"it's\"]", ["it's", "its"]),
        ("[unknown]", ["[unknown]"]),  # a name, no list
        ("(none)|cat", ["(none)", "cat"]),
        ("cat|dog", ["cat", "dog"]),
    ],
)
def test_lists_that_are_written_as_text(text, names):
    """Catches one class for each combination of classes, and strings that Python would join to one."""
    assert label_names(text, "|") == names


DEEP, LONG = "[" * 99 + "'a'" + "]" * 99, "['a'" + ",'a'" * 99_999 + "]"


@pytest.mark.parametrize(
    "text", ["['cat', 'dog'", "['cat', dog]", '{"cat": 1}', DEEP, "[" * 9_000 + "'a'" + "]" * 9_000, LONG]
)
def test_text_that_only_looks_like_a_list(text):
    """Catches a broken or bottomless list that becomes a class, stops the process or takes its time."""
    if text.endswith(("]", "}")):
        with pytest.raises(ValueError, match=r"list|mapping"):
            label_names(text, "|")
    else:
        assert label_names(text, "|") == [text]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_list_where_one_class_is_expected_names_column_and_row(make_config, read_all, tmp_path, suffix):
    """Catches a class for each combination, and a complaint that leaves open where and what to do."""
    frame = pd.DataFrame({"text": ["a", "b"], "kinds": [["cat"], ["cat", "dog"]]})
    source = {**manifest(f"a.{suffix}"), "columns": {"text": "text", "label": "kinds"}}
    if suffix == "parquet":
        frame.to_parquet(tmp_path / "a.parquet")
        with pytest.raises(
            DataError, match=r"'a.parquet': column 'kinds' .* lists where one value is expected.*multilabel"
        ):
            read(make_config, tmp_path, {**source, "reader": "parquet"})
        return
    if suffix == "csv":
        frame.to_csv(tmp_path / "a.csv", index=False)
    else:
        frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    _, rejects = read_all(make_config(tmp_path, source))
    assert len(rejects) == 2
    for reject in rejects:
        assert "(column 'kinds')" in reject.reason
        assert "kind to multilabel" in reject.reason
        assert reject.sample_id.startswith(f"a.{suffix}#")


def _class_labels(values: pa.Array, feature: object) -> pa.Table:
    features = {"text": {"dtype": "string", "_type": "Value"}, "meta": feature}
    table = pa.table({"text": ["t"] * len(values), "meta": values})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


NAMES = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("values", "feature", "path", "expected"),
    [
        (pa.array([1, -1, -100, None]), NAMES, "meta", ["dog", None, None, None]),
        (pa.array([1.0, float("nan"), 0.0]), NAMES, "meta", ["dog", None, "cat"]),
        (pa.array([{"kind": 0}, {"kind": -100}]), {"kind": NAMES}, "meta.kind", ["cat", None]),
        (pa.array([{"a": {"kind": 1}}]), {"a": {"kind": NAMES}}, "meta.a.kind", ["dog"]),
        (pa.array([[0, 1], [-100], None]), {"feature": NAMES, "_type": "List"}, "meta", [["cat", "dog"], [], None]),
        (pa.array([[0], [1]]), [NAMES], "meta", [["cat"], ["dog"]]),
        (
            pa.array([{"kind": [1, 0]}]),
            {"feature": {"kind": NAMES}, "_type": "Sequence"},
            "meta.kind",
            [["cat", "dog"]],
        ),
        (
            pa.array([[{"kind": 0, "box": 1}, {"kind": 1, "box": 2}], None, [{"kind": -100, "box": 3}]]),
            {"feature": {"kind": NAMES, "box": {"dtype": "int64", "_type": "Value"}}, "_type": "List"},
            "meta.kind",
            [["cat", "dog"], None, []],
        ),
        (pa.array([{"kind": [1]}]), {"kind": {"feature": NAMES, "_type": "Sequence"}}, "meta.kind", [["dog"]]),
    ],
)
def test_class_labels_wherever_they_are_nested(make_config, read_all, tmp_path, values, feature, path, expected):
    """Catches class numbers in place of names inside structs and lists, and -100 as an error."""
    pq.write_table(_class_labels(values, feature), tmp_path / "a.parquet")
    source = {"reader": "parquet", "path": "a.parquet", "columns": {"text": "text", "label": path}}
    kind = "multilabel" if isinstance(expected[0], list) else "multiclass"
    table, rejects = read_all(make_config(tmp_path, source, tasks={"label": {"kind": kind}}))
    assert (table["label"].to_pylist(), rejects) == (expected, [])


@pytest.mark.parametrize("reader", ["parquet", "manifest"])
def test_class_labels_in_every_reader_and_kind(make_config, read_all, tmp_path, reader):
    """Catches numbers in place of names as a Parquet file is read as a manifest, in a table's column,
    and -1 as a number."""
    values = pa.array([{"kind": 0, "kinds": [1, 0]}, {"kind": -1, "kinds": None}, {"kind": 1, "kinds": [1]}])
    pq.write_table(_class_labels(values, {"kind": NAMES, "kinds": [NAMES]}), tmp_path / "a.parquet")
    columns = {"label": "meta.kind", "all": "meta.kinds", "facts": ["meta.kind", "meta.kinds"], "text": "text"}
    more = {
        "modalities": {"facts": {"kind": "table", "encoder": "table"}, "text": {"kind": "text", "encoder": "tfidf"}}
    }
    tasks = {"label": {"kind": "multiclass"}, "all": {"kind": "multilabel"}}
    source = {"reader": reader, "path": "a.parquet", "columns": columns}
    table, rejects = read_all(make_config(tmp_path, source, tasks=tasks, **more))
    assert (table["label"].to_pylist(), rejects) == (["cat", None, "dog"], [])
    assert table["all"].to_pylist() == [["cat", "dog"], None, ["dog"]]
    assert [row and dict(row) for row in table["facts"].to_pylist()] == [
        {"meta.kind": "cat", "meta.kinds": "dog\x1fcat"},
        None,
        {"meta.kind": "dog", "meta.kinds": "dog"},
    ]


def test_a_struct_where_one_class_is_expected_says_which_fields_there_are(make_config, tmp_path):
    """Catches a message of Arrow's kernels."""
    pq.write_table(pa.table({"text": ["a"], "label": [{"name": "x", "score": 1}]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'label' .* several values, name, score: name the one that is meant"):
        read(make_config, tmp_path, {"reader": "parquet", "path": "a.parquet", "columns": COLUMNS})


# --- spellings --------------------


@pytest.mark.parametrize(
    ("written", "canonical_form"),
    [("1.0", "1"), ("-3.00", "-3"), ("-0.0", "0"), ("True", "true"), ("FALSE", "false"), ("cafe\u0301", "caf\xe9"),
     ("\xa0a ", "a"), ("\ufeff7", "7"), ("\u200bcat\u200e", "cat"), ("New\xa0 York", "New York"),
     ("1.1", "1.1"), ("01.0", "01.0"), ("v1.0", "v1.0"), ("1.0.0", "1.0.0"),
     ("1e3", "1e3"), ("Trueish", "Trueish"), ("9" * 5_000 + ".0", "9" * 5_000)],
)  # fmt: skip
def test_the_canonical_form(written, canonical_form):
    """Catches two spellings of one class or key, names that are changed without need,
    and forms that are not final."""
    assert canonical(written) == canonical_form == canonical(canonical_form)


def test_keys_match_and_labels_keep_their_spelling():
    """Catches versions 1.0 and 1.1 renamed, and keys that do not meet between a CSV and a table of pandas."""
    assert [label_text(v) for v in ("1.0", "True", 1.0, True, 2.0**60)] == ["1.0", "True", "1", "true", repr(2.0**60)]
    assert [key_text(v) for v in ("1.0", "True", 1.0, True, " 1 ")] == ["1", "true", "1", "true", "1"]


def test_ids_and_keys_match_across_readers(make_config, read_all, tmp_path):
    """Catches a join without partners, as one of the tables went through a float column."""
    frame = pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"], "id": [17, 18], "k": [True, False]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.astype({"id": float}).to_csv(tmp_path / "b.csv", index=False)
    frame.astype({"id": float}).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.astype({"id": float}).to_parquet(tmp_path / "a.parquet")
    for path in ("a.csv", "b.csv", "a.jsonl", "a.parquet"):
        source = manifest(path, columns={**COLUMNS, "sample_id": "id", "key": "k"})
        table, _ = read_all(make_config(tmp_path, source))
        assert table.select(["sample_id", "key"]).to_pylist() == [
            {"sample_id": "17", "key": "true"},
            {"sample_id": "18", "key": "false"},
        ], path


def test_narrow_floats_keep_their_digits(make_config, read_all, tmp_path):
    """Catches the class 0.1 as 0.10000000149011612, as a column of 32 bit holds it."""
    table = pa.table({"text": ["a"] * 3, "label": pa.array([0.1, 2.0, None], pa.float32())})
    pq.write_table(table, tmp_path / "a.parquet")
    for reader in ("parquet", "manifest"):
        source = {"reader": reader, "path": "a.parquet", "columns": COLUMNS}
        assert read_all(make_config(tmp_path, source))[0]["label"].to_pylist() == ["0.1", "2", None]


def test_composed_and_decomposed_class_folders_are_one(make_config, read_all, tmp_path):
    """Catches a class twice, as macOS and Linux wrote its folder; the row says what was changed."""
    for number, name in enumerate(("caf\xe9", "cafe\u0301")):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / f"{number}.txt").write_text("t")
    source = {"reader": "folders", "path": "d", "columns": {"text": "content", "label": "folder"}}
    table, _ = read_all(make_config(tmp_path, source))
    assert table["label"].to_pylist() == ["caf\xe9"] * 2
    assert sorted(table["cleaned"].to_pylist(), key=str) == [None, ["label: Unicode form"]]


@pytest.mark.parametrize("name", ["A.CSV", "A.Tar", "A.PARQUET"])
def test_suffixes_of_any_case(make_config, read_all, write_tar, tmp_path, name):
    """Catches files that are not found, and members that are null, as a suffix is in capitals."""
    source = manifest(name)
    if name == "A.CSV":
        (tmp_path / name).write_text("text,label\na,x\n")
    elif name == "A.PARQUET":
        pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / name)
        source = {**source, "reader": "parquet"}
    else:
        write_tar(tmp_path / name, [("1.TXT", b"a"), ("1.Json", b'{"Kind": "x"}')])
        source = {**source, "reader": "webdataset", "columns": {"text": "Txt", "label": "JSON.Kind"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert (table.select(["text", "label"]).to_pylist(), rejects) == ([{"text": "a", "label": "x"}], [])
