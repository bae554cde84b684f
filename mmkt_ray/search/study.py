"""A search as an Optuna study in a journal file, which `optuna-dashboard` opens: <run>/search/study.journal."""

from __future__ import annotations

import tempfile
from pathlib import Path

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mmkt_ray import storage
from mmkt_ray.search.leaderboard import overrides_of
from mmkt_ray.search.space import Space
from mmkt_ray.search.tuner import frozen_trial

FILE = "study.journal"
MAX_TRIALS = 2000  # the best ones: a dashboard draws no more


def write_study(search_uri: str, space: Space, rows: pd.DataFrame) -> str:
    """Write the scored candidates of a leaderboard as trials of one study; returns the file's place."""
    scored = rows[rows["score"].notna() & rows["reference"].isna()].nlargest(MAX_TRIALS, "score").sort_index()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))), study_name=space.config.name, direction="maximize"
        )
        study.add_trials([frozen_trial(space, overrides_of(row), row["score"]) for _, row in scored.iterrows()])
        uri = storage.join(search_uri, FILE)
        storage.write_bytes(uri, path.read_bytes())
    return uri
