"""Files about models, features or settings that a run no longer has."""

import pytest

from mmkt_ray import storage
from mmkt_ray.evaluation.evaluated import is_stale
from mmkt_ray.scoring.metrics import ModelMetrics
from mmkt_ray.scoring.provenance import Current, LeftOut, Study, about, recipe
from mmkt_ray.scoring.results import Described
from mmkt_ray.scoring.run_file import RunFile
from tests.evaluation.runs import make_config
from tests.manifests import make_card, make_results


@pytest.fixture
def run(tmp_path):
    """A run folder with one model, and what the run holds; its config has the variants image, text and concat."""
    storage.write_json(str(tmp_path / "models" / "concat" / "config.json"), {"fingerprint": "f1"})
    config = make_config(tmp_path)
    about = {
        "kind": "trained",
        "name": "concat",
        "modalities": ["image", "text"],
        "fusion": "concat",
        "sharing": "task",
    }
    model = Described(**about, num_params=1, training_s=1.0, store="s1", folder="models/concat")
    results = make_results(models={"concat": model})
    return config, str(tmp_path), Current.of(str(tmp_path), RunFile(config=config.model_dump(mode="json")), results)


def told(run_uri: str, current: Current, **changes):
    Study(about=about(run_uri, **changes)).write(storage.join(run_uri, "found.json"))
    return current.read(Study, "found.json", "mmkt something")


def test_a_file_about_what_the_run_holds_is_read(run):
    """Catches a page that leaves out what is up to date."""
    config, uri, current = run
    variants = config.expand_variants()
    assert told(uri, current, folders=["models/concat"], stores=["s1", None], recipes=variants) is not None
    assert told(uri, current, recipes={"": config}) is not None
    assert current.read(Study, "nothing.json", "mmkt something") is None
    assert current.left_out == []


def test_a_file_about_another_model_is_left_out_and_told(run):
    """Catches missing curves of a 1-epoch model beside the model of 20 epochs that took its place."""
    _, uri, current = run
    assert told(uri, current, folders=["models/concat"]) is not None
    storage.write_json(storage.join(uri, "models", "concat", "config.json"), {"fingerprint": "f2"})
    assert current.read(Study, "found.json", "mmkt evaluate --missing") is None
    assert current.left_out == [LeftOut("found.json", "mmkt evaluate --missing")]


def test_a_file_about_other_features_or_settings_is_left_out(run):
    """Catches scores of another store's features, and seeds of models that were trained otherwise."""
    config, uri, current = run
    assert told(uri, current, stores=["s0"]) is None
    longer = config.with_overrides({"training.epochs": 99})
    assert told(uri, current, recipes=longer.expand_variants()) is None
    assert told(uri, current, recipes={"": longer}) is None
    assert told(uri, current, recipes={"gone": config}) is None
    assert current.left_out == [LeftOut("found.json", "mmkt something")]  # a page names it once


def test_seeds_are_no_part_of_a_recipe(run):
    """Catches repeats of the very same model that pass for those of another."""
    config, _, _ = run
    assert recipe(config) == recipe(config.with_overrides({"seed": 7, "training.seed": 8}))
    assert recipe(config) != recipe(config.with_overrides({"training.lr": 0.5}))


def metrics(fingerprint: str | None) -> ModelMetrics:
    about = {"name": "m", "split": "test", "num_rows": 1, "confidence": 0.95, "modalities": [], "tasks": {}}
    return ModelMetrics(fingerprint=fingerprint, **about)


def test_metrics_of_a_model_that_was_trained_anew_are_stale():
    """Catches scores of the model before beside the one after."""
    assert is_stale(metrics("a"), make_card(fingerprint="b"))
    assert not is_stale(metrics("a"), make_card(fingerprint="a"))
    assert not is_stale(metrics(None), make_card())
