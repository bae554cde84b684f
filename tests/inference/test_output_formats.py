"""Predictions as CSV, JSON lines or Parquet: classes by name, the input's columns beside them."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.errors import ConfigError
from mmkt_ray.inference.output_formats import CLASSES, Output, classes_metadata, write_output
from mmkt_ray.inference.prediction import prediction_config
from mmkt_ray.inference.rows import prediction_columns, write_parts
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.evaluation.runs import make_config

CLASS_NAMES = {"colour": ["blue", "red, dark", "é"], "tags": ["a", "b"]}
ROWS = [("x1", "a car"), ("x2", 'a "cat", big'), ("x3", "naïve")]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A CSV of three rows, two of them of one line more than others."""
    path = tmp_path / "new.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("code", "caption", "colour_pred", "price"), *((*row, "old", "3") for row in ROWS)])
    return path


def predictions(path: Path, ids: list[str]) -> str:
    """The file that `mmkt predict` writes, its second row without a prediction."""
    import numpy as np

    proba = {"colour": [[0.2, 0.5, 0.3], [np.nan] * 3, [0.1, 0.2, 0.7]], "tags": [[0.9, 0.8], [0.1, 0.2], [0.3, 0.6]]}
    columns: dict[str, Any] = {"sample_id": pa.array(ids), "missing": [["image"], ["image", "text"], []]}
    for task, kind in (("colour", "multiclass"), ("tags", "multilabel")):
        columns |= prediction_columns(task, np.array(proba[task]), CLASS_NAMES[task], task_kind(kind))
    table = pa.table(columns)
    write_parts(str(path), [table.slice(0, 2), table.slice(2)], classes_metadata(CLASS_NAMES))
    return str(path)


def written(tmp_path: Path, shard: Path, output: Output, with_ids: bool = False) -> str:
    columns = {"text": "caption"} | ({"sample_id": "code"} if with_ids else {})
    config = prediction_config(make_config(tmp_path), [str(shard)], 0, "manifest", columns)
    chunks = [c for s in list_shards(ReadingPlan.of(config)) for c in read_chunks(ReadingPlan.of(config), s)]
    ids = [sample_id for chunk in chunks for sample_id in chunk.table["sample_id"].to_pylist()]
    return write_output(predictions(tmp_path / "predictions.parquet", ids), config, CLASS_NAMES, output)


def test_csv_has_the_best_class_and_its_probability(tmp_path: Path, shard: Path) -> None:
    """Catches lists in cells, a class of the wrong row, and a comma in a class name that makes a column."""
    found = pd.read_csv(written(tmp_path, shard, Output("csv")))
    assert list(found) == ["sample_id", "missing", *(f"colour_{c}" for c in ("pred", "top1", "top1_proba")),
                           *(f"tags_{c}" for c in ("pred", "top1", "top1_proba"))]  # fmt: skip
    assert (
        found["colour_pred"].fillna("-").tolist()
        == found["colour_top1"].fillna("-").tolist()
        == ["red, dark", "-", "é"]
    )
    assert found["colour_top1_proba"].fillna(-1).tolist() == pytest.approx([0.5, -1, 0.7])
    assert found["tags_pred"].fillna("").tolist() == ["a|b", "", "b"]
    assert found["missing"].fillna("").tolist() == ["image", "image|text", ""]


def test_json_lines_name_the_classes(tmp_path: Path, shard: Path) -> None:
    """Catches probabilities without the names of their classes, and text that is escaped."""
    text = Path(written(tmp_path, shard, Output("jsonl"))).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert "é" in text
    assert rows[2]["colour_proba"] == pytest.approx({"blue": 0.1, "red, dark": 0.2, "é": 0.7})
    assert (rows[1]["colour_pred"], rows[1]["colour_proba"], rows[1]["tags_pred"]) == (None, None, [])


def test_wide_and_top_k(tmp_path: Path, shard: Path) -> None:
    """Catches columns in another order than the probabilities, and more classes asked for than there are."""
    found = pq.read_table(written(tmp_path, shard, Output(wide=True, top_k=9))).to_pandas()
    assert found["colour_proba_é"].fillna(-1).tolist() == pytest.approx([0.3, -1, 0.7])
    assert found.loc[2, ["colour_top1", "colour_top2", "colour_top3"]].tolist() == ["é", "red, dark", "blue"]
    assert found["tags_top2_proba"].tolist() == pytest.approx([0.8, 0.1, 0.3])
    assert "tags_top3" not in found
    assert "colour_proba" not in found


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_inputs_columns_come_with_their_rows(tmp_path: Path, shard: Path, suffix: str, with_ids: bool) -> None:
    """Catches a row that gets its neighbour's columns, an input's column that is overwritten,
    and columns sorted by name."""
    frame = pd.read_csv(shard)
    if suffix == "jsonl":
        frame.to_json(shard := shard.with_suffix(".jsonl"), orient="records", lines=True)
    elif suffix == "parquet":
        frame.assign(image=[b"png"] * 3).to_parquet(shard := shard.with_suffix(".parquet"))
    found = pq.read_table(written(tmp_path, shard, Output(join=True), with_ids)).to_pandas()
    assert list(found.columns[:4]) == ["code", "caption", "input_colour_pred", "price"]
    assert found["code"].tolist() == [row[0] for row in ROWS]
    assert found["caption"].tolist() == [row[1] for row in ROWS]
    assert found["input_colour_pred"].tolist() == ["old"] * 3
    assert found["colour_pred"].fillna("-").tolist() == ["red, dark", "-", "é"]
    if suffix != "csv":  # whose cells are text
        assert found["price"].tolist() == [3, 3, 3]


def test_class_names_are_in_the_files_metadata(tmp_path: Path, shard: Path) -> None:
    """Catches a list of probabilities that says nothing by itself."""
    for path in (written(tmp_path, shard, Output(join=True)), predictions(tmp_path / "plain.parquet", ["a", "b", "c"])):
        assert json.loads(pq.read_schema(path).metadata[CLASSES.encode()]) == CLASS_NAMES


def test_what_has_no_columns_cannot_be_joined(tmp_path: Path) -> None:
    """Catches a KeyError for class folders."""
    (tmp_path / "d" / "car").mkdir(parents=True)
    (tmp_path / "d" / "car" / "1.txt").write_text("x")
    config = prediction_config(make_config(tmp_path), [str(tmp_path / "d")], 0, "folders", {"text": "content"})
    with pytest.raises(ConfigError, match=r"--join: .* is no table"):
        write_output(predictions(tmp_path / "p.parquet", ["a", "b", "c"]), config, CLASS_NAMES, Output(join=True))
