"""Manifests: CSV, JSON lines and Parquet tables whose image cells are paths."""

from __future__ import annotations

import gzip
import io
import json
import os

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.errors import DataError
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards

COLUMNS = {"image": "file", "text": "words", "label": "kind"}


@pytest.fixture
def root(tmp_path, png):
    """A folder `m` with two pictures, and a file outside of it."""
    (tmp_path / "m" / "pics").mkdir(parents=True)
    (tmp_path / "m" / "pics" / "1.png").write_bytes(png(1))
    (tmp_path / "m" / "pics" / "2 %.png").write_bytes(png(2))
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path


def manifest(path: str, **more: object) -> dict:
    return {"reader": "manifest", "path": path, "columns": COLUMNS, **more}


ROWS = [
    {"file": "pics/1.png", "words": "one, two\nthree", "kind": "3"},
    {"file": "./pics/../pics/2 %.png", "words": "", "kind": ""},
    {"file": None, "words": "no picture", "kind": "3"},
]


def write_rows(path, rows) -> None:
    """The rows as a manifest of the kind that the suffix says."""
    if path.suffix == ".csv":
        quoted = ['"{}","{}","{}"'.format(*(row[c] or "" for c in ("file", "words", "kind"))) for row in rows]
        path.write_text("\ufefffile,words,kind\n" + "\n".join(quoted) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("suffix", "places"), [("csv", (2, 4, 5)), ("jsonl", (1, 3, 5)), ("parquet", (0, 1, 2))])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_three_kinds_agree(make_config, read_all, png, root, suffix, places, scheme):
    """Catches cells that differ by kind of manifest, and ids that do not say where in the file a row is."""
    write_rows(root / "m" / f"a.{suffix}", ROWS)
    table, rejects = read_all(make_config(f"{scheme}{root}", manifest(f"m/a.{suffix}")))
    assert table.select(["sample_id", "image", "text", "label"]).to_pylist() == [
        {"sample_id": f"m/a.{suffix}#{places[0]}", "image": png(1), "text": "one, two\nthree", "label": "3"},
        {"sample_id": f"m/a.{suffix}#{places[1]}", "image": png(2), "text": None, "label": None},
        {"sample_id": f"m/a.{suffix}#{places[2]}", "image": None, "text": "no picture", "label": "3"},
    ]
    assert not rejects


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    "cell",
    [
        "../secret.png",
        "pics/../../secret.png",
        "{root}/secret.png",
        "file://{root}/secret.png",
        "link.png",
        "linked/secret.png",
    ],
)
def test_paths_out_of_the_folder_are_rejected_unless_allowed(make_config, read_all, root, cell, scheme):
    """Catches a manifest from elsewhere that reads any file of this machine into the results."""
    os.symlink(root / "secret.png", root / "m" / "link.png")
    os.symlink(root, root / "m" / "linked")
    write_rows(root / "m" / "a.jsonl", [{"file": cell.format(root=root), "words": "t", "kind": "x"}])
    table, rejects = read_all(make_config(f"{scheme}{root}", manifest("m/a.jsonl")))
    assert (table["image"].to_pylist(), table["text"].to_pylist()) == ([None], ["t"])
    assert rejects[0].stage == "modality"
    assert "is outside of the folder" in rejects[0].reason
    assert "allow_outside: true" in rejects[0].reason
    allowed, _ = read_all(make_config(f"{scheme}{root}", manifest("m/a.jsonl", allow_outside=True)))
    assert allowed["image"].to_pylist() == [b"secret"]


def test_links_inside_the_folder_are_followed(make_config, read_all, root, png):
    """Catches a check that refuses every link, as data folders are often made of them."""
    os.symlink("1.png", root / "m" / "pics" / "same.png")
    os.symlink(root / "m", root / "data")  # the whole folder may be a link, too
    write_rows(root / "m" / "a.jsonl", [{"file": "pics/same.png", "words": "t", "kind": "x"}])
    assert read_all(make_config(root, manifest("data/a.jsonl")))[0]["image"].to_pylist() == [png(1)]


def test_bad_files_cost_their_modality_and_bad_cells_their_row(make_config, read_all, root):
    """Catches a missing file, a folder or a wrong type that stops the job, or that costs the text beside it."""
    bad = ["pics/nope.png", "pics", "web://x/y.png", 5, "pics/\x00.png"]
    rows = [
        {"file": "pics/1.png", "words": "t", "kind": "x"},
        *[{"file": f, "words": "t", "kind": "x"} for f in bad],
    ]
    write_rows(
        root / "m" / "a.jsonl",
        [
            *rows,
            {"words": "t", "kind": {}},
            {"file": None, "words": ["list"], "kind": "x"},
            {"file": "gone", "kind": "x"},
        ],
    )
    table, rejects = read_all(make_config(root, manifest("m/a.jsonl", allow_outside=True)))
    assert (table.num_rows, table["image"].null_count, table["text"].null_count) == (6, 5, 0)
    assert [r.stage for r in rejects] == ["read"] + ["modality"] * 5 + ["read"] * 2
    expected = [
        "label: must be a single value",
        "no file",
        "no regular file",
        "cannot open",
        "must be the path",
        "NUL",
        "text: must be one text, got several",
        "no file",
    ]
    assert len(rejects) == len(expected)
    for reject, reason in zip(rejects, expected, strict=True):
        assert reason in reject.reason


def test_the_limit_counts_rows_not_what_is_told_of_them(make_config, read_all, root):
    """Catches rows that a limit leaves out because files of earlier rows could not be read."""
    write_rows(root / "m" / "a.jsonl", [{"file": "gone.png", "words": "t", "kind": "x"}] * 6)
    table, rejects = read_all(make_config(root, manifest("m/a.jsonl", limit=4)))
    assert (table.num_rows, len(rejects)) == (4, 4)


def test_broken_lines_cost_their_row(make_config, read_all, root):
    """Catches one broken line that loses the rows after it."""
    lines = [
        '{"words": "a", "kind": "x", "file": null}',
        "{broken",
        "[1]",
        "[" * 100_000,
        '"\\ud800"',
        '{"words": "\\ud800"}',
        '{"words": "b"}',
    ]
    (root / "m" / "a.jsonl").write_text("\n".join(lines))
    table, rejects = read_all(make_config(root, manifest("m/a.jsonl")))
    assert table["text"].to_pylist() == ["a", "b"]
    assert [r.sample_id for r in rejects] == [f"m/a.jsonl#{n}" for n in (2, 3, 4, 5, 6)]
    (root / "m" / "a.csv").write_text("file,words,kind\n,a,x\n,only two\n,b,x,4\n\n,c,x\n")
    table, rejects = read_all(make_config(root, manifest("m/a.csv")))
    assert table["text"].to_pylist() == ["a", "c"]
    assert ["2 cells where the header names 3" in rejects[0].reason, "4 cells" in rejects[1].reason] == [
        True,
        True,
    ]


def test_long_cells(make_config, read_all, root):
    """Catches the csv module's own limit of 131,072 characters, which raises in the middle of a shard."""
    write_rows(root / "m" / "a.csv", [{"file": None, "words": "w" * 200_000, "kind": "x"}])
    assert len(read_all(make_config(root, manifest("m/a.csv")))[0]["text"][0].as_py()) == 200_000


def test_rows_are_streamed(make_config, root):
    """Catches a manifest that is parsed as a whole before its first chunk."""
    write_rows(root / "m" / "a.jsonl", [{"file": "pics/1.png", "words": "t", "kind": "x"}] * 2000)
    config = make_config(root, manifest("m/a.jsonl"), extract={"chunk_rows": 10})
    chunks = read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0])
    next(chunks)
    (root / "m" / "pics" / "1.png").unlink()
    assert sum(len(chunk.rejects) for chunk in chunks) > 1000


def test_digits(make_config, read_all, data_dir):
    """Catches relative paths, int labels and given splits gone wrong in a real manifest."""
    columns = {"image": "image", "label": "digit", "sample_id": "id", "split": "split"}
    table, rejects = read_all(
        make_config(data_dir, {"reader": "manifest", "path": "digits/images.jsonl", "columns": columns})
    )
    assert (table.num_rows, len(rejects)) == (6000, 0)
    assert sorted(set(table["label"].to_pylist())) == [str(digit) for digit in range(10)]
    assert table["sample_id"][0].as_py() == "train-0-10045"
    assert {data[:4] for data in table["image"].to_pylist()} == {b"\x89PNG"}


# --- tables as they come --------------------


@pytest.mark.parametrize("content", ["\n\n{}", "  \n{}", "\ufeff\n{}", "{}\n   \n\n"])
def test_blank_lines_are_passed_over_as_pandas_does(make_config, read_all, tmp_path, content):
    """Catches a file of which no row is read, without a word, as a blank line is before its header."""
    (tmp_path / "a.csv").write_text(content.format("words,kind\na,x\nb,y\n"))
    source = manifest("a.csv", columns={"text": "words", "label": "kind"})
    table, rejects = read_all(make_config(tmp_path, source))
    expected = pd.read_csv(io.StringIO((tmp_path / "a.csv").read_text().lstrip("\ufeff\n ")))
    assert (table["text"].to_pylist(), rejects) == (expected["words"].tolist(), [])


def test_joined_files_are_read_on(make_config, read_all, tmp_path):
    """Catches the header of the second file as a row with the class `kind`,
    and its byte order mark as broken JSON."""
    rows = pd.DataFrame({"words": ["a", "b"], "kind": ["x", "y"]})
    with_mark = rows.to_csv(index=False).encode("utf-8-sig")
    (tmp_path / "a.csv").write_bytes(with_mark * 2)
    table, rejects = read_all(make_config(tmp_path, manifest("a.csv", columns={"text": "words", "label": "kind"})))
    assert table["label"].to_pylist() == ["x", "y"] * 2
    assert [(r.sample_id, "the header once more" in r.reason) for r in rejects] == [("a.csv#4", True)]
    lines = rows.to_json(orient="records", lines=True).encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(lines * 2)
    table, rejects = read_all(make_config(tmp_path, manifest("a.jsonl", columns={"text": "words", "label": "kind"})))
    assert (table["label"].to_pylist(), rejects) == (["x", "y"] * 2, [])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (gzip.compress(b"words,kind\na,x\n", mtime=0), "packed by gzip"),
        (b"PK\x03\x04\x14\x00", "spreadsheet"),
        (b"PAR1\x15\x04\n", "a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"<!DOCTYPE html>\n", "a web page"),
        (bytes(500), "full of zeros"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_is_no_table_is_told(make_config, read_all, tmp_path, suffix, data, told):
    """Catches one bad line, or a missing column of strange signs, where the file is of another kind altogether."""
    (tmp_path / f"a.{suffix}").write_bytes(data)
    with pytest.raises(DataError, match=f"'a.{suffix}' is no table: it is .*{told}"):
        read_all(make_config(tmp_path, manifest(f"a.{suffix}")))


@pytest.mark.parametrize("mark", [";", "\t"])
def test_another_separator_is_told(make_config, read_all, tmp_path, mark):
    """Catches advice to take `file;words;kind` for a misspelt `kind`."""
    pd.DataFrame({"words": ["a"], "kind": ["x"]}).to_csv(tmp_path / "a.csv", sep=mark, index=False)
    with pytest.raises(DataError, match=r"'a.csv' is separated by .*, not by commas"):
        read_all(make_config(tmp_path, manifest("a.csv", columns={"text": "words", "label": "kind"})))


def test_a_nested_column_that_is_there_twice_is_refused(make_config, read_all, write_tar, tmp_path):
    """Catches the last of two labels taken in silence: inside an object, and in the json member of an archive."""
    good, bad = '{"t": "a", "m": {"kind": "x"}, "kind": "z"}', '{"t": "b", "m": {"kind": "x", "kind": "y"}}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}\n")
    table, rejects = read_all(make_config(tmp_path, manifest("a.jsonl", columns={"text": "t", "label": "m.kind"})))
    assert (table["label"].to_pylist(), ["'m.kind' is there twice" in r.reason for r in rejects]) == (["x"], [True])
    write_tar(tmp_path / "a.tar", [("1.json", good.encode()), ("2.json", bad.encode())])
    source = {"reader": "webdataset", "path": "a.tar", "columns": {"text": "json.t", "label": "json.m.kind"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert (table["label"].to_pylist(), ["has 'm.kind' twice" in r.reason for r in rejects]) == (["x"], [True])


def test_json_members_are_read_in_the_source_s_encoding(make_config, read_all, write_tar, tmp_path):
    """Catches json members that must be UTF-8 beside texts that need not; those that are still are read as such."""
    texts = [
        json.dumps({"t": "caf\xe9", "k": "x"}, ensure_ascii=False).encode(e) for e in ("latin-1", "utf-8", "utf-16")
    ]
    write_tar(tmp_path / "a.tar", [(f"{i}.json", text) for i, text in enumerate(texts)])
    source = {
        "reader": "webdataset",
        "path": "a.tar",
        "columns": {"text": "json.t", "label": "json.k"},
        "encoding": "latin-1",
    }
    table, rejects = read_all(make_config(tmp_path, source))
    assert (table["text"].to_pylist(), rejects) == (["caf\xe9"] * 3, [])
