"""A run with a task of each kind, by the real code: files, comparison, gallery, baselines, calibration."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmkt_ray import storage
from mmkt_ray.config import EvaluationConfig
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.evaluate import evaluate_model
from mmkt_ray.features.store import Store, open_store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.prediction import write_predictions
from mmkt_ray.scoring.tables import comparison_table
from tests.evaluation.runs import KINDS, SINGLES, THINGS, draw_samples, make_config, train_variant, write_run

pytestmark = pytest.mark.slow

TAGS = ["animal", "flies", "red", "swims"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    config = make_config(folder, {"image": SINGLES["image"], "concat": {}}, KINDS, tasks__thing__inputs=["text"])
    image = config.variants["image"] | {"model.tasks": ["warm", "tags"]}
    config = config.with_overrides({"variants": {**config.variants, "image": image}})
    return Path(write_run(folder, config, draw_samples(600, (*THINGS, "unicorn"))))


@pytest.fixture
def store(finished) -> Store:
    return open_store(str(finished / "features" / "union"))


def test_each_kind_has_its_own_scores(finished):
    """Catches a multilabel task scored by its most probable class, or a binary one without its positive class."""
    tasks = storage.read_json(str(finished / "models" / "concat" / "metrics.json"))["tasks"]
    assert {t: found["kind"] for t, found in tasks.items()} == KINDS
    assert tasks["warm"]["positive"] == "yes"
    assert tasks["warm"]["average_precision"] > 0.6  # a third of the rows are positive
    assert tasks["tags"]["class_names"] == TAGS
    assert tasks["tags"]["confusion"] is None
    assert tasks["tags"]["unseen"] == {"magic": tasks["tags"]["num_unseen"]}  # the unicorn's
    assert tasks["tags"]["num_unseen"] > 0
    assert tasks["tags"]["macro_average_precision"] > 0.7
    for found in tasks.values():
        whole = found["subsets"]["image+text"]["metrics"]
        assert whole == {name: found[name] for name in whole}
        assert found["intervals"]["accuracy"]["value"] == pytest.approx(found["accuracy"])
        assert found["intervals"]["macro_f1"]["value"] == pytest.approx(found["macro_f1"])


def test_the_predictions_of_a_multilabel_task_are_lists(finished):
    """Catches class names joined to strings, probabilities that sum to one,
    and unlabelled rows told as rows of no class."""
    table = pq.read_table(finished / "models" / "concat" / "predictions-test.parquet")
    assert [str(table.schema.field(f"tags_{c}").type) for c in ("label", "pred")] == ["list<element: string>"] * 2
    rows = table.to_pylist()
    assert any(r["tags_label"] is None for r in rows)
    assert any(r["tags_label"] == [] for r in rows)
    assert any("magic" in (r["tags_label"] or ()) for r in rows)
    labelled = [r for r in rows if r["tags_label"] is not None]
    for r in labelled:
        assert r["tags_pred"] == [n for n, p in zip(TAGS, r["tags_proba"], strict=True) if p >= 0.5]
    right = [set(r["tags_label"]) - {"magic"} == set(r["tags_pred"]) for r in labelled]
    record = storage.read_json(str(finished / "models" / "concat" / "metrics.json"))["tasks"]["tags"]
    assert np.mean(right) == pytest.approx(record["accuracy"])


def test_a_task_is_scored_on_rows_that_have_what_it_reads(finished):
    """Catches rows with only an image scored for a task that may not read it: their prediction is a guess."""
    rows = pq.read_table(finished / "models" / "concat" / "predictions-test.parquet").to_pylist()
    without = [r for r in rows if "text" in r["missing"]]
    assert without
    assert all(r["thing_pred"] is None and r["thing_proba"] is None and r["warm_pred"] for r in without)
    tasks = storage.read_json(str(finished / "models" / "concat" / "metrics.json"))["tasks"]
    with_text = [r for r in rows if "text" not in r["missing"] and r["thing_label"] is not None]
    assert tasks["thing"]["num_rows"] == len(with_text)
    assert set(tasks["thing"]["subsets"]) == {"image+text", "text"}
    assert set(tasks["thing"]["patterns"]) == {"image+text", "text"}


def test_models_are_compared_on_every_kind(finished):
    """Catches a comparison that crashes on lists, or that takes the order of classes for a difference."""
    results = compare(str(finished))
    row = results.tasks["tags"].row("concat")
    assert row.versus.model == "image"
    both = [
        {r["sample_id"]: r for r in pq.read_table(finished / "models" / m / "predictions-test.parquet").to_pylist()}
        for m in ("concat", "image")
    ]
    shared = [i for i in both[0] if i in both[1] and both[0][i]["tags_label"] is not None]
    ours, theirs = (
        np.mean([set(b[i]["tags_label"]) - {"magic"} == set(b[i]["tags_pred"]) for i in shared]) for b in both
    )
    assert row.versus.shared_accuracy.to_dict() == pytest.approx({"ours": ours, "theirs": theirs})
    assert row.versus["accuracy"]["value"] == pytest.approx(ours - theirs)
    assert any("subset accuracy" in note for note in results.notes)
    assert "tags" in comparison_table(results)
    main = storage.read_json(str(finished / "models" / results.main / "gallery.json"))["tasks"]["tags"]
    assert all(s["label"] == s["pred"] for s in main["right"])
    assert all(isinstance(s["label"], str) and 0.5 <= s["proba"] <= 1 for group in main.values() for s in group)


def test_baselines_of_every_kind_know_something(finished):
    """Catches a multilabel baseline with the columns of another class."""
    models = storage.read_json(str(finished / "baselines" / "union" / "metrics.json"))["models"]
    assert set(models) == {"majority", "logreg:image", "logreg:text", "logreg:image+text"}
    for task in ("tags", "warm"):
        auroc = {name: record["tasks"][task]["auroc"] for name, record in models.items()}
        assert auroc["majority"] == pytest.approx(0.5)
        assert auroc["logreg:image+text"] > 0.8


def test_calibration_is_kept_in_the_card_and_used_everywhere(finished, store, tmp_path):
    """Catches a temperature that only the report knows: predictions would go on as before."""
    config = make_config(tmp_path, tasks=KINDS)
    undisturbed = {"model.dropout": 0.0, "model.modality_dropout": 0.0}
    sure = config.with_overrides({"training.epochs": 30, "training.lr": 0.05, **undisturbed})
    uri = str(tmp_path / "sure")
    train_variant(sure, store, uri)
    raw = EvaluationConfig(calibrate=False, bootstrap_samples=100)
    plain = evaluate_model(uri, store, evaluation=raw)
    asked = evaluate_model(uri, store, evaluation=EvaluationConfig(calibrate=True, bootstrap_samples=100))
    model, card = load_model(uri)
    for task, found in asked.tasks.items():
        fitted = found.calibration
        assert fitted.temperature > 1.1
        assert fitted.before.log_loss == pytest.approx(plain.tasks[task]["log_loss"])
        assert fitted.after.log_loss == found["log_loss"] < fitted.before.log_loss
        assert found["accuracy"] == plain.tasks[task]["accuracy"]
        assert card.temperatures[task] == fitted.temperature
    write_predictions(str(tmp_path / "p.parquet"), model, store, card.class_names)
    new, old = (
        {r["sample_id"]: r["tags_proba"] for r in pq.read_table(path).to_pylist()}
        for path in (tmp_path / "p.parquet", f"{uri}/predictions-test.parquet")
    )
    assert all(np.allclose(new[i], p, atol=1e-6) for i, p in old.items())
    evaluate_model(uri, store, evaluation=raw)
    model, card = load_model(uri)
    assert card.temperatures == model.temperatures == {}
    before = predict_table(model, store.table(config.model_modalities, config.model_tasks))["tags"]
    assert not np.allclose(before[:20], np.stack([new[f"s{i}"] or [np.nan] * 4 for i in range(20)]), atol=1e-3)
