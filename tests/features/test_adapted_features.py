"""Adapting an encoder from shards to a fitted state: over workers, and once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_score

from mmkt_ray.config import Config, parse_config
from mmkt_ray.encoders.build import build_encoder, load_fitted
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.fit import fit_encoder
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.encoders.tiny_networks import WORDS, image_folder, text_folder
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


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_network_is_adapted_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches prices taken for classes, a transform that was not fitted or is no part of the fit's name, and features
    that know no more of the number than before."""
    rng, folder = np.random.default_rng(0), text_folder(tmp_path / "bert")
    rows = [[WORDS[i] for i in rng.integers(0, len(WORDS), 6)] for _ in range(240)]
    price = np.array([np.exp(1 + row.count("cat") - row.count("mat")) for row in rows])
    frame = pd.DataFrame({"id": range(240), "text": [" ".join(row) for row in rows], "price": price})
    (tmp_path / "data").mkdir()
    frame.to_csv(tmp_path / "data" / "rows.csv", index=False)
    adapt = {"task": "price", "how": "full", "lr": 2e-3, "epochs": 6, "batch_size": 16}

    def config(transform: str) -> Config:
        columns = {"sample_id": "id", "text": "text", "price": "price"}
        section = {"name": "huggingface", "folder": str(folder), "max_tokens": 16, "adapt": adapt}
        return parse_config(
            {
                "name": "priced",
                "data_root": str(tmp_path / "data"),
                "run_root": str(tmp_path / "runs"),
                "samples": {
                    "sources": [{"reader": "manifest", "path": "rows.csv", "columns": columns}],
                    "split": {"val_frac": 0.2, "test_frac": 0.2},
                },
                "modalities": {"text": {"kind": "text", "encoder": section}},
                "tasks": {"price": {"kind": {"name": "regression", "transform": transform}}},
            }
        )

    shards = list_shards(ReadingPlan.of(config("log")))
    with caplog.at_level("INFO", logger="mmkt_ray"):
        fits = {t: fit_encoder(config(t), str(tmp_path / "run"), "text", shards, {}) for t in ("log", "sqrt")}
    assert fits["log"] != fits["sqrt"]
    assert "val r2" in caplog.text
    section = config("log").modalities["text"].encoder
    adapted = load_fitted(build_encoder(section), fits["log"])
    frozen = build_encoder(section.model_copy(update={"adapt": None}))
    explained = []
    for encoder in (adapted, frozen):
        x = encoder.encode(frame["text"].tolist())
        explained.append(cross_val_score(RidgeCV(np.logspace(-3, 3, 13)), x, np.log(price), cv=4).mean())
    assert explained[0] > explained[1] + 0.05


def test_a_task_that_is_not_there_is_refused(shapes: Path, make_config: Callable[..., Config]) -> None:
    """Catches a run that decodes all images and then finds no label to train on."""
    with pytest.raises(ConfigError, match="trained on an unknown task 'color': did you mean 'colour'"):
        make_config(modalities__image__encoder=encoder(shapes, task="color"))
