"""A kind of modality that is made of several of a source's columns, through every layout."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards

ROWS = [
    {"id": "a", "price": 1.5, "x2": 2, "x10": 10, "label": "u"},
    {"id": "b", "price": None, "x2": 3, "x10": 11, "label": "v"},
    {"id": "c", "price": "cheap", "x2": 4, "x10": 12, "label": "v"},
]


class Facts(ModalityKind):
    """A price, and the sum and the names of the other columns."""

    name: Literal["facts"] = "facts"
    holds: ClassVar[str] = "facts"
    takes_several: ClassVar[bool] = True

    @property
    def arrow_type(self) -> pa.DataType:
        return pa.struct([("price", pa.float64()), ("rest", pa.float64()), ("names", pa.string())])

    def from_cell(self, cell: Any, encoding: str) -> dict[str, Any]:
        cell = {name.removeprefix("json."): value for name, value in cell.items()}  # as a WebDataset's are called
        rest = {k: float(v) for k, v in cell.items() if k != "price"}
        price = cell["price"]
        return {
            "price": None if price in (None, "") else float(price),
            "rest": sum(rest.values()),
            "names": " ".join(rest),
        }


@pytest.fixture(autouse=True)
def _entry() -> Iterator[None]:
    MODALITY_KINDS["facts"] = Facts
    yield
    del MODALITY_KINDS["facts"]


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    text = {"price": pa.array([None if r["price"] is None else str(r["price"]) for r in rows], pa.string())}
    pq.write_table(pa.table({name: text.get(name, [r[name] for r in rows]) for name in rows[0]}), path)


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_tar(path: Path, rows: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        for row in rows:
            data = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{row['id']}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


LAYOUTS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], None]]] = {
    "a.parquet": ("parquet", as_parquet),
    "b.parquet": ("manifest", as_parquet),
    "a.csv": ("manifest", as_csv),
    "a.jsonl": ("manifest", as_jsonl),
    "a.tar": ("webdataset", as_tar),
}


def config_of(folder: Path, file: str, facts: Any) -> Config:
    prefix = "json." if file.endswith(".tar") else ""
    names = [prefix + name for name in facts] if isinstance(facts, list) else facts
    source = {"reader": LAYOUTS[file][0], "path": file, "split": "train"}
    source["columns"] = {"sample_id": f"{prefix}id", "facts": names, "label": f"{prefix}label"}
    return parse_config(
        {
            "name": "t",
            "data_root": str(folder),
            "samples": {"sources": [source]},
            "modalities": {"facts": {"kind": "facts", "encoder": "some.module:Class"}},
            "tasks": {"label": {}},
        }
    )


@pytest.mark.parametrize("file", LAYOUTS)
def test_every_layout_gathers_the_columns(tmp_path: Path, file: str) -> None:
    """Catches a layout that reads one column only; a bad cell that costs more than its row;
    a pattern that takes in labels."""
    LAYOUTS[file][1](tmp_path / file, ROWS)
    in_tar = file.endswith(".tar")
    plan = ReadingPlan.of(config_of(tmp_path, file, ["price", "x2", "x10"] if in_tar else ["price", "x*"]))
    (chunk,) = read_chunks(plan, list_shards(plan)[0])
    assert chunk.table["facts"].to_pylist() == [
        {"price": 1.5, "rest": 12.0, "names": "x2 x10"},
        {"price": None, "rest": 14.0, "names": "x2 x10"},
    ]
    (reject,) = chunk.rejects
    assert (reject.sample_id, reject.reason) == ("c", "facts: could not convert string to float: 'cheap'")


def test_a_pattern_leaves_the_other_columns_alone(tmp_path: Path) -> None:
    """Catches labels and ids among the features."""
    as_csv(tmp_path / "a.csv", ROWS[:2])
    plan = ReadingPlan.of(config_of(tmp_path, "a.csv", ["*"]))
    shard = list_shards(plan)[0]
    for some in (plan, plan.only("facts"), plan.only_source(0, limit=1)):  # as encoders are fitted, and as doctor looks
        chunk = next(read_chunks(some, shard))
        assert chunk.table["facts"][0].as_py() == {"price": 1.5, "rest": 12.0, "names": "x2 x10"}


def test_what_is_not_there_or_not_meant_is_told(tmp_path: Path) -> None:
    """Catches a pattern without any column, and a list for a kind that takes one, that are found by their results."""
    as_parquet(tmp_path / "a.parquet", ROWS)
    plan = ReadingPlan.of(config_of(tmp_path, "a.parquet", ["price", "y*"]))
    with pytest.raises(DataError, match=r"'a\.parquet' has no column 'y\*'"):
        list(read_chunks(plan, list_shards(plan)[0]))
    with pytest.raises(ConfigError, match=r"source 'a\.tar' fills 'facts' from a pattern: name each column"):
        config_of(tmp_path, "a.tar", ["price", "x*"])
    raw = config_of(tmp_path, "a.parquet", "price").model_dump(mode="json")
    raw["modalities"]["facts"] = {"kind": "text", "encoder": "tfidf"}
    raw["samples"]["sources"][0]["columns"]["facts"] = ["price", "x2"]
    with pytest.raises(ConfigError, match=r"source 'a\.parquet' fills 'facts' from a list: name one column"):
        parse_config(raw)
