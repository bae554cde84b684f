"""Trials, without Ray: what they write, what is read back, what is told of it."""

import json
import time

import numpy as np
import pandas as pd
import pytest

from mmkt_ray.errors import DataError
from mmkt_ray.search.finalists import choose_finalists
from mmkt_ray.search.leaderboard import Leaderboard, overrides_of
from mmkt_ray.search.search import search_digest
from mmkt_ray.search.space import build_space
from mmkt_ray.search.summary import anytime_curve, importance, summarise_search
from mmkt_ray.search.trial import SearchContext, Trial, stacks_per_trial

HIERARCHICAL = {"model.fusion.name": "hierarchical", "model.fusion.depth": 2, "model.sharing": "task"}
CONCAT = {"model.fusion.name": "concat", "model.sharing": "task_modality"}


def make_job(config, store, folder):
    space = build_space(config)
    leaderboard = Leaderboard(str(folder / "search"), space, search_digest(space, config.search, store))
    return SearchContext(space, config.search, leaderboard, num_stacks=1, started_at=time.time())


@pytest.fixture(scope="module")
def done(make_config, store, tmp_path_factory):
    """(job, results) of two trials and a reference that ran to their ends."""
    job = make_job(make_config(), store, tmp_path_factory.mktemp("run"))
    results = []
    for number, (architecture, reference) in enumerate(
        [(HIERARCHICAL, None), (CONCAT, None), (job.space.references()["image"], "image")]
    ):
        trial = Trial(job, store.table(), number, architecture, reference)
        while not trial.halving.done:
            results.append(trial.step())
    job.leaderboard.publish()
    return job, results


def test_a_row_says_all_that_makes_its_candidate(done):
    """Catches a candidate that can't be trained again from the leaderboard, and one without its scores."""
    job, _ = done
    rows = job.leaderboard.read()
    assert len(rows) == 18
    assert rows["candidate"].is_unique
    for _, row in rows.iterrows():
        config = job.space.configure(overrides_of(row))
        assert "+".join(config.model_modalities) == row["modalities"]
        assert config.training.lr == row["training.lr"]
        assert config.model.fusion.name == row["fusion"]
    scored = rows[rows["score"].notna()]
    mean = scored[["macro_f1.mood", "macro_f1.topic"]].mean(axis=1)
    np.testing.assert_allclose(scored["score"], mean)
    assert set(rows["status"]) == {"finished", "stopped"}
    assert rows.groupby("trial")["finished_at"].max().is_monotonic_increasing
    assert rows["finished_at"].between(0, 300).all()
    known = job.leaderboard.trials()
    assert [(t.number, t.reference) for t in known] == [(0, None), (1, None), (2, "image")]
    assert [t.architecture for t in known] == [HIERARCHICAL, CONCAT, {}]


def test_steps_tell_asha_how_far_they_are_but_for_references(done):
    """Catches a reference that ASHA may stop before the winner can be compared with it."""
    _, results = done
    budgets = [r.get("budget") for r in results]
    assert budgets == [1, 3, 9, 1, 3, 9, None, None, None]
    assert [r["done"] for r in results] == [False, False, True] * 3


def test_a_stopped_trial_leaves_its_candidates(make_config, store, tmp_path):
    """Catches candidates of a trial that was killed or given up, lost because they had not finished; a killed trial
    taken for one that has ended, and one that was given up taken for killed."""
    job = make_job(make_config(), store, tmp_path)
    trial = Trial(job, store.table(), 7, CONCAT)
    trial.step()
    assert job.leaderboard.publish() == 6
    rows = job.leaderboard.read()
    assert set(rows["status"]) == {"stopped"}
    assert rows["reason"].str.contains("given up after epoch 1").sum() == 2
    candidates, elapsed = job.leaderboard.progress()
    assert candidates == 0
    assert elapsed > 0
    job.leaderboard.close_part(7)
    assert job.leaderboard.progress() == (6, elapsed)
    assert job.leaderboard.publish() == 6
    assert job.leaderboard.read().equals(rows)


def test_an_architecture_that_fails_is_written_down_and_costs_only_itself(make_config, store, tmp_path):
    """Catches a trial that takes the search with it, or leaves no trace."""
    job = make_job(make_config(), store, tmp_path)
    table = store.table()
    del table.features["text"]
    result = Trial(job, table, 0, CONCAT).step()
    assert result["done"]
    assert result["score"] == 0.0
    job.leaderboard.publish()
    rows = job.leaderboard.read()
    assert set(rows["status"]) == {"failed"}
    assert rows["reason"].str.contains("text").all()
    with pytest.raises(DataError, match="text"):
        choose_finalists(rows, 3)


def test_an_impossible_architecture_is_a_failure_with_its_reason(make_config, store, tmp_path):
    """Catches a combination, of a space too large to try out, that breaks the trial instead of being written down."""
    job = make_job(make_config(), store, tmp_path)
    assert Trial(job, store.table(), 0, {"model.fusion.name": "concat", "model.fusion.depth": 2}).step()["done"]
    job.leaderboard.publish()
    assert job.leaderboard.read()["reason"].str.contains("depth means nothing to concat").all()


def test_another_search_does_not_read_these_parts(done, make_config, store):
    """Catches candidates of another space, seed or objective on the leaderboard;
    a longer search goes on with them."""
    job, _ = done
    digest = job.leaderboard.digest
    assert search_digest(job.space, make_config(**{"search.max_candidates": 5}).search, store) == digest
    other = make_config(**{"seed": 1})
    assert search_digest(build_space(other), other.search, store) != digest
    other = make_config(**{"search.objective": {"task": "mood"}})
    assert search_digest(build_space(other), other.search, store) != digest
    search_uri = job.leaderboard.uri.rpartition("/")[0]
    assert Leaderboard(search_uri, job.space, digest).progress()[0] == 12  # and 6 of a reference
    assert Leaderboard(search_uri, job.space, "0" * 16).progress() == (0, 0.0)


def test_finalists_are_distinct_and_have_something_to_be_compared_with(done):
    """Catches three finalists of one architecture, and a winner without its comparison."""
    job, _ = done
    rows = job.leaderboard.read()
    found, compared = choose_finalists(rows, 2)
    assert found["candidate 1"]["score"] == rows["score"].max()
    assert found["candidate 1"]["architecture"] != found["candidate 2"]["architecture"]
    assert found[compared["best single modality"]]["modalities"] == "image"
    best_concat = rows[(rows["fusion"] == "concat") & (rows["modalities"] == "image+text")]["score"].max()
    assert found[compared["best concat"]]["score"] == best_concat


def test_insight_has_the_best_of_each_cell(done):
    """Catches a heat map that mixes its axes up or counts references, and importances that do not add up."""
    job, _ = done
    rows = job.leaderboard.read()
    found = summarise_search(job.space, rows)
    fusion, depth = found.heat_maps
    assert (fusion.row_names, fusion.column_names) == (["concat", "hierarchical"], ["task", "task_modality"])
    best = {
        name: rows[(rows["model.fusion.name"] == name) & rows["reference"].isna()]["score"].max()
        for name in fusion.row_names
    }
    assert fusion.score == [[None, best["concat"]], [best["hierarchical"], None]]
    assert fusion.candidates == [[0, 6], [6, 0]]
    assert depth.row_names == ["2"]
    assert sum(found.importance.values()) == pytest.approx(1)
    assert {len(points) for key, points in found.slices.items() if key.startswith("training")} == {18}


@pytest.mark.parametrize("everything", [False, True])
def test_a_parameter_that_never_changed_explains_nothing(done, everything):
    """Catches shares that are NaN, do not add up, or an exception, where fANOVA has one value of a parameter,
    or of all."""
    job, _ = done
    rows = job.leaderboard.read()
    first = rows[rows["reference"].isna() & (rows["model.fusion.name"] == "concat")].iloc[0]
    frozen = list(job.space.parameters) if everything else ["training.lr"]
    same = {key: value for key, value in overrides_of(first).items() if key in frozen}
    rows["overrides"] = [json.dumps(overrides_of(row) | same) for _, row in rows.iterrows()]
    found = importance(job.space, rows)
    if everything:
        assert not found or not any(found.values())
    else:
        assert found["training.lr"] == 0
        assert sum(found.values()) == pytest.approx(1)
    assert all(np.isfinite(share) for share in (found or {}).values())


def test_the_curve_only_rises_and_ends_with_all_candidates():
    """Catches a curve in the order of the file rather than of time."""
    rows = pd.DataFrame({"finished_at": [3.0, 1.0, 2.0, 4.0], "score": [0.5, 0.4, np.nan, 0.3]})
    assert anytime_curve(rows) == [(1.0, 0.4, 1), (3.0, 0.5, 3), (4.0, 0.5, 4)]


def test_trials_take_as_many_stacks_as_leave_every_architecture_one(make_config):
    """Catches a search that spends all its candidates on a part of the architectures."""
    search = make_config(**{"search.population": 64, "search.max_candidates": 10_000}).search
    assert [stacks_per_trial(search, n) for n in (1, 17, 40, 52, 53, 1000)] == [9, 9, 3, 3, 1, 1]
