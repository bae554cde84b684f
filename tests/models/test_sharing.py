"""Which towers are the same parameters, over the full (task, modality) grid."""

import itertools

import pytest
import torch

from mmkt_ray import config
from mmkt_ray.models import MultimodalModel
from mmkt_ray.models.sharing import SCHEMES, module_name, shares_tasks
from tests.models.examples import make_batch, make_spec

TASKS, MODALITIES = ("a", "b"), ("audio", "image", "text")
PAIRS = list(itertools.product(TASKS, MODALITIES))
# what two pairs must have in common to share, said independently of the key functions
SHARED_IF = {
    "separate": lambda p, q: p == q,
    "architecture": lambda p, q: p == q,
    "task": lambda p, q: p[1] == q[1],
    "modality": lambda p, q: p[0] == q[0],
    "task_modality": lambda p, q: True,
}


def spec(*schemes, dim=6, fusion="concat", **changes):
    dims = dim if isinstance(dim, dict) else dict.fromkeys(MODALITIES, dim)
    return make_spec(schemes, fusion, dims, sparse=(), **changes)


def batch(model):
    features, present = make_batch(model.spec)
    return features, {m: torch.ones_like(p) for m, p in present.items()}


def storages(module):
    return {p.data_ptr() for p in module.parameters()}


def test_the_names_are_those_of_the_config():
    """Catches a scheme that the config refuses, or one that it allows and no model knows."""
    assert {*SCHEMES, "cross_stitch", "mmoe"} == set(config.SCHEME_NAMES)
    assert set(SCHEMES) == set(SHARED_IF)


@pytest.mark.parametrize(("low", "high"), list(itertools.product(SCHEMES, SCHEMES)))
def test_pairs_share_exactly_the_towers_that_the_scheme_says(low, high):
    """Catches a level that reads another level's scheme; towers built per pair though their key is the same."""
    model = MultimodalModel(spec(low, high))
    for (level, scheme), p, q in itertools.product(enumerate((low, high)), PAIRS, PAIRS):
        mine, other = (storages(model.tower(level, *pair)) for pair in (p, q))
        assert (mine == other) if SHARED_IF[scheme](p, q) else not (mine & other)


@pytest.mark.parametrize(("scheme", "shared"), [(s, s in ("task", "task_modality")) for s in SCHEMES])
@pytest.mark.parametrize("dim", [6, {"audio": 4, "image": 6, "text": 9}])
def test_a_task_trains_the_other_tasks_towers_only_where_tasks_share(scheme, shared, dim):
    """Catches knowledge that leaks between tasks through an adapter,
    a fusion or an input stage in schemes that share no task."""
    model = MultimodalModel(spec(scheme, dim=dim, fusion="hierarchical 3"))
    assert shares_tasks(scheme) == shared
    model(*batch(model))["a"].square().sum().backward()
    reached = any(p.grad is not None and p.grad.any() for m in MODALITIES for p in model.tower(0, "b", m).parameters())
    assert reached == shared
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    own = {name for name, _ in model.named_parameters() if "[b" in name}
    assert untouched == own, "exactly what belongs to task b alone is left alone"


def test_the_more_is_shared_the_fewer_parameters():
    """Catches a shared tower that is counted, or built, once for each pair."""
    towers = {s: MultimodalModel(spec(s)).num_parameters_by_part()["level_1"] for s in SCHEMES}
    one = towers["task_modality"]
    assert towers == {
        "separate": 6 * one,
        "architecture": 6 * one,
        "task": 3 * one,
        "modality": 2 * one,
        "task_modality": one,
    }


def test_separate_gives_each_modality_its_own_width():
    """Catches `separate` that is `architecture` under another name."""
    dims = {"audio": 3, "image": 4, "text": 9}
    model = MultimodalModel(spec("separate", dim=dims))
    assert [model.tower(0, "a", m).linear.out_features for m in MODALITIES] == [3, 4, 6]
    same = MultimodalModel(spec("architecture", dim=dims))
    assert [same.tower(0, "a", m).linear.out_features for m in MODALITIES] == [6, 6, 6]


@pytest.mark.parametrize(("scheme", "needed"), [(s, s in ("modality", "task_modality")) for s in SCHEMES])
def test_adapters_stand_only_before_towers_that_modalities_of_different_widths_share(scheme, needed):
    """Catches an adapter in front of features that fit as they are;
    a shared tower that can't take one of its modalities."""
    equal, different = (
        MultimodalModel(spec(scheme, dim=dim)).num_parameters_by_part()["input"]
        for dim in (6, {"audio": 4, "image": 6, "text": 9})
    )
    assert equal == 0
    assert (different > 0) == needed


@pytest.mark.parametrize(
    "names", [("type",), ("keys",), ("a.b",), ("a,b",), ("a/b",), ("a b",), (), ("a", "b"), ("forward", "weight")]
)
def test_any_name_of_a_task_or_modality_becomes_a_module(names):
    """Catches a task called `type` that torch refuses as a module name, a dot that splits a state's key."""
    modules = torch.nn.ModuleDict({module_name(*names): torch.nn.Linear(1, 1)})
    assert len(modules.state_dict()) == 2


def test_module_names_do_not_collide():
    """Catches two keys on one module because a separator occurs in a name."""
    keys = [("a,b",), ("a", "b"), ("a.b",), ("a%2Eb",), ()]
    assert len({module_name(*key) for key in keys}) == len(keys)


def randomized(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def test_cross_stitch_mixes_the_tasks_signals_of_a_modality():
    """Catches a matrix used transposed, or one that mixes modalities instead of tasks."""
    torch.manual_seed(0)
    model = randomized(MultimodalModel(spec("cross_stitch", inputs={"a": ["audio", "text"]})))
    features, present = batch(model)
    signals, _ = model.encode(features, present)
    for m in ("audio", "text"):
        a = model.levels[0].mixing[f"[{m}]"].weights.reshape(2, 2)
        own = [model.tower(0, t, m)(features[m]) for t in TASKS]
        for i, t in enumerate(TASKS):
            torch.testing.assert_close(signals[t, m], a[i, 0] * own[0] + a[i, 1] * own[1])
    alone = model.tower(0, "b", "image")(features["image"])
    assert torch.equal(signals["b", "image"], alone), "only one task reads it, so there is nothing to mix"


def test_cross_stitch_starts_near_separate_towers_and_is_not_decayed():
    """Catches a start at zero or at the mean of all tasks; a matrix that weight decay would pull to zero."""
    weights = MultimodalModel(spec("cross_stitch")).levels[0].mixing["[text]"].weights
    torch.testing.assert_close(weights.reshape(2, 2), torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    assert weights.ndim == 1


@pytest.mark.parametrize("dim", [6, {"audio": 4, "image": 6, "text": 9}])
@torch.no_grad()
def test_mixture_of_experts_is_its_formula(dim):
    """Catches a gate that is shared by pairs, reads the adapted signal, or is normalised over the batch."""
    torch.manual_seed(0)
    model = randomized(MultimodalModel(spec("mmoe", dim=dim)))
    features, present = batch(model)
    signals, _ = model.encode(features, present)
    level = model.levels[0]
    assert len(level.towers) == 3
    assert len(level.adapters) == (0 if dim == 6 else 3)
    for t, m in PAIRS:
        for b, x in enumerate(features[m]):
            gate = (level.gates[f"[{t},{m}]"].weight @ x + level.gates[f"[{t},{m}]"].bias).exp()
            adapted = x if dim == 6 else level.adapters[f"[{m}]"](x)
            expected = sum(g / gate.sum() * expert(adapted) for g, expert in zip(gate, level.towers, strict=True))
            torch.testing.assert_close(signals[t, m][b], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["cross_stitch", "mmoe"])
def test_soft_schemes_let_a_task_train_what_the_other_uses(scheme):
    """Catches a soft scheme that is `separate` under another name."""
    model = MultimodalModel(spec(scheme))
    model(*batch(model))["a"].square().sum().backward()
    matrices = [p for m in MODALITIES for p in model.tower(0, "b", m).parameters() if p.ndim == 2]
    assert all(p.grad.any() for p in matrices)


def test_parameters_of_soft_schemes_are_counted():
    """Catches gates and mixing matrices missing from the count by part, or experts counted per pair."""
    one = MultimodalModel(spec("task_modality")).num_parameters_by_part()["level_1"]
    level = {s: MultimodalModel(spec(s)).num_parameters_by_part()["level_1"] for s in ("cross_stitch", "mmoe")}
    assert level == {"cross_stitch": 6 * one + 3 * 4, "mmoe": 3 * one + 6 * (6 * 3 + 3)}
