"""Feature columns to Arrow and back; labels to codes."""

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.features.manifest import MANIFEST, Manifest
from mmkt_ray.features.publish import published
from mmkt_ray.features.store import _COMPARED, Store, column_of, from_arrow, open_store, to_arrow, write_manifest
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.kinds.spelling import sort_classes
from mmkt_ray.record import write_sealed
from tests.labels import MISSING, UNSEEN, codes_of
from tests.manifests import make_manifest


@pytest.mark.parametrize("sparse", [False, True])
def test_features_survive_the_round_trip_with_nulls_slices_and_chunks(sparse: bool) -> None:
    """Rows shifted by nulls or by the offset of a slice."""
    rng = np.random.default_rng(0)
    present = rng.random(50) < 0.6
    full = np.where(rng.random((50, 30)) < 0.3, rng.normal(size=(50, 30)), 0).astype(np.float32) * present[:, None]
    column = to_arrow(sp.csr_matrix(full[present]) if sparse else full[present], present)
    for piece, rows in [
        (column, slice(0, 50)),
        (column.slice(7, 20), slice(7, 27)),
        (pa.chunked_array([column.slice(0, 9), column.slice(9)]), slice(0, 50)),
    ]:
        features, mask = from_arrow(piece, 30)
        dense = features.toarray() if sparse else features
        assert np.array_equal(dense, full[rows])
        assert np.array_equal(mask, present[rows])


def test_all_null_column() -> None:
    """A split without one modality that cannot be read."""
    for kind in (
        pa.list_(pa.float32(), 4),
        pa.struct([("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))]),
    ):
        features, present = from_arrow(pa.nulls(3, kind), 4)
        assert features.shape == (3, 4)
        assert not present.any()


def test_labels_missing_and_unseen() -> None:
    """A class seen only in test taken for class 0, or for a missing label."""
    labels = Multiclass().encode(pa.chunked_array([["b", None], ["z", "a"]]), ["a", "b"])
    assert codes_of(labels).tolist() == [1, MISSING, UNSEEN, 0]


def test_whole_numbers_sort_by_value() -> None:
    """Digits in the order 0, 1, 10, 2 in every table."""
    assert sort_classes({"10": 1, "2": 1, "0": 1}) == ["0", "2", "10"]
    assert sort_classes({"b": 1, "10": 1, "a": 1}) == ["10", "a", "b"]


def test_float16_features_survive_the_store(tmp_path):
    """Catches a type that another reader refuses, and float16 that reaches the models as it is."""
    present = np.array([True, False, True])
    column = to_arrow(np.array([[0.1, 2.0], [3.0, -4.0]], np.float32), present, "float16")
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet")
    features, found = from_arrow(pq.read_table(tmp_path / "x.parquet").column("x"), 2)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, [[0.1, 2.0], [0, 0], [3.0, -4.0]], atol=1e-4)
    assert found.tolist() == present.tolist()
    assert duckdb.read_parquet(str(tmp_path / "x.parquet")).fetchall()[2][0] == [3.0, -4.0]
    assert polars.read_parquet(tmp_path / "x.parquet")["x"].null_count() == 1


def test_lists_of_classes_become_indicator_rows():
    """Catches a class of the test split only that shifts the columns, and "no class" taken for "no label"."""
    column = pa.chunked_array([pa.array([["b", "a"], None, [], ["new", "c"]], pa.list_(pa.string()))])
    labels = Multilabel().encode(column, ["a", "b", "c"])
    assert codes_of(labels).tolist() == [[1, 1, 0], [MISSING] * 3, [0, 0, 0], [0, 0, 1]]
    assert labels.labelled.tolist() == [True, False, True, True]


def write_store(uri: str) -> Store:
    """Two parts of features, published."""
    checksums = {}
    for number in range(2):
        features = np.random.default_rng(number).normal(size=(200, 8)).astype(np.float32)
        column = to_arrow(features, np.ones(200, dtype=bool))
        ids = [f"{number}-{i}" for i in range(200)]
        table = pa.table({"sample_id": ids, "split": ["train"] * 200, column_of("image"): column})
        checksums[f"{number}.parquet"] = storage.write_table(f"{uri}/data/{number}.parquet", table)
    write_manifest(uri, make_manifest(parts=sorted(checksums), checksums=checksums, modalities={"image": {"dim": 8}}))
    return open_store(uri)


def test_a_flipped_bit_of_a_part_is_found(tmp_path):
    """A feature, or a row's id, that is read as another one:
    at any place of the file, whichever columns are asked for."""
    store = write_store(str(tmp_path))
    path = tmp_path / "data" / "1.parquet"
    whole = path.read_bytes()
    store.table()
    for position in [*range(0, len(whole), 701), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        _COMPARED.clear()  # as in another process
        with pytest.raises(DataError, match=r"1\.parquet' is damaged.*remove it and run the same command again"):
            list(store.read(["sample_id"]))
    path.write_bytes(whole)
    assert len(store.table().sample_id) == 400


def test_pages_are_compared_where_no_manifest_is(tmp_path):
    """Features of a part that the tasks of an extraction read from each other."""
    store = write_store(str(tmp_path))
    path = tmp_path / "data" / "0.parquet"
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(0).column(2)
    data[place.data_page_offset + place.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"0\.parquet.*remove it and run the same command again"):
        storage.read_table(store.parts()[0], [column_of("image")])


def test_a_manifest_that_was_changed_or_is_of_an_older_version_says_what_to_do(tmp_path):
    """Counts or classes read as others in silence; a message that leads nowhere."""
    store = write_store(str(tmp_path))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"dim": 8', '"dim": 9'))
    with pytest.raises(DataError, match=r"damaged or was changed by hand.*remove the folder"):
        open_store(store.uri)
    write_sealed(str(path), {**store.manifest.to_dict(), "schema_version": 1})
    with pytest.raises(DataError, match=r"schema version 1, this is 2: remove the folder.*run the same command again"):
        open_store(store.uri)


def test_a_manifest_with_a_key_misspelt_or_missing_names_it(tmp_path):
    """Catches a store read with a default in the place of what its manifest was to say."""
    store = write_store(str(tmp_path))
    about = store.manifest.to_dict()
    for changed, told in (
        (about | {"unitz": []}, "unknown key 'unitz'"),
        ({k: v for k, v in about.items() if k != "layout"}, "'layout' is missing"),
        (about | {"modalities": {"image": about["modalities"]["image"] | {"dim": "8"}}}, "'modalities.image.dim'"),
    ):
        write_sealed(str(tmp_path / MANIFEST), {**changed, "schema_version": Manifest.schema_version})
        with pytest.raises(DataError, match=rf"manifest\.json' is damaged.*{told}.*remove the folder '{tmp_path}'"):
            open_store(store.uri)


def test_a_part_that_is_gone_is_made_anew(tmp_path):
    """A store that is up to date without the damaged part that its user was told to remove."""
    store = write_store(str(tmp_path))
    write_manifest(store.uri, store.manifest.replaced(units=["u"]))
    assert published(store.uri, ["u"]) is not None
    (tmp_path / "data" / "0.parquet").unlink()
    assert published(store.uri, ["u"]) is None
    with pytest.raises(DataError, match=r"0\.parquet' is gone: run the same command again"):
        list(store.read())
