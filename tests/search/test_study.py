"""A search's journal opens as an Optuna study, with what each candidate chose and scored."""

import json

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mmkt_ray.search import study
from mmkt_ray.search.space import build_space

CHOSEN = {"model.fusion.name": "concat", "model.sharing": "task", "training.lr": 0.01, "model.dropout": 0.25}
DEEP = CHOSEN | {"model.fusion.name": "hierarchical", "model.fusion.depth": 2, "training.lr": 0.001}


def leaderboard(*rows):
    return pd.DataFrame(
        [{"overrides": json.dumps(chosen), "score": score, "reference": reference} for chosen, score, reference in rows]
    )


def test_the_journal_opens_with_all_scored_candidates(make_config, tmp_path):
    """References and candidates without a score are no trials; a key that is only there sometimes is no error."""
    space = build_space(make_config())
    rows = leaderboard((CHOSEN, 0.5, None), (DEEP, 0.7, None), (CHOSEN, None, None), (CHOSEN, 0.9, "image alone"))
    uri = study.write_study(str(tmp_path), space, rows)
    opened = optuna.load_study(study_name="test", storage=JournalStorage(JournalFileBackend(uri)))
    assert [trial.value for trial in opened.trials] == [0.5, 0.7]
    assert opened.best_trial.params == DEEP | {"model.fusion.depth": 2}
    assert opened.direction.name == "MAXIMIZE"


def test_of_many_the_best_are_kept_and_a_rerun_replaces(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MAX_TRIALS", 2)
    space = build_space(make_config())
    rows = leaderboard((CHOSEN, 0.5, None), (DEEP, 0.7, None), (CHOSEN, 0.6, None))
    for _ in range(2):
        uri = study.write_study(str(tmp_path), space, rows)
    opened = optuna.load_study(study_name="test", storage=JournalStorage(JournalFileBackend(uri)))
    assert [trial.value for trial in opened.trials] == [0.7, 0.6]
