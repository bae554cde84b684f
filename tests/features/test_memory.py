"""Memory does not grow with the number of samples, but for the few bytes of each that docs/performance.md names."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.config import Config, JoinCombine
from mmkt_ray.errors import ResourceError
from mmkt_ray.features import feature_table as table_module
from mmkt_ray.features.audit import audit
from mmkt_ray.features.combine import ABSENT, gather, join_by_key, read_index
from mmkt_ray.features.fit import merge_in_tree
from mmkt_ray.features.publish import Origin, publish
from mmkt_ray.features.store import Store, column_of, hash_of, part_schema, to_arrow
from mmkt_ray.inference.rows import load_rows
from mmkt_ray.training.batches import feature_statistics
from tests.manifests import make_features, make_manifest

MakeConfig = Callable[..., Config]
ROWS, DIM = 1000, 64
WIDTHS = {"image": (DIM, False), "text": (500, True)}
ENTRIES = {m: make_features(dim=d, sparse=s, kind=m, fingerprint=m) for m, (d, s) in WIDTHS.items()}
POOLS: list[pa.MemoryPool] = []  # kept: what a block leaves is given back to its pool


@contextmanager
def peak_of() -> Iterator[SimpleNamespace]:
    """Bytes that the block allocates at most, in Python and NumPy, and in Arrow."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    peak = SimpleNamespace(num_bytes=0)
    try:
        yield peak
        peak.num_bytes = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def write_store(config: Config, uri: str, num_parts: int) -> None:
    """Parts of ROWS rows of a unit `u`, with a key that two rows share, images on one and texts on the other."""
    rng = np.random.default_rng(0)
    schema = part_schema(config, WIDTHS)
    values = sp.random_array((ROWS // 2, 500), density=0.02, format="csr", rng=rng, dtype=np.float32)
    dense = rng.normal(size=(ROWS // 2, DIM)).astype(np.float32)
    has_image = np.arange(ROWS) % 2 == 0
    for number in range(num_parts):
        rows = np.arange(ROWS) + number * ROWS
        hashes = rng.integers(0, 2**64, (2, ROWS), dtype=np.uint64)
        columns = {
            "sample_id": [f"shards/{number:05d}.parquet#{row}" for row in rows],
            "split": ["train" if row % 10 else "test" for row in rows // 2],
            "key": [f"key-{row // 2}" for row in rows],
            column_of("image"): to_arrow(dense, has_image),
            column_of("text"): to_arrow(sp.csr_matrix(values), ~has_image),
            hash_of("image"): pa.array(hashes[0], mask=~has_image),
            hash_of("text"): pa.array(hashes[1], mask=has_image),
            "colour": [f"colour {row % 7}" for row in rows],
            "cleaned": pa.nulls(ROWS, pa.list_(pa.string())),
        }
        name = f"u-{number:06d}{'-end' if number == num_parts - 1 else ''}.parquet"
        storage.write_table(storage.join(uri, "data", name), pa.table(columns, schema=schema))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Unpublished stores of 4 and of 24 parts."""
    from tests.conftest import make_config

    folder = tmp_path_factory.mktemp("memory")
    config = make_config.__wrapped__(folder)()
    uris = {n: str(folder / f"store-{n}") for n in (4, 24)}
    for num_parts, uri in uris.items():
        write_store(config, uri, num_parts)
    return uris


def bytes_per_row(stores: dict[int, str], work: Callable[[str], object]) -> float:
    """What `work` needs more at its peak for each row that a store has more."""
    peaks = []
    for uri in stores.values():
        with peak_of() as peak:
            work(uri)
        peaks.append(peak.num_bytes)
    few, many = stores
    return (peaks[1] - peaks[0]) / ((many - few) * ROWS)


@pytest.mark.slow
def test_publishing_holds_hashes_only(stores: dict[int, str], make_config: MakeConfig) -> None:
    """Catches a driver that holds the ids, the labels or the features of all samples while it closes a store."""
    config = make_config()
    assert bytes_per_row(stores, lambda uri: publish(uri, config, Origin(["u"], layout="l"), ENTRIES, {})) < 80


def test_looking_for_duplicates_holds_hashes_once(stores: dict[int, str]) -> None:
    """Catches hashes of all samples that are held several times over while groups of equal ones are looked for."""
    names = {uri: [f.base_name for f in storage.list_files(f"{uri}/data")] for uri in stores.values()}
    assert bytes_per_row(stores, lambda uri: audit(uri, names[uri], ["image", "text"], ["colour"])) < 80


@pytest.mark.slow
def test_joining_holds_ids_keys_and_row_numbers(stores: dict[int, str]) -> None:
    """Catches features, or a string for each repeated split and label, held while rows are matched."""

    def work(uri: str) -> None:
        source = Store(uri, make_manifest(parts=[f.base_name for f in storage.list_files(f"{uri}/data")]))
        join_by_key(read_index(source, ["image", "text"], ["colour"]), JoinCombine())

    assert bytes_per_row(stores, work) < 440


def test_gathering_reads_the_chosen_rows_only() -> None:
    """Catches rows in another order, nulls that are lost, and a copy of the whole column for every part that is
    gathered."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 1000, DIM)).astype(np.float32)
    column = pa.chunked_array([to_arrow(v, np.ones(1000, bool)) for v in values])
    rows = rng.integers(0, 100_000, 50)
    rows[[3, 20]] = ABSENT
    with peak_of() as peak:
        found = gather(column, rows)
    assert peak.num_bytes < column.nbytes / 10
    expected = [None if r == ABSENT else values.reshape(-1, DIM)[r].tolist() for r in rows.tolist()]
    assert found.to_pylist() == expected
    assert gather(column, np.array([ABSENT])).to_pylist() == [None]


def test_a_mapped_table_is_the_same_and_takes_no_memory(
    stores: dict[int, str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches features of a large store held on the heap, and rows that a file mixes up."""
    store: Store = publish(stores[24], make_config(), Origin(["u"], layout="l"), ENTRIES, {})
    plain = store.table()
    size = plain.features["image"].nbytes + plain.features["text"].data.nbytes
    monkeypatch.setattr(table_module, "MAPPED_BYTES", 100_000)
    with peak_of() as peak:
        mapped = store.table(["image", "text"], [])
    statistics = feature_statistics(mapped.features["image"], mapped.present["image"])
    ids = sum(map(len, plain.sample_id)) + 60 * len(plain.sample_id)
    assert peak.num_bytes < ids + size / 2
    assert np.array_equal(mapped.features["image"], plain.features["image"])
    assert (mapped.features["text"] != plain.features["text"]).nnz == 0
    assert mapped.sample_id.tolist() == plain.sample_id.tolist()
    assert mapped.split.tolist() == plain.split.tolist()
    there = plain.features["image"][plain.present["image"]]
    assert np.allclose(statistics[0], there.mean(0, dtype=np.float64), atol=1e-6)
    assert np.allclose(statistics[1], there.std(0, dtype=np.float64), atol=1e-6)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("num_calls", [1, 8, 73])
def test_a_tree_merges_everything_in_order(num_calls: int) -> None:
    """Catches statistics lost or out of order at the ragged end of the tree,
    now that merging does not wait for all."""
    calls = [partial(lambda i: None if i % 5 == 4 else [i], i) for i in range(num_calls)]
    assert merge_in_tree(calls, lambda parts: list(chain(*parts))) == [i for i in range(num_calls) if i % 5 != 4]


def test_rows_that_are_scored_are_no_copy_of_their_features(
    stores: dict[int, str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a split that is copied into memory, and ids or labels held as a Python object for each row."""
    config = make_config()
    published = {n: publish(uri, config, Origin(["u"], layout="l"), ENTRIES, {}) for n, uri in stores.items()}
    monkeypatch.setattr(table_module, "MAPPED_BYTES", 10_000)
    monkeypatch.setattr(table_module, "TAKE_ROWS", 256)

    def work(uri: str) -> None:
        data = load_rows(published[next(n for n, u in stores.items() if u == uri)], ["image", "text"], ["colour"])
        data.take(data.readable("train"))

    assert bytes_per_row(stores, work) < 110  # features, ids and labels are about 300


def test_a_full_disk_under_mapped_features_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full /tmp that ends a training in a traceback, which does not say that TMPDIR moves the file."""
    growing = table_module.Growing()
    with open("/dev/full", "w+b") as full:
        monkeypatch.setattr(table_module.tempfile, "TemporaryFile", lambda prefix: full)
        with pytest.raises(ResourceError, match="TMPDIR"):
            growing.add(np.zeros(table_module.MAPPED_BYTES))
