"""Which towers are the same parameters, over the full (task, modality) grid."""

import itertools

import pytest
import torch

from mmkt_ray import config
from mmkt_ray.models import InputSpec, ModelSpec, MultimodalModel
from mmkt_ray.models.sharing import SCHEMES, module_name, shares_tasks

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


def spec(*schemes, dim=6, fusion="concat", depth=1, hidden_dim=5):
    dims = dim if isinstance(dim, dict) else dict.fromkeys(MODALITIES, dim)
    inputs = {m: InputSpec(d, False, min(hidden_dim, d)) for m, d in dims.items()}
    return ModelSpec(inputs, {"a": 2, "b": 3}, fusion, depth, tuple(schemes), hidden_dim, 0.0, 0.0)


def batch(model, num_rows=8):
    features = {m: torch.randn(num_rows, i.dim) for m, i in model.spec.modalities.items()}
    return features, {m: torch.ones(num_rows, dtype=torch.bool) for m in features}


def storages(module):
    return {p.data_ptr() for p in module.parameters()}


def test_the_names_are_those_of_the_config():
    """A scheme that the config refuses, or one that it allows and no model knows."""
    assert set(SCHEMES) == set(config.SCHEMES) == set(SHARED_IF)


@pytest.mark.parametrize(("low", "high"), list(itertools.product(SCHEMES, SCHEMES)))
def test_pairs_share_exactly_the_towers_that_the_scheme_says(low, high):
    """A level that reads another level's scheme; towers built per pair though their key is the same."""
    model = MultimodalModel(spec(low, high))
    for (level, scheme), p, q in itertools.product(enumerate((low, high)), PAIRS, PAIRS):
        mine, other = (storages(model.tower(level, *pair)) for pair in (p, q))
        assert (mine == other) if SHARED_IF[scheme](p, q) else not (mine & other)


@pytest.mark.parametrize(("scheme", "shared"), [(s, s in ("task", "task_modality")) for s in SCHEMES])
@pytest.mark.parametrize("dim", [6, {"audio": 4, "image": 6, "text": 9}])
def test_a_task_trains_the_other_tasks_towers_only_where_tasks_share(scheme, shared, dim):
    """Knowledge that leaks between tasks through an adapter, a fusion or an input stage in schemes that share no task."""
    model = MultimodalModel(spec(scheme, dim=dim, fusion="hierarchical", depth=2))
    assert shares_tasks(scheme) == shared
    model(*batch(model))["a"].square().sum().backward()
    reached = any(p.grad is not None and p.grad.any() for m in MODALITIES for p in model.tower(0, "b", m).parameters())
    assert reached == shared
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    own = {name for name, _ in model.named_parameters() if "[b" in name}
    assert untouched == own, "exactly what belongs to task b alone is left alone"


def test_the_more_is_shared_the_fewer_parameters():
    """A shared tower that is counted, or built, once for each pair."""
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
    """`separate` that is `architecture` under another name."""
    dims = {"audio": 3, "image": 4, "text": 9}
    model = MultimodalModel(spec("separate", dim=dims))
    assert [model.tower(0, "a", m).linear.out_features for m in MODALITIES] == [3, 4, 5]
    same = MultimodalModel(spec("architecture", dim=dims))
    assert [same.tower(0, "a", m).linear.out_features for m in MODALITIES] == [5, 5, 5]


@pytest.mark.parametrize(("scheme", "needed"), [(s, s in ("modality", "task_modality")) for s in SCHEMES])
def test_adapters_stand_only_before_towers_that_modalities_of_different_widths_share(scheme, needed):
    """An adapter in front of features that fit as they are; a shared tower that can't take one of its modalities."""
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
    """A task called `type` that torch refuses as a module name, a dot that splits a state's key."""
    modules = torch.nn.ModuleDict({module_name(*names): torch.nn.Linear(1, 1)})
    assert len(modules.state_dict()) == 2


def test_module_names_do_not_collide():
    """Two keys on one module because a separator occurs in a name."""
    keys = [("a,b",), ("a", "b"), ("a.b",), ("a%2Eb",), ()]
    assert len({module_name(*key) for key in keys}) == len(keys)
