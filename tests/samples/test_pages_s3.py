"""The bounds on a Parquet file's pages hold on an object store too, for hardly a request more."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray import storage
from mmkt_ray.samples import pages, parquet
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.cluster.test_s3 import BUCKET, Server, server  # noqa: F401  (a fixture)

SOURCE = {"reader": "parquet", "path": "a.parquet", "columns": {"image": "image", "label": "label"}}


@pytest.fixture
def put(server: Server, make_config):  # noqa: F811
    """Writes a table as the only shard; returns how to read it."""

    def write(table: pa.Table, **how) -> Reading:
        server.faults()
        fs, path = storage.resolve(f"{BUCKET}/pages/a.parquet")
        pq.write_table(table, path, filesystem=fs, **how)
        config = make_config(f"{BUCKET}/pages", SOURCE)
        return Reading(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0])

    return write


def test_page_that_unpacks_to_too_much_is_damage(put, monkeypatch):
    """Catches a bomb that is looked for on local disks only, and rows before it that are lost."""
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 100_000)
    images = [bytes([i % 256]) * 10 for i in range(300)] + [bytes(200_000)]
    how = {"compression": "zstd", "use_dictionary": False, "write_batch_size": 1, "data_page_size": 1}
    reading = put(pa.table({"image": images, "label": ["a"] * 301}), row_group_size=300, **how)
    (chunk,) = read_chunks(reading.plan, reading.shard)
    assert 250 < len(chunk.table) <= 300  # whole batches
    assert "bytes, more than 100,000" in chunk.rejects[0].reason


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_value_in_every_row_is_read_in_small_batches(put, monkeypatch, encoding):
    """Catches one large value that the file holds once and a batch 256 times."""
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 4_000_000)
    table = pa.table({"image": [bytes(500_000)] * 100, "label": ["a"] * 100})
    how = {} if encoding == "dictionary" else {"use_dictionary": False, "column_encoding": {"image": encoding}}
    batches = list(parquet.read_batches(put(table, compression="zstd", **how), ["image", "label"]))
    assert sum(batch.num_rows for batch in batches) == 100
    assert max(batch.num_rows for batch in batches) <= 8


def test_a_dictionary_that_the_footer_does_not_tell_of_is_damage(put, monkeypatch):
    """Catches a file whose footer hides the value that is in every row, so that batches are too large for it."""
    monkeypatch.setattr(parquet, "most_bytes_of_a_value", lambda *args, **kwargs: 0)  # as if no dictionary were named
    reading = put(pa.table({"image": [bytes(50_000)] * 100, "label": ["a"] * 100}), compression="zstd")
    (chunk,) = read_chunks(reading.plan, reading.shard)
    assert len(chunk.table) == 0
    assert "values of 50,004 bytes that repeat, of which the footer says nothing" in chunk.rejects[0].reason


@pytest.mark.slow
def test_looking_costs_hardly_a_request(put, server):  # noqa: F811
    """Catches a request for each page, and pages that are mixed up or not looked at."""
    rng = np.random.default_rng(0)
    images = [rng.bytes(3000) for _ in range(4000)]
    how = {"data_page_size": 20_000, "write_batch_size": 10, "row_group_size": 2000, "use_dictionary": ["label"]}
    reading = put(pa.table({"image": images, "label": [str(i % 7) for i in range(4000)]}), **how)
    fs, path = storage.resolve(reading.shard.uri)

    def num_requests(read) -> int:
        server.faults()
        read()
        return server.done()["requests"]

    def read_unseen() -> None:
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=parquet._READ_BYTES)
            assert sum(batch.num_rows for batch in file.iter_batches(256, use_threads=False)) == 4000

    found = []
    told = num_requests(lambda: found.extend(parquet.read_batches(reading, ["image", "label"])))
    assert [image for batch in found for image in batch.column(0).to_pylist()] == images
    assert told <= num_requests(read_unseen) + 4  # two row groups: a dictionary, a header where 4 MB end
    with fs.open_input_file(path) as stream:
        watched = pages.WatchedFile(stream)
        file = pq.ParquetFile(pa.PythonFile(watched, mode="r"), pre_buffer=False, buffer_size=1 << 16)
        watched.watch(file, range(2), range(2), most_repeated=1000)
        chunks = watched.waiting
        for _ in file.iter_batches(256, use_threads=False):
            pass
    assert [min(chunk.num_values, 2000) for chunk in chunks] == [2000] * 4
