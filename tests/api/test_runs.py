"""What a run left, as a Python user reads it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mmkt_ray as mm
from mmkt_ray.errors import ConfigError, DataError
from tests.evaluation.runs import draw_samples, make_config, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that was made without Ray."""
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder, make_config(folder), draw_samples(300))


def test_tables_say_what_the_files_do(run_folder: str) -> None:
    """Catches an interval whose ends change places, and the best model's rows mixed with another's."""
    found = mm.results(run_folder)
    assert {"scores", "candidates", "classes", "predictions"} <= set(found.tables)
    scores = found.tables["scores"]
    assert (scores["accuracy_low"] <= scores["accuracy"]).all()
    assert (scores["accuracy"] <= scores["accuracy_high"]).all()
    predictions = found.tables["predictions"]
    assert predictions["sample_id"].is_unique
    for task in found.summary.recommended.tasks:
        known = predictions.dropna(subset=[f"{task}_label", f"{task}_pred"])
        accuracy = np.mean(known[f"{task}_label"] == known[f"{task}_pred"])
        row = scores[(scores["task"] == task) & (scores["model"] == found.best_name)].iloc[0]
        assert (row["accuracy"], row["num_rows"]) == (pytest.approx(accuracy), len(known))
    assert found.tables["candidates"]["model"][0] == found.best_name
    assert set(found.tables["classes"]["task"]) == set(scores["task"])
    assert isinstance(found.tables["scores"], pd.DataFrame)
    assert Path(found.best, "config.json").exists()


def test_what_is_not_there_is_told(run_folder: str, tmp_path: Path) -> None:
    """Catches a KeyError that names nothing."""
    found = mm.results(run_folder)
    with pytest.raises(KeyError, match="did you mean 'scores'"):
        found.tables["score"]
    with pytest.raises(DataError, match="no model 'x' that predicts"):
        found.load("x")
    with pytest.raises(DataError, match="no folder of a finished run"):
        mm.results(tmp_path)
    with pytest.raises(ConfigError, match="no config at"):
        mm.run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="did you mean 'name'"):
        mm.run({"nam": "x"})
