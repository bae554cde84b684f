"""Files of a run: atomic, listed in order, with messages that help."""

import os
from glob import glob as python_glob
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray import storage
from mmkt_ray.errors import DataError, ResourceError


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    """A half-written file under the final name after a crash."""
    uri = str(tmp_path / "a" / "x.txt")
    storage.write_bytes(uri, b"old")

    def write_half() -> None:
        with storage.atomic(uri) as (fs, temporary):
            with fs.open_output_stream(temporary) as stream:
                stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path / "a") == ["x.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, the device that is always full")
def test_full_disk_says_what_to_do(tmp_path: Path) -> None:
    """A bare OSError after hours of work, or its temporary file left on the full disk."""

    def write_to_full_disk() -> None:
        with storage.atomic(str(tmp_path / "x")) as (_, temporary):
            os.symlink("/dev/full", temporary)
            with open(temporary, "wb", buffering=0) as stream:
                stream.write(b"x")

    with pytest.raises(ResourceError, match="disk full"):
        write_to_full_disk()
    assert os.listdir(tmp_path) == []


def test_glob_matches_in_any_part_and_sorts(tmp_path: Path) -> None:
    """Shards in another order on another machine, or a pattern in a folder's name ignored."""
    for name in ("b/2.parquet", "a/1.parquet", "a/x.txt", "c.parquet"):
        storage.write_bytes(str(tmp_path / name), b"")
    found = [info.path for info in storage.glob(str(tmp_path / "*" / "*.parquet"))]
    assert found == [str(tmp_path / "a/1.parquet"), str(tmp_path / "b/2.parquet")]
    assert storage.glob(str(tmp_path / "none-*")) == []


def test_two_stars_are_folders_at_any_depth(tmp_path: Path) -> None:
    """Shards two folders down, or beside the pattern's own folder, left out with exit 0.
    The right answer: Python's glob."""
    names = ("0.parquet", "a/1.parquet", "a/b/2.parquet", "a/b/c/x.parquet/3.parquet", "a/.hidden/4.parquet", "a/5.csv")
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"")
    for pattern in ("**/*.parquet", "**/b/**/*.parquet", "a/**/*", "**", "**/**/*.csv"):
        expected = {p.rstrip("/") for p in python_glob(f"{tmp_path}/{pattern}", recursive=True)}
        found = [info.path for info in storage.glob(f"{tmp_path}/{pattern}")]
        assert found == sorted(expected), pattern


def test_signs_of_a_pattern_in_names_are_characters(tmp_path: Path) -> None:
    """Baselines of `runs[1]` that vanish, or those of `runs1` in their place; `test[1].parquet` that is not found."""
    for name in ("runs[1]/m/x.json", "runs1/n/x.json", "runs1/test[1].parquet", "runs1/test1.parquet"):
        storage.write_bytes(str(tmp_path / name), b"")
    odd = str(tmp_path / "runs[1]")
    assert [i.path for i in storage.glob(f"{odd}/*/x.json", fixed=odd)] == [f"{odd}/m/x.json"]
    assert [i.path for i in storage.glob(f"{odd}/*/x.json")] == [f"{odd}/m/x.json"]
    assert [i.path for i in storage.glob(f"{tmp_path}/runs1/test[1].parquet")] == [f"{tmp_path}/runs1/test[1].parquet"]
    gone = str(tmp_path / "runs[12]")  # a folder of this name is not there, and runs1 is another one
    assert storage.glob(f"{gone}/*/x.json", fixed=gone) == []


def test_file_uris_work_like_paths(tmp_path: Path) -> None:
    """A URI taken for a relative path."""
    uri = f"file://{tmp_path}/t.parquet"
    storage.write_table(uri, pa.table({"x": [1]}))
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [{"x": 1}]
    assert storage.exists(uri)
    assert storage.absolute(uri) == uri


def test_unknown_scheme_and_damaged_json(tmp_path: Path) -> None:
    """Errors that name neither the file nor the way out."""
    with pytest.raises(DataError, match="cannot open 'nope://x'"):
        storage.exists("nope://x")
    with pytest.raises(DataError, match="has a NUL in it"):
        storage.exists(str(tmp_path / "a\0b"))
    for damaged in (b"{", b"[" * 100_000, b"9" * 5000, b'["\\ud800"]'):  # the last has half of a surrogate pair
        storage.write_bytes(str(tmp_path / "x.json"), damaged)
        with pytest.raises(DataError, match="damaged"):
            storage.read_json(str(tmp_path / "x.json"))
    storage.write_bytes(str(tmp_path / "x.json"), b'["\\ud83d\\ude42"]')
    assert storage.read_json(str(tmp_path / "x.json")) == ["\U0001f642"]


def test_unwritable_folder(tmp_path: Path) -> None:
    """A run that starts and fails at its first write."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another folder"):
        storage.make_dir(str(tmp_path / "file" / "run"))
