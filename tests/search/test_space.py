"""The search space: what is refused, what is enumerated, what is drawn."""

import numpy as np
import pytest

from mmkt_ray.errors import ConfigError
from mmkt_ray.search.space import build_space, value_at

FUSION = "model.fusion.name"
DEPTH = {"int": [1, 3], "when": {FUSION: "hierarchical"}}


def space_of(make_config, **space):
    return build_space(make_config(**{"search.space": {k.replace("__", "."): v for k, v in space.items()}}))


def test_architectures_are_all_that_conditions_allow(make_config):
    """Catches a condition that is ignored (depth for concat is refused by the config) or that hides a value."""
    space = space_of(
        make_config,
        model__fusion__depth=DEPTH,  # before the key that it waits for
        model__fusion__name={"choice": ["concat", "sum", "hierarchical"]},
        model__sharing={"choice": ["task", "modality"]},
        training__lr={"loguniform": [1e-4, 1e-1]},
    )
    found = list(space.architectures())
    assert len(found) == (2 + 3) * 2
    assert sum("model.fusion.depth" in a for a in found) == 3 * 2
    assert list(space.members) == ["training.lr"]
    assert {space.configure(a).model.fusion.depth for a in found} == {1, 2, 3}


def test_a_condition_may_name_several_values_and_keys_that_are_not_searched(make_config):
    """Catches a list taken for one value, and a fixed key that counts as not chosen."""
    space = space_of(
        make_config,
        model__fusion__name={"choice": ["attention", "decision", "gated"]},
        model__num_levels={"choice": [1, 2], "when": {FUSION: ["attention", "gated"], "model.hidden_dim": 8}},
        model__mmoe_experts={"int": [2, 4], "when": {"model.hidden_dim": 16}},
    )
    found = list(space.architectures())
    assert sum("model.num_levels" in a for a in found) == 4
    assert not any("model.mmoe_experts" in a for a in found)


def test_a_chosen_name_starts_with_its_own_defaults(make_config):
    """Catches options of the base config's fusion that make every other fusion impossible."""
    config = make_config(**{"model.fusion": {"name": "hierarchical", "depth": 3}, "search.space": None})
    space = build_space(config)
    assert space.configure({FUSION: "concat"}).model.fusion.depth == 1
    assert space.configure({}).model.fusion.depth == 3


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"model__fusoin__name": {"choice": ["concat"]}}, "model.fusion.name"),
        ({"modalities__image__encoder": {"choice": ["cnn"]}}, "can't search over"),
        ({"training__transfer__tuning": {"choice": ["frozen"]}}, "can't search over"),
        ({"model__fusion__depth": {"int": [1, 3]}}, "depth means nothing to concat"),
        ({"model__sharing": {"choice": ["task", "taks"]}}, "taks"),
        ({"model__dropout": {"float": [0.0, 1.5]}}, "model.dropout"),
        ({"model__num_levels": {"choice": [1], "when": {"model.depth": 1}}}, "unknown key 'model.depth'"),
        (
            {"model__num_levels": {"choice": [1], "when": {"training.lr": 1}}, "training__lr": {"float": [0.1, 1]}},
            "differs",
        ),
        (
            {
                "model__num_levels": {"choice": [1], "when": {"model.hidden_dim": 8}},
                "model__hidden_dim": {"choice": [8], "when": {"model.num_levels": 1}},
            },
            "circle",
        ),
        ({"model__num_levels": {"choice": [1, 2]}, "model__sharing": {"choice": ["task", ["task", "task"]]}}, "levels"),
    ],
)
def test_what_is_impossible_is_refused_with_the_reason(make_config, space, told):
    """Catches a search that fails hours later in some of its trials."""
    with pytest.raises(ConfigError, match=told):
        space_of(make_config, **space)


@pytest.mark.parametrize("values", [{}, {"choice": [1], "int": [1, 2]}, {"loguniform": [0.0, 1.0]}, {"int": [3, 3]}])
def test_a_parameter_is_of_one_kind_and_its_range_has_a_width(make_config, values):
    """Catches a parameter of which one half is ignored, and ranges that have no value or no logarithm."""
    with pytest.raises(ConfigError):
        space_of(make_config, training__lr=values)


def test_draws_cover_each_range_evenly_and_are_repeated_by_their_seed(make_config):
    """Catches draws off the range or on the wrong scale, draws that differ in a rerun,
    and trials that draw the same."""
    space = space_of(
        make_config,
        training__lr={"loguniform": [1e-4, 1e-1]},
        model__dropout={"float": [0.2, 0.6]},
        training__label_smoothing={"choice": [0.0, 0.1]},
        model__modality_dropout={"float": [0.0, 0.5], "when": {"model.missing": "token"}},
    )
    draws = space.draw_members({}, 60, [0, 1])
    assert len(draws) == 60
    assert draws == space.draw_members({}, 60, [0, 1])
    assert draws != space.draw_members({}, 60, [0, 2])
    assert {tuple(d) for d in draws} == {("training.lr", "model.dropout", "training.label_smoothing")}
    by_decade = np.histogram([np.log10(d["training.lr"]) for d in draws], bins=3, range=(-4, -1))[0]
    assert by_decade.tolist() == pytest.approx([20, 20, 20], abs=2)
    by_dropout = np.histogram([d["model.dropout"] for d in draws], bins=4, range=(0.2, 0.6))[0]
    assert by_dropout.tolist() == pytest.approx([15] * 4, abs=2)
    assert {d["training.label_smoothing"] for d in draws} == {0.0, 0.1}


def test_without_member_keys_there_is_one_candidate(make_config):
    """Catches a population of copies."""
    space = space_of(make_config, model__sharing={"choice": ["task", "modality"]})
    assert space.draw_members({}, 64, [0]) == [{}]


def test_a_space_of_millions_is_tried_out_at_its_corners(make_config):
    """Catches a check that never ends, or that sees the first values of a long range only."""
    long = {"int": [1, 10_000]}
    space = {
        "model__hidden_dim": long,
        "model__mmoe_experts": {"int": [1, 64]},
        "training__batch_size_per_worker": long,
    }
    assert len(list(space_of(make_config, **space).some_architectures())) == 27
    with pytest.raises(ConfigError, match="mmoe_experts=100"):
        space_of(make_config, **space | {"model__mmoe_experts": {"int": [1, 100]}})


def test_ends_of_a_range_are_its_values(make_config):
    """Catches an off-by-one at the end of a choice, and rounding off a logarithmic range."""
    parameters = make_config().search.space
    assert value_at(parameters["model.fusion.name"], 1.0) == "hierarchical"
    assert value_at(parameters["training.lr"], 0.0) == pytest.approx(1e-4)
    assert value_at(parameters["training.lr"], 1.0) == pytest.approx(1e-1)
    assert [value_at(parameters["model.fusion.depth"], u) for u in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 2, 2]


def test_references_are_each_modality_alone_and_concat(make_config):
    """Catches a comparison that nobody can make, because a task can't do with that modality."""
    assert set(build_space(make_config()).references()) == {"image", "text", "concat"}
    assert set(build_space(make_config(**{"tasks.mood.inputs": ["text"]})).references()) == {"text", "concat"}
