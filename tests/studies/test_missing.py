"""Missing-modality curves: what is hidden, what stands beside it, and that few forward passes make them."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from mmkt_ray import storage
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.store import Store, open_store
from mmkt_ray.inference.model_card import read_card, write_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.studies import missing
from mmkt_ray.studies.missing import missing_curves
from mmkt_ray.studies.missing_results import MissingCurves, missing_table
from tests.evaluation.runs import draw_samples, make_config, write_run

pytestmark = pytest.mark.slow

RATES = (0.0, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("missing")
    config = make_config(folder, training__epochs=8)
    return Path(write_run(folder, config, draw_samples(600)))


@pytest.fixture(scope="module")
def store(run) -> Store:
    return open_store(str(run / "features" / "union"))


@pytest.fixture(scope="module")
def result(run, store) -> MissingCurves:
    return missing_curves(str(run / "models" / "concat"), store, str(run), rates=RATES)


def complete_rows(store: Store, task: str):
    """The labelled test rows with both modalities: what can lose one."""
    table = store.table()
    both = table.present["image"] & table.present["text"] & table.labels[task].labelled
    return table.take(np.flatnonzero(both & (table.split == "test")))


@pytest.mark.parametrize("task", ["thing", "colour"])
@pytest.mark.parametrize(("hidden", "left"), [("image", "text"), ("text", "image")])
def test_the_ends_of_a_curve_are_the_model_with_and_without(run, store, result, task, hidden, left):
    """Catches rows hidden that lack the modality anyway, and rates that never reach none or all of the rows."""
    rows = complete_rows(store, task)
    model, _ = load_model(str(run / "models" / "concat"))
    ends = [
        (predict_table(model, rows, drop=d)[task].argmax(axis=1) == rows.labels[task].values).mean()
        for d in ([], [hidden])
    ]
    curve = result.curves[hidden][task]
    assert curve.num_rows == len(rows.sample_id)
    assert [curve.by_metric["accuracy"][0][0], curve.by_metric["accuracy"][-1][0]] == pytest.approx(ends)
    for value, low, high in curve.by_metric["accuracy"] + curve.by_metric["macro_f1"]:
        assert low <= value <= high
    reference = result.reference[hidden][task]
    alone = pq.read_table(run / "models" / left / "predictions-test.parquet").to_pandas().set_index("sample_id")
    if reference.models[left] == left:
        alone = alone.loc[rows.sample_id]
        expected = (alone[f"{task}_pred"] == alone[f"{task}_label"]).mean()
        assert reference.by_metric["accuracy"][-1][0] == pytest.approx(expected)


def test_half_of_the_rows_are_hidden_at_a_rate_of_one_half(result):
    """Catches a rate taken of all rows, or of the rows that stay: the accuracy must lie midway between the ends."""
    first, _, middle, last = (point[0] for point in result.curves["image"]["colour"].by_metric["accuracy"])
    assert first - last > 0.15
    assert middle == pytest.approx((first + last) / 2, abs=0.06)


def test_any_takes_one_modality_of_each_row(result):
    """Catches rows that lose everything: a model without any input answers by chance, and so would the curve."""
    for task in ("thing", "colour"):
        alone = [result.curves[m][task].by_metric["accuracy"][-1][0] for m in ("image", "text")]
        assert result.curves["any"][task].by_metric["accuracy"][-1][0] == pytest.approx(np.mean(alone), abs=0.08)


def test_the_difference_is_that_of_model_and_reference(result):
    """Catches a reference over other hidden rows than the model's."""
    for hidden, by_task in result.difference.items():
        for task, scores in by_task.items():
            for metric in ("accuracy", "macro_f1"):
                for d, a, b in zip(
                    *(
                        c.by_metric[metric]
                        for c in (scores, result.curves[hidden][task], result.reference[hidden][task])
                    ),
                    strict=True,
                ):
                    assert d[0] == pytest.approx(a[0] - b[0])


def test_a_model_below_the_best_of_what_is_there_is_told(run, store):
    """Catches a table that calls a model robust though the text alone, left to itself, does better."""
    uri = str(run / "models" / "ruined")
    shutil.copytree(run / "models" / "concat", uri)
    model, _ = load_model(uri)
    for name, value in model.named_parameters():
        if "heads" in name or "fusions" in name:
            value.data.zero_()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f"{uri}/model.safetensors")
    checksums = {"model.safetensors": storage.file_checksum(f"{uri}/model.safetensors")}
    write_card(uri, read_card(uri).replaced(checksums=checksums))
    found = missing_curves(uri, store, str(run), rates=(0.0, 1.0))
    (text,) = [a.text for a in found.answers if (a.hidden, a.task) == ("image", "thing")]
    assert "points" in text
    assert "below the best single-modality model" in text
    assert text in missing_table(found)
    shutil.rmtree(uri)


def test_one_forward_pass_with_everything_and_one_without_each(run, store, monkeypatch):
    """Catches a pass for every rate and seed, which takes hours on a large test split."""
    passes = []

    def counted(*args, **kwargs):
        passes.append(kwargs.get("drop", ()))
        return predict_table(*args, **kwargs)

    monkeypatch.setattr(missing, "predict_table", counted)
    missing_curves(str(run / "models" / "concat"), store, str(run))
    assert passes == [(), ["image"], ["text"]]


def test_the_result_is_kept_and_the_same_every_time(run, store, result):
    """Catches hidden rows that differ from run to run, and numbers that JSON cannot hold."""
    again = missing_curves(str(run / "models" / "concat"), store, str(run), rates=RATES)
    assert again == MissingCurves.read(str(run / "models" / "concat" / "missing.json")) == result
    assert set(result.patterns) == {"image+text", "image", "text"}
    record = storage.read_json(str(run / "models" / "concat" / "metrics.json"))["tasks"]["thing"]
    for pattern, by_task in result.patterns.items():
        assert by_task["thing"]["accuracy"] == pytest.approx(record["patterns"][pattern]["accuracy"])
        assert by_task["thing"].num_rows == record["patterns"][pattern]["num_rows"]
        assert "weighted_f1" in by_task["thing"].values


def test_a_model_of_one_modality_is_refused(run, store):
    """Catches a curve of guesses."""
    with pytest.raises(ConfigError, match="reads image only"):
        missing_curves(str(run / "models" / "image"), store, str(run))
