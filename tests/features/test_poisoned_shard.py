"""Shards whose reading kills the process, on their way through the whole pipeline."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from poison_shard import TEXT, TIMEOUT

from mmkt_ray.config import Config
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.extract import extract
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.isolated import read_isolated
from mmkt_ray.samples.parquet import count_row_groups
from mmkt_ray.samples.readers import read_blocks, read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import write_shard, write_shards

MakeConfig = Callable[..., Config]


def poison(shard: Path, row: int) -> None:
    """The shard in row groups of 10 rows, one of them with a text that kills its reader."""
    table = pq.read_table(shard)
    captions = table.column("caption").to_pylist()
    captions[row] = TEXT
    table = table.set_column(table.column_names.index("caption"), "caption", pa.array(captions))
    pq.write_table(table, shard, row_group_size=10)


@pytest.mark.usefixtures("ray_local")
def test_a_shard_that_kills_its_reader_loses_a_row_group(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches a job that a single shard stops for good, while an encoder is fitted or while rows are encoded, and
    rows before or behind the crash that are lost, doubled or moved."""
    source = {
        "reader": "parquet",
        "path": "shapes/*.parquet",
        "columns": {"sample_id": "id", "text": "caption", "colour": "colour"},
    }
    texts = {"modalities": {"text": {"kind": "text", "encoder": "tfidf"}}, "samples.sources": [source]}
    config = make_config(samples__max_reject_frac=0.1).with_overrides(texts)
    shards = tmp_path / "data" / "shapes"
    write_shards(tmp_path)
    poison(shards / "1.parquet", 23)
    store = extract(config, str(tmp_path / "poisoned"))
    rejects = pd.read_parquet(f"{store.uri}/rejects.parquet")
    assert rejects[["sample_id", "source", "stage"]].to_numpy().tolist() == [
        ["shapes/1.parquet#row-group-2", "shapes/1.parquet", "damage"]
    ]
    assert rejects["num_rows"].tolist() == [10]
    assert (
        "reading row group 3 of 4 ends the process that reads it, each time: signal 11 (SIGSEGV)" in rejects.reason[0]
    )
    table = pq.read_table(shards / "1.parquet")
    keep = pa.array([not 20 <= i < 30 for i in range(40)])
    pq.write_table(table.filter(keep), shards / "1.parquet")
    clean = extract(config, str(tmp_path / "clean"))
    rows, expected = (pa.concat_tables(s.read()).sort_by("sample_id") for s in (store, clean))
    assert rows.equals(expected)
    assert len(rows) == 110


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 25])
def test_a_child_reads_what_its_parent_would_have_read(
    tmp_path: Path, make_config: MakeConfig, limit: int | None
) -> None:
    """Catches rows, ids, notes of unreadable cells, or a source's limit that get lost on the way from the child."""
    path = tmp_path / "data" / "shapes" / "0.parquet"
    write_shard(path, 0, 40)
    table = pq.read_table(path)
    captions = pc.if_else(pa.array([i == 12 for i in range(40)]), b"\xff", table.column("caption").cast(pa.binary()))
    pq.write_table(table.set_column(2, "caption", captions), path, row_group_size=10)
    reading = one_reading(make_config(), limit)
    whole, apart = list(read_blocks(reading)), list(read_isolated(reading))
    assert (
        [i for b in apart for i in b.ids] == [i for b in whole for i in b.ids] == [f"s{i}" for i in range(limit or 40)]
    )
    for name in ("image", "text", "colour"):
        ours, theirs = (pa.concat_arrays([b.columns[name] for b in blocks]) for blocks in (apart, whole))
        assert ours.equals(theirs)
    assert (
        [list(b.unread.values()) for b in apart if b.unread]
        == [list(b.unread.values()) for b in whole if b.unread]
        != []
    )


@pytest.mark.slow
def test_a_shard_of_another_kind_keeps_what_was_read(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error of the data that a child turns into a crash, and damage that a child reads past."""
    monkeypatch.setattr("mmkt_ray.samples.readers.died_before", lambda: True)
    folder = tmp_path / "data" / "shapes"
    write_shard(folder / "0.parquet", 0, 40)
    whole = (folder / "0.parquet").read_bytes()
    (folder / "1.parquet").write_bytes(whole[: len(whole) // 2])
    config = make_config()
    sound, damaged = (list(read_chunks(ReadingPlan.of(config), shard)) for shard in list_shards(ReadingPlan.of(config)))
    assert sum(len(c.table) for c in sound) == 40
    assert [len(c.table) for c in damaged] == [0]
    (reject,) = damaged[0].rejects
    assert reject.reason.startswith("the shard is damaged")


def one_reading(config: Config, limit: int | None = None) -> Reading:
    """Of the only shard, at most `limit` rows."""
    source = config.samples.sources[0].model_copy(update={"limit": limit})
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"sources": (source,)})})
    (shard,) = list_shards(ReadingPlan.of(config))
    return Reading(ReadingPlan.of(config), shard)


@pytest.fixture
def large_blocks(tmp_path: Path, make_config: MakeConfig) -> Reading:
    """Of a shard of one row group of four blocks, each larger than what a pipe holds."""
    path = tmp_path / "data" / "shapes" / "0.parquet"
    write_shard(path, 0, 4)
    table, rng = pq.read_table(path), np.random.default_rng(0)
    images = pa.array([rng.bytes(3_000_000) for _ in range(4)], pa.binary())
    pq.write_table(table.set_column(table.column_names.index("image"), "image", images), path, use_dictionary=False)
    return one_reading(make_config())


@pytest.mark.slow
def test_a_parent_that_takes_its_time_loses_nothing(large_blocks: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a child that ends because whoever wants its blocks is busy, and rows that are called lost for that."""
    monkeypatch.setenv(TIMEOUT, "3")  # for a block of 3 MB: much, also on a busy machine
    blocks = []
    for block in read_isolated(large_blocks):
        blocks.append(block)
        if len(blocks) == 1:
            time.sleep(3.5)  # the child waits in the midst of the second one
    assert [reject.reason for block in blocks for reject in block.rejects] == []
    assert [i for block in blocks for i in block.ids] == ["s0", "s1", "s2", "s3"]


def test_a_child_whose_blocks_nobody_wants_ends_in_silence(
    large_blocks: Reading, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a child that reads on, or fills the log with an error,
    after its parent has found what it looked for."""
    blocks = read_isolated(large_blocks)
    assert next(blocks).ids == ["s0"]
    blocks.close()  # type: ignore[attr-defined]
    assert capfd.readouterr().err == ""


def test_a_child_that_does_not_start_costs_no_rows(large_blocks: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a broken installation that is taken for a broken shard, whose rows would be lost."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ResourceError, match=r"does not start \(exit code 1\)"):
        list(read_isolated(large_blocks))


def test_a_file_of_no_row_group_is_an_empty_shard(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches an empty shard that a child cannot read, which would end the job."""
    path = tmp_path / "data" / "shapes" / "0.parquet"
    write_shard(path, 0, 4)
    pq.ParquetWriter(path, pq.read_schema(path)).close()
    assert pq.read_metadata(path).num_row_groups == 0
    assert list(read_isolated(one_reading(make_config()))) == []


@pytest.mark.slow
def test_what_is_behind_the_limit_is_not_read(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches damage, or a crash, that costs a reject though the source's limit ends before it."""
    path = tmp_path / "data" / "shapes" / "0.parquet"
    write_shard(path, 0, 40)
    pq.write_table(pq.read_table(path), path, row_group_size=10, use_dictionary=False)
    group = pq.read_metadata(path).row_group(2)
    data = bytearray(path.read_bytes())
    for c in range(group.num_columns):
        start = group.column(c).data_page_offset
        data[start : start + group.column(c).total_compressed_size] = bytes(group.column(c).total_compressed_size)
    path.write_bytes(data)
    for limit, damaged in ((20, False), (21, True)):
        blocks = list(read_isolated(one_reading(make_config(), limit)))
        assert [i for b in blocks for i in b.ids] == [f"s{i}" for i in range(20)]
        assert any(b.rejects for b in blocks) == damaged


def test_storage_that_does_not_answer_is_no_small_shard(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches row groups that are left out without a word because the footer could not be asked for."""
    path = tmp_path / "data" / "shapes" / "0.parquet"
    write_shard(path, 0, 4)
    reading = one_reading(make_config())
    path.unlink()
    with pytest.raises(FileNotFoundError):
        count_row_groups(reading)
    with pytest.raises(OSError, match="FileNotFoundError"):
        list(read_isolated(reading))
