"""What stands in for missing modalities, modality dropout, and the maps that generate features."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import Ridge

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.models import MultimodalModel, build_spec
from mmkt_ray.models.imputation import FILLS, Generators, fit_ridge, hide_modalities, mean_squared_norm, ridge
from mmkt_ray.models.towers import Width
from tests.models.examples import B, everywhere, make_batch, make_spec, sparse_batch


def fitted(missing, sparse=(), inputs=None, **changes):
    """A model without towers, so that signals are what the input stages hand on,
    with statistics away from 0 and 1."""
    model = MultimodalModel(make_spec((), missing=missing, sparse=sparse, inputs=inputs, **changes)).eval()
    for m, i in model.spec.modalities.items():
        shape = () if i.sparse else (i.dim,)
        model.inputs[f"[{m}]"].set_statistics(torch.rand(shape) + 1, torch.rand(shape) + 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("missing", ["mean", "zero", "token"])
def test_dense_fills(missing):
    """Catches zeros filled after standardisation, where they are the mean; a fill of rows that have the modality."""
    model = fitted(missing)
    stage = model.inputs["[image]"]
    features, _ = make_batch(model.spec)
    seen = {"image": torch.arange(B) % 2 == 0, "text": torch.ones(B, dtype=torch.bool)}
    signals, present = model.encode(features, seen)
    token = torch.zeros(4) if stage.token is None else stage.token
    stand_in = {"mean": stage.mean, "zero": torch.zeros(4), "token": token * stage.std + stage.mean}[missing]
    raw = torch.where(seen["image"][:, None], features["image"], stand_in.detach())
    torch.testing.assert_close(signals["a", "image"].detach(), (raw - stage.mean) / stage.std)
    assert all(p.all() for p in present.values()), "what is filled is present"


@pytest.mark.parametrize("missing", ["mask", "drop", *FILLS])
def test_what_counts_as_present(missing):
    """Catches a row with nothing that becomes a row with everything; a fill that the fusion then leaves out."""
    model = fitted(missing, dims={"audio": 3, "image": 4, "text": 7}, fusion="gated")
    features, _ = make_batch(model.spec)
    rows = torch.arange(B)
    seen = {"audio": rows > 7, "image": rows > 5, "text": rows > 3}
    present = model.encode(features, seen)[1]
    for m in seen:
        assert torch.equal(present[m], rows > 3 if missing in FILLS else seen[m])
    empty = model(features, {m: rows < 0 for m in seen})
    for logits in empty.values():
        assert torch.equal(logits, logits[:1].expand_as(logits)), "nothing there: the same prediction for all rows"


@pytest.mark.parametrize("missing", ["mean", "zero"])
def test_sparse_fills_are_empty_rows(missing):
    """Catches values left in the rows of an absent modality now that it counts as present."""
    model = fitted(missing, sparse=("text",))
    features, present = make_batch(model.spec)
    text = model.encode(features, present)[0]["a", "text"]
    absent = torch.repeat_interleave(~present["text"], text.offsets.diff())
    assert absent.any()
    assert not text.values[absent].any()
    torch.testing.assert_close(text.values[~absent], (features["text"].values / model.inputs["[text]"].std)[~absent])


def test_a_sparse_token_is_a_vector_of_its_own_in_every_map_that_reads_it():
    """Catches a token that is learned and never used in prediction;
    one that also marks rows which have the modality."""
    model = fitted("token", sparse=("text",))
    features, present = make_batch(model.spec)
    logits = model(features, present)["a"]
    token = model.heads["[a]"].parts["[text]"].weight[7]
    with torch.no_grad():
        token += 1
    moved = model(features, present)["a"] - logits
    filled = ~present["text"] & present["image"]
    assert filled.any()
    torch.testing.assert_close(moved, torch.where(filled[:, None], 1.0, 0.0).expand(B, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sparse", [(), ("text",)])
def test_tokens_learn_from_rows_that_lack_the_modality_only(sparse):
    """Catches a token that gets no gradient, or one from rows where it does not stand in."""
    model = fitted("token", sparse=sparse)
    features, _ = make_batch(model.spec)
    for missing_rows in (0, 3):
        model.zero_grad()
        present = {"image": torch.ones(B, dtype=torch.bool), "text": torch.arange(B) >= missing_rows}
        model(features, present)["a"].square().sum().backward()
        weights = model.heads["[a]"].parts["[text]"].weight.grad
        token = weights[7] if sparse else model.inputs["[text]"].token.grad
        assert bool(token.any()) == (missing_rows > 0)


def test_modality_dropout_hides_each_with_its_chance_and_leaves_one():
    """Catches rows with nothing left, modalities that appear from nowhere, a wrong chance, one modality preferred."""
    torch.manual_seed(0)
    there = {"audio": torch.ones(40_000, dtype=torch.bool), "text": torch.arange(40_000) % 4 != 0}
    kept = hide_modalities(there, 0.3, [("audio", "text")])
    assert all((there[m] | ~kept[m]).all() for m in there)
    assert torch.stack(list(kept.values())).any(dim=0).all()
    alone = ~there["text"]
    assert kept["audio"][alone].all()
    for m in there:  # hidden: it falls, and not both fall and the draw keeps it
        expected = 0.3 - 0.3**2 / 2
        assert abs(1 - kept[m][~alone].float().mean() - expected) < 4 * math.sqrt(expected / 30_000)


def test_modality_dropout_leaves_every_task_something_of_its_own():
    """Catches a task that reads the image only and is trained on rows where the text alone stayed."""
    torch.manual_seed(0)
    there = {m: torch.arange(3000) % k != 0 for m, k in (("audio", 3), ("image", 5), ("text", 7))}
    reads = [("image",), ("audio", "text"), ("audio", "image", "text")]
    kept = hide_modalities(there, 0.9, reads)
    for names in reads:
        had, has = (torch.stack([p[m] for m in names]).any(dim=0) for p in (there, kept))
        assert torch.equal(had, has)
    assert not all(torch.equal(there[m], kept[m]) for m in there)


def test_modality_dropout_is_for_training():
    """Catches modalities hidden in prediction, or never in training."""
    torch.manual_seed(0)
    model = fitted("mask", modality_dropout=0.5)
    features, _ = make_batch(model.spec)
    present = everywhere(features, "image", "text")
    assert all(p.all() for p in model.encode(features, present)[1].values())
    hidden = model.train().encode(features, present)[1]
    assert not all(p.all() for p in hidden.values())


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
@pytest.mark.parametrize("sparse", [False, True])
def test_ridge_is_scikit_learns(shape, sparse):
    """Catches a penalised intercept, sparse rows that are not centred, the wrong Gram matrix."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * (rng.random(shape) < 0.5) + 0.3 * (rng.random(shape) < 0.1)
    y = rng.normal(size=(shape[0], 3)) + 2
    expected = Ridge(alpha=2.5).fit(x, y)
    weight, bias = ridge(sp.csr_matrix(x) if sparse else x, y, 2.5)
    np.testing.assert_allclose(weight, expected.coef_.T, atol=1e-4)
    np.testing.assert_allclose(bias, expected.intercept_, atol=1e-4)


@pytest.mark.parametrize("noise", [0.01, 30.0])
def test_the_penalty_follows_the_noise(noise):
    """Catches one penalty for all: too much for what is clear, or too little for what is noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 40))
    y = x @ rng.normal(size=(40, 2)) + noise * rng.normal(size=(60, 2))
    weight, _ = fit_ridge(x, y)
    strength = {p: ridge(x, y, p * mean_squared_norm(x)) for p in (0.01, 100.0)}
    np.testing.assert_array_equal(weight, strength[0.01 if noise < 1 else 100.0][0])


def correlated(rng, num_rows=400):
    """Rows of image (4), text (7) and audio (3) that follow the same two numbers."""
    z = rng.normal(size=(num_rows, 2))
    dims = {"audio": 3, "image": 4, "text": 7}
    return {m: (3 * z @ rng.normal(size=(2, d)) + 5 + 0.01 * rng.normal(size=(num_rows, d))) for m, d in dims.items()}


@pytest.mark.parametrize("sparse", [(), ("text",)])
def test_generated_features_are_near_the_true_ones(sparse):
    """Catches maps in the wrong space (raw and standardised mixed up), sources and targets exchanged,
    a map left at zero."""
    rng = np.random.default_rng(0)
    rows = {m: x.astype(np.float32) for m, x in correlated(rng).items()}
    model = MultimodalModel(make_spec((), dims={m: x.shape[1] for m, x in rows.items()}, sparse=sparse)).eval()
    model.generators = Generators(
        {m: Width(x.shape[1], m in sparse) for m, x in rows.items()}, {"image": ["audio", "text"]}
    )
    for m, x in rows.items():
        statistics = (0.0, float(np.sqrt((x**2).mean()))) if m in sparse else (x.mean(0), x.std(0))
        model.inputs[f"[{m}]"].set_statistics(*map(torch.as_tensor, statistics))
    train = {m: sp.csr_matrix(x) if m in sparse else x for m, x in rows.items()}
    both = {m: rng.random(400) < 0.7 for m in rows}
    model.fit_generators(train, both)
    stage = model.inputs["[image]"]
    true = (torch.from_numpy(rows["image"][:B]) - stage.mean) / stage.std
    features = {m: sparse_batch(x[:B]) if m in sparse else torch.from_numpy(x[:B]) for m, x in rows.items()}
    for sources in (("audio",), ("text",), ("audio", "text")):
        got = model.encode(features, everywhere(features, *sources))[0]["a", "image"]
        assert (got - true).abs().mean() < 0.1 * true.abs().mean()
    nothing = model.encode(features, everywhere(features))[0]["a", "image"]
    assert not nothing.any(), "the mean, where there is no source"


def test_generating_is_kept_with_the_model():
    """Catches maps that are no part of the saved state, or that training would change."""
    rng = np.random.default_rng(0)
    rows = {m: x.astype(np.float32) for m, x in correlated(rng).items()}
    dims = {m: x.shape[1] for m, x in rows.items()}
    model = MultimodalModel(make_spec(dims=dims, sparse=(), missing="generate"))
    model.fit_generators(rows, {m: np.ones(400, dtype=bool) for m in rows})
    again = MultimodalModel(model.spec)
    again.load_state_dict(model.state_dict())
    features = {m: torch.from_numpy(x[:B]) for m, x in rows.items()}
    present = everywhere(features, "text")
    assert model.generators.maps["[image,text]"].weight.any()
    assert not any("generators" in name for name, _ in model.named_parameters())
    for t, logits in model.eval()(features, present).items():
        assert torch.equal(logits, again.eval()(features, present)[t])


def test_generated_features_carry_nothing_from_what_a_task_may_not_read():
    """Catches a task restricted to image and audio that gets its image from the text."""
    dims = {"audio": 3, "image": 4, "text": 7}
    spec = make_spec(dims=dims, sparse=(), missing="generate", inputs={"a": ["image", "audio"]})
    assert MultimodalModel(spec).generators.sources == {
        "audio": ["image"],
        "image": ["audio"],
        "text": ["audio", "image"],
    }


def test_nothing_to_learn_to_generate_from_is_said():
    """Catches unpaired corpora whose generated features are silently the mean."""
    model = MultimodalModel(make_spec(sparse=(), missing="generate"))
    rows = np.arange(6)
    features = {"image": np.ones((6, 4), np.float32), "text": np.ones((6, 7), np.float32)}
    with pytest.raises(DataError, match="together"):
        model.fit_generators(features, {"image": rows < 3, "text": rows >= 3})


def test_generating_sparse_features_is_refused(make_config):
    """Catches a model that would have to make rows as wide as a vocabulary."""
    with pytest.raises(ConfigError, match=r"add modalities\.text\.reduce"):
        make_config(model__missing="generate")
    config = make_config(model__missing="generate", modalities__text__reduce="standardize")  # which may stay sparse
    dims, sparse = dict.fromkeys(config.model_modalities, 5), dict.fromkeys(config.model_modalities, True)
    with pytest.raises(ConfigError, match="reduce"):
        build_spec(config, dims, sparse, dict.fromkeys(config.model_tasks, 3))
    assert build_spec(config, dims, dict.fromkeys(sparse, False), dict.fromkeys(config.model_tasks, 3))
