"""A run folder by the real code: which rows count, what the files hold, and who is compared with whom."""

import base64
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support, recall_score

from mmkt_ray import storage
from mmkt_ray.cluster import cores
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.compare import compare
from mmkt_ray.evaluation.evaluate import evaluate_model, modality_subsets
from mmkt_ray.evaluation.scoring_baselines import evaluate_baselines
from mmkt_ray.features import feature_table as table_module
from mmkt_ray.features.store import open_store
from mmkt_ray.inference import rows as rows_module
from mmkt_ray.inference.model_card import read_card, write_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import load_rows
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.sandbox.child import Limits
from mmkt_ray.scoring.heldout import load_heldout
from mmkt_ray.scoring.metrics import ModelMetrics
from mmkt_ray.scoring.tables import comparison_table
from mmkt_ray.studies.gallery import show, write_gallery
from mmkt_ray.studies.gallery_results import Gallery
from tests.evaluation.runs import (
    THINGS,
    VARIANTS,
    draw_samples,
    make_config,
    train_variant,
    write_run,
    write_shards,
    write_store,
)
from tests.labels import codes_of

pytestmark = pytest.mark.slow

ALL_THINGS = (*THINGS, "unicorn")  # the last one is in test only


@pytest.fixture(scope="module")
def samples():
    return draw_samples(600, things=ALL_THINGS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, samples) -> Path:
    """The folder of a finished run; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("run")
    return Path(write_run(folder, make_config(folder), samples))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def predictions(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder / "predictions-test.parquet").to_pandas()


def labelled_rows(samples, task: str, modalities: list[str]) -> np.ndarray:
    """Mask of the test samples with a label and one of the modalities, counted by hand."""
    readable = np.any([samples[m][1] for m in modalities], axis=0)
    return (
        np.array([s == "test" and name is not None for s, name in zip(samples["split"], samples[task], strict=True)])
        & readable
    )


def row_of(results: dict, task: str, model: str) -> dict:
    return next(r for r in results["tasks"][task]["rows"] if r["model"] == model)


def test_results_call_a_model_by_its_own_name(run):
    """Every model had the name of the last subset of its modalities that was scored."""
    for name in ("image", "text", "concat"):
        assert ModelMetrics.read(str(run / "models" / name / "metrics.json")).name == name


def test_classes_that_train_lacks_are_named(finished, samples):
    """Catches a note on unseen classes that leaves open which they are and how many rows have them."""
    results = storage.read_json(str(finished / "report" / "results.json"))
    num = int(
        sum(
            samples["thing"][i] == "unicorn" for i in np.flatnonzero(labelled_rows(samples, "thing", ["image", "text"]))
        )
    )
    assert row_of(results, "thing", "concat")["unseen"] == {"unicorn": num}
    assert row_of(results, "colour", "concat")["unseen"] == {}
    assert any(f"does not have: thing 'unicorn' ({num});" in note for note in results["notes"])


@pytest.mark.parametrize("variant", ["image", "concat"])
def test_rows_are_the_labelled_ones_that_the_model_can_read(finished, samples, variant):
    """Catches unlabelled rows scored as wrong, and rows without any of the model's modalities scored at all."""
    record = storage.read_json(str(finished / "models" / variant / "metrics.json"))
    assert record["modalities"] == (["image"] if variant == "image" else ["image", "text"])
    for task in ("thing", "colour"):
        expected = labelled_rows(samples, task, record["modalities"])
        found = record["tasks"][task]
        assert found["num_rows"] == expected.sum()
        unseen = sum(samples[task][i] == "unicorn" for i in np.flatnonzero(expected))
        assert found["num_unseen"] == unseen
        assert (unseen > 0) == (task == "thing")
        assert sum(p["num_rows"] for p in found["patterns"].values()) == expected.sum()
        low, value, high = (found["intervals"]["accuracy"][k] for k in ("low", "value", "high"))
        assert low < value < high
        assert value == pytest.approx(found["accuracy"])


def test_the_predictions_file_holds_what_the_metrics_say(finished, samples):
    """Catches predictions joined to the wrong ids, and unseen labels written as null or as a known class."""
    table = pq.read_table(finished / "models" / "concat" / "predictions-test.parquet")
    assert table.column_names == [
        "sample_id",
        "split",
        "missing",
        *(f"{t}_{c}" for t in ("colour", "thing") for c in ("label", "pred", "proba")),
    ]
    assert str(table.schema.field("thing_proba").type) == "fixed_size_list<element: float>[4]"
    rows = table.to_pandas()
    truth = (
        pd.DataFrame({k: samples[k] for k in ("sample_id", "thing", "colour")})
        .set_index("sample_id")
        .loc[rows["sample_id"]]
    )
    assert (
        rows["thing_label"].where(rows["thing_label"].notna(), None).tolist()
        == truth["thing"].where(truth["thing"].notna(), None).tolist()
    )
    assert "unicorn" in set(rows["thing_label"])
    index = {name: i for i, name in enumerate(samples["sample_id"])}
    for sample_id, missing in zip(rows["sample_id"], rows["missing"], strict=True):
        assert list(missing) == [m for m in ("image", "text") if not samples[m][1][index[sample_id]]]
    labelled = rows[rows["thing_label"].notna()]
    record = storage.read_json(str(finished / "models" / "concat" / "metrics.json"))["tasks"]["thing"]
    assert (labelled["thing_label"] == labelled["thing_pred"]).mean() == pytest.approx(record["accuracy"])
    best = np.stack(labelled["thing_proba"]).argmax(axis=1)
    assert [record["class_names"][i] for i in best] == labelled["thing_pred"].tolist()


def test_subsets_really_drop_modalities(finished, samples):
    """Catches a subset that is scored with everything: text knows nothing of the colour, the image does."""
    found = storage.read_json(str(finished / "models" / "concat" / "metrics.json"))["tasks"]["colour"]
    subsets = found["subsets"]
    assert set(subsets) == {"image+text", "image", "text"}
    assert subsets["image+text"]["accuracy"] == found["intervals"]["accuracy"]
    assert subsets["text"]["num_rows"] == labelled_rows(samples, "colour", ["text"]).sum()
    things = storage.read_json(str(finished / "models" / "concat" / "metrics.json"))["tasks"]["thing"]["subsets"]
    assert things["text"]["num_rows"] == labelled_rows(samples, "thing", ["text"]).sum()  # some have no label
    assert subsets["text"]["accuracy"]["value"] < 0.5 < subsets["text"]["all"]["accuracy"]
    assert subsets["image"]["accuracy"]["value"] > 0.55
    assert [len(modality_subsets(list("abcdef")[:n])) for n in (1, 2, 3, 4, 5)] == [1, 3, 7, 15, 11]


@pytest.mark.parametrize("task", ["thing", "colour"])
@pytest.mark.parametrize("subset", [("image", "text"), ("image",), ("text",)])
def test_each_subset_has_all_metrics_of_its_own(finished, task, subset):
    """Catches a subset that is told the metrics of another one, or those of all modalities, or of other rows."""
    folder = str(finished / "models" / "concat")
    found = storage.read_json(f"{folder}/metrics.json")["tasks"][task]["subsets"]["+".join(subset)]["metrics"]
    model, card = load_model(folder)
    data = load_rows(open_store(str(finished / "features" / "union")), ["image", "text"], [task], card.class_names)
    there = np.any([data.table.present[m] for m in subset], axis=0)
    table = data.table.take(np.flatnonzero((data.table.split == "test") & (data.table.labels[task].labelled) & there))
    nothing = np.zeros(len(table.sample_id), bool)
    alone = replace(table, present={m: p if m in subset else nothing for m, p in table.present.items()})
    labels, names = codes_of(table.labels[task]), table.class_names[task]
    pred, pred_all = (predict_table(model, t)[task].argmax(axis=1) for t in (alone, table))
    assert found["num_rows"] == len(labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, pred))
    recalls = recall_score(labels, pred, labels=np.unique(labels), average=None, zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recalls.mean())
    for average in ("macro", "micro", "weighted"):
        expected = precision_recall_fscore_support(labels, pred, average=average, zero_division=0)[:3]
        assert [found[f"{average}_{n}"] for n in ("precision", "recall", "f1")] == pytest.approx(expected)
    codes = range(len(names))
    columns = precision_recall_fscore_support(labels, pred, labels=codes, zero_division=np.nan)
    for name, *expected in zip(names, *columns, strict=True):
        told = [found["per_class"][name][k] for k in ("precision", "recall", "f1", "support")]
        assert told == pytest.approx([None if np.isnan(v) else v for v in expected])
    seen = labels >= 0
    assert found["confusion"] == confusion_matrix(labels[seen], pred[seen], labels=codes).tolist()
    if len(subset) == 1:  # another matrix than with all modalities on the same rows
        assert found["confusion"] != confusion_matrix(labels[seen], pred_all[seen], labels=codes).tolist()


def test_a_model_is_scored_in_its_own_classes_whatever_the_store_calls_them(run, samples, tmp_path):
    """Catches labels encoded by the store's class list: a store with one class more would shift all the others."""
    before = storage.read_json(str(run / "models" / "concat" / "metrics.json"))
    other = dict(samples, split=list(samples["split"]), thing=list(samples["thing"]))
    row = other["split"].index("train")
    other["thing"][row] = "aardvark"  # sorts before all others
    store = write_store(str(tmp_path / "other"), other)
    assert store.manifest.tasks["thing"].classes[0] == "aardvark"
    after = evaluate_model(str(run / "models" / "concat"), store)
    assert after.tasks["thing"].confusion == before["tasks"]["thing"]["confusion"]
    assert after.store == "other"


def test_figures_do_not_hang_on_how_much_is_held(run, monkeypatch):
    """Catches rows that are lost, doubled or mixed up where a table is mapped from files, and where predictions are
    written, compared and looked through a few rows at a time."""
    store, config = open_store(str(run / "features" / "union")), make_config(run)
    names = ("models/concat/metrics.json", "models/concat/gallery.json", "baselines/union/metrics.json")
    names += ("report/results.json",)

    def figures() -> list:
        evaluate_model(str(run / "models" / "concat"), store)
        evaluate_baselines(config, store, str(run / "baselines" / "union"))
        compare(str(run))
        write_gallery(str(run / "models" / "concat"))
        found = [without_times(storage.read_json(str(run / name))) for name in names]
        return found + [
            pq.read_table(run / f / "predictions-test.parquet") for f in ("models/concat", "baselines/union")
        ]

    before = figures()
    monkeypatch.setattr(rows_module, "ROW_GROUP", 7)
    monkeypatch.setattr(table_module, "TAKE_ROWS", 50)
    monkeypatch.setattr(table_module, "MAPPED_BYTES", 100)
    assert figures() == before


def without_times(record):
    """A result without what differs from run to run."""
    if isinstance(record, dict):
        return {k: without_times(v) for k, v in record.items() if k not in ("seconds", "training_s")}
    return [without_times(v) for v in record] if isinstance(record, list) else record


def test_another_split_leaves_the_test_files_alone(run):
    """Catches `--split val` that overwrites the test scores."""
    before = (run / "models" / "image" / "metrics.json").read_bytes()
    record = evaluate_model(str(run / "models" / "image"), open_store(str(run / "features" / "union")), split="val")
    assert (run / "models" / "image" / "metrics.json").read_bytes() == before
    assert (run / "models" / "image" / "predictions-val.parquet").exists()
    assert record.tasks["colour"].val is None
    on_test = storage.read_json(str(run / "models" / "image" / "metrics.json"))
    assert on_test["tasks"]["colour"]["val"]["accuracy"] == pytest.approx(record.tasks["colour"]["accuracy"])


def test_errors_say_what_to_do(run, samples, tmp_path):
    """Catches a diverged model that quietly scores as its first class, and an empty split that scores as zero."""
    store = open_store(str(run / "features" / "union"))
    with pytest.raises(DataError, match="no 'holdout' rows"):
        evaluate_model(str(run / "models" / "image"), store, split="holdout")
    weights = run / "models" / "image" / "model.safetensors"
    save_file(
        {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in load_file(weights).items()},
        weights,
    )
    card = read_card(str(run / "models" / "image"))
    write_card(
        str(run / "models" / "image"),
        card.replaced(checksums={"model.safetensors": storage.file_checksum(str(weights))}),
    )
    with pytest.raises(DataError, match="NaN or infinite weights"):
        evaluate_model(str(run / "models" / "image"), store)
    with pytest.raises(DataError, match="nothing is evaluated"):
        compare(str(tmp_path / "nowhere"))
    none = write_store(str(tmp_path / "none"), dict(samples, split=["train"] * 600))
    with pytest.raises(DataError, match="no 'test' rows"):
        evaluate_baselines(make_config(tmp_path), none, str(tmp_path / "out"))


def test_baselines_have_the_same_record_and_rows(finished, samples):
    """Catches baselines scored on other rows than the models they stand beside."""
    found = storage.read_json(str(finished / "baselines" / "union" / "metrics.json"))
    assert set(found["models"]) == {"majority", "logreg:image", "logreg:text", "logreg:image+text"}
    rows = predictions(finished / "baselines" / "union")
    for name, record in found["models"].items():
        modalities = record["modalities"] or ["image", "text"]
        mine = rows[(rows["model"] == name) & rows["thing_label"].notna() & rows["thing_pred"].notna()]
        expected = np.array(samples["sample_id"])[labelled_rows(samples, "thing", modalities)]
        assert sorted(mine["sample_id"]) == sorted(expected)
        assert record["tasks"]["thing"]["num_rows"] == len(expected)
        assert (mine["thing_label"] == mine["thing_pred"]).mean() == pytest.approx(record["tasks"]["thing"]["accuracy"])


def test_a_baseline_is_shipped_as_a_model_that_says_the_same(finished):
    """Catches a baseline that the report recommends and nobody can use,
    and val scores of rows that it learnt from."""
    results = storage.read_json(str(finished / "report" / "results.json"))["models"]
    assert results["majority"]["folder_to_ship"] is None
    assert results["concat"]["folder_to_ship"] == "models/concat"
    folder = results["logreg:image+text"]["folder_to_ship"]
    model, card = load_model(str(finished / folder))
    table = open_store(str(finished / "features" / "union")).table(["image", "text"], ["thing", "colour"])
    rows = predictions(finished / "baselines" / "union")
    rows = rows[rows["model"] == "logreg:image+text"].set_index("sample_id").dropna(subset=["thing_proba"])
    proba = predict_table(model, table.take(np.flatnonzero(np.isin(table.sample_id.astype(str), rows.index))))["thing"]
    np.testing.assert_allclose(proba, np.stack(rows["thing_proba"]), atol=1e-6)
    heldout = load_heldout(str(finished / folder))
    y, z = codes_of(table.labels["thing"])[heldout.rows], heldout.logits["image+text"]["thing"]
    record = storage.read_json(str(finished / "baselines" / "union" / "metrics.json"))
    val = record["models"]["logreg:image+text"]["tasks"]["thing"]["val"]
    assert (val["num_rows"], val["on"]) == ((y >= 0).sum(), "cv")
    assert val["accuracy"] == pytest.approx((z.argmax(axis=1) == y)[y >= 0].mean())
    assert card.training.linear.l2.keys() == {"thing", "colour"}


def test_the_difference_is_paired_over_shared_samples(finished):
    """Catches a subtraction of two scores over different samples: the image alone sees only part of them."""
    results = storage.read_json(str(finished / "report" / "results.json"))
    single = results["tasks"]["colour"]["best_single"]
    assert single == "image"
    row = row_of(results, "colour", "concat")
    a, b = (predictions(finished / "models" / m).set_index("sample_id") for m in ("concat", "image"))
    both = a.join(b.add_suffix("_b"), how="inner").dropna(subset=["colour_label"])
    right = (both["colour_pred"] == both["colour_label"]).mean(), (both["colour_pred_b"] == both["colour_label"]).mean()
    assert row["versus"]["num_rows"] == len(both) < row["num_rows"]
    assert row["versus"]["shared_accuracy"] == pytest.approx({"ours": right[0], "theirs": right[1]})
    assert row["versus"]["accuracy"]["value"] == pytest.approx(right[0] - right[1])
    assert any("both can read" in note for note in results["notes"])
    assert row_of(results, "colour", single)["verdict"] == "best single modality"
    assert row_of(results, "colour", "text")["verdict"] == "worse"


def test_models_are_chosen_on_val_not_on_test(run):
    """Catches choosing on test, which makes the best of many look better than it is."""
    for name, accuracy in {"image": 0.1, "text": 0.9, "concat": 0.5}.items():
        uri = str(run / "models" / name / "metrics.json")
        record = storage.read_json(uri)
        for task in record["tasks"].values():
            task["val"]["accuracy"] = accuracy
        storage.write_json(uri, record)
    found = compare(str(run)).tasks["colour"]
    assert (found.selected_on, found.best_single, found.best_trained) == ("val", "text", "text")


@pytest.mark.parametrize(("num_rows", "chosen"), [(60, "text"), (60_000, "concat")])
def test_of_models_that_val_cannot_tell_apart_the_smallest_is_chosen(run, num_rows, chosen):
    """Catches a larger model put forward for one val sample more,
    and a smaller one where val does tell them apart."""
    for name, (accuracy, num_params) in {"image": (0.3, 10), "text": (0.6, 20), "concat": (0.65, 30)}.items():
        uri = str(run / "models" / name / "metrics.json")
        record = storage.read_json(uri) | {"num_params": num_params}
        for task in record["tasks"].values():
            task["val"] |= {"accuracy": accuracy, "num_rows": num_rows}
        storage.write_json(uri, record)
    found = compare(str(run)).tasks["colour"]
    assert (found.best_trained, found.best_fused) == (chosen, "concat")


def test_a_model_that_reads_only_the_easy_samples_is_not_the_best(run):
    """Catches a choice by accuracy alone: 99 % of a tenth of the samples is no better than 60 % of all."""
    for name, (accuracy, num_rows) in {"image": (0.99, 6), "text": (0.3, 60), "concat": (0.6, 60)}.items():
        uri = str(run / "models" / name / "metrics.json")
        record = storage.read_json(uri)
        for task in record["tasks"].values():
            task["val"] |= {"accuracy": accuracy, "num_rows": num_rows}
        storage.write_json(uri, record)
    results = compare(str(run))
    assert results.tasks["colour"].best_trained == results.main == "concat"
    assert results.tasks["colour"].best_single == "text"


def test_without_val_the_choice_is_on_test_and_said(run):
    """Catches a crash on data without a val split, and a choice on test that nobody is told of."""
    uri = str(run / "models" / "concat" / "metrics.json")
    record = storage.read_json(uri)
    record["tasks"]["thing"]["val"] = None
    storage.write_json(uri, record)
    results = compare(str(run))
    assert {t: f.selected_on for t, f in results.tasks.items()} == {"thing": "test", "colour": "val"}
    assert "no held-out rows but test" in results.notes[0]


def test_without_trained_single_modality_models_nothing_is_said_of_fusing(run):
    """Catches a gain over something weaker, such as a baseline, sold as a gain of fusing; and silence about it."""
    shutil.rmtree(run / "models" / "image")
    shutil.rmtree(run / "models" / "text")
    results = compare(str(run))
    found = results.tasks["colour"]
    assert found.best_single is None
    assert found.headline.title == "Whether fusing helps is not known: concat stands alone"
    row = results.tasks["colour"].row("concat")
    assert (row.versus, row.verdict) == (None, "no single modality trained")
    assert results.notes[0] == (
        "Not evaluated, or trained anew since, so not shown: image, text; run `mmkt evaluate` again."
    )
    assert any("trained for colour, thing: nothing says there whether fusing helps" in note for note in results.notes)


def test_models_of_other_samples_are_not_compared(run, samples, tmp_path):
    """Catches a difference between scores on different samples, e.g. of a paired and an unpaired store."""
    renamed = dict(samples, sample_id=[f"pair-{i}" for i in samples["sample_id"]])
    store = write_store(str(run / "features" / "pairs"), renamed, synthetic_pairs=True)
    config = make_config(tmp_path)
    train_variant(config.with_overrides({"training.epochs": 1}), store, str(run / "models" / "paired"))
    evaluate_model(str(run / "models" / "paired"), store)
    card = storage.read_json(str(run / "run.json"))
    card["variants"]["paired"] = {"store": "features/pairs", "model": "models/paired"}
    storage.write_json(str(run / "run.json"), card)
    results = compare(str(run))
    row = results.tasks["colour"].row("paired")
    assert (row.versus, row.verdict) == (None, "different samples")
    assert "different samples" in comparison_table(results)
    torch.set_num_threads(1)
    evaluate_baselines(config, store, str(run / "baselines" / "pairs"))
    assert torch.get_num_threads() == cores()  # or a run and an evaluation on its own differ in the last bits
    results = compare(str(run))
    assert results.tasks["colour"].row("paired").verdict == "different samples"
    assert results.tasks["colour"].row("concat").versus.model == "image"


def test_the_table_fits_a_terminal_whatever_the_names(run):
    """Catches a table that wraps in a terminal of 100 columns because a variant has a long name."""
    card = storage.read_json(str(run / "run.json"))
    card["variants"]["concat-with-a-name-that-goes-on-and-on-and-on-and-on"] = card["variants"].pop("concat")
    storage.write_json(str(run / "run.json"), card)
    text = comparison_table(compare(str(run)))
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert max(map(len, lines)) <= 100
    assert len(lines) == 2 * (1 + 3 + 4)
    assert "…" in text
    assert "accuracy [95 %]" in text


def test_the_gallery_shows_what_the_model_saw(finished):
    """Catches a gallery that shows another row's image, or samples in the wrong group."""
    main = compare(str(finished)).main
    gallery = Gallery.read(str(finished / "models" / main / "gallery.json"))
    assert gallery.note is None
    for groups in gallery.tasks.values():
        assert all(1 <= len(group) <= 4 for group in groups.values())
        assert all(s.label == s.pred for s in groups["right"])
        assert all(s.label != s.pred for s in groups["wrong"])
        confidences = [s.proba for s in groups["right"]]
        assert confidences == sorted(confidences, reverse=True)
    for group in gallery.tasks["colour"].values():
        for s in group:
            if (shown := s.inputs.get("image")) is not None:
                red, green, blue = np.asarray(
                    Image.open(io.BytesIO(base64.b64decode(shown["png"]))).convert("RGB")
                ).mean(axis=(0, 1))
                assert {"red": red, "green": green, "blue": blue}[s.label] == max(red, green, blue)
            if (shown := s.inputs.get("text")) is not None:
                assert shown["text"].endswith(f"seen {s.sample_id[1:]} times")


def test_a_combined_sample_shows_both_of_its_sources(run, samples, tmp_path):
    """Catches pairs (`a|b`) that no shard knows by that name, and so have no picture."""
    pairs = dict(samples, sample_id=[f"s{i}|s{(i + 1) % 600}" for i in range(600)])
    store = write_store(str(run / "features" / "pairs"), pairs)
    config = make_config(tmp_path)
    write_shards(tmp_path, samples)
    train_variant(config.with_overrides({"training.epochs": 1}), store, str(run / "models" / "paired"))
    evaluate_model(str(run / "models" / "paired"), store)
    gallery = write_gallery(str(run / "models" / "paired"))
    shown = [s.inputs for groups in gallery.tasks.values() for group in groups.values() for s in group]
    assert all(set(inputs) == {"image", "text"} for inputs in shown)
    assert all(inputs["image"] and inputs["text"] for inputs in shown if None not in inputs.values())
    shutil.rmtree(tmp_path / "data")
    assert "could not be read" in write_gallery(str(run / "models" / "paired")).note


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
def test_thumbnails_are_small_whatever_the_image(mode):
    """Catches image modes that PNG cannot hold, and full-size images in the page."""
    out = io.BytesIO()
    Image.new(mode, (500, 200)).save(out, "tiff")
    kind, limits = MODALITY_KINDS["image"](), Limits(max_pixels=1_000_000, timeout_s=30.0)
    found = Image.open(io.BytesIO(base64.b64decode(show(out.getvalue(), kind, limits)["png"])))
    assert found.size == (96, 38)
    assert show(b"no image", kind, limits) == {"kind": "image", "png": None}


def test_variants_of_the_run_are_the_ones_asked_for(finished):
    """Catches parameters or training time of one model shown beside another."""
    results = storage.read_json(str(finished / "report" / "results.json"))
    assert [n for n, m in results["models"].items() if m["kind"] == "trained"] == sorted(VARIANTS)
    by_name = results["models"]
    assert by_name["concat"]["num_params"] > max(by_name["image"]["num_params"], by_name["text"]["num_params"])
    assert by_name["concat"]["fusion"] == "concat"
    assert by_name["image"]["fusion"] is None
    assert all(m["training_s"] > 0 for m in by_name.values() if m["name"] != "majority")
