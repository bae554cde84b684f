"""Damaged shards: the reject that stands for the lost rows says how many they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.samples.lines import that_may_be_cut
from mmkt_ray.samples.schema import DAMAGE, Shard

NUM_SHARDS, ROWS = 4, 300
PARQUET = {"reader": "parquet", "path": "d", "columns": {"text": "text", "label": "label"}}
WEBDATASET = {"reader": "webdataset", "path": "d", "columns": {"text": "txt", "label": "cls"}}
MANIFEST = {"reader": "manifest", "path": "d", "columns": {"text": "text", "label": "label"}}
FOLDERS = {"reader": "folders", "path": "d", "columns": {"text": "content", "label": "folder"}}


@pytest.fixture
def write_shards(tmp_path, write_tar):
    """write_shards(kind): four shards of 300 rows each; returns the third one's path."""

    def write(kind: str) -> Path:
        (tmp_path / "d").mkdir()
        for shard in range(NUM_SHARDS):
            texts = [f"text {shard} {i} " * (1 + i % 7) for i in range(ROWS)]
            path = tmp_path / "d" / f"{shard}.{kind}"
            if kind == "parquet":
                table = pa.table({"text": texts, "label": ["a"] * ROWS})
                pq.write_table(table, path, row_group_size=100, compression="none", data_page_version="2.0")
                continue
            if kind in ("csv", "jsonl"):
                frame = pd.DataFrame({"text": texts, "label": ["a"] * ROWS})
                how = {"index": False} if kind == "csv" else {"orient": "records", "lines": True}
                (frame.to_csv if kind == "csv" else frame.to_json)(path, **how)
                continue
            members = [
                (f"a/{i:03d}.{s}", d)
                for i, text in enumerate(texts)
                for s, d in (("cls", b"a"), ("txt", text.encode()))
            ]
            write_tar(path, members, mode="w:gz" if kind.endswith("gz") else "w")
        return tmp_path / "d" / f"2.{kind}"

    return write


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["parquet", "tar", "tar.gz"])
def test_a_cut_shard_counts_as_the_rows_that_it_held(make_config, read_all, write_shards, tmp_path, kind, share):
    """Catches 300 of 1,200 rows that are lost as one reject, under a budget of 1 %."""
    path = write_shards(kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    table, rejects = read_all(make_config(tmp_path, PARQUET if kind == "parquet" else WEBDATASET))
    assert [(r.sample_id, r.stage) for r in rejects] == [(f"d/2.{kind}", DAMAGE)]
    num_lost = NUM_SHARDS * ROWS - table.num_rows
    assert num_lost >= (ROWS if kind == "parquet" else 1)
    assert abs(rejects[0].num_rows - num_lost) <= 0.1 * ROWS
    assert f"about {rejects[0].num_rows} rows, as in the other shards" in rejects[0].reason


ZEROS = "\0" * 4_000


@pytest.mark.parametrize(
    ("kind", "share", "tail"),
    [("csv", 0, ""), ("csv", 0.5, ""), ("csv", 0.5, ZEROS), ("jsonl", 0.5, ""), ("jsonl", 0.5, ZEROS)],
)
def test_a_table_of_text_that_breaks_off_counts_as_the_rows_that_it_held(
    make_config, read_all, write_shards, tmp_path, kind, share, tail
):
    """Catches 150 rows that are lost as one bad line, or as none:
    cut within a line, also where zeros fill up the file."""
    path = write_shards(kind)
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"\n", 0, int(len(data) * share)) + 1 + (7 if share else 0)] + tail.encode())
    table, rejects = read_all(make_config(tmp_path, MANIFEST))
    assert [(r.sample_id, r.stage) for r in rejects] == [(f"d/2.{kind}", DAMAGE)]
    assert abs(rejects[0].num_rows - (NUM_SHARDS * ROWS - table.num_rows)) <= 0.1 * ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-be"])
def test_a_table_that_may_be_cut_within_its_last_cell_is_told(tmp_path, encoding):
    """Catches "cat" that was "caterpillar", where one of several files lacks its last line end."""
    texts = {"1.csv": "a,b\n1,x\n", "2.csv": "a,b\n1,cat", "3.csv": "a,b\r\n1,x\r\n", "4.csv": ""}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    shards = [Shard(0, str(tmp_path / name), name, "") for name in texts]
    assert that_may_be_cut(shards) == ["2.csv"]
    assert that_may_be_cut(shards[1:2]) == []  # as one writer leaves all its files
    assert that_may_be_cut([shards[0], replace(shards[1], source=1)]) == []


@pytest.mark.parametrize("between", ["", "\r", ","])
def test_a_line_counts_as_the_rows_in_it(make_config, read_all, write_shards, tmp_path, between):
    """Catches a whole file in one line, as a list or with other line ends, that is lost as one row."""
    path = write_shards("jsonl")
    rows = path.read_text().splitlines()
    path.write_text("[" + ",".join(rows) + "]\n" if between == "," else between.join(rows) + "\n")
    table, rejects = read_all(make_config(tmp_path, MANIFEST))
    assert (table.num_rows, [r.num_rows for r in rejects]) == ((NUM_SHARDS - 1) * ROWS, [ROWS])
    assert "write each on a line of its own" in rejects[0].reason


def test_a_footer_says_what_a_damaged_page_cost(make_config, read_all, write_shards, tmp_path):
    """Catches an estimate where the number is known."""
    path = write_shards("parquet")
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    table, rejects = read_all(make_config(tmp_path, PARQUET))
    assert [r.num_rows for r in rejects] == [NUM_SHARDS * ROWS - table.num_rows]
    assert "as its footer says" in rejects[0].reason


def test_damage_within_the_only_shard_is_estimated_by_its_size(make_config, read_all, write_tar, tmp_path):
    """Catches most of a single archive lost as one reject."""
    (tmp_path / "d").mkdir()
    write_tar(tmp_path / "d" / "0.tar", [(f"a/{i:04d}.txt", b"x" * 600) for i in range(1000)])
    data = bytearray((tmp_path / "d" / "0.tar").read_bytes())
    data[400 * 1536 + 100 : 400 * 1536 + 300] = b"\xff" * 200  # a member is 1536 bytes
    (tmp_path / "d" / "0.tar").write_bytes(data)
    table, rejects = read_all(make_config(tmp_path, FOLDERS))
    assert table.num_rows == 400
    assert rejects[0].num_rows == pytest.approx(600, abs=60)
    assert "by its size" in rejects[0].reason


def test_a_limit_bounds_what_can_be_lost(make_config, read_all, write_shards, tmp_path):
    """Catches a quick look at ten rows of each shard that is refused for hundreds."""
    write_shards("parquet").write_bytes(b"no Parquet")
    _, rejects = read_all(make_config(tmp_path, PARQUET | {"limit": 10}))
    assert [r.num_rows for r in rejects] == [10]
