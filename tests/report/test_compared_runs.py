"""Runs side by side: paired on the rows that both have, by sample id, with the tests of the report."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.inference.model_card import write_card
from mmkt_ray.report.compared_runs import against, as_page, chosen_model, compare_models, compare_runs
from mmkt_ray.scoring.intervals import exact_p
from mmkt_ray.scoring.results import ResultsFile
from tests.manifests import make_card


def write_model(folder: Path, ids, labels, preds, names=("a", "b")) -> str:
    """A model folder with just what a comparison reads."""
    uri = folder / "models" / "m"
    uri.mkdir(parents=True)
    interval = {"value": float(np.mean(np.array(labels) == preds)), "low": 0.0, "high": 1.0}
    scores = {
        "kind": "multiclass",
        "num_rows": len(ids),
        "class_names": list(names),
        "intervals": {"accuracy": interval},
    }
    record = {"name": "m", "split": "test", "confidence": 0.95, "bootstrap_samples": 100, "modalities": ["text"]}
    record |= {"num_rows": len(ids)}
    storage.write_json(str(uri / "metrics.json"), record | {"tasks": {"t": scores}})
    write_card(str(uri), make_card(config={"tasks": {"t": {"inputs": None}}}))
    table = pa.table({"sample_id": ids, "split": ["test"] * len(ids), "t_label": labels, "t_pred": preds})
    pq.write_table(table, uri / "predictions-test.parquet")
    return str(uri)


@pytest.fixture
def runs(tmp_path):
    """The second run has its rows in another order, lacks the first five, has ten of its own, and one other label."""
    ids = [f"s{i}" for i in range(40)]
    labels = ["a" if i % 3 else "b" for i in range(40)]
    first = write_model(tmp_path / "one", ids, labels, ["a"] * 40)
    order = [*range(39, 4, -1), *range(100, 110)]
    own = ["a" if i == 39 else labels[i] if i < 40 else "a" for i in order]
    other = write_model(tmp_path / "two", [f"s{i}" for i in order], own, own)
    return first, other, ids, labels


def test_rows_are_paired_by_id_and_tested_exactly(runs):
    first, other, _, labels = runs
    found = against("t", chosen_model(other), chosen_model(first))
    common = range(5, 39)
    right = [labels[i] == "a" for i in common]
    assert found["num_rows"] == len(common)
    assert found["value"] == pytest.approx(1 - np.mean(right))
    assert found["p"] == pytest.approx(exact_p(int(np.sum(np.logical_not(right))), 0))


def test_a_run_that_ships_a_linear_model_is_compared_by_it(runs, tmp_path):
    """Catches a refused run folder: scores of linear models lie with the baselines,
    not in the folder that is shipped."""
    first, other, ids, labels = runs
    run = tmp_path / "ships"
    record = storage.read_json(f"{first}/metrics.json")
    own = {"name": "logreg:text", "folder_to_ship": "models/.linear/x/text"}
    own |= {"modalities": record.pop("modalities"), "tasks": record.pop("tasks")}
    storage.make_dir(str(run / "baselines" / "s"))
    del record["name"]
    storage.write_json(str(run / "baselines/s/metrics.json"), record | {"models": {"logreg:text": own}})
    table = pa.table({"sample_id": ids, "split": ["test"] * 40, "t_label": labels, "t_pred": ["a"] * 40})
    pq.write_table(
        table.append_column("model", pa.array(["logreg:text"] * 40)), run / "baselines/s/predictions-test.parquet"
    )
    chosen = {"model": "logreg:text", "folder": own["folder_to_ship"], "tasks": ["t"], "why": [], "considered": []}
    results = ResultsFile(
        run="ships", split="test", confidence=0.95, models={}, tasks={}, main=None, notes=[], recommended=None
    )
    results.replaced(recommended=chosen | {"per_task": {"t": "logreg:text"}}).write(
        str(run / "report" / "results.json")
    )
    assert chosen_model(str(run)).name == "ships/logreg:text"
    assert "34" in compare_runs([str(run), other])


def test_models_of_one_name_are_told_apart(runs):
    """Catches two runs of one name, below different folders, in lines that nobody can tell apart."""
    first, other, *_ = runs
    assert first.split("/")[-3:] != other.split("/")[-3:]
    assert compare_runs([first, other]).count("one/m") == 1
    told = compare_runs([first, first, other])
    assert told.count(f"one/m ({first})") == 2


def test_the_table_says_which_is_better_after_correction(runs):
    first, other, *_ = runs
    (table,) = compare_models([chosen_model(first), chosen_model(other), chosen_model(first)])
    assert [row[-1] for row in table.rows] == ["the first", "better", "no difference shown"]
    assert table.rows[2][-2] == "1"


def test_a_page_escapes_and_loads_nothing(runs, tmp_path):
    first, other, *_ = runs
    text = compare_runs([first, other], str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "better" in text
    assert "one/m" in text
    assert page.count('scope="row"') == 2
    assert "://" not in page
    (table,) = compare_models([chosen_model(first), chosen_model(other)])
    assert "<b>" not in as_page([type(table)("<b>", table.head, table.rows)])


def test_what_cannot_be_compared_is_said(runs, tmp_path):
    first, *_ = runs
    with pytest.raises(DataError, match="no evaluated model"):
        compare_runs([first, str(tmp_path)])
    rows = ["x1", "x2"]
    apart = write_model(tmp_path / "three", rows, ["a", "b"], ["a", "b"])
    assert "no shared rows" in compare_runs([first, apart])
