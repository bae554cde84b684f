"""In which order a search tries what it tries, and what is said of one that ended early; without Ray."""

from itertools import count

import numpy as np
import pytest

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.search.leaderboard import Known, Leaderboard
from mmkt_ray.search.search import check_search, check_searchable, notes_of, search_digest
from mmkt_ray.search.search_results import NumTried
from mmkt_ray.search.space import build_space
from mmkt_ray.search.trial import SearchContext, Trial, search_score
from mmkt_ray.search.tuner import Proposals, architecture_of, build_sampler, planned_trials
from tests.labels import codes_of

LR = {"training.lr": {"loguniform": [1e-3, 1e-1]}}


def fused(space, turn):
    """Whether a turn of the plan reads several modalities."""
    overrides = space.references()[turn] if isinstance(turn, str) else turn or {}
    return len(space.configure(overrides).model_modalities) > 1


@pytest.mark.parametrize("num_trials", [4, 9, 50])
def test_fused_candidates_come_first_and_references_between_them(make_config, num_trials):
    """Catches a search whose budget is spent on single modalities before anything is fused."""
    space = build_space(make_config())
    turns = planned_trials(space, [], num_trials)
    assert [number for number, _ in turns] == list(range(len(turns)))
    kinds = [fused(space, turn) for _, turn in turns]
    assert kinds[:2] == [True, True]
    assert all(sum(kinds[:n]) >= n / 2 for n in range(1, len(kinds) + 1))
    assert {turn for _, turn in turns if isinstance(turn, str)} == {"concat", "image", "text"}


def test_optuna_proposes_what_is_planned(make_config, store, tmp_path):
    """Catches a plan that Tune's searcher does not follow: a reference for a candidate, or the other way round."""
    config = make_config()
    space = build_space(config)
    job = SearchContext(space, config.search, Leaderboard(str(tmp_path), space, "digest"), 1, 0.0)
    for num_trials in (5, 20):
        searcher = build_sampler(job, num_trials)
        proposed = [searcher.suggest(f"t{i}") for i in range(num_trials)]
        assert [p["number"] for p in proposed] == list(range(num_trials))
        assert [p["reference"] for p in proposed[:5]] == ["concat", None, "image", None, "text"]
        assert {p["reference"] for p in proposed[5:]} <= {None}
        chosen = [architecture_of(space, p) for p in proposed if p["reference"] is None]
        assert all(space.configure(c).model_modalities == ("image", "text") for c in chosen)
        assert num_trials < 20 or len({str(c) for c in chosen[:6]}) == 6  # each architecture once


def test_few_candidates_are_not_all_references(make_config):
    """Catches `max_candidates` that references use up: a winner is declared and nothing of the space was tried."""
    turns = planned_trials(build_space(make_config()), [], 3 + 2)
    assert sum(not isinstance(turn, str) for _, turn in turns) == 2


def test_a_search_that_goes_on_keeps_the_numbers_of_its_plan(make_config):
    """Catches a restart that repeats a trial that has ended, or draws other candidates for one that died."""
    space = build_space(make_config())
    first = planned_trials(space, [], 5)
    ended = [Known(0, "concat", {}, 0.5, True), Known(1, None, {"model.fusion.name": "concat"}, 0.5, True)]
    died = Known(2, "image", {}, 0.0, False)
    again = planned_trials(space, [*ended, died], 3)
    assert again == [turn for turn in first if turn[0] >= 2]
    proposals = Proposals(space, count(9), list(again))
    assert proposals(None) == {"number": 2, "reference": "image"}


def tried(candidates, references, fused):
    return NumTried(candidates=candidates, references=references, fused=fused, by_status={})


def test_an_early_end_is_said_with_what_to_do(make_config):
    """Catches a search that compared no fused candidate and reads as if it had."""
    config = make_config(**{"search.time_budget_s": 1.0})
    space = build_space(config)
    for found, start in (
        (
            tried(0, 0, 0),
            "The time budget of 1 s ended before any candidate was tried, so there is no winner. Set search.",
        ),
        (
            tried(0, 384, 0),
            "The time budget of 1 s ended before any fused candidate had a score, so what follows compares",
        ),
        (tried(40, 18, 50), "The time budget of 1 s ended the search after 40 of 72 candidates."),
        (tried(72, 18, 0), "No fused candidate has a score"),
    ):
        (note,) = notes_of(space, config.search, found)
        assert note.startswith(start)
    assert notes_of(space, config.search, tried(72, 18, 90)) == []
    single = make_config(**{"model.modalities": ["image"]})
    assert notes_of(build_space(single), single.search, tried(72, 6, 0)) == []


@pytest.mark.parametrize(
    "objective",
    [
        {"metric": "balanced_accuracy"},
        {"metric": "auroc", "over": "worst"},
        {"metric": "log_loss"},
        {"metric": "macro_recall", "task": "mood"},
    ],
)
def test_candidates_are_chosen_by_the_metric_asked_for(make_config, store, tmp_path, objective):
    """Catches a metric that is accepted and then not used, one that higher values of make worse, and a lost epoch."""
    config = make_config(**{"search.objective": objective, "training.epochs": 3, "search.max_candidates": 6})
    space = build_space(config)
    board = Leaderboard(str(tmp_path), space, search_digest(space, config.search, store))
    trial = Trial(SearchContext(space, config.search, board, 1, 0.0), store.table(), 0, {"model.fusion.name": "concat"})
    while not trial.halving.done:
        trial.step()
    board.publish()
    rows, metric = board.read(), objective["metric"]
    columns = rows[[f"{metric}.mood", f"{metric}.topic"]]
    by_task = {"mood": columns[f"{metric}.mood"], "worst": columns.min(axis=1), "mean": columns.mean(axis=1)}
    expected = by_task[objective.get("task") or objective.get("over", "mean")]
    np.testing.assert_allclose(rows["score"], expected)
    best = rows.loc[rows["score"].idxmax()]
    assert best["score"] > rows["first_score"].min()
    assert (rows["score"] < 0).all() == (metric == "log_loss")


def test_an_objective_that_cannot_be_had_is_refused(make_config, store):
    """Catches a search that finds out after all its time that nothing can be chosen."""
    with pytest.raises(ConfigError, match=r"'recall' is no metric of 'mood', a multiclass task: .*macro_recall"):
        make_config(**{"search.objective": {"metric": "recall"}})
    space = {**LR, "model.tasks": {"choice": [["mood"], ["mood", "topic"]]}}
    with pytest.raises(ConfigError, match=r"chosen by 'topic', which \[\['mood'\]\] leaves out"):
        check_search(make_config(**{"search.space": space, "search.objective": {"task": "topic"}}))
    table = store.table()
    mood, topic = (codes_of(table.labels[t]) for t in ("mood", "topic"))
    one = table.take(np.flatnonzero((table.split != "val") | ((mood == 0) & (topic == 0))))
    with pytest.raises(DataError, match="chooses by auroc on val, which is undefined for mood, topic"):
        check_searchable(build_space(make_config(**{"search.objective": {"metric": "auroc"}})), one)


def test_a_task_that_a_candidate_lacks_counts_as_the_constant_prediction(make_config, store):
    """Catches a search over tasks that the candidate wins which dropped the hard one."""
    space = build_space(make_config(**{"search.space": {**LR, "model.tasks": {"choice": [["topic"], None]}}}))
    score, table = search_score(space, store.table()), store.table()
    assert score.floors.keys() == {"mood", "topic"}
    val = {t: codes_of(y)[table.split == "val"] for t, y in table.labels.items()}
    majority = np.bincount(codes_of(table.labels["mood"])[table.split == "train"]).argmax()
    hits = (val["mood"] == majority).mean()
    assert score.floors["mood"] == pytest.approx((2 * hits / (1 + hits)) / 2)  # F1 of the one class, 0 of the other
    assert score({"macro_f1": {"topic": 0.9}}) == pytest.approx((0.9 + score.floors["mood"]) / 2)
    assert search_score(build_space(make_config()), table).floors == {}
