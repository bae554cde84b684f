"""Hostile files: damaged and made-up ones by the thousand, and bombs. Whatever a file holds costs its own rows.

MMKT_FUZZ says how many files are read in all (20,000 take some ten minutes); each run reads the same ones first.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.kinds.images import decode_image
from mmkt_ray.samples import archives, lines, manifests, pages, parquet
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.samples import fuzz_seeds

KINDS = ("images", "sounds", "tars", "parquet", "manifests")
NUM_FILES = int(os.environ.get("MMKT_FUZZ", "2000"))
TABLE = {"reader": "manifest", "columns": {"text": "text", "label": "label"}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(120 + NUM_FILES // 5)
def test_damaged_files_cost_their_rows_alone(kind, tmp_path):
    """Catches a file that stops or hangs the job, kills the process, fills the memory,
    or has another file opened or code run."""
    root = Path(__file__).parents[2]
    count = max(1, NUM_FILES // len(KINDS))
    command = [sys.executable, "-m", "tests.samples.fuzz_worker", kind, str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace", check=False)
    told = f"the file is {tmp_path}/in/case.*; exit code {done.returncode}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    outcomes = json.loads(done.stdout.splitlines()[-1])["outcomes"]
    assert sum(outcomes.values()) >= count
    assert len(outcomes) > 1, f"all damage had the same end, {outcomes}: is anything damaged?"


# --- bombs --------------------


def test_long_json_line_costs_its_row(make_config, read_all, tmp_path, monkeypatch):
    """Catches a line of gigabytes that is read as a whole, and the row after it lost with it."""
    for module in (lines, manifests):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1_000)
    rows = [{"text": "one"}, {"text": "x" * 5_000}, {"text": "y" * 988}, {"text": "two", "label": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, rejects = read_all(make_config(tmp_path, {**TABLE, "path": "a.jsonl"}))
    assert table["text"].to_pylist() == ["one", "two"]
    assert [(r.sample_id, r.reason) for r in rejects] == [
        (f"a.jsonl#{line}", "more than the 1,000 characters of one row at most") for line in (2, 3)
    ]


@pytest.mark.parametrize("row", ['"' + "x" * 5_000 + '",a\n', "x" * 5_000])
def test_csv_row_without_end_is_damage(make_config, read_all, tmp_path, monkeypatch, row):
    """Catches a quote that is never closed, or a line of gigabytes, gathered in memory."""
    for module in (lines, manifests):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1_000)
    (tmp_path / "a.csv").write_text("text,label\n" + f"{'z' * 300},a\n" * 5 + row)
    table, rejects = read_all(make_config(tmp_path, {**TABLE, "path": "a.csv"}))
    assert table.num_rows == 5
    assert [r.sample_id for r in rejects] == ["a.csv"]
    assert "larger than field limit" in rejects[0].reason or "a row of more than 1,000" in rejects[0].reason


def test_large_json_member_is_not_parsed(make_config, read_all, write_tar, tmp_path, monkeypatch):
    """Catches JSON that becomes twenty times its size as Python objects."""
    monkeypatch.setattr(archives, "MAX_ROW_BYTES", 1_000)
    source = {"reader": "webdataset", "path": "a.tar", "columns": {"text": "txt", "label": "json.kind"}}
    write_tar(tmp_path / "a.tar", [("1.txt", b"one"), ("1.json", b"[" * 2_000), ("2.txt", b"two")])
    table, rejects = read_all(make_config(tmp_path, source))
    assert table["text"].to_pylist() == ["two"]
    assert "json member has 2,000 bytes" in rejects[0].reason


def sparse_tar() -> bytes:
    """A member of 7 bytes that states holes of any number."""
    info = tarfile.TarInfo("a/1.txt")
    info.size, info.pax_headers = (
        7,
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999"},
    )
    return info.tobuf(tarfile.PAX_FORMAT) + b"9\n0\n1\n".ljust(512, b"\0")


def endless_tar() -> bytes:
    """A member that states 8 EiB, which is skipped block by block."""
    info = tarfile.TarInfo("a/1.txt")
    info.size = 2**63
    return info.tobuf(tarfile.GNU_FORMAT) + b"text".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lzma.compress(fuzz_seeds.tar_bytes([("a/1.txt", b"text")])), "xz"),  # decoding takes the memory it states
        (sparse_tar(), "a sparse file"),
        (endless_tar(), "bytes, more than|ends within a member"),
        (b"\x1f\x8b", "damaged"),
        (b"\x1f\x8b\x08", "damaged"),
    ],
    ids=["xz", "sparse", "endless", "gz of 2 bytes", "gz of 3 bytes"],
)
@pytest.mark.timeout(20)
def test_tar_that_states_too_much(make_config, read_all, tmp_path, data, reason):
    """Catches memory or time that a header asks for: xz dictionaries, lists of holes, members of exabytes;
    a cut gzip header."""
    (tmp_path / "a.tar").write_bytes(data)
    source = {"reader": "folders", "path": "a.tar", "columns": {"text": "content", "label": "folder"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert table.num_rows == 0
    assert any(word in rejects[0].reason for word in reason.split("|"))


PARQUET = {"reader": "parquet", "path": "a.parquet", "columns": {"image": "image", "label": "label"}}


def test_page_that_unpacks_to_too_much_is_damage(make_config, read_all, tmp_path, monkeypatch):
    """Catches a file of some bytes that states a page of gigabytes, for which Arrow makes room."""
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 100_000)
    pq.write_table(pa.table({"image": [bytes(200_000)], "label": ["a"]}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 3_000
    table, rejects = read_all(make_config(tmp_path, PARQUET))
    assert table.num_rows == 0
    assert "a page of 200,004 bytes, more than 100,000" in rejects[0].reason


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_value_in_every_row_is_read_in_small_batches(make_config, tmp_path, monkeypatch, encoding):
    """Catches one large value that the file holds once and a batch 256 times."""
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 4_000_000)
    table = pa.table({"image": [bytes(500_000)] * 100, "label": ["a"] * 100})
    how = {} if encoding == "dictionary" else {"use_dictionary": False, "column_encoding": {"image": encoding}}
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", **how)
    plan = ReadingPlan.of(make_config(tmp_path, PARQUET))
    batches = list(parquet.read_batches(Reading(plan, list_shards(plan)[0]), ["image", "label"]))
    assert sum(batch.num_rows for batch in batches) == 100
    assert max(batch.num_rows for batch in batches) <= 8


def test_lists_of_too_many_values_are_damage(make_config, read_all, tmp_path, monkeypatch):
    """Catches one row whose list, a few bytes in the file, has billions of values."""
    monkeypatch.setattr(pages, "MAX_LIST_VALUES", 1_000)
    pq.write_table(pa.table({"text": ["x"], "label": [["a"] * 2_000]}), tmp_path / "a.parquet")
    source = {"reader": "parquet", "path": "a.parquet", "columns": {"text": "text", "label": "label"}}
    _, rejects = read_all(make_config(tmp_path, source, tasks={"label": {"kind": "multilabel"}}))
    assert "lists of more than 1,000 values" in rejects[0].reason


def test_pages_of_large_files_are_all_seen(tmp_path):
    """Catches a look at page headers that loses its place: a bomb behind it would go unseen."""
    values = np.random.default_rng(0).integers(0, 1 << 40, 50_000)
    table = pa.table({"n": values, "s": [f"value {v}" for v in values]})
    for version in ("1.0", "2.0"):
        pq.write_table(table, tmp_path / "a", data_page_size=20_000, data_page_version=version, row_group_size=30_000)
        with pa.OSFile(str(tmp_path / "a")) as stream:
            file = pq.ParquetFile(stream)
            for chunk in pages._column_chunks(file, range(2), range(file.num_row_groups)):
                num_values = [page.num_values for page in iter(lambda chunk=chunk: chunk.next_page(stream), None)]
                assert len(num_values) > 3
                assert sum(num_values) >= chunk.chunk.num_values


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_packed_chunks_of_a_png_are_not_unpacked(kind):
    """Catches a picture of some kilobytes whose profile or comment takes gigabytes."""
    packed = zlib.compress(bytes(50_000_000), 9)
    body = b"name\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + packed
    chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    png = fuzz_seeds.images()["png rgb"]
    tracemalloc.start()
    try:
        decode_image(png[:33] + chunk + png[33:], 1_000_000)
    except ValueError as error:
        assert "too large" in str(error)  # noqa: PT017 (either end is right)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.timeout(20)
def test_a_server_in_a_cell_is_not_asked(make_config, read_all, tmp_path):
    """Catches a manifest that makes the job look up a host, and stops it where there is none."""
    (tmp_path / "a.csv").write_text("image,text\ns3://no-such-bucket/x.png,one\n")
    source = {"reader": "manifest", "path": "a.csv", "columns": {"image": "image", "text": "text", "label": "text"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert table["text"].to_pylist() == ["one"]
    assert "is outside of the folder" in rejects[0].reason


@pytest.mark.parametrize("cell", ["x" * 300, "loop", "a.csv/x"])
def test_name_that_no_file_can_have_costs_its_cell(make_config, read_all, tmp_path, cell):
    """Catches a name too long for the file system, or a link to itself, that stops the job."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.csv").write_text(f"image,text\n{cell},one\n")
    source = {"reader": "manifest", "path": "a.csv", "columns": {"image": "image", "text": "text", "label": "text"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert table["text"].to_pylist() == ["one"]
    assert len(rejects) == 1
