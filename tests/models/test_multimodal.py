"""The assembled model: absent modalities, shared work, sparse features, logistic regression as its simplest case."""

import itertools
import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from mmkt_ray.models import InputSpec, ModelSpec, MultimodalModel, SparseBatch
from mmkt_ray.models.sharing import SCHEMES
from mmkt_ray.models.sparse import SparseLinear
from mmkt_ray.models.towers import Tower

B = 9
FUSED = [("concat", 1), ("hierarchical", 3), ("decision", 1)]


def make_spec(schemes=("task",), fusion="concat", depth=1, dims=None, sparse=("text",), dropout=0.0):
    dims = dims or {"image": 4, "text": 7}
    inputs = {m: InputSpec(d, m in sparse, min(6, d)) for m, d in dims.items()}
    return ModelSpec(inputs, {"a": 2, "b": 3}, fusion, depth, tuple(schemes), 6, dropout, dropout)


def sparse_batch(matrix):
    matrix = sp.csr_matrix(matrix, dtype=np.float32)
    return SparseBatch(
        *(torch.from_numpy(x) for x in (matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64), matrix.data))
    )


def make_batch(spec, seed=0):
    rng = np.random.default_rng(seed)
    features = {}
    for m, i in spec.modalities.items():
        x = rng.normal(size=(B, i.dim)).astype(np.float32)
        features[m] = sparse_batch(x * (rng.random(x.shape) < 0.4)) if i.sparse else torch.from_numpy(x)
    present = {m: torch.from_numpy(rng.random(B) < 0.6) for m in features}
    return features, present


def garbage(features, present, rng):
    """The same features with absent rows replaced by something wild."""
    out = {}
    for m, x in features.items():
        if isinstance(x, SparseBatch):
            absent = torch.repeat_interleave(~present[m], x.offsets.diff())
            out[m] = x._replace(values=torch.where(absent, torch.tensor(1e3 * rng.normal()).float(), x.values))
        else:
            out[m] = torch.where(present[m][:, None], x, torch.tensor([np.nan, np.inf, -1e9, 3.0]))
    return out


@pytest.mark.parametrize(("fusion", "depth"), FUSED)
@pytest.mark.parametrize("schemes", [(), *((s,) for s in SCHEMES), ("separate", "task_modality")])
def test_what_an_absent_modality_holds_has_no_influence(fusion, depth, schemes):
    """A mask that is applied before a tower with a bias only, multiplied onto NaN, or forgotten for sparse features."""
    model = MultimodalModel(make_spec(schemes, fusion, depth)).eval()
    features, present = make_batch(model.spec)
    wild = garbage(features, present, np.random.default_rng(1))
    for t, logits in model(features, present).items():
        assert torch.equal(logits, model(wild, present)[t])
        assert torch.isfinite(logits).all()


def test_garbage_in_absent_rows_reaches_no_gradient():
    """0 * NaN in the backward pass of a masked row."""
    model = MultimodalModel(make_spec(("task_modality",), "hierarchical", 2))
    features, present = make_batch(model.spec)
    sum(x.sum() for x in model(garbage(features, present, np.random.default_rng(1)), present).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("scheme", "runs"), [("separate", 4), ("task", 2), ("modality", 4), ("task_modality", 2)])
def test_a_signal_passes_a_tower_once(scheme, runs, monkeypatch):
    """Work done again for every task that shares a tower; two modalities' signals taken for one in a shared tower."""
    calls = []
    forward = Tower.forward
    monkeypatch.setattr(Tower, "forward", lambda self, x: calls.append(self) or forward(self, x))
    model = MultimodalModel(make_spec((scheme, scheme)))
    model(*make_batch(model.spec))
    assert len(calls) == 2 * runs


def test_tasks_that_share_all_towers_share_the_fusion():
    """A fusion of its own for each task under a trunk that all tasks share, or one for all where they share none."""
    fusions = {s: len(MultimodalModel(make_spec((s,), "hierarchical")).fusions) for s in SCHEMES}
    assert fusions == {"separate": 2, "architecture": 2, "task": 1, "modality": 2, "task_modality": 1}
    assert len(MultimodalModel(make_spec((), "hierarchical")).fusions) == 2


@given(
    schemes=st.lists(st.sampled_from(sorted(SCHEMES)), max_size=3),
    fused=st.sampled_from(FUSED),
    dims=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    sparse=st.sets(st.integers(0, 2)),
)
@settings(max_examples=40, deadline=None)
def test_any_order_of_levels_builds_trains_and_comes_back_from_json(schemes, fused, dims, sparse):
    """Widths that do not meet between levels; a parameter without a gradient (which stops DDP); a spec that JSON changes."""
    names = [f"m{i}" for i in range(len(dims))]
    spec = make_spec(schemes, *fused, dims=dict(zip(names, dims, strict=True)), sparse={f"m{i}" for i in sparse})
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    model = MultimodalModel(spec)
    features, present = make_batch(spec)
    logits = model(features, present)
    assert {t: tuple(x.shape) for t, x in logits.items()} == {"a": (B, 2), "b": (B, 3)}
    sum(x.square().sum() for x in logits.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(model.num_parameters_by_part().values()) == sum(p.numel() for p in model.parameters())


def test_the_same_seed_builds_the_same_model():
    """Initialisation that follows the order in which modalities were named."""
    spec = make_spec(("separate", "task"))
    turned = ModelSpec(
        **{**vars(spec), "modalities": dict(reversed(spec.modalities.items())), "tasks": {"b": 3, "a": 2}}
    )
    states = []
    for s in (spec, turned):
        torch.manual_seed(3)
        states.append(MultimodalModel(s).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_sparse_linear_layer_is_the_dense_one():
    """Columns or empty rows mixed up in the sorted backward pass."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(7, 11)) * (rng.random((7, 11)) < 0.3)).astype(np.float32)
    x[3] = x[6] = 0
    layer = SparseLinear(11, 4)
    y = layer(sparse_batch(x))
    torch.testing.assert_close(y, torch.from_numpy(x) @ layer.weight + layer.bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(layer.weight.grad, torch.from_numpy(x).T @ grad)


def test_sparse_and_dense_features_give_the_same_model():
    """A second meaning of the same features because they were kept sparse."""
    dense = MultimodalModel(make_spec((), sparse=())).eval()
    sparse = MultimodalModel(make_spec((), sparse=("text",))).eval()
    with torch.no_grad():
        for t, head in dense.heads.items():
            sparse.heads[t].parts["[image]"].weight.copy_(head.parts["[image]"].weight)
            sparse.heads[t].parts["[text]"].weight.copy_(head.parts["[text]"].weight.T)
    image, text = torch.randn(B, 4), np.random.default_rng(0).normal(size=(B, 7)).astype(np.float32)
    present = {m: torch.ones(B, dtype=torch.bool) for m in ("image", "text")}
    expected = dense({"image": image, "text": torch.from_numpy(text)}, present)
    got = sparse({"image": image, "text": sparse_batch(text)}, present)
    for t in expected:
        torch.testing.assert_close(got[t], expected[t])


def test_without_levels_concat_is_logistic_regression():
    """A hidden layer or a norm between features and head, so that the simplest model is not the baseline it claims to be."""
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(300, 4)).astype(np.float32), "text": rng.normal(size=(300, 7)).astype(np.float32)}
    together = np.hstack([x["image"], x["text"]])
    y = (together @ rng.normal(size=(11, 3)) + rng.gumbel(size=(300, 3))).argmax(1)
    model = MultimodalModel(make_spec((), sparse=()))
    features = {m: torch.from_numpy(v) for m, v in x.items()}
    present = {m: torch.ones(300, dtype=torch.bool) for m in x}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        penalty = sum(w.square().sum() for w in model.heads["[b]"].parts.parameters())
        value = F.cross_entropy(model(features, present)["b"], torch.from_numpy(y), reduction="sum") + penalty / 2
        value.backward()
        return value

    optimizer.step(loss)
    expected = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(together, y).predict_proba(together)
    np.testing.assert_allclose(model(features, present)["b"].softmax(1).detach().numpy(), expected, atol=2e-3)


def test_dropout_is_off_in_eval_mode_and_on_in_training():
    """Feature dropout that is never applied to sparse values, or stays on when predicting."""
    model = MultimodalModel(make_spec((), dropout=0.5))
    features, _ = make_batch(model.spec)
    present = {m: torch.ones(B, dtype=torch.bool) for m in features}
    for m, other in itertools.permutations(features):
        only = {m: present[m], other: torch.zeros(B, dtype=torch.bool)}
        assert not torch.equal(model.train()(features, only)["a"], model(features, only)["a"])
        assert torch.equal(model.eval()(features, only)["a"], model(features, only)["a"])
