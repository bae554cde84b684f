"""timm's networks from a file, against timm itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.pretrained.timm_images import TimmImageEncoder
from mmkt_ray.errors import ConfigError, DataError

timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")


def pictures() -> list[np.ndarray]:
    small = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    sizes = [(60, 60), (40, 95), (224, 224)]
    return [
        np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))
        for p, size in zip(small, sizes, strict=True)
    ]


def expected_of(model: Any) -> np.ndarray:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return torch.stack([model.eval()(transform(Image.fromarray(p))[None])[0] for p in pictures()]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mobilenetv3_small_050", "vit_tiny_patch16_224", "resnet10t"])
def test_features_are_timms(architecture: str, tmp_path: Path):
    """Catches another crop, mean or std than the network's settings say, a width that is not what comes out,
    a classifier."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    model.reset_classifier(0)
    encoder = build_encoder(
        TimmImageEncoder.Section(architecture=architecture, weights=str(tmp_path / "w.safetensors"))
    )
    encoder.to(torch.device("cpu"), 2)
    found = encoder.encode([encoder.prepare(p) for p in pictures()])
    assert found.shape == (3, encoder.dim)
    np.testing.assert_allclose(found, expected_of(model), atol=1e-4, rtol=1e-4)


def test_the_card_beside_the_weights_says_what_they_are(tmp_path: Path):
    """Catches a mean and std of the architecture's default, where the weights were trained with others."""
    overlay = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0}
    model = timm.create_model("resnet10t", pretrained=False, num_classes=0, pretrained_cfg_overlay=overlay)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    card = {"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": overlay}
    (tmp_path / "config.json").write_text(json.dumps(card))
    encoder = build_encoder(TimmImageEncoder.Section(weights=str(tmp_path / "model.safetensors")))
    encoder.to(torch.device("cpu"), 2)
    values = [encoder.prepare(p) for p in pictures()]
    assert values[0].shape == (3, 96, 96)
    np.testing.assert_allclose(encoder.encode(values), expected_of(model), atol=1e-4, rtol=1e-4)


def test_what_is_no_network_of_timm_is_refused(tmp_path: Path):
    """Catches a pickle, a name with a typing error, and weights of another network that are half loaded."""
    with pytest.raises(ConfigError, match=r"must be a \.safetensors file"):
        build_encoder(TimmImageEncoder.Section(architecture="resnet10t", weights="w.pth"))
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        build_encoder(TimmImageEncoder.Section(architecture="resnet18x", weights="w.safetensors"))
    with pytest.raises(ConfigError, match="name the architecture"):
        build_encoder(TimmImageEncoder.Section(weights=str(tmp_path / "w.safetensors")))
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="are not those of timm's resnet10t"):
        build_encoder(
            TimmImageEncoder.Section(architecture="resnet10t", weights=str(tmp_path / "w.safetensors"))
        ).state()
