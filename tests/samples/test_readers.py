"""Readers: shards, chunks, cells and Parquet. Bad input costs its own row and is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.cells import escape_id, label_names, label_text
from mmkt_ray.samples.readers import find_samples, read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import sample_schema
from mmkt_ray.samples.shards import list_shards

TEXT = {"text": "text", "label": "label"}
PARQUET = {"reader": "parquet", "path": "a.parquet", "columns": TEXT}
WEBDATASET = {
    "reader": "webdataset",
    "path": "a.tar",
    "columns": {"image": "jpg,png", "text": "txt", "label": "json.kind"},
}
FOLDERS = {"reader": "folders", "path": "a.tar", "columns": {"text": "content", "label": "folder"}}


def write_parquet(path: Path, **columns: object) -> None:
    """A Parquet file of columns as lists or Arrow arrays."""
    pq.write_table(pa.table(columns), path)


# --- listing --------------------


@pytest.mark.parametrize("path", ["d", "d/*.parquet", "d/", "file"])
def test_folder_glob_and_uri_list_the_same_shards(make_config, tmp_path, path):
    """Catches names, and so sample ids, that depend on how a path is written; and hidden files read."""
    (tmp_path / "d").mkdir()
    for name in ("b c.parquet", "a.parquet", ".tmp.parquet", "notes.md"):
        write_parquet(tmp_path / "d" / name, text=["x"], label=["y"])
    root, path = (f"file://{tmp_path}", "d") if path == "file" else (tmp_path, path)
    plan = ReadingPlan.of(make_config(root, {**PARQUET, "path": path}))
    assert [s.name for s in list_shards(plan)] == ["d/a.parquet", "d/b c.parquet"]
    assert [c.table.num_rows for s in list_shards(plan) for c in read_chunks(plan, s)] == [1, 1]


def test_shards_below_a_pattern_are_listed_once(make_config, tmp_path):
    """Catches `**` that means one folder only, a shard read twice as its folder matches too,
    and brackets in names."""
    root = tmp_path / "data[1]"
    for name in ("0.parquet", "a/1.parquet", "a/b/2.parquet", "a/b/[3].parquet"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(root / name, text=["x"], label=["y"])
    names = ["0.parquet", "a/1.parquet", "a/b/2.parquet", "a/b/[3].parquet"]
    for data_root in (root, f"file://{root}"):
        for path, expected in (("**/*.parquet", names), ("**", names), ("a/b/[3].parquet", names[3:])):
            config = make_config(data_root, {**PARQUET, "path": path})
            shards = list_shards(ReadingPlan.of(config))
            assert sorted(s.name for s in shards) == expected, (data_root, path)
            assert [c.table.num_rows for s in shards for c in read_chunks(ReadingPlan.of(config), s)] == [1] * len(
                expected
            )


def test_misspelt_path_names_the_nearest(make_config, tmp_path):
    """Catches an empty result, or a bare 'not found', for the commonest mistake."""
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(DataError, match=r"sources\[0\].path: nothing at .*has no 'cifra10'; did you mean 'cifar10'\?"):
        list_shards(ReadingPlan.of(make_config(tmp_path, {**PARQUET, "path": "cifra10/train-*.parquet"})))


@pytest.mark.parametrize("root", ["", "file://"])
def test_missing_data_root_is_told_from_where_it_ends(make_config, tmp_path, root):
    """Catches an endless climb, or a listing of the current folder, when not even the root exists."""
    with pytest.raises(DataError, match=r"nothing at '.*/no/such/a.parquet'"):
        list_shards(ReadingPlan.of(make_config(f"{root}{tmp_path}/no/such", PARQUET)))
    with pytest.raises(
        DataError, match=r"nothing at '.*/no_such_folder_here/x/a.parquet'.* has no 'no_such_folder_here'"
    ):
        list_shards(ReadingPlan.of(make_config(f"{root}/no_such_folder_here/x", PARQUET)))


def test_folder_without_files_of_the_reader_says_what_it_holds(make_config, tmp_path):
    """Catches a wrong reader that silently reads nothing."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no \*\.parquet for reader 'parquet' .*it holds: x\.tar"):
        list_shards(ReadingPlan.of(make_config(tmp_path, {**PARQUET, "path": "d"})))


def test_identity_follows_the_content(make_config, tmp_path):
    """Catches a changed file that resumes from old features; a grown class folder that spoils the others."""
    for folder in ("cats", "dogs"):
        (tmp_path / "d" / folder).mkdir(parents=True)
        (tmp_path / "d" / folder / "1.txt").write_text("x")
    config = make_config(tmp_path, {**FOLDERS, "path": "d"})
    before = {s.name: s.unit for s in list_shards(ReadingPlan.of(config))}
    (tmp_path / "d" / "cats" / "2.txt").write_text("y")
    after = {s.name: s.unit for s in list_shards(ReadingPlan.of(config))}
    assert set(before) == {"d/cats", "d/dogs"}
    assert before["d/dogs"] == after["d/dogs"]
    assert before["d/cats"] != after["d/cats"]


# --- chunks --------------------


def test_chunks_keep_both_limits_and_the_order(make_config, tmp_path):
    """Catches chunks over the limits, rows lost or doubled at boundaries, boundaries of row groups."""
    texts = ["x" * (n * 37 % 500 + 1) for n in range(1500)]
    table = pa.table({"text": texts, "label": ["a"] * len(texts)})
    boundaries = []
    for row_group_size in (1500, 70):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=row_group_size)
        config = make_config(tmp_path, PARQUET, extract={"chunk_rows": 100, "chunk_bytes": 20_000})
        chunks = [c for s in list_shards(ReadingPlan.of(config)) for c in read_chunks(ReadingPlan.of(config), s)]
        assert all(c.table.schema.equals(sample_schema(ReadingPlan.of(config))) for c in chunks)
        sizes = [[len(text) for text in c.table["text"].to_pylist()] for c in chunks]
        assert all(len(rows) <= 100 and sum(rows) <= 20_000 for rows in sizes)
        assert [text for c in chunks for text in c.table["text"].to_pylist()] == texts
        boundaries.append([len(rows) for rows in sizes])
    assert boundaries[0] == boundaries[1]


def test_a_sample_larger_than_a_chunk_stands_alone(make_config, read_all, tmp_path):
    """Catches an endless loop or a lost row where a sample exceeds the limit; rows that just fit stay."""
    texts = ["s", "L" * 5000, "s" * 400, "s" * 600, "s"]
    write_parquet(tmp_path / "a.parquet", text=texts, label=["a"] * 5)
    config = make_config(tmp_path, PARQUET, extract={"chunk_bytes": 1000})
    assert [c.table.num_rows for c in read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0])] == [
        1,
        1,
        2,
        1,
    ]
    assert read_all(config)[0]["text"].to_pylist()[1] == "L" * 5000


@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_memory_is_bounded_by_the_chunk(make_config, write_tar, tmp_path, layout):
    """Catches a reader that loads its shard: the shard has 30 MB, a row group of it 10 MB."""
    image, num_rows = os.urandom(200_000), 150
    if layout == "parquet":
        schema = pa.schema([("image", pa.binary()), ("label", pa.string())])
        pages = {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 100_000}  # one row a page
        with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="none", **pages) as writer:
            for _ in range(num_rows // 50):
                writer.write_table(pa.table({"image": [image] * 50, "label": ["a"] * 50}, schema=schema))
        source = {**PARQUET, "columns": {"image": "image", "label": "label"}}
    else:
        write_tar(tmp_path / "a.tar", [(f"{i}.png", image) for i in range(num_rows)])
        source = {**WEBDATASET, "columns": {"image": "png", "label": "cls"}}
    config = make_config(tmp_path, source, extract={"chunk_bytes": 1_000_000})
    shard = list_shards(ReadingPlan.of(config))[0]
    start, most, rows = pa.total_allocated_bytes(), 0, 0
    for chunk in read_chunks(ReadingPlan.of(config), shard):
        rows += chunk.table.num_rows
        most = max(most, pa.total_allocated_bytes() - start)
    assert rows == num_rows
    # two chunks of 1 MB, a block of 4 MB before and after conversion, the read buffers of two columns
    assert most < 16_000_000, f"{most:,} bytes of Arrow memory"


@pytest.mark.parametrize("layout", ["parquet", "tar", "folder tar", "csv", "jsonl"])
def test_empty_shard_is_one_empty_chunk(make_config, read_all, write_tar, tmp_path, layout):
    """Catches a shard that is never marked as done because it yields nothing, or one taken for damaged."""
    source = PARQUET
    if layout == "parquet":
        write_parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()), label=pa.array([], pa.string()))
    elif layout.endswith("tar"):
        write_tar(tmp_path / "a.tar", [])
        source = WEBDATASET if layout == "tar" else FOLDERS
    else:
        (tmp_path / f"a.{layout}").write_text("text,label\n" if layout == "csv" else "")
        source = {**PARQUET, "reader": "manifest", "path": f"a.{layout}"}
    table, rejects = read_all(make_config(tmp_path, source))
    assert (table.num_rows, rejects) == (0, [])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_limit_counts_rows_of_each_shard(make_config, read_all, tmp_path, suffix):
    """Catches a quick look that reads everything."""
    write_parquet(tmp_path / "a.parquet", text=["x"] * 600, label=["y"] * 600)
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "y"}\n' * 600)
    (tmp_path / "a.csv").write_text("text,label\n" + "x,y\n" * 600)
    reader = "parquet" if suffix == "parquet" else "manifest"
    source = {**PARQUET, "reader": reader, "path": f"a.{suffix}", "limit": 300}
    assert read_all(make_config(tmp_path, source))[0].num_rows == 300


# --- cells --------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (3, "3"),
        (3.0, "3"),
        (0.5, "0.5"),
        (float("nan"), None),
        (True, "true"),
        (" cat\n", "cat"),
        ("", None),
        (b"x", "x"),
        (None, None),
    ],
)
def test_labels_become_class_names(value, name):
    """Catches the same class twice, as '3' and '3.0', and empty strings that become a class."""
    assert label_text(value) == name


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["b", "a", "b", None, " "], ["a", "b"]),
        ([], []),
        ([2, 10.0, True], ["10", "2", "true"]),
        ("b| a||b", ["a", "b"]),
        ("|", []),
        (b"a|\xc3\xa9", ["a", "\u00e9"]),
        ("", None),
        (None, None),
        (float("nan"), None),
        (3, ["3"]),
    ],
)
def test_multilabel_cells_become_sorted_class_names(value, names):
    """Catches 'no class' taken for 'no label', doubled classes, and an order that makes equal sets differ."""
    assert label_names(value, "|") == names


@pytest.mark.parametrize(
    "layout", ["list", "large_list", "fixed_size_list", "string", "classes", "csv", "jsonl", "tar"]
)
def test_multilabel_in_every_layout(make_config, read_all, write_tar, tmp_path, layout):
    """Catches a reader that rejects lists, splits a class name, or keeps the numbers of a list of ClassLabel."""
    rows = [["b", "a"], [], None]
    source = PARQUET
    if layout in ("csv", "jsonl"):
        source = {**PARQUET, "reader": "manifest", "path": f"a.{layout}"}
        (tmp_path / "a.csv").write_text("text,label\nt,b; a\nt,;\nt,\n")
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", "label": r}) + "\n" for r in rows))
    elif layout == "tar":
        source = WEBDATASET
        members = [
            (f"{i}.{k}", v)
            for i, r in enumerate(rows)
            for k, v in (("txt", b"t"), ("json", json.dumps({"kind": r}).encode()))
        ]
        write_tar(tmp_path / "a.tar", members)
    elif layout == "classes":
        labels = pa.array([[1, 0], [], None], pa.list_(pa.int64()))
        feature = {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}, "_type": "Sequence"}
        metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
        table = pa.table({"text": ["t"] * 3, "label": labels}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "a.parquet")
    elif layout == "string":
        write_parquet(tmp_path / "a.parquet", text=["t"] * 3, label=["b; a", ";", None])
    else:
        kind = {"list": pa.list_(pa.string()), "large_list": pa.large_list(pa.large_string())}.get(layout)
        if kind is None:
            kind, rows = pa.list_(pa.string(), 2), [["b", "a"], ["", ""], None]
        write_parquet(tmp_path / "a.parquet", text=["t"] * 3, label=pa.array(rows, kind))
    table, rejects = read_all(make_config(tmp_path, source, tasks={"label": {"kind": "multilabel", "separator": ";"}}))
    assert not rejects
    assert table["label"].to_pylist() == [["a", "b"], [], None]


def test_a_broken_multilabel_cell_costs_its_row(make_config, read_all, tmp_path):
    """Catches undecodable names and numbers without a name that stop a job or become a class."""
    names = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"]).buffers())
    labels = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), names)
    write_parquet(tmp_path / "a.parquet", text=["x", "x"], label=labels)
    config = make_config(tmp_path, PARQUET, tasks={"label": {"kind": "multilabel"}})
    table, rejects = read_all(config)
    assert table["label"].to_pylist() == [["ok"]]
    assert [(r.sample_id, r.reason.split(":")[0]) for r in rejects] == [("a.parquet#1", "label")]


def test_float_labels_of_parquet_and_jsonl_agree(make_config, read_all, tmp_path):
    """Catches a column that pandas made float for one null: its classes must stay those of the ints."""
    write_parquet(tmp_path / "a.parquet", text=["x"] * 3, label=[1.0, None, 2.0])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x", "label": v}) + "\n" for v in (1, None, 2.0)))
    for path, reader in (("a.parquet", "parquet"), ("a.jsonl", "manifest")):
        table, _ = read_all(make_config(tmp_path, {**PARQUET, "path": path, "reader": reader}))
        assert table["label"].to_pylist() == ["1", None, "2"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec=None) | st.sampled_from("%|\n\x00é\udcff")),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_ids_are_clean_and_stay_distinct(texts):
    """Catches two ids that escape to the same text, and characters that break ids of pairs or tables."""
    first, second = (escape_id(text) for text in texts)
    assert first != second
    assert not {"|", "\n", "\x00"} & set(first)
    first.encode()


def test_null_and_blank_modalities(make_config, read_all, tmp_path):
    """Catches blank texts that count as present, and rows without anything that become samples."""
    texts = ["a", "", " \t\u00a0\n", None]
    write_parquet(tmp_path / "a.parquet", text=texts, image=[None, b"x", None, None], label=["l", "", "l", "l"])
    table, rejects = read_all(make_config(tmp_path, {**PARQUET, "columns": {**TEXT, "image": "image"}}))
    assert table.select(["text", "image", "label"]).to_pylist() == [
        {"text": "a", "image": None, "label": "l"},
        {"text": None, "image": b"x", "label": None},
    ]
    assert [(r.sample_id, r.reason) for r in rejects] == [
        ("a.parquet#2", "no modality is present"),
        ("a.parquet#3", "no modality is present"),
    ]
    assert {(r.source, r.stage) for r in rejects} == {("a.parquet", "read")}


@pytest.mark.parametrize("layout", ["parquet", "tar", "csv", "jsonl"])
def test_latin_1_where_utf_8_was_said(make_config, read_all, write_tar, tmp_path, layout):
    """Catches replacement characters that slip in, and one bad row that costs the shard."""
    bad = "ab\xe9".encode("latin-1")
    if layout == "parquet":
        write_parquet(tmp_path / "a.parquet", text=[b"good", bad], label=["x", "x"])
        source = PARQUET
    elif layout == "tar":
        write_tar(tmp_path / "a.tar", [("x/1", b"good"), ("x/2", bad)])
        source = FOLDERS
    else:
        row = {"csv": b"%s,x\n", "jsonl": b'{"text": "%s", "label": "x"}\n'}[layout]
        header = b"text,label\n" if layout == "csv" else b""
        (tmp_path / f"a.{layout}").write_bytes(header + row % b"good" + row % bad)
        source = {**PARQUET, "reader": "manifest", "path": f"a.{layout}"}
    table, rejects = read_all(make_config(tmp_path, source))
    assert table["text"].to_pylist() == ["good"]
    assert len(rejects) == 1
    assert "encoding: latin-1" in rejects[0].reason
    assert "2" in rejects[0].reason or layout == "jsonl"  # the position of the byte; in a JSON line, that in the line
    table, rejects = read_all(make_config(tmp_path, {**source, "encoding": "latin-1"}))
    assert table["text"].to_pylist() == ["good", "ab\xe9"]
    assert not rejects


@pytest.mark.parametrize("layout", ["parquet", "strings", "tar", "csv", "jsonl"])
def test_undecodable_text_costs_the_text_not_the_image(make_config, read_all, write_tar, png, tmp_path, layout):
    """Catches an image and its label lost to a byte in the text beside it;
    and the row counted twice, as kept and rejected."""
    bad = "ab\xe9".encode("latin-1")
    texts = pa.array([b"good", bad, bad])
    source = {**PARQUET, "path": f"a.{layout}", "columns": {**TEXT, "image": "image"}}
    (tmp_path / "1.png").write_bytes(png(1))
    if layout in ("parquet", "strings"):
        if layout == "strings":
            texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
        source["path"] = "a.parquet"
        write_parquet(tmp_path / "a.parquet", text=texts, label=["x"] * 3, image=[png(1), png(1), None])
    elif layout == "tar":
        source = WEBDATASET
        members = [("1.txt", b"good"), ("1.png", png(1)), ("2.txt", bad), ("2.png", png(1)), ("3.txt", bad)]
        write_tar(tmp_path / "a.tar", [*members, ("3.json", b"{}")])
    else:
        row = {"csv": b"%s,x,%s\n", "jsonl": b'{"text": "%s", "label": "x", "image": "%s"}\n'}[layout]
        header = b"text,label,image\n" if layout == "csv" else b""
        rows = [(b"good", b"1.png"), (bad, b"1.png"), (bad, b"")]
        (tmp_path / f"a.{layout}").write_bytes(header + b"".join(row % cells for cells in rows))
        source["reader"] = "manifest"
    table, rejects = read_all(make_config(tmp_path, source))
    assert table.select(["text", "image"]).to_pylist() == [
        {"text": "good", "image": png(1)},
        {"text": None, "image": png(1)},
    ]
    assert [r.stage for r in rejects] == ["modality", "read"]
    assert rejects[0].sample_id == table["sample_id"][1].as_py() != rejects[1].sample_id
    assert all(r.reason.startswith("text: not ") and "encoding: latin-1" in r.reason for r in rejects)


def test_a_row_rejected_for_another_reason_is_told_once(make_config, read_all, tmp_path):
    """Catches counts that do not add up where a row lost a modality and is rejected all the same."""
    texts = [b"good", b"\xff", b"\xff"]
    write_parquet(tmp_path / "a.parquet", text=texts, image=[b"x"] * 3, label=["y"] * 3, id=["a", "b", "b"])
    columns = {**TEXT, "image": "image", "sample_id": "id"}
    table, rejects = read_all(make_config(tmp_path, {**PARQUET, "columns": columns}))
    assert table["sample_id"].to_pylist() == ["a", "b"]
    assert [(r.sample_id, r.stage) for r in rejects] == [("b", "modality"), ("b", "read")]
    assert "duplicate" in rejects[1].reason


def test_invalid_utf_8_in_a_string_column_is_rejected(make_config, read_all, tmp_path):
    """Catches strings that Arrow reads unchecked and that blow up much later in an encoder."""
    strings = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"]).buffers())
    for column in ("text", "label"):
        write_parquet(tmp_path / "a.parquet", **{"text": ["x", "x"], "label": ["x", "x"], column: strings})
        table, rejects = read_all(make_config(tmp_path, PARQUET))
        assert table[column].to_pylist() == ["ok"]
        assert [(r.sample_id, r.reason.split(":")[0]) for r in rejects] == [("a.parquet#1", column)]


def test_mapped_ids(make_config, read_all, tmp_path):
    """Catches null and doubled ids that pass as two samples, and mapped ids with unsafe characters."""
    # the first c is no sample, the second is
    texts, ids = ["x", "x", " ", "x", "x"], ["a|b", None, "c", "c", "c"]
    write_parquet(tmp_path / "a.parquet", text=texts, label=["y"] * 5, id=ids)
    config = make_config(tmp_path, {**PARQUET, "columns": {**TEXT, "sample_id": "id"}})
    table, rejects = read_all(config)
    assert table["sample_id"].to_pylist() == ["a%7Cb", "c"]
    assert [(r.sample_id, r.reason.split(":")[0]) for r in rejects] == [
        ("a.parquet#1", "sample_id is null"),
        ("c", "no modality is present"),
        ("c", "duplicate sample id"),
    ]
    assert find_samples(ReadingPlan.of(config), ["c", "a%7Cb", "none"])["sample_id"].to_pylist() == ["c", "a%7Cb"]


def test_split_column(make_config, read_all, tmp_path):
    """Catches unknown split names that silently train."""
    write_parquet(tmp_path / "a.parquet", text=["x"] * 3, label=["y"] * 3, part=["dev", "TEST", "tset"])
    table, rejects = read_all(make_config(tmp_path, {**PARQUET, "columns": {**TEXT, "split": "part"}}))
    assert table["split"].to_pylist() == ["val", "test"]
    assert "unknown split 'tset'" in rejects[0].reason


# --- Parquet --------------------


def test_hugging_face_layout(make_config, read_all, tmp_path):
    """Catches class numbers in place of names, -1 as a class, nameless numbers, bytes left in a file."""
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "1.png").write_bytes(b"from file")
    image = [
        {"bytes": b"here", "path": None},
        {"bytes": None, "path": "pics/1.png"},
        None,
        {"bytes": None, "path": "../x"},
    ]
    table = pa.table({"img": pa.array([*image, image[0]]), "label": [1, -1, 0, 0, 7], "text": ["t"] * 5})
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    read, rejects = read_all(make_config(tmp_path, {**PARQUET, "columns": {**TEXT, "image": "img"}}))
    assert read["image"].to_pylist() == [b"here", b"from file", None, None]
    assert read["label"].to_pylist() == ["dog", None, "cat", "cat"]
    assert ["outside" in rejects[0].reason, "label 7 has no name" in rejects[1].reason] == [True, True]
    assert [(r.sample_id, r.stage) for r in rejects] == [("a.parquet#3", "modality"), ("a.parquet#4", "read")]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("img.bytes", pa.array([{"bytes": b"a"}, None])),
        ("img.bytes", pa.array([b"a", None])),  # a top-level name with a dot
        ("img", pa.array([b"a", None], pa.large_binary())),
        ("img", pa.array([b"a", None]).dictionary_encode()),
    ],
)
def test_nested_dotted_and_encoded_columns(make_config, read_all, tmp_path, column, values):
    """Catches column kinds that other tools write and that would stop a job."""
    write_parquet(
        tmp_path / "a.parquet",
        **{
            column if pa.types.is_binary(values.type) else "img": values,
            "text": ["t", "t"],
            "label": ["l", "l"],
        },
    )
    table, _ = read_all(make_config(tmp_path, {**PARQUET, "columns": {**TEXT, "image": column}}))
    assert table["image"].to_pylist() == [b"a", None]


@pytest.mark.parametrize("path", ["a.parquet", "a.csv", "a.jsonl"])
def test_missing_column_lists_those_there_are(make_config, tmp_path, path):
    """Catches a misspelt column that becomes nulls for a whole corpus."""
    write_parquet(tmp_path / "a.parquet", text=["x"], lable=["y"])
    (tmp_path / "a.csv").write_text("text,lable\nx,y\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x", "lable": "y"}\n')
    config = make_config(
        tmp_path, {**PARQUET, "path": path, "reader": "parquet" if path == "a.parquet" else "manifest"}
    )
    with pytest.raises(DataError, match=r"no column 'label'; did you mean 'lable'\? known: lable, text"):
        list(read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0]))


def test_paths_in_an_image_column_point_to_the_manifest_reader(make_config, tmp_path):
    """Catches paths that are taken for encoded images and rejected one by one."""
    write_parquet(tmp_path / "a.parquet", image=["x.png"], label=["y"])
    config = make_config(tmp_path, {**PARQUET, "columns": {"image": "image", "label": "label"}})
    with pytest.raises(DataError, match="set reader: manifest"):
        list(read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0]))


def test_truncated_parquet_is_one_reject(make_config, read_all, tmp_path):
    """Catches one damaged file that stops a job over thousands."""
    write_parquet(tmp_path / "a.parquet", text=["x"] * 100, label=["y"] * 100)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    table, rejects = read_all(make_config(tmp_path, PARQUET))
    assert table.num_rows == 0
    assert [r.sample_id for r in rejects] == ["a.parquet"]
    assert "the shard is damaged" in rejects[0].reason


def test_rows_before_a_damaged_page_are_kept(make_config, read_all, tmp_path):
    """Catches readable row groups that are lost with a damaged one after them."""
    texts = [str(os.urandom(20)) for _ in range(1000)]
    table = pa.table({"text": texts, "label": ["y"] * 1000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[start : start + 400] = os.urandom(400)
    (tmp_path / "a.parquet").write_bytes(data)
    read, rejects = read_all(make_config(tmp_path, PARQUET))
    assert read["text"].to_pylist()[:256] == texts[:256]
    assert [r.sample_id for r in rejects] == ["a.parquet"]


# --- real data --------------------


def test_cifar10_of_the_hub(make_config, data_dir):
    """Catches class numbers in place of names, and images that are not the file's bytes, in real data."""
    source = {
        **PARQUET,
        "path": "cifar10/test-*.parquet",
        "columns": {"image": "img", "label": "label"},
        "split": "test",
    }
    config = make_config(data_dir, source)
    chunks = list(read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0]))
    assert [c.table.num_rows for c in chunks] == [1024] * 9 + [784]
    labels = [label for c in chunks for label in c.table["label"].to_pylist()]
    assert sorted(set(labels)) == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    assert chunks[0].table["image"][0].as_py().startswith(b"\xff\xd8")
    wanted = ["cifar10/test-00000-of-00001.parquet#1500", "cifar10/test-00000-of-00001.parquet#3"]
    assert find_samples(ReadingPlan.of(config), wanted)["label"].to_pylist() == [labels[1500], labels[3]]
