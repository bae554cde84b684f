"""Tables and vectors through every layout of shards, and what becomes of rows that are not as they should be."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.config import Config, parse_config
from mmkt_ray.doctor import look_at_source
from mmkt_ray.encoders.identity import IdentityEncoder
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.encode import encode_column
from mmkt_ray.inference.prediction import prediction_config
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"id": "a", "price": 1.5, "new": True, "on": "2026-11-30", "fabrics": ["silk", "wool"], "more": {"size": 3}},
    {"id": "b", "price": None, "new": None, "on": None, "fabrics": None, "more": {"size": 4}},
    {"id": "c", "price": 2.0, "new": False, "on": "2026-12-01", "fabrics": [], "more": {"size": None}},
    {"id": "d", "price": None, "new": None, "on": None, "fabrics": None, "more": None},
]
CELLS = [
    {"price": "1.5", "new": "true", "on": "2026-11-30", "fabrics": "silk\x1fwool", "more.size": "3"},
    {"more.size": "4"},
    {"price": "2", "new": "false", "on": "2026-12-01"},
    None,
]


def config_of(
    folder: Path, reader: str, path: str, columns: dict[str, Any], kind: Any = "table", **source: Any
) -> Config:
    name = "table" if (kind if isinstance(kind, str) else kind["name"]) == "table" else "identity"
    return parse_config(
        {
            "name": "t",
            "data_root": str(folder),
            "samples": {"sources": [{"reader": reader, "path": path, "split": "train", "columns": columns} | source]},
            "modalities": {"x": {"kind": kind, "encoder": name}},
            "tasks": {"label": {}},
        }
    )


def read(config: Config) -> tuple[list[Any], dict[str, str]]:
    """Values of the modality x of all rows, and the reasons of rejects by id."""
    plan, values, reasons = ReadingPlan.of(config), [], {}
    for shard in list_shards(plan):
        for chunk in read_chunks(plan, shard):
            values += plan.modalities["x"].values(chunk.table["x"])
            reasons |= {r.sample_id: r.reason for r in chunk.rejects}
    return values, reasons


def write(path: Path, rows: Rows) -> None:
    """As the file's suffix says."""
    rows = [{"label": "u", **row} for row in rows]
    if path.suffix == ".parquet":
        frame = pa.Table.from_pylist(rows)
        on = pa.array([r.get("on") for r in rows], pa.string()).cast(pa.date32())
        pq.write_table(
            frame.set_column(frame.column_names.index("on"), "on", on) if "on" in frame.column_names else frame, path
        )
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with tarfile.open(path, "w") as tar:
            for row in rows:
                data = json.dumps(row).encode()
                info = tarfile.TarInfo(f"{row['id']}.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("file", "reader"),
    [("t.parquet", "parquet"), ("t.parquet", "manifest"), ("t.jsonl", "manifest"), ("t.tar", "webdataset")],
)
def test_typed_cells_are_spelt_alike(tmp_path: Path, file: str, reader: str) -> None:
    """Catches a layout that spells numbers, dates, lists or nested columns in its own way;
    a row of nulls that is present."""
    write(tmp_path / file, ROWS)
    prefix = "json." if reader == "webdataset" else ""
    names = [f"{prefix}{name}" for name in ("price", "new", "on", "fabrics", "more")]
    config = config_of(tmp_path, reader, file, {"sample_id": f"{prefix}id", "x": names, "label": f"{prefix}label"})
    values, reasons = read(config)
    assert values == CELLS[:3]
    assert reasons == {"d": "no modality is present"}


def test_nested_json(tmp_path: Path) -> None:
    """Catches a field of an object that a manifest of JSON lines cannot name, as other layouts can."""
    rows = [
        {"id": "a", "more": {"size": 3, "of": {"wool": 0.5}}, "label": "u"},
        {"id": "b", "more": None, "label": "v"},
    ]
    write(tmp_path / "t.jsonl", [*rows, {"id": "c", "more": {"size": 4}, "more.size": 5}])
    columns = {"sample_id": "id", "x": ["more.size", "more.of.wool"], "label": "label"}
    values, _ = read(config_of(tmp_path, "manifest", "t.jsonl", columns))
    assert values == [{"more.size": "3", "more.of.wool": "0.5"}, {"more.size": "5"}]
    with pytest.raises(DataError, match=r"has no column 'more\.sise'; did you mean 'more\.size'"):
        read(config_of(tmp_path, "manifest", "t.jsonl", columns | {"x": ["more.size", "more.sise"]}))


def test_csv_cells_are_spelt_as_typed_ones(tmp_path: Path) -> None:
    """Catches pandas' 1.0 and True, blanks and NaN that become categories."""
    (tmp_path / "t.csv").write_text(
        'id,price,new,size,label\na,1.0,True, 7 in ,u\nb,,NaN,"12,5",v\nc, 2.50 ,False, ,v\n'
    )
    config = config_of(tmp_path, "manifest", "t.csv", {"sample_id": "id", "x": ["*"], "label": "label"})
    values, _ = read(config)
    assert values == [
        {"price": "1", "new": "true", "size": "7 in"},
        {"size": "12,5"},
        {"price": "2.50", "new": "false"},
    ]


def test_doctor_tells_types(tmp_path: Path) -> None:
    """Catches types that nobody hears of before a run, and a stated one that the first rows contradict."""
    rows = [
        {"id": f"r{i}", "price": f"{i} lbs" if i % 5 == 0 else str(i), "on": f"2026-01-{i % 28 + 1:02d}"}
        for i in range(40)
    ]
    write(tmp_path / "t.csv", rows)
    columns = {"sample_id": "id", "x": ["price", "on"], "label": "label"}
    finding, _ = look_at_source(config_of(tmp_path, "manifest", "t.csv", columns), 0)
    assert finding.ok
    assert finding.text.endswith("x: category: price; date: on")
    for types, told in (
        ({"price": "number"}, "column 'price' is no number, as the config says: 8 of 40 cells"),
        ({"prize": "number"}, "no row has a cell in column 'prize'; did you mean 'price'?"),
    ):
        finding, _ = look_at_source(
            config_of(tmp_path, "manifest", "t.csv", columns, {"name": "table", "types": types}), 0
        )
        assert not finding.ok
        assert not finding.stops  # 64 rows are not all
        assert told in finding.text
    _, reasons = read(config_of(tmp_path, "manifest", "t.csv", columns | {"x": "price"}))
    assert "write the source's column as a list, [price]" in reasons["r1"]


def test_columns_that_a_shard_lacks(tmp_path: Path) -> None:
    """Catches a column that is missing in silence, and new files without one that lose the whole row."""
    write(tmp_path / "a.csv", [{"id": "a", "price": 1, "size": 2}])
    write(tmp_path / "b.csv", [{"id": "b", "size": 3}])
    columns = {"sample_id": "id", "x": ["price", "size"], "label": "label"}
    with pytest.raises(DataError, match=r"'b\.csv' has no column 'price'"):
        read(config_of(tmp_path, "manifest", "*.csv", columns))
    values, _ = read(config_of(tmp_path, "manifest", "*.csv", columns, absent="null"))
    assert values == [{"price": "1", "size": "2"}, {"size": "3"}]
    write(tmp_path / "b.parquet", [{"id": "b", "size": 3}])
    values, _ = read(config_of(tmp_path, "parquet", "*.parquet", columns, absent="null"))
    assert values == [{"size": "3"}]


def test_columns_of_a_command_line(tmp_path: Path) -> None:
    """Catches a table that predict can be told no columns of, as --column names one."""
    columns = {"sample_id": "id", "x": ["price", "size"], "label": "label"}
    config = config_of(tmp_path, "manifest", "t.csv", columns)
    new = prediction_config(config, ["new.csv"], 0, None, {"x": "cost,size", "sample_id": "id"})
    assert new.samples.sources[0].columns == {"x": ("cost", "size"), "sample_id": "id"}
    vector = config_of(tmp_path, "manifest", "t.csv", columns | {"x": "v"}, "vector")
    for words, wanted in (("v", "v"), ("v*", ("v*",)), ("{shard}.npy", "{shard}.npy")):
        assert prediction_config(vector, ["new.csv"], 0, None, {"x": words}).samples.sources[0].columns == {"x": wanted}


# --- vectors --------------------

GOOD = np.array([[1.0, -2.5], [0.25, 3.0], [9.0, 8.0]])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
@pytest.mark.parametrize(
    "form", ["list", "fixed", "columns", "json", "csv", "array", "array of a csv", "column of a csv"]
)
def test_vectors_of_every_form(tmp_path: Path, form: str, dtype: str) -> None:
    """Catches a width, a type or a form of vectors that is read as others are."""
    vectors = GOOD.astype(dtype)
    ids, label = ["a", "b", "c"], ["u", "v", "u"]
    columns: dict[str, Any] = {"sample_id": "id", "x": "v", "label": "label"}
    reader, file = "parquet", "t.parquet"
    flat = pa.array(vectors.ravel())
    if form in ("list", "fixed"):
        v = (
            pa.ListArray.from_arrays([0, 2, 4, 6], flat)
            if form == "list"
            else pa.FixedSizeListArray.from_arrays(flat, 2)
        )
        pq.write_table(pa.table({"id": ids, "v": v, "label": label}), tmp_path / file)
    elif form in ("columns", "column of a csv"):
        columns["x"] = ["v*"]
        frame = pd.DataFrame({"id": ids, "v10": vectors[:, 1], "v2": vectors[:, 0], "label": label})
        if form == "columns":
            frame.to_parquet(tmp_path / file)
        else:
            reader, file = "manifest", "t.csv"
            frame.to_csv(tmp_path / file, index=False)
    elif form == "json":
        reader, file = "manifest", "t.jsonl"
        write(tmp_path / file, [{"id": i, "v": v.tolist()} for i, v in zip(ids, vectors, strict=True)])
    elif form == "csv":
        reader, file = "manifest", "t.csv"
        write(tmp_path / file, [{"id": i, "v": json.dumps(v.tolist())} for i, v in zip(ids, vectors, strict=True)])
    else:
        reader, file = ("manifest", "t.csv") if form == "array of a csv" else ("parquet", "t.parquet")
        write(tmp_path / file, [{"id": i} for i in ids])
        np.save(tmp_path / "t.npy", vectors)
        columns["x"] = "{shard}.npy"
    values, reasons = read(config_of(tmp_path, reader, file, columns, "vector"))
    assert not reasons
    assert all(v.dtype == np.float32 for v in values)
    np.testing.assert_array_equal(values, vectors.astype(np.float32))


def test_what_is_no_vector(tmp_path: Path) -> None:
    """Catches NaN, infinity, nulls and text among features; a broken row that takes the others with it,
    or shifts them."""
    nan, inf = float("nan"), float("inf")
    cells = [[1.0, 2.0], None, [nan, 1.0], [1.0, -inf], [], [1e300, 0.0], [3.0, None], [3.0, 4.0]]
    reasons = {
        "r1": "no modality is present",
        "r2": "x: number 1 of 2 is nan, no finite number (column 'v')",
        "r3": "x: number 2 of 2 is -inf, no finite number (column 'v')",
        "r4": "x: must be a list of numbers, got an empty one (column 'v')",
        "r5": "x: number 1 of 2 is 1e+300, too large for float32 (column 'v')",
        "r6": "x: number 2 of 2 is null (column 'v')",
    }
    table = {"id": [f"r{i}" for i in range(8)], "v": pa.array(cells, pa.list_(pa.float64())), "label": ["u"] * 8}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    columns = {"sample_id": "id", "x": "v", "label": "label"}
    values, told = read(config_of(tmp_path, "parquet", "t.parquet", columns, "vector"))
    assert told == reasons
    np.testing.assert_array_equal(values, [[1, 2], [3, 4]])
    pq.write_table(pa.table(table | {"v": pa.array([[True]] * 8)}), tmp_path / "t.parquet")
    _, told = read(config_of(tmp_path, "parquet", "t.parquet", columns, "vector"))
    assert told["r0"] == "x: must be a list of numbers, got [True] (column 'v')"
    some = {"v1": [1.0, None, None], "v2": [2.0, 3.0, None]}
    pq.write_table(pa.table({"id": ["a", "b", "c"], "label": ["u"] * 3} | some), tmp_path / "t.parquet")
    _, told = read(config_of(tmp_path, "parquet", "t.parquet", columns | {"x": ["v*"]}, "vector"))
    assert told == {"b": "x: column 'v1' is null and others are not", "c": "no modality is present"}
    (tmp_path / "t.csv").write_text('id,v1,v2,label\na,1,2,u\nb,1,"2,5",u\n')
    _, told = read(config_of(tmp_path, "manifest", "t.csv", columns | {"x": ["v1", "v2"]}, "vector"))
    assert told == {"b": "x: column 'v2' must be a number, got '2,5'"}


def test_doctor_tells_lengths(tmp_path: Path) -> None:
    """Catches vectors of two models that are found in the middle of a run."""
    for vectors, told in (([[1.0, 2.0]] * 3, "x: 2 numbers each"), ([[1.0], [1.0, 2.0]], "x: 1 or 2 numbers each")):
        write(tmp_path / "t.parquet", [{"id": f"r{i}", "v": v} for i, v in enumerate(vectors)])
        columns = {"sample_id": "id", "x": "v", "label": "label"}
        finding, _ = look_at_source(config_of(tmp_path, "parquet", "t.parquet", columns, "vector"), 0)
        assert finding.text.endswith(told)


def test_another_length_is_a_reject() -> None:
    """Catches a vector of another model among the others; a length that depends on the shard."""
    encoder = IdentityEncoder(IdentityEncoder.Section())
    parts = [encoder.partial([np.zeros(n, np.float32) for n in lengths]) for lengths in ([3, 3], [4, 3], [4])]
    encoder.finish(encoder.merge([encoder.merge(parts[:2]), parts[2]]))
    values = [np.ones(3, np.float32), None, np.ones(4, np.float32), np.full(3, 2, np.float32)]
    column, refused = encode_column(encoder, values)
    assert refused == {2: "a vector of 4 numbers, where the first of the train split has 3"}
    assert column.to_pylist() == [[1, 1, 1], None, None, [2, 2, 2]]
    with pytest.raises(DataError, match="the first vector of the train split has 3 numbers, 3 of 4 have 4"):
        encoder.finish(encoder.partial([np.zeros(n, np.float32) for n in (3, 4, 4, 4)]))


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    """Catches vectors of other rows, a pickle that is loaded, a file outside the folder,
    an array that changes unnoticed."""
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "t.csv", [{"id": i} for i in "abc"])
    columns = {"sample_id": "id", "x": "v.npy", "label": "label"}
    config = config_of(tmp_path, "manifest", "d/t.csv", columns, "vector")
    path = tmp_path / "d" / "v.npy"
    with pytest.raises(DataError, match=r"columns\.x: no file 'v\.npy' in '.*/d'; 'd/t\.csv' needs it beside it"):
        read(config)
    for array, told in (
        (GOOD[:2], r"'v\.npy' has 2 rows and 'd/t\.csv' beside it has (more|3)"),
        (np.concatenate([GOOD, GOOD]), r"'v\.npy' has 6 rows and 'd/t\.csv' beside it has 3: row i of one must belong"),
        (np.array([{"a": 1}]), "holds object of shape"),
        (GOOD[:, 0], r"holds float64 of shape \(3,\)"),
        (np.asfortranarray(GOOD), r"shape \(3, 2\), by columns"),
        (GOOD.astype(complex), "holds complex128"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(DataError, match=told):
            read(config)
    path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os')}")
    with pytest.raises(DataError, match=r"'v\.npy' beside 'd/t\.csv' is no array of NumPy"):
        read(config)
    np.save(path, GOOD)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="is damaged: its header says"):
        read(config)
    np.save(path, GOOD)
    before = list_shards(ReadingPlan.of(config))[0].unit
    np.testing.assert_array_equal(read(config)[0], GOOD)
    np.save(path, GOOD + 1)
    os.utime(path, ns=(1, 1))
    assert list_shards(ReadingPlan.of(config))[0].unit != before
    np.save(tmp_path / "v.npy", GOOD)
    with pytest.raises(DataError, match=r"'\.\./v\.npy' is outside of the folder"):
        read(config_of(tmp_path, "manifest", "d/t.csv", columns | {"x": "../v.npy"}, "vector"))
    with pytest.raises(ConfigError, match="an array fills vectors alone"):
        config_of(tmp_path, "manifest", "d/t.csv", columns)


def test_a_bad_row_does_not_shift_an_array(tmp_path: Path) -> None:
    """Catches a row of too few cells after which every row has its neighbour's vector; a group that is read alone."""
    (tmp_path / "t.csv").write_text("id,label\na,u\nb\nc,u\n")
    np.save(tmp_path / "t.npy", GOOD)
    columns = {"sample_id": "id", "x": "{shard}.npy", "label": "label"}
    values, reasons = read(config_of(tmp_path, "manifest", "t.csv", columns, "vector"))
    np.testing.assert_array_equal(values, GOOD[[0, 2]])
    assert list(reasons) == ["t.csv#3"]
    pq.write_table(pa.table({"id": list("abc"), "label": ["u"] * 3}), tmp_path / "t.parquet", row_group_size=1)
    config = config_of(tmp_path, "parquet", "t.parquet", columns, "vector")
    np.testing.assert_array_equal(read(config)[0], GOOD)
    plan = ReadingPlan.of(config).only("x")
    (chunk,) = read_chunks(plan, list_shards(plan)[0])
    np.testing.assert_array_equal(plan.modalities["x"].values(chunk.table["x"]), GOOD)


@pytest.mark.parametrize("file", ["v.parquet", "v.jsonl", "v.csv"])
def test_vectors_that_pandas_left_out_are_absent(tmp_path: Path, file: str) -> None:
    """Catches NaN in columns side by side, or a blank cell, as broken numbers where there is no vector."""
    nan = float("nan")
    rows = [{"id": "a", "x1": 1.0, "x2": 2.0}, {"id": "b", "x1": nan, "x2": nan}, {"id": "c", "x1": nan, "x2": 2.0}]
    write(tmp_path / file, rows)
    reader = "parquet" if file.endswith("parquet") else "manifest"
    values, reasons = read(
        config_of(tmp_path, reader, file, {"sample_id": "id", "x": ["x*"], "label": "label"}, "vector")
    )
    assert [list(value) for value in values] == [[1.0, 2.0]]
    assert reasons == {"b": "no modality is present", "c": "x: column 'x1' is null and others are not"}
    frame = pd.DataFrame({"id": ["a", "b"], "v": ["[1, 2]", None], "label": ["u", "v"]})
    frame.to_csv(tmp_path / "w.csv", index=False)
    values, reasons = read(
        config_of(tmp_path, "manifest", "w.csv", {"sample_id": "id", "x": "v", "label": "label"}, "vector")
    )
    assert ([list(value) for value in values], reasons) == ([[1.0, 2.0]], {"b": "no modality is present"})
