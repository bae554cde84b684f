"""Successive halving, with real populations on a small store."""

import numpy as np
import pytest
import torch

from mmkt_ray.search.halving import Halving, rungs_of
from mmkt_ray.search.space import build_space
from mmkt_ray.training.population import Population


@pytest.fixture(scope="module")
def table(store):
    return store.table()


@pytest.fixture(scope="module")
def config(make_config):
    return build_space(make_config()).configure({"model.fusion.name": "concat"})


def rates(num, top=0.05):
    return [{"training.lr": float(lr)} for lr in np.geomspace(1e-4, top, num)]


def builder(config, table, sizes, limit=10**9, error=torch.OutOfMemoryError):
    """Builds real populations, notes their sizes, and has no memory for more than `limit` members."""

    def build(members):
        if len(members) > limit:
            raise error("no memory")
        sizes.append(len(members))
        return Population.start(config, table, members)

    return build


def run(halving):
    while not halving.done:
        halving.run_rung()
    return halving


def test_stacks_stay_full_and_everyone_has_an_end(config, table):
    """Catches survivors that go on in stacks of their own, and candidates that are dropped without being told."""
    sizes = []
    halving = Halving(builder(config, table, sizes), rates(18), 6, [1, 3, 9], 3)
    halving.run_rung()
    assert sizes == [6, 6, 6]
    assert [len(s.candidates) for s in halving.stacks] == [6]  # two of each make one full stack
    run(halving)
    ends = [(c.status, c.epochs) for c in halving.candidates]
    assert sorted(ends) == sorted([("stopped", 1)] * 12 + [("stopped", 3)] * 4 + [("finished", 9)] * 2)
    assert all(c.reason for c in halving.candidates if c.status == "stopped")
    assert all(c.seconds > 0 for c in halving.candidates)


def test_the_best_of_a_stack_go_on_with_the_result_that_they_have_alone(config, table):
    """Catches survivors picked by the wrong end of the scores,
    and members mixed up when stacks are cut and merged."""
    halving = run(Halving(builder(config, table, []), rates(12), 6, [2, 6], 3))
    for stack in (halving.candidates[:6], halving.candidates[6:]):
        stopped = [c.score for c in stack if c.status == "stopped"]
        assert min(c.first_score for c in stack if c.status == "finished") >= max(stopped)
    finished = [c for c in halving.candidates if c.status == "finished"]
    assert len(finished) == 4
    for candidate in finished:
        alone = Population.start(config, table, [candidate.member])
        alone.train(6)
        assert candidate.score == pytest.approx(float(alone.scores[0]), abs=1e-3)


def test_out_of_memory_halves_the_stack_and_loses_nobody(config, table):
    """Catches a search that dies of a stack that is too large, and candidates that are lost or doubled by halving."""
    for error in (torch.OutOfMemoryError, MemoryError):
        sizes = []
        halving = run(Halving(builder(config, table, sizes, limit=3, error=error), rates(8), 8, [1, 2], 2))
        assert max(sizes) <= 3
        assert sum(sizes) == 8
        assert {c.status for c in halving.candidates} == {"stopped", "finished"}
        assert all(np.isfinite(c.score) for c in halving.candidates)
    halving = run(Halving(builder(config, table, [], limit=0), rates(3), 3, [1, 2], 2))
    assert [c.status for c in halving.candidates] == ["out_of_memory"] * 3
    assert halving.best == -np.inf


def test_a_diverging_candidate_costs_only_itself(config, table):
    """Catches NaN that wins the race, takes the others with it, or keeps a place in the next rung."""
    members = [{"training.lr": 1e30}, *rates(5)]
    halving = run(Halving(builder(config, table, []), members, 6, [1, 3], 3))
    assert halving.candidates[0].status == "diverged"
    assert [c.status for c in halving.candidates[1:]].count("finished") == 1
    assert np.isfinite(halving.best)


def test_failing_marks_those_still_in_the_race(config, table):
    """Catches an error that rewrites the ends of those who were done before it."""
    halving = Halving(builder(config, table, []), rates(6), 6, [1, 3], 3)
    halving.run_rung()
    halving.fail("RuntimeError: no")
    assert halving.done
    assert sorted(c.status for c in halving.candidates) == ["failed"] * 2 + ["stopped"] * 4


def test_rungs_are_shares_of_the_epochs():
    """Catches rungs at epoch 0, twice at the same epoch, or without the last one."""
    assert rungs_of(18, 3, 3) == [2, 6, 18]
    assert rungs_of(4, 3, 3) == [1, 4]
    assert rungs_of(1, 3, 3) == [1]
