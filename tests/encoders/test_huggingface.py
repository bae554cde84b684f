"""Networks from Hugging Face folders against what transformers and sentence-transformers themselves make of the same
input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmkt_ray.config.modality_config import ModalityConfig
from mmkt_ray.encoders.build import build_encoder, load_fitted, save_fitted
from mmkt_ray.encoders.pretrained.huggingface import HuggingFaceEncoder
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.sounds import Clip
from tests.encoders.tiny_networks import image_folder, sound_folder, text_folder, transformers

pytest.importorskip("transformers", reason="the extra `pretrained` is not installed")

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
AS_TENSORS = {"return_tensors": "pt", "input_data_format": "channels_last"}
TEXTS = ["a cat sits on the mat", "the kitten is sitting on a rug", "cat", "interest rates fell again " * 20, ""]


def encoder_of(folder: Path, kind: str, **options: Any) -> Any:
    """As a config has it, with small batches."""
    modality = ModalityConfig(kind=kind, encoder={"name": "huggingface", "folder": str(folder), **options})
    encoder = build_encoder(modality.encoder)
    encoder.to(CPU, 4)
    return encoder


def pictures() -> list[np.ndarray]:
    """Smooth ones of several shapes."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    sizes = [(40, 40), (30, 55), (90, 33), (24, 24)]
    return [
        np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))
        for p, size in zip(small, sizes, strict=True)
    ]


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x, dim=1).numpy()


# --- texts --------------------


@pytest.mark.parametrize("network", ["Bert", "Roberta", "ModernBert"])
@pytest.mark.parametrize(
    ("modes", "dense", "unit_length"),
    [(["mean"], False, True), (["cls"], False, False), (["max", "mean"], True, True), (["lasttoken"], False, True),
     (["weightedmean"], False, False), (["mean_sqrt_len_tokens"], True, False)],
)  # fmt: skip
def test_texts_are_pooled_as_sentence_transformers_does(
    network: str, modes: list[str], dense: bool, unit_length: bool, tmp_path: Path
):
    """Catches another pooling than the folder's, a dense layer that is left out,
    features that are or are not normalised."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    folder = text_folder(tmp_path / "network", network)
    steps = [models.Transformer(str(folder), max_seq_length=32), models.Pooling(16, pooling_mode=tuple(modes))]
    if dense:
        torch.manual_seed(0)
        steps.append(models.Dense(16 * len(modes), 7))
    steps += [models.Normalize()] if unit_length else []
    library.SentenceTransformer(modules=steps, device="cpu").save(str(tmp_path / "saved"))
    reference = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    expected = reference.encode(TEXTS[:4], normalize_embeddings=False)
    encoder = encoder_of(tmp_path / "saved", "text", max_tokens=32)
    assert encoder.dim == expected.shape[1]
    np.testing.assert_allclose(encoder.encode(TEXTS[:4]), expected, atol=1e-4)


def test_a_prefix_stands_before_every_text(tmp_path: Path):
    """Catches E5 features made without the words that it was trained with,
    and a folder's own prompt that is not used."""
    folder = text_folder(tmp_path / "e5")
    given = encoder_of(folder, "text", max_tokens=32, prefix="query : ").encode(TEXTS)
    by_hand = encoder_of(folder, "text", max_tokens=32).encode(["query : " + text for text in TEXTS])
    np.testing.assert_array_equal(given, by_hand)
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "path": "", "type": "sentence_transformers.models.Normalize"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"q": "query : "}, "default_prompt_name": "q"})
    )
    np.testing.assert_array_equal(encoder_of(folder, "text", max_tokens=32).encode(TEXTS), given)
    assert np.abs(encoder_of(folder, "text", max_tokens=32, prefix="").encode(TEXTS) - given).max() > 1e-3


def test_options_that_came_later_leave_fingerprints_as_they_were(tmp_path: Path):
    """Catches every run with text features encoding them again, as its config has keys that it did not have."""
    folder = text_folder(tmp_path / "bert")
    modality = ModalityConfig(kind="text", encoder={"name": "huggingface", "folder": str(folder)})
    dumped = modality.model_dump(mode="json")["encoder"]
    assert dumped == {"name": "huggingface", "folder": str(folder), "max_tokens": 128, "precision": "fp32"}
    images = ModalityConfig(kind="image", encoder={"name": "huggingface", "folder": str(folder)})
    assert images.model_dump(mode="json")["encoder"]["reads"] == "image"
    assert ModalityConfig.model_validate(images.model_dump(mode="json")) == images


def test_a_step_that_is_not_known_is_refused(tmp_path: Path):
    """Catches features of a network whose last step was left out in silence."""
    folder = text_folder(tmp_path / "bert")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": "1_CNN", "type": "x.models.CNN"}]))
    with pytest.raises(DataError, match="has a step 'CNN': known: Transformer, Pooling"):
        encoder_of(folder, "text", max_tokens=32)
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": "../..", "type": "x.models.Pooling"}]))
    with pytest.raises(DataError, match="outside of its own"):
        encoder_of(folder, "text", max_tokens=32)


# --- images --------------------


@pytest.mark.parametrize(("network", "dim"), [("ViT", 16), ("Dinov2", 16), ("DINOv3ViT", 16), ("ConvNext", 20)])
def test_images_are_what_the_folders_processor_and_network_make(network: str, dim: int, tmp_path: Path):
    """Catches another size, crop, mean or std than the folder's, and features that are not the pooled ones."""
    folder = image_folder(tmp_path / "network", network)
    library = transformers()
    processor, model = (
        library.AutoImageProcessor.from_pretrained(folder),
        library.AutoModel.from_pretrained(folder).eval(),
    )
    with torch.inference_mode():
        expected = torch.cat([
            model(**processor(images=p, **AS_TENSORS)).pooler_output.flatten(1) for p in pictures()
        ])  # fmt: skip
    encoder = encoder_of(folder, "image")
    found = encoder.encode([encoder.prepare(p) for p in pictures()])
    assert found.shape == (4, dim) == (4, encoder.dim)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_classifier_without_a_pooler_gives_its_first_token(tmp_path: Path):
    """Catches features of a random layer: a checkpoint for classification has no pooler,
    and transformers draws one."""
    folder, library = image_folder(tmp_path / "vit", "ViT"), transformers()
    settings = library.AutoConfig.from_pretrained(folder)
    settings.num_labels = 3
    torch.manual_seed(1)
    library.ViTForImageClassification(settings).save_pretrained(folder)
    encoder, again = encoder_of(folder, "image"), encoder_of(folder, "image")
    values = [encoder.prepare(p) for p in pictures()]
    np.testing.assert_array_equal(encoder.encode(values), again.encode(values))
    processor = library.AutoImageProcessor.from_pretrained(folder)
    model = library.ViTForImageClassification.from_pretrained(folder).eval()
    inputs = processor(images=pictures()[0], return_tensors="pt", input_data_format="channels_last")
    with torch.inference_mode():
        expected = model.vit(**inputs).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder.encode(values)[:1], expected.numpy(), atol=1e-4)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path):
    """Catches random layers where a folder's weights are those of a smaller network."""
    folder = image_folder(tmp_path / "vit", "ViT")
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(card | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"lack 16 tensors .* the first '\S*layer"):
        encoder_of(folder, "image").state()


def test_a_processor_that_keeps_the_aspect_ratio_is_refused(tmp_path: Path):
    """Catches a batch of images of several shapes, deep in the job."""
    folder = image_folder(tmp_path / "dino", "Dinov2")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": False}))
    with pytest.raises(DataError, match="images of different shapes"):
        encoder_of(folder, "image")


# --- two towers --------------------


@pytest.mark.parametrize(("network", "dim"), [("CLIP", 10), ("Siglip", 16)])
def test_two_towers_share_a_space(network: str, dim: int, tmp_path: Path):
    """Catches features before the projection, towers that are mixed up,
    padding that SigLIP must see and CLIP must not."""
    folder, library = image_folder(tmp_path / "towers", network), transformers()
    model = library.AutoModel.from_pretrained(folder).eval()
    processor = library.AutoImageProcessor.from_pretrained(folder)
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    padding: Any = (
        {"padding": "max_length", "max_length": 12} if network == "Siglip" else {"padding": True, "max_length": 12}
    )
    tokens = tokenizer(TEXTS, truncation=True, return_tensors="pt", return_token_type_ids=False, **padding)
    inputs = {"input_ids": tokens["input_ids"]}
    if network == "CLIP":
        inputs["attention_mask"] = tokens["attention_mask"]
    with torch.inference_mode():
        texts = model.get_text_features(**inputs).pooler_output
        images = torch.cat([
            model.get_image_features(**processor(images=p, **AS_TENSORS)).pooler_output for p in pictures()
        ])  # fmt: skip
    of_images, of_texts = encoder_of(folder, "image"), encoder_of(folder, "text")
    assert of_images.dim == of_texts.dim == dim
    np.testing.assert_allclose(of_images.encode([of_images.prepare(p) for p in pictures()]), unit(images), atol=1e-4)
    np.testing.assert_allclose(of_texts.encode(TEXTS), unit(texts), atol=1e-4)
    one, other = (save_fitted(e, e.config, str(tmp_path / k)) for e, k in ((of_images, "i"), (of_texts, "t")))
    assert one.fingerprint != other.fingerprint


# --- sounds --------------------


def clips(rate: int) -> list[Clip]:
    """A short one, one of another rate, a long one, two of one length."""
    rng = np.random.default_rng(0)
    lengths = [(rate // 3, rate), (rate // 2, rate // 2), (3 * rate, rate), (rate, rate), (rate, rate)]
    return [Clip(rng.normal(0, 0.1, n).astype(np.float32), r) for n, r in lengths]


@pytest.mark.parametrize(
    ("network", "rate", "dim"), [("Whisper", 16000, 16), ("Wav2Vec2", 16000, 16), ("Clap", 8000, 10)]
)
def test_sounds_are_what_the_network_makes_of_each_alone(network: str, rate: int, dim: int, tmp_path: Path):
    """Catches the wrong sample rate, silence that is averaged in, a piece taken at random, neighbours that matter."""
    pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    folder, library = sound_folder(tmp_path / "network", network), transformers()
    encoder = encoder_of(folder, "audio", seconds=1.0)
    values = [encoder.prepare(clip) for clip in clips(rate)]
    assert {value.shape for value in values} == {(rate,)}
    found = encoder.encode(values)
    assert found.shape == (5, dim)
    model = library.AutoModel.from_pretrained(folder).eval()
    extractor = library.AutoFeatureExtractor.from_pretrained(folder)
    for value, got in zip(values, found, strict=True):
        samples = value[np.isfinite(value)]
        given = extractor(samples, sampling_rate=rate, return_tensors="pt")
        with torch.inference_mode():
            if network == "Whisper":
                hidden = model.get_encoder()(given["input_features"]).last_hidden_state[0]
                expected = hidden[: -(-len(samples) // 320)].mean(0)
            elif network == "Wav2Vec2":
                expected = model(given["input_values"]).last_hidden_state[0].mean(0)
            else:
                expected = model.get_audio_features(given["input_features"]).pooler_output[0]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(encoder.encode(values[3:4]), found[3:4], atol=1e-6)


def test_claps_texts_are_in_the_space_of_its_sounds(tmp_path: Path):
    """Catches text features before the projection."""
    folder, library = sound_folder(tmp_path / "clap", "Clap"), transformers()
    model, tokenizer = library.AutoModel.from_pretrained(folder).eval(), library.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS[:3], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        expected = model.get_text_features(**tokens).pooler_output
    np.testing.assert_allclose(encoder_of(folder, "text").encode(TEXTS[:3]), unit(expected), atol=1e-4)


# --- what is refused --------------------


def test_a_network_of_another_kind_is_refused_at_once(tmp_path: Path):
    """Catches a job that starts, and fails at its first batch, as its folder is one for texts."""
    folder = text_folder(tmp_path / "bert")
    with pytest.raises(DataError, match=r"no preprocessor_config\.json .* to encode images"):
        encoder_of(folder, "image")
    with pytest.raises(ConfigError, match=r"sound network in .*'bert'"):
        encoder_of(folder, "audio")
    vit = image_folder(tmp_path / "vit", "ViT")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        encoder_of(vit, "text")


def test_code_in_a_folder_is_not_run(tmp_path: Path):
    """Catches trust_remote_code, and weights that are a pickle."""
    folder = image_folder(tmp_path / "vit", "ViT")
    card = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('was-here').touch()")
    auto = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(card | auto))
    with pytest.raises(DataError, match="cannot read"):
        encoder_of(folder, "image")
    assert not Path("was-here").exists()
    (folder / "config.json").write_text(json.dumps(card))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        encoder_of(folder, "image").state()


def test_another_processor_is_another_encoder(tmp_path: Path):
    """Catches features of images that were normalised otherwise, in one store."""
    folder = image_folder(tmp_path / "vit", "ViT")
    encoder = encoder_of(folder, "image")
    save_fitted(encoder, encoder.config, str(tmp_path / "fitted"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(DataError, match="are not those"):
        load_fitted(encoder_of(folder, "image"), str(tmp_path / "fitted"))


def test_the_section_names_what_it_reads():
    """Catches a kind that the encoder's own list and its section disagree about."""
    assert set(HuggingFaceEncoder.Section.model_fields["reads"].annotation.__args__) == set(HuggingFaceEncoder.kinds)
