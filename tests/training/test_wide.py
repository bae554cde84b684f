"""`model.wide`: a linear model beside the network, with a share that held-out rows choose."""

import copy

import numpy as np
import pytest

from mmkt_ray.errors import DataError
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import check_card, read_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_logits
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.scoring.heldout import load_heldout
from mmkt_ray.training import linear, trainer
from mmkt_ray.training.fingerprint import linear_place, model_identity
from mmkt_ray.training.trainer import train
from mmkt_ray.training.wide import best_share, is_wide, wide_config
from tests.labels import MISSING, labels_of
from tests.training.test_trainer import write_store

SETTINGS = {"training.auto": ["training.lr", "model.dropout"], "training.steps": 20}


@pytest.fixture(scope="module")
def make_wide(make_config):
    """A config of a wide model."""
    return lambda **overrides: make_config(**{**SETTINGS, **overrides})


@pytest.fixture(scope="module")
def trained(make_wide, table, tmp_path_factory):
    """The store, and the folder of the models: `wide`, and `network`, which is the same without a linear model."""
    folder = tmp_path_factory.mktemp("models")
    store = write_store(str(folder / "store"), table)
    for name, wide in (("wide", True), ("network", False)):
        train(make_wide(**{"model.wide": wide}), store, str(folder / name))
    return store, str(folder)


# --- shares ---------------------------------------------------------------------------------------------------------


def test_the_share_is_that_of_the_lowest_loss():
    """Catches a share that ignores the rows, the wrong model's share, and temperatures that are left out."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    labels = labels_of(y)
    truth = 2 * np.eye(3)[y]
    noise = rng.normal(size=(2, 600, 3))
    one, other = truth + noise[0], truth + noise[1]
    share, (a, b) = best_share(one, other, labels)
    assert 0.3 <= share <= 0.7
    both, alone, alone_too = (Multiclass().each_loss(z, labels).mean() for z in (a * one + b * other, one, other))
    assert both < min(alone, alone_too) - 0.02
    assert best_share(one, 9 * noise[1], labels)[0] >= 0.9
    assert best_share(9 * noise[0], one, labels)[0] <= 0.1
    scaled = best_share(one, 10 * other, labels)
    np.testing.assert_allclose(scaled[1], (a, b / 10), rtol=0.1)


def test_without_a_known_label_the_network_keeps_all():
    """Catches the mean of no row."""
    assert best_share(np.ones((2, 3)), np.zeros((2, 3)), labels_of(np.full(2, MISSING))) == (1.0, (1.0, 0.0))


# --- which models are wide ------------------------------------------------------------------------------------------


def test_given_settings_and_other_class_frequencies_have_no_linear_model(make_wide, make_config):
    """Catches a linear model beside one that corrects class frequencies, which would undo the correction, and one
    beside a model whose settings the user gave."""
    assert is_wide(make_wide())
    assert is_wide(make_wide(**{"training.balance": "ogm_ge"}))
    assert not is_wide(make_config())
    for change in ({"model.wide": False}, {"training.logit_adjustment": 1.0}, {"training.resample": "balanced"}):
        assert not is_wide(make_wide(**change)), change
    assert wide_config(make_wide(**{"training.class_weights": "balanced"})).training.class_weights == "balanced"
    assert linear.is_linear(wide_config(make_wide(**{"training.class_weights": "balanced", "model.missing": "token"})))
    assert model_identity(make_config(**{"model.wide": False})) == model_identity(make_config())


# --- the model ------------------------------------------------------------------------------------------------------


def test_a_wide_model_is_its_network_and_the_linear_model(trained, make_wide, table):
    """Catches shares of the wrong task, a linear model of other rows, and held-out predictions of one part alone."""
    uri, folder = trained
    every = open_store(uri).table()
    place = linear_place(wide_config(make_wide()), open_store(uri), folder)
    places = {"wide": f"{folder}/wide", "network": f"{folder}/network", "linear": place}
    models = {name: load_model(where)[0] for name, where in places.items()}
    held = {name: load_heldout(where) for name, where in places.items()}
    card = read_card(places["wide"])
    assert set(card.fit.wide) == {"topic", "mood"}
    assert all(0 <= share <= 1 for share in card.fit.wide.values())
    assert min(card.fit.wide.values()) < 1
    scales = dict(zip(models["wide"].reads, models["wide"].scales.tolist(), strict=True))
    for drop in ([], ["image"], ["text"]):
        logits = {name: predict_logits(model, every, drop=drop) for name, model in models.items()}
        for t, (a, b) in scales.items():
            expected = a * logits["network"][t] + b * logits["linear"][t]
            np.testing.assert_allclose(logits["wide"][t], expected, atol=1e-4)
    for given, by_task in held["wide"].logits.items():
        for t, z in by_task.items():
            a, b = scales[t]
            expected = a * held["network"].logits[given][t] + b * held["linear"].logits[given][t]
            np.testing.assert_allclose(z, expected, atol=1e-4)
    assert card.fit.num_params_by_part["wide"] == sum(p.numel() for p in models["linear"].parameters())
    assert card.fit.num_params == sum(p.numel() for p in models["wide"].parameters())


def test_the_linear_model_is_solved_once(trained, make_wide, tmp_path, monkeypatch):
    """Catches a linear model of its own for each seed and sharing scheme."""
    uri, folder = trained
    solved = []
    real = trainer.linear_result
    monkeypatch.setattr(trainer, "linear_result", lambda *args: solved.append(1) or real(*args))
    for name, change in (("a", {"training.seed": 5}), ("b", {"model.sharing": "separate"})):
        assert train(make_wide(**change), uri, str(tmp_path / name), folder).wide is not None
    assert not solved


def test_where_training_cannot_be_held_out_val_decides(trained, make_wide, table, tmp_path):
    """Catches val rows that the linear model had learnt from:
    its out-of-fold predictions decide, and are the model's."""
    uri, folder = trained
    one = str(tmp_path / "balanced")
    summary = train(make_wide(**{"training.balance": "ogm_ge"}), uri, one, folder)
    held, store = load_heldout(one), open_store(uri)
    assert summary.val.on == held.on == "val"
    assert set(open_store(uri).table().split[held.rows]) == {"val"}
    known = load_heldout(linear_place(wide_config(make_wide()), store, folder))
    model = load_model(one)[0]
    a, b = model.scales[list(model.reads).index("topic")].tolist()
    network = copy.deepcopy(model)
    network.wide = None
    alone = predict_logits(network, store.table().take(held.rows))["topic"]
    of_linear = known.logits["image+text"]["topic"][np.isin(known.rows, held.rows)]
    np.testing.assert_allclose(held.logits["image+text"]["topic"], a * alone + b * of_linear, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"schemes": ["task"]},
        {"tasks": {"topic": 4, "mood": 2}},
        {"inputs": {"topic": ["image"], "mood": ["image"]}},
        {"wide": "itself"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_linear_model_that_is_none_is_refused(trained, change):
    """Catches layers without end, and a linear model that reads or predicts something else."""
    card = read_card(f"{trained[1]}/wide")
    spec = copy.deepcopy(card.spec)
    spec["wide"] |= {"wide": copy.deepcopy(spec["wide"])} if "wide" in change else change
    with pytest.raises(DataError, match="damaged"):
        check_card("model", card.replaced(spec=spec))
