"""A whole search on Ray: trials, leaderboard, finalists, winner; and what is left of it when it ends early."""

import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray import storage
from mmkt_ray.config import SearchConfig
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.search.leaderboard import Leaderboard, overrides_of
from mmkt_ray.search.search import check_search, check_searchable, explore, result_table, search, search_digest
from mmkt_ray.search.search_results import SearchResult, SearchSummary
from tests.labels import codes_of

import psutil  # isort: skip  (Ray ships it)


@pytest.fixture(scope="module")
def found(ray_local, make_config, store, tmp_path_factory):
    """(config, run folder, result) of a finished search."""
    config, run_uri = make_config(), str(tmp_path_factory.mktemp("run"))
    return config, run_uri, search(config, store, run_uri)


def read_rows(run_uri):
    return pq.read_table(f"{run_uri}/search/leaderboard.parquet").to_pandas()


def test_every_candidate_is_on_the_leaderboard_with_its_parameters_and_its_end(found):
    """Catches candidates that get lost on the way through Tune, and architectures that never come up."""
    _, run_uri, result = found
    rows = read_rows(run_uri)
    assert rows["candidate"].is_unique
    assert (result.tried.candidates, result.tried.references) == (72, 18)
    assert len(rows) == 72 + 18
    assert set(rows["status"]) == {"finished", "stopped"}
    hierarchical = rows["model.fusion.name"] == "hierarchical"
    assert rows.loc[hierarchical, "model.fusion.depth"].notna().all()
    assert rows.loc[~hierarchical, "model.fusion.depth"].isna().all()
    assert set(rows["reference"].dropna()) == {"image", "text", "concat"}
    assert rows[rows["reference"].isna()]["architecture"].nunique() == 6
    assert rows[rows["reference"].notna()].groupby("trial")["epochs"].max().eq(9).all()


def test_the_winner_is_chosen_on_val_and_told_on_test(found, store):
    """Catches a winner by its test score, a test score of other rows or another model, and missing comparisons."""
    _, run_uri, result = found
    val = {role: finalist.val for role, finalist in result.finalists.items()}
    assert result.winner == max(val, key=val.get)
    assert set(result.versus) == set(val) - {result.winner}
    assert set(result.compared_with) == {"best single modality", "best concat"}
    assert set(result.compared_with.values()) <= set(val)
    winner = result.finalists[result.winner]
    assert len(winner.folders) == 2
    table = store.table()
    test = table.take(table.rows("test"))
    inputs = winner.modalities
    accuracies = []
    for uri in winner.folders:
        model, _ = load_model(uri)
        rows = np.logical_or.reduce([test.present[m] for m in inputs])
        accuracies.append(
            (predict_table(model, test)["topic"].argmax(axis=1) == codes_of(test.labels["topic"]))[rows].mean()
        )
    accuracy = winner.test["topic"]["accuracy"]
    assert accuracy["value"] == pytest.approx(np.mean(accuracies))
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    single = result.compared_with["best single modality"]
    assert result.versus[single]["mood"].metrics["accuracy"]["verdict"] in {"better", "worse", "tie"}
    assert "72 candidates tried" in result_table(result)
    assert SearchSummary.read(f"{run_uri}/search/report.json").curve[-1][2] == 90


def test_the_winner_is_a_model_folder(found, store):
    """Catches a winner that can't be used, or is not the one of the result."""
    _, run_uri, result = found
    model, card = load_model(f"{run_uri}/models/search_winner")
    best = result.finalists[result.winner]
    assert card.fit.val.score == pytest.approx(max(best.val_by_seed))
    table = store.table(model.spec.modalities, list(model.spec.tasks))
    assert np.isfinite(predict_table(model, table)["mood"]).all()


def test_the_same_command_again_does_nothing_twice(found, store, monkeypatch):
    """Catches finished trials or finalists that are trained again after a restart."""
    config, run_uri, result = found
    files = {p: p.stat().st_mtime_ns for p in Path(run_uri, "search").rglob("*.safetensors")}
    files |= {p: p.stat().st_mtime_ns for p in Path(run_uri, "search", "parts").iterdir()}
    monkeypatch.setattr("mmkt_ray.search.search.run_trials", lambda *_: pytest.fail("trials run again"))
    assert search(config, store, run_uri) == result
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_killed_search_goes_on_with_what_is_missing(found, make_config, store, tmp_path):
    """Catches a restart that begins anew, repeats finished trials, draws the same candidates again,
    or stops short."""
    _, run_uri, _ = found
    config = make_config(**{"search.max_candidates": 36})
    space = check_search(config)
    before = Leaderboard(str(tmp_path), space, search_digest(space, config.search, store))
    parts = sorted(Path(run_uri, "search", "parts").iterdir())[1:5]
    for part in parts:
        storage.write_bytes(f"{before.parts_uri}/{part.name}", part.read_bytes())
    explore(space, config.search, before, store.table())
    rows = before.read()
    assert len(rows) == 36 + 18
    assert rows["candidate"].is_unique
    old = pq.read_table([str(p) for p in parts]).to_pandas()
    assert set(old["candidate"]) < set(rows["candidate"])
    assert not rows["training.lr"].duplicated().any()
    assert rows[~rows["candidate"].isin(old["candidate"])]["finished_at"].min() >= old["finished_at"].max()
    assert set(rows["reference"].dropna()) == {"image", "text", "concat"}


def test_trials_that_break_off_are_made_up_for(found, store, tmp_path, monkeypatch):
    """Catches candidates that are missing for good because Tune gave a trial up whose worker had died."""
    config, run_uri, _ = found
    space = check_search(config)
    board = Leaderboard(str(tmp_path), space, search_digest(space, config.search, store))
    parts = sorted(Path(run_uri, "search", "parts").iterdir())
    for part in parts[:-1]:
        storage.write_bytes(f"{board.parts_uri}/{part.name}", part.read_bytes())
    asked = []

    def last_one_breaks_off(context, table, num_trials, budget):
        asked.append(num_trials)
        if len(asked) == 2:
            storage.write_bytes(f"{board.parts_uri}/{parts[-1].name}", parts[-1].read_bytes())
        return int(len(asked) == 1)

    monkeypatch.setattr("mmkt_ray.search.search.run_trials", last_one_breaks_off)
    explore(space, config.search, board, store.table())
    assert asked == [1, 1]
    assert len(board.read()) == len(Leaderboard(f"{run_uri}/search", space, board.digest).read())


def test_a_spent_time_budget_starts_nothing(found, make_config, store, tmp_path, monkeypatch):
    """Catches a restart that begins its time anew; a longer budget goes on."""
    _, run_uri, result = found
    config = make_config(**{"search.max_candidates": 1000, "search.time_budget_s": result.seconds})
    space = check_search(config)
    board = Leaderboard(f"{run_uri}/search", space, search_digest(space, config.search, store))
    asked = []
    monkeypatch.setattr("mmkt_ray.search.search.run_trials", lambda *args: asked.append(args[2:]))
    explore(space, config.search, board, store.table())
    assert asked == []
    longer = config.search.model_copy(update={"time_budget_s": result.seconds + 5})
    explore(space, longer, board, store.table())
    ((num_trials, seconds),) = asked
    assert seconds == pytest.approx(5)
    assert num_trials == -(-(1000 - 72) // 54)  # nine stacks of six in a trial, as there are candidates enough


def end_trials():
    """Those that went on after an interrupt would hold the CPUs of this Ray, which outlives the search here."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # ended meanwhile
            if "PopulationTrial" in " ".join(process.cmdline()):
                process.kill()


def test_an_interrupt_leaves_a_whole_leaderboard(ray_local, make_config, store, tmp_path):
    """Catches Ctrl-C that is swallowed by Tune, or that leaves the candidates in pieces."""
    config = make_config(**{"search.max_candidates": 1_000_000})
    space = check_search(config)
    board = Leaderboard(str(tmp_path), space, search_digest(space, config.search, store))
    over, limit = threading.Event(), time.monotonic() + 120
    before: list[int] = []  # trials on disk when the signal comes

    def interrupt():
        while board.progress()[0] == 0 and time.monotonic() < limit:
            if over.wait(0.2):  # it has ended by itself: a signal now would end pytest
                return
        before.extend(part["trial"][0].as_py() for part in board.parts())
        os.kill(os.getpid(), signal.SIGINT)
        while not over.wait(60):  # it came while a finalizer ran, where Python loses it; `interruptible` sees to that
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest was started to ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            explore(space, config.search, board, store.table())
    finally:
        over.set()
        signal.signal(signal.SIGINT, handler)
        end_trials()
    published = Counter(board.read()["trial"])
    parts = {part["trial"][0].as_py(): len(part) for part in board.parts()}  # a trial may write its last one after that
    assert published.keys() >= set(before) > set()
    assert published.items() <= parts.items()
    assert all(overrides_of(row) for _, row in board.read().iterrows())


def test_an_impossible_search_is_refused_before_any_work(make_config, store, tmp_path, monkeypatch):
    """Catches an objective that no task has and features that can't be stacked, found after the start."""
    monkeypatch.setattr("mmkt_ray.search.search.run_trials", lambda *_: pytest.fail("the search has begun"))
    with pytest.raises(ConfigError, match="did you mean 'mood'"):
        search(make_config(**{"search.objective.task": "moood"}), store, str(tmp_path))
    with pytest.raises(ConfigError, match="balance"):
        search(make_config(**{"training.balance": "ogm_ge"}), store, str(tmp_path))
    space = {"training.balance": {"choice": [None, "ogm_ge"]}}
    with pytest.raises(ConfigError, match=r"training\.balance=ogm_ge.*can't be searched"):
        search(make_config(**{"search.space": space}), store, str(tmp_path))


def test_a_val_split_without_labels_to_choose_by_is_refused(make_config, store):
    """Catches a search that tells after all its time that no candidate has a score, as if they had diverged."""
    table = store.table()
    hidden = table.labels["mood"].keep(table.split != "val")
    table = replace(table, labels={**table.labels, "mood": hidden})
    for task in ("topic", None):
        config = make_config(**{"search.objective.task": task})
        check_searchable(check_search(config), table)
    config = make_config(**{"search.objective.task": "mood"})
    with pytest.raises(DataError, match="labels of mood"):
        check_searchable(check_search(config), table)


def test_rows_left_out_are_found_from_anywhere_and_decide_the_result(
    ray_local, make_config, store, tmp_path, monkeypatch
):
    """Catches a relative path that trials, which run in another folder, can't open;
    another list taken for the same search."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"sample_id": ["s0", "s1"]}), "out.parquet")
    changes = {"training.exclude": "out.parquet", "training.epochs": 1, "search.max_candidates": 6}
    config = make_config(**changes, **{"search.finalists": 1, "search.seeds": 1})
    result = search(config, store, str(tmp_path / "run"))
    assert result.tried.to_dict() == {"candidates": 6, "references": 18, "fused": 12, "finished": 6}
    before = search_digest(check_search(config), config.search, store)
    pq.write_table(pa.table({"sample_id": ["s0", "s4"]}), "out.parquet")
    assert search_digest(check_search(config), config.search, store) != before


def test_without_a_search_section_the_defaults_are_searched(make_config):
    """Catches defaults that refuse themselves."""
    space = check_search(make_config(search=None))
    assert len(list(space.architectures())) == (4 + 4) * 5
    assert SearchConfig().max_candidates == 10_000


def test_a_budget_of_a_moment_ends_with_what_there_is_and_says_so(ray_local, make_config, store, tmp_path):
    """Catches an exception, or a winner of nothing, where the time was up before any candidate had a score."""
    config = make_config(**{"search.max_candidates": 1000, "search.time_budget_s": 0.01})
    result = search(config, store, str(tmp_path))
    assert result.notes
    if result.winner is None:
        assert result.tried.to_dict() == {"candidates": 0, "references": 0, "fused": 0}
        assert not Path(tmp_path, "models", "search_winner").exists()
    first = result_table(result).splitlines()[0]
    assert first.startswith("The time budget of 0.01 s ended")
    assert SearchResult.read(f"{tmp_path}/search/result.json") == result


def test_searching_over_tasks_ends_with_a_winner(ray_local, make_config, store, tmp_path):
    """Catches a KeyError after all finalists are trained, and a candidate that wins by leaving out a task."""
    space = {"model.tasks": {"choice": [["topic"], ["mood", "topic"]]}, "training.lr": {"loguniform": [1e-3, 1e-1]}}
    changes = {"search.space": space, "search.max_candidates": 12, "search.finalists": 12}
    changes |= {"training.epochs": 3, "search.seeds": 1}
    result = search(make_config(**changes, **{"search.ensemble": 2}), store, str(tmp_path))
    rows = read_rows(tmp_path)
    alone = rows[rows["model.tasks"] == '["topic"]']
    assert alone["macro_f1.mood"].isna().all()
    assert (alone["score"] < alone["macro_f1.topic"]).any()  # mood counts as the constant prediction
    assert result.finalists[result.winner].tasks == ["mood", "topic"]
    assert {role for role, f in result.finalists.items() if f.tasks == ["topic"]}
    assert result.ensemble_test.keys() == {"mood", "topic"}
