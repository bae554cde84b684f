"""Encoders adapted to a task: what changes, what is kept of it, and that a kill costs nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmkt_ray.config.modality_config import ModalityConfig
from mmkt_ray.encoders.build import build_encoder, load_fitted, save_fitted
from mmkt_ray.encoders.encoder import EncoderTraining, fit_of
from mmkt_ray.encoders.pretrained import adapt_training, adapted_weights
from mmkt_ray.encoders.pretrained.huggingface import HuggingFaceEncoder
from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.multiclass import Multiclass
from tests.encoders.tiny_networks import WORDS, image_folder, sound_folder, text_folder, transformers

pytest.importorskip("transformers", reason="the extra `pretrained` is not installed")

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
CLASSES = ["even", "odd"]


def classes(codes: np.ndarray) -> Labels:
    """Labels of CLASSES; negative codes are of a class that train lacks."""
    return Labels(Multiclass(), np.maximum(codes, 0), np.ones(len(codes), bool), codes >= 0)


def section(folder: Path, **adapt: Any) -> Any:
    """Of a text encoder that is adapted quickly."""
    options = {"task": "label", "epochs": 4, "batch_size": 16, "lr": 3e-3, **adapt}
    return HuggingFaceEncoder.Section(folder=str(folder), max_tokens=16, adapt=options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without dropout."""
    folder = text_folder(tmp_path_factory.mktemp("bert"))
    settings = transformers().AutoConfig.from_pretrained(folder)
    settings.hidden_dropout_prob = settings.attention_probs_dropout_prob = 0.0
    settings.save_pretrained(folder)
    return folder


def texts(num: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Five words each; the class is whether two of them, `cat` and `mat`, are both there or both absent."""
    rng = np.random.default_rng(seed)
    rows = [[WORDS[i] for i in rng.integers(0, len(WORDS), 5)] for _ in range(num)]
    for row in rows[::2]:
        row[rng.integers(5)] = "cat" if "mat" not in row else "mat"
    labels = np.array([("cat" in row) == ("mat" in row) for row in rows]).astype(np.int64)
    return [" ".join(row) for row in rows], labels


def data(encoder: Any, num: int = 160) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prepared values, labels, and which are held out."""
    rows, labels = texts(num, 0)
    return np.stack([encoder.prepare(row) for row in rows]), labels, np.arange(num) % 4 == 0


def train(
    config: Any, checkpoint: dict[str, Any] | None = None, on_epoch: Callable[..., None] | None = None
) -> dict[str, np.ndarray]:
    encoder = build_encoder(config)
    values, labels, held_out = data(encoder)
    keep = on_epoch or (lambda *_: None)
    return encoder.train(values, classes(labels), CLASSES, EncoderTraining(0, CPU, 0, 1, checkpoint, keep, held_out))


def fitted(config: Any, tensors: dict[str, np.ndarray]) -> Any:
    encoder = build_encoder(config)
    encoder.load_state(tensors, encoder.rest_of_state(CLASSES))
    return encoder


def separation(encoder: Any) -> float:
    """How far apart the classes' means are, in standard deviations, on the rows that are trained on."""
    rows, labels = texts(160, 0)
    features = encoder.encode(rows)
    gap = features[labels == 0].mean(0) - features[labels == 1].mean(0)
    return float(np.linalg.norm(gap) / features.std(0).mean())


@pytest.mark.parametrize("how", ["lora", "last_layers", "full"])
def test_what_is_kept_makes_the_features_that_were_trained(how: str, folder: Path, tmp_path: Path):
    """Catches changes that are lost or applied twice on the way to disk,
    weights that `how` leaves alone and that change."""
    config = section(folder, how=how, num_layers=1, rank=2)
    encoder = build_encoder(config)
    assert fit_of(encoder) == "training"
    values, labels, held_out = data(encoder)
    seen = []
    training = EncoderTraining(0, CPU, 0, 1, None, lambda _, metrics, __: seen.append(metrics), held_out)
    tensors = encoder.train(values, classes(labels), CLASSES, training)
    rows = texts(30, 2)[0]
    frozen = build_encoder(section(folder).model_copy(update={"adapt": None}))
    frozen.load_state({}, encoder.rest_of_state(CLASSES))
    adapted = fitted(config, tensors)
    save_fitted(adapted, config, str(tmp_path / "fitted"))
    again = load_fitted(build_encoder(config), str(tmp_path / "fitted"))
    np.testing.assert_array_equal(again.encode(rows), adapted.encode(rows))
    best = min(range(len(seen)), key=lambda i: seen[i]["val_loss"])
    if best == len(seen) - 1:  # the trained network is the one that was kept
        encoder.model.eval()
        np.testing.assert_allclose(adapted.encode(rows), encoder.encode(rows), atol=1e-5)
    assert np.abs(adapted.encode(rows) - frozen.encode(rows)).max() > 1e-3
    before, after = (dict(e.model.named_parameters()) for e in (frozen, adapted))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name.split("layer.")[1][0] if "layer." in name else "" for name in changed}
    assert layers == {"lora": {"0", "1"}, "last_layers": {"1"}, "full": {"", "0", "1"}}[how]
    assert not any("pooler" in name for name in tensors)
    size = sum(value.nbytes for value in tensors.values()) / sum(4 * p.numel() for p in before.values())
    assert size < {"lora": 0.45, "last_layers": 0.5, "full": 1.01}[how]


def test_an_adapted_encoder_tells_classes_apart_that_the_frozen_one_mixes(folder: Path):
    """Catches training that does not reach the features: a head alone, a learning rate of zero,
    labels out of order."""
    config = section(folder, how="full", epochs=30)
    frozen, encoder = build_encoder(section(folder).model_copy(update={"adapt": None})), build_encoder(config)
    values, labels, _ = data(encoder)
    tensors = encoder.train(values, classes(labels), CLASSES, EncoderTraining(0, CPU, 0, 1, None, lambda *_: None))
    assert separation(fitted(config, tensors)) > 1.5 * separation(frozen)


def test_a_killed_training_goes_on_from_its_last_epoch(folder: Path):
    """Catches other weights after a kill: an optimiser that forgets, another order, a best epoch that is lost."""
    config = section(folder, how="lora", rank=2)
    whole, states = train(config), []
    train(config, on_epoch=lambda epoch, _, state_fn: states.append((epoch, state_fn())))
    state = {k: torch.as_tensor(v).contiguous().clone() for k, v in states[1][1].items()}
    epochs: list[int] = []
    resumed = train(config, state, lambda epoch, *_: epochs.append(epoch))
    assert epochs == [3, 4]
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_accumulated_gradients_are_those_of_the_whole_batch(folder: Path):
    """Catches a mean of means, or a step for each part."""
    configs = [section(folder, how="full", epochs=2, accumulate=n) for n in (1, 3)]
    once, parts = (fitted(config, train(config)).encode(texts(30, 2)[0]) for config in configs)
    np.testing.assert_allclose(once, parts, atol=1e-3)


def test_no_train_value_is_encoded_by_a_network_that_learnt_it(folder: Path, tmp_path: Path):
    """Catches features of train rows that look better than those of new ones, folds that are mixed up,
    a kill between them."""
    config = section(folder, how="last_layers", num_layers=1, folds=3, epochs=2)
    states: list[dict[str, Any]] = []
    tensors = train(config, on_epoch=lambda _, __, state_fn: states.append(state_fn()))
    assert len(states) == 6
    encoder = fitted(config, tensors)
    save_fitted(encoder, config, str(tmp_path / "fitted"))
    again = load_fitted(build_encoder(config), str(tmp_path / "fitted"))
    rows, new = texts(160, 0)[0], [" ".join(WORDS[i:]) for i in range(6)]
    values, labels, held_out = data(encoder)
    found = again.encode(rows + new)
    hashes = adapted_weights.hashes_of(encoder.contents(rows))
    assert np.array_equal(hashes, adapted_weights.hashes_of(encoder.contents(values)))
    alone = []
    for number in range(3):  # each network by itself, trained from the start on the other two parts
        left_out = adapted_weights.fold_of(hashes, 3) == number
        chosen = held_out | ~left_out
        one: Any = build_encoder(section(folder, how="last_layers", num_layers=1, epochs=2))
        training = EncoderTraining(0, CPU, 0, 1, None, lambda *_: None, held_out[chosen])
        changes = one.train(values[chosen], classes(labels[chosen]), CLASSES, training)
        alone.append(fitted(one.config, changes).encode(rows + new))
    learnt = np.isin(hashes, np.unique(hashes[~held_out]))
    expected = np.mean(alone, axis=0)
    for row in np.flatnonzero(learnt):
        expected[row] = alone[adapted_weights.fold_of(hashes, 3)[row]][row]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    state = {k: torch.as_tensor(v).contiguous().clone() for k, v in states[2].items()}
    resumed = train(config, state)
    assert all(np.array_equal(tensors[name], resumed[name]) for name in tensors)


def test_training_stops_when_val_gets_no_better_and_keeps_the_best(folder: Path):
    """Catches epochs that only learn the train rows by heart, and the last epoch kept in place of the best."""
    seen: list[tuple[float, dict[str, Any]]] = []
    config = section(folder, how="full", epochs=60, lr=2e-2, patience=2)
    kept = train(config, on_epoch=lambda _, metrics, state_fn: seen.append((metrics["val_loss"], state_fn())))
    losses = [loss for loss, _ in seen]
    best = int(np.argmin(losses))
    assert len(losses) < 60
    assert len(losses) == best + 1 + 2
    expected = {k.removeprefix("trained."): v.numpy() for k, v in seen[best][1].items() if k.startswith("trained.")}
    assert all(np.array_equal(kept[name], value) for name, value in expected.items())


def test_the_head_begins_as_the_linear_model_of_the_frozen_features(folder: Path):
    """Catches a random head, whose first gradients distort what was pretrained."""
    encoder = build_encoder(section(folder))
    values, labels, _ = data(encoder)
    encoder.load()
    net = adapt_training.Net(encoder, 2, CPU)
    net.set_mode(False)
    net.fit_head(values, classes(labels))
    from sklearn.linear_model import LogisticRegression

    features = encoder.encode(texts(160, 0)[0])
    x = (features - features.mean(0)) / features.std(0)
    # of one row of weights; ours are two halves, of opposite sign
    strength = 1 / (adapt_training.HEAD_DECAY * len(labels))
    reference = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(x, labels).predict_proba(x)
    with torch.no_grad():
        found = net(torch.from_numpy(values)).softmax(1).numpy()
    np.testing.assert_allclose(found, reference, atol=5e-3)


@pytest.mark.parametrize(
    ("make", "network", "kind"),
    [
        (image_folder, "ViT", "image"),
        (image_folder, "CLIP", "text"),
        (image_folder, "Siglip", "image"),
        (sound_folder, "Wav2Vec2", "audio"),
    ],
)
def test_every_kind_of_network_can_be_adapted(make: Any, network: str, kind: str, tmp_path: Path):
    """Catches a tower through which no gradient goes, and a prepared value of another shape or type than is said."""
    folder = make(tmp_path / "network", network)
    adapt = {"task": "label", "how": "last_layers", "num_layers": 1, "epochs": 1, "batch_size": 4}
    modality = ModalityConfig(
        kind=kind, encoder={"name": "huggingface", "folder": str(folder), "seconds": 0.2, "adapt": adapt}
    )
    encoder: Any = build_encoder(modality.encoder)
    rng = np.random.default_rng(0)
    shape, dtype = encoder.prepared_shape, encoder.prepared_dtype
    if kind == "text":
        values = np.stack([encoder.prepare(text) for text in texts(8, 0)[0]])
    elif kind == "image":
        values = np.stack([encoder.prepare(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(8)])
    else:
        values = rng.normal(0, 0.1, (8, *shape)).astype(np.float32)
    assert values.shape[1:] == shape
    assert values.dtype == dtype
    training = EncoderTraining(0, CPU, 0, 1, None, lambda *_: None)
    tensors = encoder.train(values, classes(np.arange(8) % 2), CLASSES, training)
    assert tensors
    assert all(np.isfinite(value).all() for value in tensors.values())


def test_what_cannot_be_adapted_is_refused(folder: Path, tmp_path: Path):
    """Catches LoRA that changes nothing, as a network has no linear layers,
    and a state of another rank that is taken."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1))
    with pytest.raises(ConfigError, match="this network has none: use last_layers or full"):
        adapted_weights.make_trainable(net, section(folder).adapt, 0)
    config = section(folder, how="lora", rank=2, epochs=1)
    tensors = train(config)
    name = next(iter(tensors)).rsplit(".", 1)[0]
    with pytest.raises(ValueError, match="none of the network's"):
        fitted(config, {"other.lora_a": tensors[f"{name}.lora_a"], "other.lora_b": tensors[f"{name}.lora_b"]})


def test_images_are_augmented_in_training_alone(tmp_path: Path) -> None:
    """Else a few hundred pictures are learnt by heart, or the loss on val that stops training is one of changed
    pictures."""
    folder = image_folder(tmp_path, "ViT")
    options = {"task": "label", "epochs": 2, "batch_size": 8, "folds": 1}
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 24, 24), dtype=np.uint8)
    held_out, seen = np.arange(24) % 3 == 0, {}
    for names in ([], ["flip"], ["crop"]):
        adapt = options | {"augment": names}
        section = ModalityConfig(
            kind="image", encoder={"name": "huggingface", "folder": str(folder), "adapt": adapt}
        ).encoder
        encoder: Any = build_encoder(section)
        batches: list[tuple[bool, np.ndarray]] = []
        forward = encoder.forward_features
        encoder.forward_features = lambda x, forward=forward, into=batches: (
            into.append((torch.is_grad_enabled(), x.numpy().copy())),
            forward(x),
        )[1]
        alone = EncoderTraining(0, CPU, 0, 1, None, lambda *_: None, held_out)
        encoder.train(images, classes(np.arange(24) % 2), CLASSES, alone)
        seen[tuple(names)] = [np.concatenate([x for t, x in batches if t is training]) for training in (True, False)]
    originals = {image.tobytes() for image in images}
    mirrored = {np.ascontiguousarray(image[..., ::-1]).tobytes() for image in images}

    def known(images: np.ndarray, among: set[bytes]) -> float:
        return float(np.mean([image.tobytes() in among for image in images]))

    assert all(known(without, originals) == 1 for _, without in seen.values())  # head, val
    assert known(seen[()][0], originals) == 1
    assert known(seen["flip",][0], originals | mirrored) == 1
    assert 0.2 < known(seen["flip",][0], mirrored) < 0.8
    assert known(seen["crop",][0], originals) < 0.5
