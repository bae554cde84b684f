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
from torch.func import functional_call

from mmkt_ray.config import MISSING_STRATEGIES, SCHEME_NAMES
from mmkt_ray.kinds.multiclass import Binary, Multiclass
from mmkt_ray.models import ModelSpec, MultimodalModel
from mmkt_ray.models.sparse import SparseLinear, append_column
from mmkt_ray.models.towers import Tower
from tests.models.examples import FUSIONS_TO_TRY, B, garbage, make_batch, make_spec, sparse_batch


@pytest.mark.parametrize("fusion", FUSIONS_TO_TRY)
@pytest.mark.parametrize("schemes", [(), *((s,) for s in SCHEME_NAMES), ("separate", "mmoe", "cross_stitch")])
@pytest.mark.parametrize("missing", ["mask", "zero", "token"])
def test_what_an_absent_modality_holds_has_no_influence(fusion, schemes, missing):
    """Catches a mask before a tower with a bias only, one multiplied onto NaN,
    or one forgotten for sparse features."""
    model = MultimodalModel(make_spec(schemes, fusion, missing=missing)).eval()
    features, present = make_batch(model.spec)
    wild = garbage(features, present)
    for t, logits in model(features, present).items():
        assert torch.equal(logits, model(wild, present)[t])
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("fusion", FUSIONS_TO_TRY)
@pytest.mark.parametrize("scheme", ["task_modality", "cross_stitch", "mmoe"])
def test_garbage_in_absent_rows_reaches_no_gradient(fusion, scheme):
    """Catches 0 * NaN in the backward pass of a masked row."""
    model = MultimodalModel(make_spec((scheme,), fusion))
    features, present = make_batch(model.spec)
    sum(x.sum() for x in model(garbage(features, present), present).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("missing", MISSING_STRATEGIES)
@pytest.mark.parametrize("schemes", [("mmoe", "cross_stitch"), ("task_modality", "separate")])
def test_a_row_does_not_depend_on_the_rows_beside_it(schemes, missing):
    """Catches statistics, gates or fills taken over the batch."""
    model = MultimodalModel(make_spec(schemes, "gated", sparse=(), missing=missing)).eval()
    features, present = make_batch(model.spec)
    together = model(features, present)
    for b in range(B):
        row = slice(b, b + 1)
        alone = model({m: x[row] for m, x in features.items()}, {m: p[row] for m, p in present.items()})
        for t in together:
            torch.testing.assert_close(alone[t], together[t][row])


@pytest.mark.parametrize(
    ("scheme", "runs"), [("separate", 4), ("task", 2), ("modality", 4), ("task_modality", 2), ("cross_stitch", 4)]
)
def test_a_signal_passes_a_tower_once(scheme, runs, monkeypatch):
    """Catches work done again for every task that shares a tower;
    two modalities' signals taken for one in a shared tower."""
    calls = []
    forward = Tower.forward
    monkeypatch.setattr(Tower, "forward", lambda self, x: calls.append(self) or forward(self, x))
    model = MultimodalModel(make_spec((scheme, scheme)))
    model(*make_batch(model.spec))
    assert len(calls) == 2 * runs


@pytest.mark.parametrize("scheme", ["task", "task_modality"])
def test_experts_work_once_on_a_signal_that_all_pairs_of_a_modality_share(scheme, monkeypatch):
    """Catches experts that run for every task on the same signal."""
    calls = []
    forward = Tower.forward
    monkeypatch.setattr(Tower, "forward", lambda self, x: calls.append(self) or forward(self, x))
    model = MultimodalModel(make_spec((scheme, "mmoe")))
    model(*make_batch(model.spec))
    assert len(calls) == 2 + 2 * model.spec.mmoe_experts


def test_tasks_that_share_all_towers_share_the_fusion():
    """Catches a fusion of its own for each task under a trunk that all tasks share,
    or one for all where they share none."""
    fusions = {s: len(MultimodalModel(make_spec((s,), "hierarchical")).fusions) for s in SCHEME_NAMES}
    shared = {"task", "task_modality"}
    assert fusions == {s: 1 if s in shared else 2 for s in SCHEME_NAMES}
    assert len(MultimodalModel(make_spec((), "hierarchical")).fusions) == 2


@given(
    schemes=st.lists(st.sampled_from(SCHEME_NAMES), max_size=3),
    fusion=st.sampled_from(sorted(FUSIONS_TO_TRY)),
    dims=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    sparse=st.sets(st.integers(0, 2)),
    missing=st.sampled_from(MISSING_STRATEGIES),
    reads=st.tuples(*[st.sets(st.integers(0, 2), min_size=1)] * 2),
)
@settings(max_examples=80, deadline=None)
@pytest.mark.slow
def test_any_order_of_levels_builds_trains_and_comes_back_from_json(schemes, fusion, dims, sparse, missing, reads):
    """Catches widths that do not meet between levels; a parameter without a gradient (which stops DDP); a spec that
    JSON changes; a modality that no task reads."""
    names = [f"m{i}" for i in range(len(dims))]
    inputs = {
        t: [n for i, n in enumerate(names) if i in chosen] or names for t, chosen in zip("ab", reads, strict=True)
    }
    dims, kept = dict(zip(names, dims, strict=True)), {f"m{i}" for i in sparse} if missing != "generate" else ()
    spec = make_spec(schemes, fusion, dims, kept, inputs, missing=missing, modality_dropout=0.5)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    model = MultimodalModel(spec)
    features, present = make_batch(spec)
    logits = model(features, present)
    assert {t: tuple(x.shape) for t, x in logits.items()} == {"a": (B, 2), "b": (B, 3)}
    sum(x.square().sum() for x in logits.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert sum(model.num_parameters_by_part().values()) == sum(p.numel() for p in model.parameters())


def test_the_same_seed_builds_the_same_model():
    """Catches initialisation that follows the order in which modalities were named."""
    spec = make_spec(("separate", "task"))
    turned = ModelSpec(
        **{
            **vars(spec),
            "modalities": dict(reversed(spec.modalities.items())),
            "inputs": {"b": ("text", "image"), "a": ("text", "image")},
            "tasks": {"b": 3, "a": 2},
        }
    )
    states = []
    for s in (spec, turned):
        torch.manual_seed(3)
        states.append(MultimodalModel(s).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_sparse_linear_layer_is_the_dense_one():
    """Catches columns or empty rows mixed up in the sorted backward pass."""
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
    """Catches a second meaning of the same features because they were kept sparse."""
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
    """Catches a hidden layer or a norm between features and head, so that the simplest model is no baseline."""
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(300, 4)).astype(np.float32), "text": rng.normal(size=(300, 7)).astype(np.float32)}
    together = np.hstack([x["image"], x["text"]])
    y = (together @ rng.normal(size=(11, 3)) + rng.gumbel(size=(300, 3))).argmax(1)
    model = MultimodalModel(make_spec((), sparse=(), kinds={"a": Binary(), "b": Multiclass()}))
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
    """Catches feature dropout that is never applied to sparse values, or stays on when predicting."""
    model = MultimodalModel(make_spec((), dropout=0.5))
    features, _ = make_batch(model.spec)
    present = {m: torch.ones(B, dtype=torch.bool) for m in features}
    for m, other in itertools.permutations(features):
        only = {m: present[m], other: torch.zeros(B, dtype=torch.bool)}
        assert not torch.equal(model.train()(features, only)["a"], model(features, only)["a"])
        assert torch.equal(model.eval()(features, only)["a"], model(features, only)["a"])


@pytest.mark.parametrize("fusion", FUSIONS_TO_TRY)
@pytest.mark.parametrize("schemes", [("separate", "mmoe"), ("task", "cross_stitch")])
def test_deciding_on_what_was_encoded_is_the_forward_pass(fusion, schemes):
    """Catches a step of `forward` that `encode` and `decide` leave out;
    a signal replaced for one task that another reads."""
    model = MultimodalModel(make_spec(schemes, fusion, missing="token")).eval()
    features, present = make_batch(model.spec)
    logits = model(features, present)
    signals, seen = model.encode(features, present)
    assert {pair: tuple(x.shape) for pair, x in signals.items()} == {(t, m): (B, 6) for t in "ab" for m in present}
    assert all(torch.equal(x, logits[t]) for t, x in model.decide(signals, seen).items())
    changed = model.decide(signals | {("a", "image"): signals["a", "image"] + 1}, seen)
    assert not torch.equal(changed["a"], logits["a"])
    assert torch.equal(changed["b"], logits["b"])


@pytest.mark.parametrize(
    "schemes", [(), ("task",), ("modality",), ("task_modality", "separate"), ("mmoe", "cross_stitch")]
)
@pytest.mark.parametrize("fusion", ["concat", "attention", "decision"])
def test_a_task_sees_its_inputs_only(schemes, fusion):
    """Catches a task that reads a modality it may not; one whose shared fusion expects the other task's
    modalities."""
    model = MultimodalModel(make_spec(schemes, fusion, inputs={"a": ["image"]}, sparse=(), missing="token")).eval()
    features, present = make_batch(model.spec)
    logits = model(features, present)
    other = model(features | {"text": features["text"] + 1}, present)
    assert torch.equal(logits["a"], other["a"])
    assert torch.equal((logits["b"] != other["b"]).any(dim=1), present["text"])
    assert len(model.fusions) == 2
    assert ("a", "text") not in model.encode(features, present)[0]


SIGNAL_PATHS = [(s,) for s in SCHEME_NAMES] + [("task", "mmoe", "cross_stitch"), ("task_modality", "separate")]


@pytest.mark.parametrize("schemes", SIGNAL_PATHS)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_parameters_of_a_modality_are_those_that_its_signals_depend_on(schemes, modality):
    """Catches a shared tower, an adapter, a gate or a mixing matrix that is left out,
    or another modality's put in."""
    model = MultimodalModel(make_spec(schemes, missing="token", sparse=()))
    stages = model.modality_parameters(modality)
    assert len(stages) == 1 + len(schemes)
    assert f"inputs.[{modality}].mean" in stages[0]
    features, present = make_batch(model.spec)
    signals, _ = model.encode(features, present)
    sum(x.square().sum() for (_, m), x in signals.items() if m == modality).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    listed = [name for stage in stages for name in stage]
    assert len(listed) == len(set(listed))
    assert set(listed) & dict(model.named_parameters()).keys() == reached
    for level, stage in enumerate(stages[1:]):
        assert all(name.startswith(f"levels.{level}.") for name in stage)


@pytest.mark.parametrize("fusion", FUSIONS_TO_TRY)
@pytest.mark.parametrize("schemes", [("mmoe",), ("cross_stitch",), ("task_modality",)])
def test_models_of_one_spec_can_be_stacked(fusion, schemes):
    """Catches an axis that is taken for another one in a stack,
    and a gradient written by hand that is not torch's."""
    models = [MultimodalModel(make_spec(schemes, fusion, missing="token", sparse=())).double().eval() for _ in range(2)]
    features, present = make_batch(models[0].spec)
    batch = ({m: x.double() for m, x in features.items()}, present)
    each = [dict(model.named_parameters()) for model in models]
    stack = {name: torch.stack([p[name].detach() for p in each]).requires_grad_() for name in each[0]}
    found = functional_call(models[0], stack, batch)
    sum(x.square().sum() for x in found.values()).backward()
    for k, model in enumerate(models):
        alone = model(*batch)
        sum(x.square().sum() for x in alone.values()).backward()
        for t, logits in alone.items():
            torch.testing.assert_close(found[t][k], logits)
        for name, p in model.named_parameters():
            torch.testing.assert_close(stack[name].grad[k], p.grad)


def test_a_column_is_appended_to_a_sparse_batch():
    """Catches values that slip into the row before or after; empty rows."""
    x = np.random.default_rng(0).normal(size=(5, 4)) * np.array([1, 0, 1, 0, 1])[:, None]
    column = torch.tensor([1.0, 0, 0, 1, 1])
    got = append_column(sparse_batch(x), column, 4)
    dense = sp.csr_matrix((got.values.numpy(), got.indices.numpy(), got.offsets.numpy()), shape=(5, 5)).toarray()
    np.testing.assert_array_equal(dense, np.hstack([x, column[:, None]]).astype(np.float32))
