"""The CNN encoder: trained on the train split of one modality and one task, resumable, then frozen."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features import pretrain
from mmkt_ray.features.extract import extract
from mmkt_ray.features.fit import fit_encoder
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import png, write_shard

pytestmark = pytest.mark.usefixtures("ray_local")

CNN = {
    "name": "cnn",
    "pretrain": "colour",
    "width": 8,
    "epochs": 3,
    "batch_size": 16,
    "image_size": 16,
    "precision": "fp32",
}


@pytest.fixture
def config(shapes: Path, make_config: Callable[..., Config]) -> Config:
    return make_config(modalities__image__encoder=CNN, samples__sources__0__split="train", samples__split__val_frac=0.0)


def fit(config: Config, folder: Path) -> bytes:
    uri = fit_encoder(config, str(folder), "image", list_shards(ReadingPlan.of(config)), {})
    assert sorted(p.name for p in Path(uri).iterdir()) == ["encoder.json", "state.safetensors"]
    return (Path(uri) / "state.safetensors").read_bytes()


def test_the_test_split_changes_nothing_and_the_seed_everything(config: Config, shapes: Path) -> None:
    """Pictures of the test split in the network's weights or in its whitening; a fit that is not reproducible."""
    images = pa.array([png("green", i, 40) for i in range(12)], pa.binary())
    write_shard(shapes / "data" / "planted" / "0.parquet", 500, 12, image=images)
    source = config.samples.sources[0].model_dump()
    both = config.with_overrides({"samples.sources": [source, source | {"path": "planted/*.parquet", "split": "test"}]})
    assert fit(config, shapes / "a") == fit(both, shapes / "b")
    assert fit(config, shapes / "a") != fit(config.with_overrides({"seed": 1}), shapes / "a")


def test_leaking_rows_change_nothing(config: Config, shapes: Path) -> None:
    """Catches a network that was trained, label and all, on images that the test split has too."""
    images = pa.array([png("green", i, 40) for i in range(12)], pa.binary())
    write_shard(shapes / "data" / "planted" / "0.parquet", 500, 12, image=images)
    source = config.samples.sources[0].model_dump()
    both = config.with_overrides({"samples.sources": [source, source | {"path": "planted/*.parquet"}]})
    shards = list_shards(ReadingPlan.of(both))
    leaking = {shards[-1].unit: [f"s{500 + i}" for i in range(12)]}
    uri = Path(fit_encoder(both, str(shapes / "b"), "image", shards, leaking))
    assert (uri / "state.safetensors").read_bytes() == fit(config, shapes / "a")


def test_a_killed_fit_goes_on_from_its_last_epoch(
    config: Config, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes of training lost, or other weights, after a kill."""
    whole = fit(config, shapes / "whole")
    real, saved = storage.write_bytes, []

    def write_and_die(uri: str, data: bytes) -> None:
        real(uri, data)
        saved.extend([uri] if uri.endswith("checkpoint.safetensors") else [])
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.storage, "write_bytes", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        fit(config, shapes / "killed")
    monkeypatch.undo()
    epochs = []
    monkeypatch.setattr(
        pretrain.log, "info", lambda text, *args: epochs.append(args[1]) if "%s epoch" in text else None
    )
    assert fit(config, shapes / "killed") == whole
    assert epochs == [3]


def test_features_come_from_the_network_and_tell_the_colours_apart(config: Config, shapes: Path) -> None:
    """An encoder that is trained and then not used, or used in training mode."""
    store = extract(config, str(shapes / "run"))
    table = store.table(["image"])
    assert table.features["image"].shape == (120, 32)
    means = {c: table.features["image"][table.labels["colour"].values == c].mean(0) for c in range(3)}
    spread = max(table.features["image"][table.labels["colour"].values == c].std(0).mean() for c in range(3))
    assert min(abs(means[a] - means[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))) > spread


def test_one_class_is_refused(config: Config, shapes: Path) -> None:
    """A network trained to say the only thing there is."""
    shutil.rmtree(shapes / "data" / "shapes")
    write_shard(shapes / "data" / "shapes" / "0.parquet", 0, 20, colour=["red"] * 20)
    with pytest.raises(DataError, match="needs two classes of 'colour'"):
        fit(config, shapes / "one")


def test_two_ray_train_workers_train_one_network(config: Config, shapes: Path) -> None:
    """A fit across workers that hangs, that returns one worker's own network, or that cannot be loaded afterwards."""
    two = config.with_overrides({"modalities.image.encoder.num_workers": 2, "modalities.image.encoder.epochs": 8})
    store = extract(two, str(shapes / "two"))
    table = store.table(["image"])
    centres = np.stack([table.features["image"][table.labels["colour"].values == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(table.features["image"][:, None] - centres, axis=2).argmin(1)
    assert (nearest == table.labels["colour"].values).mean() > 0.9


def wav(hz: float, seed: int) -> bytes:
    """A tone in noise."""
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    noise = np.random.default_rng(seed).normal(0, 0.05, 4000)
    sink = io.BytesIO()
    soundfile.write(sink, np.sin(2 * np.pi * hz * np.arange(4000) / 8000) * 0.3 + noise, 8000, format="WAV")
    return sink.getvalue()


def test_audio_goes_the_way_of_images(shapes: Path, make_config: Callable[..., Config]) -> None:
    """Catches what holds for images alone: in reading, decoding, training, rejecting, storing."""
    hz = {"red": 300.0, "green": 900.0, "blue": 2500.0}
    colours = [list(hz)[i % 3] for i in range(120)]
    sounds = [wav(hz[c], i) for i, c in enumerate(colours)]
    sounds[7] = b"RIFF no sound"
    write_shard(shapes / "data" / "heard" / "0.parquet", 0, 120, image=pa.array(sounds, pa.binary()), colour=colours)
    source = {
        "reader": "parquet",
        "path": "heard/*.parquet",
        "columns": {"sample_id": "id", "sound": "image", "colour": "colour"},
    }
    encoder = CNN | {"name": "logmel_cnn", "seconds": 0.5}
    config = make_config(
        modalities={"sound": {"kind": "audio", "encoder": encoder}},
        samples__sources=[source],
        samples__max_reject_frac=0.1,
        samples__split={"val_frac": 0.0, "test_frac": 0.3},
    )
    store = extract(config, str(shapes / "run"))
    table = store.table(["sound"])
    assert table.features["sound"].shape == (119, 32)
    assert store.manifest.counts.rejects == 1
    train, test = table.rows("train"), table.rows("test")
    features, labels = table.features["sound"], table.labels["colour"].values
    centres = np.stack([features[train][labels[train] == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(features[test][:, None] - centres, axis=2).argmin(1)
    assert (nearest == labels[test]).mean() > 0.9


def test_a_task_with_several_classes_per_sample_is_refused(config: Config) -> None:
    """Catches a network trained on lists of classes as if each list were a class."""
    with pytest.raises(ConfigError, match="'colour' is multilabel"):
        config.with_overrides({"tasks.colour.kind": "multilabel"})
