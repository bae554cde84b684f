"""Feature columns to Arrow and back; labels to codes."""

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from mmkt_ray.features.publish import sort_classes
from mmkt_ray.features.store import MISSING, UNSEEN, encode_labels, from_arrow, to_arrow


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
    codes = encode_labels(pa.chunked_array([["b", None], ["z", "a"]]), ["a", "b"])
    assert codes.tolist() == [1, MISSING, UNSEEN, 0]


def test_whole_numbers_sort_by_value() -> None:
    """Digits in the order 0, 1, 10, 2 in every table."""
    assert sort_classes({"10": 1, "2": 1, "0": 1}) == ["0", "2", "10"]
    assert sort_classes({"b": 1, "10": 1, "a": 1}) == ["10", "a", "b"]
