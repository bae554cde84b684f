"""Adapting an encoder from shards to a fitted state: over workers, and once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, load_fitted
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.fit import fit_encoder
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.encoders.tiny_networks import image_folder
from tests.shapes import png

pytest.importorskip("transformers", reason="the extra `pretrained` is not installed")


def encoder(folder: Path, **adapt: Any) -> dict[str, Any]:
    options = {"task": "colour", "how": "full", "lr": 1e-3, "epochs": 2, "batch_size": 16, **adapt}
    return {"name": "huggingface", "folder": str(folder), "adapt": options}


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_local")
def test_two_workers_adapt_one_network(shapes: Path, make_config: Callable[..., Config]) -> None:
    """Catches gradients of one worker alone, rows of test that are trained on, and a fit that is done twice."""
    folder = image_folder(shapes / "vit", "ViT")
    one = make_config(modalities__image__encoder=encoder(folder), samples__split={"val_frac": 0.2, "test_frac": 0.2})
    two = one.with_overrides({"modalities.image.encoder.adapt.num_workers": 2})
    shards = list_shards(ReadingPlan.of(one))
    fits = [fit_encoder(c, str(shapes / name), "image", shards, {}) for c, name in ((one, "a"), (two, "b"))]
    assert all(sorted(p.name for p in Path(fit).iterdir()) == ["encoder.json", "state.safetensors"] for fit in fits)
    loaded: list[Any] = []
    for c, fit in ((one, fits[0]), (two, fits[1])):
        loaded.append(load_fitted(build_encoder(c.modalities["image"].encoder), fit))
    frozen = build_encoder(one.with_overrides({"modalities.image.encoder.adapt": None}).modalities["image"].encoder)
    values = [loaded[0].prepare(decode_image(png(colour, 7), 10**6)) for colour in ("red", "green", "blue")]
    features = [encoder.encode(values) for encoder in (*loaded, frozen)]
    np.testing.assert_allclose(features[0], features[1], atol=2e-3)
    assert np.abs(features[0] - features[2]).mean() > 1e-2
    before = (Path(fits[0]) / "state.safetensors").stat().st_mtime_ns
    assert fit_encoder(one, str(shapes / "a"), "image", shards, {}) == fits[0]
    assert (Path(fits[0]) / "state.safetensors").stat().st_mtime_ns == before


def test_a_task_that_is_not_there_is_refused(shapes: Path, make_config: Callable[..., Config]) -> None:
    """Catches a run that decodes all images and then finds no label to train on."""
    with pytest.raises(ConfigError, match="trained on an unknown task 'color': did you mean 'colour'"):
        make_config(modalities__image__encoder=encoder(shapes, task="color"))
