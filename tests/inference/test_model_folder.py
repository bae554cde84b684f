"""The model folder and prediction from it: what was saved is what is used, and a broken folder is told as such."""

import json
import os

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from mmkt_ray import __version__, storage
from mmkt_ray.config import parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.model_card import read_card, write_card
from mmkt_ray.inference.model_folder import load_model, save_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.models import MultimodalModel, build_spec
from mmkt_ray.models.expert_model import ExpertModel, ExpertSpec
from mmkt_ray.record import write_sealed
from tests.configs import build_config, raw_config
from tests.labels import labels_of
from tests.manifests import make_manifest, make_training

MANIFEST = make_manifest(
    modalities={
        "image": {"dim": 8, "fingerprint": "abc", "folders": ["image-1"]},
        "text": {"dim": 30, "sparse": True, "kind": "text", "fingerprint": "def"},
    },
    tasks={"topic": {"classes": ["x", "y", "z"]}, "unused": {"classes": ["p", "q"]}},
)
ENCODERS = {m: about.to_dict() for m, about in MANIFEST.modalities.items()}
N = 50


@pytest.fixture(scope="module")
def config():
    model = {"fusion": {"name": "hierarchical", "depth": 2}, "sharing": "task_modality", "hidden_dim": 16}
    return build_config(raw_config({"topic": "multiclass"}, model=model))


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    model = MultimodalModel(build_spec(config, {"image": 8, "text": 30}, {"image": False, "text": True}, {"topic": 3}))
    model.inputs["[image]"].set_statistics(torch.full((8,), 0.5), torch.full((8,), 2.0))
    return model.eval()


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    present = {"image": rng.random(N) < 0.7, "text": rng.random(N) < 0.7}
    text = sp.random(N, 30, 0.2, format="csr", dtype=np.float32, random_state=0)
    return FeatureTable(
        sample_id=np.arange(N).astype(str).astype(object),
        split=np.full(N, "test", dtype=object),
        features={"image": rng.normal(size=(N, 8)).astype(np.float32), "text": text},
        present=present,
        labels={"topic": labels_of(rng.integers(0, 3, N))},
        class_names={"topic": ["x", "y", "z"]},
    )


@pytest.fixture
def folder(tmp_path, model, config):
    save_model(str(tmp_path / "model"), model, config, MANIFEST, make_training(seconds=2.0), "f00")
    return tmp_path / "model"


def test_a_loaded_model_predicts_the_same(folder, model, table):
    """Statistics of the input stage, a shared tower or an adapter not in the file; a model left in training mode."""
    loaded, _ = load_model(str(folder))
    assert np.array_equal(predict_table(loaded, table)["topic"], predict_table(model, table)["topic"])


def test_experts_of_several_modalities_are_loaded(tmp_path, config):
    """Catches a card that knows experts of one modality alone: `mmkt train` wrote folders that nothing could read."""
    raw = config.model_dump(mode="json")
    raw["modalities"]["sound"] = {"kind": "vector", "encoder": "identity"}
    raw["samples"]["sources"][0]["columns"]["sound"] = "s"
    whole = parse_config(raw)
    dims, sparse = {"image": 8, "sound": 4, "text": 30}, {"image": False, "sound": False, "text": True}

    def new(own):
        return MultimodalModel(build_spec(own, dims, sparse, {"topic": 3})).eval()

    fused, pair = new(whole), new(whole.with_overrides({"model.modalities": ["image", "text"]}))
    routes = {"topic": {"image+sound+text": "image+text", "image+text": "image+text"}}
    expert = ExpertModel(ExpertSpec(fused.spec, {"image+text": pair.spec}, routes), fused, {"image+text": pair})
    manifest = make_manifest(
        modalities={m: {"dim": dims[m], "fingerprint": m, "folders": [m]} for m in dims},
        tasks={"topic": {"classes": ["x", "y", "z"]}},
    )
    save_model(str(tmp_path / "model"), expert.eval(), whole, manifest, make_training())
    loaded, _ = load_model(str(tmp_path / "model"))
    assert loaded.spec == expert.spec
    card = read_card(str(tmp_path / "model"))
    card.spec["experts"]["sound+text"] = card.spec["experts"].pop("image+text")
    change_card(tmp_path / "model", "spec", card.spec)
    with pytest.raises(DataError, match=r"the expert of sound\+text reads or predicts something else"):
        load_model(str(tmp_path / "model"))


def test_the_card_says_all_that_is_needed_to_use_the_model(folder, config):
    """Class names of tasks that the model does not predict; encoders missing; a config that does not parse again."""
    _, card = load_model(str(folder))
    assert card.class_names == {"topic": ["x", "y", "z"]}
    assert card.encoders == MANIFEST.modalities
    assert parse_config(card.config) == config
    assert (card.fingerprint, card.fit.seconds, card.versions.mmkt_ray) == ("f00", 2.0, __version__)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_of_before_there_was_a_choice_decodes_exactly(folder):
    """Catches photos that are scaled for a model which has learnt from every pixel."""
    card = read_card(str(folder))
    assert load_model(str(folder))[1].config["samples"]["decode"] == "scaled"
    card.config["samples"].pop("decode")
    write_card(str(folder), card)
    assert load_model(str(folder))[1].config["samples"]["decode"] == "exact"


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def change_card(folder, key, value):
    """As somebody would who knows of the checksum."""
    write_sealed(str(folder / "config.json"), {**json.loads((folder / "config.json").read_text()), key: value})


def flip(path, position):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "mmkt train"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
        (cut_weights, "damaged"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "damaged"),
        (lambda f: change_card(f, "schema_version", 99), "99"),
        (lambda f: change_card(f, "spec", {"modalities": {}}), "damaged"),
        (
            lambda f: change_card(f, "spec", {**json.loads((f / "config.json").read_text())["spec"], "hidden_dim": 17}),
            "damaged",
        ),
    ],
)
def test_a_broken_folder_is_told_as_such(folder, damage, says):
    """A traceback of safetensors or torch, or a model with weights of chance, from a folder that is not whole."""
    damage(folder)
    with pytest.raises(DataError, match=says):
        load_model(str(folder))


def test_a_flipped_bit_of_the_weights_is_found(folder, model):
    """A weight that is read as another value, in silence."""
    path = folder / "model.safetensors"
    for position in (-1, -1000, 9):  # values, values, header
        flip(path, position)
        with pytest.raises(DataError, match=r"model\.safetensors' is damaged.*remove it"):
            load_model(str(folder))
        flip(path, position)
    load_model(str(folder))


def test_a_flipped_bit_of_the_card_is_found(folder):
    """A class name or a temperature that is read as another one, in silence."""
    path = folder / "config.json"
    position = path.read_bytes().index(b'"y"') + 1
    flip(path, position)
    with pytest.raises(DataError, match=r"config\.json' is damaged"):
        load_model(str(folder))


def nan_weights(folder):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).fill_(np.nan)
    save_file(weights, folder / "model.safetensors")
    change_card(folder, "checksums", {"model.safetensors": storage.file_checksum(str(folder / "model.safetensors"))})


def change_spec(folder, **changes):
    change_card(folder, "spec", {**json.loads((folder / "config.json").read_text())["spec"], **changes})


def with_folder(name):
    return ENCODERS | {"image": ENCODERS["image"] | {"folders": [name]}}


FUSION = {"name": "hierarchical", "depth": 2, "fuse": "concat", "rank": 16, "num_heads": 4, "combine": "learned"}


@pytest.mark.parametrize(
    "damage",
    [
        nan_weights,
        lambda f: change_card(f, "checksums", {}),
        lambda f: change_card(f, "class_names", {"topic": ["x", "y"]}),
        lambda f: change_card(f, "class_names", {"topic": ["x", "y", "x"]}),
        lambda f: change_card(f, "temperatures", {"topic": 0.0}),
        lambda f: change_card(f, "encoders", with_folder("../../x")),
        lambda f: change_card(f, "encoders", with_folder("/x")),
        lambda f: change_card(f, "encoders", ENCODERS | {"image": ENCODERS["image"] | {"found": 5}}),
        lambda f: change_card(f, "config", []),
        lambda f: change_card(f, "margins", {"topic": {"image": 1.0}}),
        lambda f: change_spec(f, hidden_dim=10**30),
        lambda f: change_card(f, "training", {"members": 10**9}),
        lambda f: change_spec(f, hidden_dim=10**9),  # 8 TB, if it were made before it is compared
        lambda f: change_spec(f, mmoe_experts=10**9),
        lambda f: change_spec(f, fusion=FUSION | {"depth": 10**9}),
        lambda f: change_spec(f, kinds={"topic": "os:system"}),
        lambda f: change_spec(f, inputs={"topic": ["smell"]}),
    ],
)
@pytest.mark.timeout(30)
def test_a_card_of_somebody_else_is_data(folder, damage):
    """A card with a right checksum that has memory filled, files outside read,
    or names and numbers that do not fit."""
    damage(folder)
    with pytest.raises(DataError, match="damaged") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)  # a backtrace of C++


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "zeros", "long", "of the kernel"])
def test_reading_a_folder_ends(folder, name, what, monkeypatch):
    """A pipe, a device without end, or a file of any size that has `predict` hang or fill the memory."""
    path = folder / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "zeros":
        path.symlink_to("/dev/zero")
    elif what == "of the kernel":
        path.symlink_to("/proc/kmsg" if os.access("/proc/kmsg", os.R_OK) else "/proc/self/maps")  # the first has no end
    else:
        with path.open("wb") as file:
            file.truncate(storage.MAX_FILE_BYTES + 1)  # it takes no room on the disk
    with pytest.raises(DataError, match=name):
        load_model(str(folder))


def test_new_weights_never_stand_beside_an_old_card(folder, model, config, monkeypatch):
    """A run killed between two writes, whose folder then says "up to date" for a config that it does not hold."""
    monkeypatch.setattr(storage, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_model(str(folder), model, config, MANIFEST, make_training(), "f01")
    assert read_card(str(folder)) is None


def test_a_key_that_this_version_does_not_know_is_named(folder):
    """A card of another tool, or with a key misspelt by hand, that is used as if it were whole."""
    training = json.loads((folder / "config.json").read_text())["training"]
    misspelt, cut = {**training, "best_epok": 1}, {"history": []}
    for changed, told in (
        (misspelt, "unknown key 'training.model.best_epok'"),
        (cut, "'training.model.seconds' is missing"),
    ):
        change_card(folder, "training", changed)
        with pytest.raises(DataError, match=rf"config\.json'.*{told}.*remove the folder and train again"):
            read_card(str(folder))


def test_no_folder_is_no_card(tmp_path):
    """A crash where `train` only asks whether a model is there."""
    assert read_card(str(tmp_path / "nothing")) is None


def test_predictions_do_not_depend_on_the_batch(model, table):
    """Rows that see their neighbours, or a last short batch at the wrong place."""
    together = predict_table(model, table)["topic"]
    assert together.dtype == np.float32
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-6)
    for batch_size in (1, 7, 49):
        np.testing.assert_allclose(predict_table(model, table, batch_size=batch_size)["topic"], together, atol=1e-6)


@pytest.mark.parametrize("dropped", [["image"], ["text"], ["image", "text"]])
def test_a_dropped_modality_counts_as_absent(model, table, dropped):
    """A subset's score that still sees the dropped modality."""
    absent = {m: p & (m not in dropped) for m, p in table.present.items()}
    without = FeatureTable(**{**vars(table), "present": absent})
    got = predict_table(model, table, drop=dropped)["topic"]
    assert np.array_equal(got, predict_table(model, without)["topic"])
    assert not np.array_equal(got, predict_table(model, table)["topic"])


def test_features_of_another_encoder_are_refused(model, table):
    """A shape error deep in torch, or worse none, after the encoder was changed."""
    narrower = FeatureTable(**{**vars(table), "features": {**table.features, "image": table.features["image"][:, :5]}})
    with pytest.raises(DataError, match=r"'image' are 5 wide .* 8"):
        predict_table(model, narrower)
    dense = FeatureTable(**{**vars(table), "features": {**table.features, "text": table.features["text"].toarray()}})
    with pytest.raises(DataError, match="dense"):
        predict_table(model, dense)
    with pytest.raises(DataError, match="'text'"):
        predict_table(model, FeatureTable(**{**vars(table), "features": {"image": table.features["image"]}}))
