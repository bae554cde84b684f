"""A model folder's README.md: it parses as a model card, tells what evaluation found, and nothing that is private."""

import json
from pathlib import Path

import pytest
import yaml

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.model_readme import _text, readme_text, write_readme
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.scoring.metrics import ModelMetrics
from tests.evaluation.runs import draw_samples, make_config, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    return Path(write_run(folder, make_config(folder), draw_samples(240)))


def read(run):
    manifest = open_store(str(run / "features/union")).manifest
    return manifest, write_readme(str(run / "models/concat"), manifest)


def test_header_is_yaml_with_the_metrics_of_evaluation(run):
    _, text = read(run)
    header = yaml.safe_load(text.split("---\n")[1])
    metrics = json.loads((run / "models/concat/metrics.json").read_text())
    results = {r["task"]["name"]: r["metrics"] for r in header["model-index"][0]["results"]}
    assert set(results) == set(metrics["tasks"])
    for task, found in results.items():
        assert found[0]["value"] == round(metrics["tasks"][task]["accuracy"], 4)
        assert {m["type"] for m in found} == {"accuracy", "f1"}
    assert header["tags"] == ["image", "mmkt_ray", "multimodal", "text"]


def test_the_model_still_loads_and_its_card_has_the_checksum(run):
    _, text = read(run)
    _, card = load_model(str(run / "models/concat"))
    assert card.checksums["README.md"] == storage.checksum(text.encode())
    assert (run / "models/concat/README.md").read_text() == text


def test_no_place_of_this_machine_is_told(run):
    """A model folder is given away; data_root, run_root and the sources' paths are not."""
    manifest, text = read(run)
    assert str(run) not in text
    assert "/tmp" not in text
    assert "parquet'" not in text
    assert "3 rows of the source could not be read" in text
    assert manifest.counts.rejects == 3


def test_names_cannot_break_the_page():
    assert _text("a|b\n# c <img>") == "a\\|b \\# c \\<img\\>"
    assert len(_text("x" * 500)) == 60


def test_limits_name_few_rows_and_unseen_classes(run):
    manifest, _ = read(run)
    metrics = ModelMetrics.read(str(run / "models/concat/metrics.json"))
    _, card = load_model(str(run / "models/concat"))
    metrics.tasks["thing"].num_unseen = 7
    metrics.tasks["thing"].per_class["cat"].support = 2
    text = readme_text("concat", card, metrics, manifest.replaced(synthetic_pairs=True))
    assert "thing: 7 test rows are of classes that it never saw" in text
    assert "1 of 4 classes have fewer than 10 test rows" in text
    assert "synthetic pairs" in text


def test_a_model_without_evaluation_has_none(tmp_path):
    with pytest.raises(DataError, match="mmkt evaluate"):
        write_readme(str(tmp_path), {})
