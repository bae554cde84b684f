"""Which model is recommended: simple ones within one standard error, paired where held-out predictions are there."""

from pathlib import Path

import numpy as np
import pytest

from mmkt_ray import storage
from mmkt_ray.evaluation.evaluated import Evaluated
from mmkt_ray.evaluation.recommend import Candidate, _can_ship, rank_candidates, standard_error
from mmkt_ray.scoring.metrics import ModelMetrics
from mmkt_ray.scoring.results import Recommended
from mmkt_ray.scoring.tables import recommendation_text
from tests.manifests import make_results

ROWS = np.arange(100)


def candidate(name: str, num_right: int, num_params: int, modalities: str = "ab", predicted: bool = True) -> Candidate:
    """Right on the first so many of 100 held-out rows."""
    rows = (ROWS, num_right > ROWS) if predicted else None
    return Candidate(name, tuple(modalities), num_params, {"t": num_right / 100}, {"t": 100}, {"t": rows})


def test_the_standard_error_is_that_of_paired_differences():
    """Catches the binomial error where models agree on most rows:
    it would call 4 of 100 rows level at any accuracy near half."""
    best, other = candidate("best", 60, 9), candidate("other", 56, 1)
    gain = (ROWS < 60).astype(float) - (ROWS < 56)
    assert standard_error(best, other) == (pytest.approx(gain.std(ddof=1) / 10), True)
    assert [c.model for c in rank_candidates([best, other])] == ["best", "other"]
    blind = candidate("other", 56, 1, predicted=False)
    error, paired = standard_error(best, blind)
    assert (error, paired) == (pytest.approx(0.049, abs=1e-3), False)
    assert rank_candidates([best, blind])[0].model == "other"


def test_fewer_modalities_come_before_fewer_parameters():
    """Catches a fused model that is shipped though one modality does as well, because it is narrower."""
    models = [candidate("fused", 80, 10), candidate("single", 80, 99, "a"), candidate("small", 80, 50, "b")]
    assert rank_candidates(models)[0].model == "small"
    assert {c.model for c in rank_candidates(models) if c.within} == {"fused", "single", "small"}


def test_a_row_that_a_model_cannot_read_counts_as_wrong():
    """Catches a pair compared only where both can answer: the model of the few easy rows would pass as level."""
    best = candidate("best", 90, 9)
    half = Candidate("half", ("a",), 1, {"t": 0.5}, {"t": 100}, {"t": (ROWS[:50], np.ones(50, bool))})
    assert standard_error(best, half)[1]
    assert rank_candidates([best, half])[0].model == "best"


def test_one_row_or_none_wrong_is_no_certainty():
    """Catches an error of zero where the best has everything right."""
    blind = {"t": None}
    models = [Candidate(n, ("a",), p, {"t": s}, {"t": 20}, blind) for n, p, s in (("big", 9, 1.0), ("small", 1, 0.96))]
    assert rank_candidates(models)[0].model == "small"
    assert rank_candidates(models[:1])[0].model == "big"


def test_a_few_rows_are_no_reason_to_ship_the_worse_model():
    """Catches a model that is shipped though it has one held-out row in four wrong and all of test: the standard
    error of four differences was as large. Of equals the simplest is shipped even then."""
    right = {"fused": [1, 1, 1, 1], "text": [1, 1, 1, 1], "price": [1, 1, 1, 0]}
    models = [
        Candidate(name, (name,), num_params, {"t": np.mean(r)}, {"t": 4}, {"t": (np.arange(4), np.array(r, bool))})
        for num_params, (name, r) in zip((9, 5, 1), right.items(), strict=True)
    ]
    assert standard_error(models[0], models[2])[0] == pytest.approx(0.25)
    assert rank_candidates(models)[0].model == "text"


def test_the_last_lines_say_what_to_ship_and_how(tmp_path):
    """Catches a run that ends without the model, its reasons, its place, or a command that a shell takes apart."""
    about = {
        "folder": "models/image",
        "why": ["It is good."],
        "tasks": ["t"],
        "per_task": {"t": "image"},
        "considered": [],
    }
    chosen = Recommended(model="image", **about)
    run = str(tmp_path / "my run")
    text = recommendation_text(make_results(recommended=chosen), run)
    assert text.splitlines() == [
        "Ship image.",
        "It is good.",
        f"model: {storage.join(run, 'models/image')}",
        f"use it: mmkt predict '{run}' NEW_SHARDS --out FOLDER",
        f"in Python: mmkt_ray.load('{run}').predict(df)",
    ]
    assert recommendation_text(make_results(), str(tmp_path)) == ""


def test_a_solved_model_can_be_shipped(tmp_path: Path) -> None:
    """Catches a recommendation that passes over solved models: their folders lie elsewhere than their scores."""
    folder = "models/.linear/abc/image+text"
    about = {"name": "logreg:image+text", "modalities": ["image", "text"], "folder_to_ship": folder}
    record = ModelMetrics(split="test", num_rows=9, confidence=0.95, tasks={}, **about)
    linear = Evaluated(
        name="logreg:image+text", kind="baseline", folder="baselines/abc", record=record, predictions_uri=""
    )
    assert not _can_ship(str(tmp_path), linear)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text("{}")
    assert _can_ship(str(tmp_path), linear)
