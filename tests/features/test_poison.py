"""Images that crash, hang or bloat the process that decodes them, on their way through the whole pipeline."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from poison import poison

from mmkt_ray.config import Config
from mmkt_ray.features.extract import extract
from mmkt_ray.features.resume import reading_layout
from mmkt_ray.features.store import Store
from tests.shapes import png, write_shard

MakeConfig = Callable[..., Config]

POISONS = {5: poison("segfault"), 47: poison("loop"), 50: poison("eat_memory"), 81: poison("segfault")}
REASONS = {
    "s5": "image: the decoder crashed: signal 11 (SIGSEGV)",
    "s47": "image: took longer than samples.decode_timeout_s = 1 s",
    "s50": "image: needs more memory to be decoded than 1.0 GiB",
    "s81": "image: the decoder crashed: signal 11 (SIGSEGV)",
}


def write_shards(folder: Path, instead: dict[int, bytes | None]) -> None:
    """Three shards of 40 rows with other images in some; s81 has no caption."""
    for start in (0, 40, 80):
        rows = range(start, start + 40)
        colours = ["red", "green", "blue"]
        images = [instead.get(i, png(colours[i % 3], i)) for i in rows]
        captions = [None if i == 81 else f"a {colours[i % 3]} square number w{i}" for i in rows]
        write_shard(folder / f"{start}.parquet", start, 40, image=pa.array(images, pa.binary()), caption=captions)


def features(store: Store) -> pa.Table:
    """All rows but s81, sorted, without what was noted about their images."""
    table = pa.concat_tables(store.read()).sort_by("sample_id").drop_columns("cleaned")
    return table.filter(pc.not_equal(table.column("sample_id"), "s81"))


@pytest.mark.usefixtures("ray_local")
def test_poison_is_quarantined_and_the_rest_arrives(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches a job that one image ends or stops for good, or that loses the rest of its chunk: while it looks for
    leaking rows, which hashes every image, or while it encodes."""
    limits = {"samples__max_reject_frac": 0.1, "samples__decode_timeout_s": 1.0, "samples__max_image_pixels": 10_000}
    config = make_config(**limits, samples__drop_leakage=True)
    write_shards(tmp_path / "data" / "shapes", POISONS)
    store = extract(config, str(tmp_path / "poisoned"))
    rejects = pd.read_parquet(f"{store.uri}/rejects.parquet").set_index("sample_id")
    assert rejects["reason"].to_dict() == REASONS
    assert rejects["stage"].to_dict() == dict.fromkeys(REASONS, "modality") | {"s81": "decode"}
    assert rejects.loc["s50", "source"] == "shapes/40.parquet"
    write_shards(tmp_path / "data" / "shapes", dict.fromkeys(POISONS, None) | {81: png("red", 81)})
    assert features(store).equals(features(extract(config, str(tmp_path / "clean"))))
    assert store.manifest.counts.rows == 119


def test_the_time_limit_is_no_part_of_what_features_are(make_config: MakeConfig) -> None:
    """Catches a store that is made anew as the next run may wait longer for an image."""
    assert reading_layout(make_config()) == reading_layout(make_config(samples__decode_timeout_s=5))
