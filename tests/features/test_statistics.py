"""What an encoder that is fitted from statistics is given: values as `encode` takes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmkt_ray.config import Config, CustomEncoder
from mmkt_ray.features.statistics import encoder_statistics
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import png, write_shard


def test_images_are_decoded_and_prepared_first(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """Catches the bytes of PNG files handed to an encoder that was promised pixels; a broken image that ends the fit;
    a row that leaks in spite of being left out."""
    images = [png("red", 0), b"broken", png("blue", 2), None, png("green", 4)]
    write_shard(tmp_path / "data" / "shapes" / "0.parquet", 0, 5, image=pa.array(images, pa.binary()))
    config = make_config(
        modalities__image__encoder="bright_encoder:Bright",
        samples__sources__0__split="train",
        samples__split__val_frac=0.0,
    )
    plan = ReadingPlan.of(config).only("image")
    section = CustomEncoder(name="bright_encoder:Bright")
    total, num = encoder_statistics(section, plan, config.samples, list_shards(plan)[0], leaking=["s4"])
    assert num == 2
    assert total == pytest.approx(sum(decode_image(images[i], 10**6).mean(dtype=np.float64) for i in (0, 2)), rel=1e-5)
