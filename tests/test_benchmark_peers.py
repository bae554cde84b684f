"""What is measured beside its peers."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import benchmark_peers as peers


@pytest.mark.cluster
def test_the_package_writes_what_the_encoder_says(tmp_path: Path) -> None:
    """Catches a comparison in which this package reads other rows or other pixels than its peers."""
    peers.write_shards("small", 24, tmp_path)
    assert peers.time_of("mmkt", "small", tmp_path) > 0
    found = peers.features_of("mmkt", tmp_path)
    images = [data for path in (tmp_path / "shards").iterdir() for data in pq.read_table(path)["image"].to_pylist()]
    pixels = [np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1) for data in images]
    expected = peers.SeededCNN().encode(pixels)
    assert found.shape == expected.shape
    assert np.abs(found.mean(axis=0) - expected.mean(axis=0)).max() < 0.05 * expected.std()


def test_the_table_tells_ratios_of_the_same_round() -> None:
    """Catches a ratio of medians: a machine that slowed down in one round would count as a difference."""
    found = {"what": "small", "rows": 100, "seconds": {"mmkt": [1.0, 10.0, 1.0], "daft": [2.0, 20.0, 2.0]}}
    lines = peers.as_table(found).splitlines()
    assert lines[2] == "| mmkt | 1.0 [1.0, 10.0] | 100 |  |"
    assert lines[3] == "| daft | 2.0 [2.0, 20.0] | 50 | 2.00 [2.00, 2.00] |"
