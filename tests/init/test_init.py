"""`mmkt init`: what columns are taken for, and a config that the readers can read."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.cli import main
from mmkt_ray.config import load_config
from mmkt_ray.doctor import look_at_columns, look_at_source
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.init import writing
from mmkt_ray.init.classify import KINDS, Look, classify, classify_all, classify_target
from mmkt_ray.init.writing import init
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import png

CLASSES = ("mug", "shirt", "lamp")
ROWS = [
    {
        "sku": f"A{i}",
        "photo": f"img/{i}.png",
        "title": f"{('fine', 'old', 'new')[i % 3]} {CLASSES[i % 3]} of series {i}",
        "price": f"{i % 7}.99",
        "colour": ("red", "blue")[i % 2],
        "category": CLASSES[i % 3],
        "tags": "|".join(CLASSES[: 1 + i % 3]),
        "added": f"2024-01-{1 + i % 28:02}",
    }
    for i in range(30)
]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A CSV of 30 products with photos."""
    (tmp_path / "img").mkdir()
    for i in range(len(ROWS)):
        (tmp_path / "img" / f"{i}.png").write_bytes(png("red", i))
    with (tmp_path / "shop.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path / "shop.csv"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """read(data, targets): the samples of the config that init writes, without rejects."""

    def read(data: Path, targets: list[str], **options: Any) -> list[dict[str, Any]]:
        init(str(data), targets, str(tmp_path / "run.yaml"), force=True, **options)
        plan = ReadingPlan.of(load_config(tmp_path / "run.yaml"))
        chunks = [chunk for shard in list_shards(plan) for chunk in read_chunks(plan, shard)]
        assert [reject for chunk in chunks for reject in chunk.rejects] == []
        return [row for chunk in chunks for row in chunk.table.to_pylist()]

    return read


def test_a_csv_with_photos(
    shop: Path, read: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a config that does not run, or that reads another column than it tells."""
    rows = read(shop, ["category", "tags"])
    assert (len(rows), rows[4]["sample_id"], rows[4]["category"], rows[4]["tags"]) == (
        30,
        "A4",
        "shirt",
        ["mug", "shirt"],
    )
    assert (rows[4]["photo"], rows[4]["title"]) == (png("red", 4), "old shirt of series 4")
    out = str(shop.parent / "shop.yaml")
    assert main(["init", str(shop), "--target", "category", "--out", out]) == 0
    told = capsys.readouterr().out
    for line in (
        r"photo     image             paths of image files, 30 of 30 are there",
        r"sku       id                its name, and the 30 values that were read are all different",
        r"category  label, multiclass  3 classes",
        r"price     number, in the table",
        f"next: mmkt run {out} --quick",
    ):
        assert " ".join(line.split()) in " ".join(told.split())
    assert main(["init", str(shop), "--target", "category", "--out", out]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_other_tables(shop: Path, read: Callable[..., list[dict[str, Any]]], suffix: str) -> None:
    """Catches a layout whose config names the wrong reader."""
    path = shop.with_suffix(f".{suffix}")
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert read(path, ["category"])[4]["photo"] == png("red", 4)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_with_bytes(tmp_path: Path, read: Callable[..., list[dict[str, Any]]], nested: bool) -> None:
    """Catches Hugging Face's struct of bytes and path that is taken for nothing,
    and a folder of shards that is not."""
    images = [png("red", i) for i in range(30)]
    cells = [{"bytes": image, "path": None} for image in images] if nested else images
    (tmp_path / "data").mkdir()
    for number in range(2):
        table = pa.table({"img": cells, "label": [CLASSES[i % 3] for i in range(30)], "set": ["train", "test"] * 15})
        pq.write_table(table, tmp_path / "data" / f"{number}.parquet")
    rows = read(tmp_path / "data", ["label"])
    assert (len(rows), rows[4]["img"], rows[4]["split"], rows[5]["split"]) == (60, images[4], "train", "test")


def test_class_folders_and_archives(tmp_path: Path, read: Callable[..., list[dict[str, Any]]]) -> None:
    """Catches folders whose names are the classes, plain or in a tar,
    and WebDatasets whose members belong together."""
    for i in range(12):
        folder = tmp_path / "photos" / CLASSES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png("red", i))
    rows = read(tmp_path / "photos", [])
    assert sorted(row["label"] for row in rows) == sorted(CLASSES * 4)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", "photos")
    assert sorted(row["label"] for row in read(tmp_path / "photos.tar", [])) == sorted(CLASSES * 4)
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for i, row in enumerate(ROWS):
            members = {
                "png": png("red", i),
                "txt": row["title"].encode(),
                "json": json.dumps({"kind": row["category"]}).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:04}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = read(tmp_path / "web.tar", ["kind"])
    assert (rows[4]["image"], rows[4]["txt"], rows[4]["kind"]) == (png("red", 4), ROWS[4]["title"], "shirt")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a.JPG", "b.png"], "image"),
        ([b"\x89PNG..", b"\xff\xd8\xff.."], "image"),
        ([b"RIFF1234WEBP", b"RIFF1234WEBP"], "image"),
        ([b"RIFF1234WAVE"], "audio"),
        ([b"nothing", b"known"], "other"),
        (["a red car", "a blue car", "a cat on a mat"], "text"),
        (["3", "4.5", "-1e3"], "number"),
        ([1, 2.5], "number"),
        (["2024-01-02", "2024-01-03 10:00"], "date"),
        (["red", "blue", "red", "blue", "red"], "category"),
        ([True, False, True, True], "category"),
        ([{"a": 1}], "other"),
        ([], "other"),
    ],
)
def test_columns_are_told_by_their_values(values: list[Any], kind: str) -> None:
    """Catches a rule that a column of another kind meets too."""
    assert classify(Look("x", values, len(values))).kind == kind
    assert kind in KINDS


def test_one_id_and_one_split(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an id with repeats, which would reject rows, and two columns that fill one."""
    looks = [
        Look("product_id", ["1", "2", "2"], 3),
        Look("sku", ["1", "2", "3"], 3),
        Look("code", ["7", "8", "9"], 3),
        Look("split", ["train", "dev", "test"], 3),
        Look("fold", ["train", "odd", "test"], 3),
    ]
    assert [column.kind for column in classify_all(looks)] == ["number", "id", "other", "split", "text"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([f"name {i}" for i in range(50)], "50 different values in 50 rows, too many"),
        (["a"] * 5, "nothing to learn"),
        ([], "no value"),
    ],
)
def test_what_is_no_target_is_refused(values: list[Any], says: str) -> None:
    """Catches texts, one class or nothing learnt as classes."""
    look = Look("price", values, len(values))
    with pytest.raises(DataError, match=says):
        classify_target(look)
    if len(set(values)) > 1:
        assert classify_target(look, as_classes=True).kind == "multiclass"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([f"{i}.99" for i in range(36)], "regression"),
        (list(range(10)), "regression"),
        (["0", "1", "1", "0", "1"], "binary"),
        (["yes", "no", "no", "no"], "binary"),
        (["a", "b", "c"] * 5, "multiclass"),
        ([["a", "b"], ["c"], []], "multilabel"),
        (["a;b", "b", "a", "a;c", "c;b", "b;a"], "multilabel"),
    ],
)
def test_kinds_of_target(values: list[Any], kind: str) -> None:
    """Catches 36 prices learnt as 36 classes, and several classes in one string taken for one class."""
    assert classify_target(Look("y", values, len(values))).kind == kind


def test_nothing_to_run_on_is_told(shop: Path, tmp_path: Path) -> None:
    """Catches a traceback, or a config of nothing, for a wrong path, a wrong target, or a table of numbers."""
    out = str(tmp_path / "x.yaml")
    with pytest.raises(
        ConfigError, match=r"it may be: price \(numbers.*colour \(2 classes\), category \(3 classes\), tags"
    ):
        init(str(shop), [], out)
    with pytest.raises(ConfigError, match=r"no column 'catgory': did you mean 'category'"):
        init(str(shop), ["catgory"], out)
    with pytest.raises(DataError, match="nothing at"):
        init(str(tmp_path / "gone.csv"), ["y"], out)
    (tmp_path / "alone.csv").write_text("y\n" + "yes\nno\n" * 5)
    with pytest.raises(DataError, match="no column holds anything to predict from"):
        init(str(tmp_path / "alone.csv"), ["y"], out)
    (tmp_path / "semicolons.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match="separated by ';'"):
        init(str(tmp_path / "semicolons.csv"), ["y"], out)
    assert not (tmp_path / "x.yaml").exists()


def test_doctor_looks_at_the_paths_of_the_whole_table(shop: Path, tmp_path: Path) -> None:
    """Catches photos that are missing in the second half of a table, beyond the rows that are read first."""
    init(str(shop), ["category"], str(tmp_path / "run.yaml"))
    config = load_config(tmp_path / "run.yaml")
    found = look_at_columns(config, 0, *look_at_source(config, 0))
    assert found.ok
    assert "of all 30 rows looked at" in found.text
    for i in range(15, 30):  # more than samples.min_reject_budget
        (tmp_path / "img" / f"{i}.png").unlink()
    found = look_at_columns(config, 0, *look_at_source(config, 0))
    assert not found.ok
    assert "15 will be rejected or lack a modality" in found.text


def test_files_in_another_encoding(tmp_path: Path, read: Callable[..., list[dict[str, Any]]]) -> None:
    """Catches texts in Windows' encoding that lose their rows."""
    lines = ["text,label", *(f"schöne grüne Tasse {i},{CLASSES[i % 3]}" for i in range(9))]
    (tmp_path / "a.csv").write_bytes("\r\n".join([*lines, ""]).encode("cp1252"))
    assert read(tmp_path / "a.csv", ["label"])[0]["text"] == "schöne grüne Tasse 0"


def test_numbers_and_categories_are_one_table(tmp_path: Path) -> None:
    """Catches a price that is left out beside a title, and a config of them that is refused."""
    colours = ["blue", "red"]
    rows = "".join(f"new lamp of series {i},{i}.50,{colours[i % 2]},2024-01-{i + 1:02},{i * 3}.25\n" for i in range(20))
    (tmp_path / "a.csv").write_text("title,weight,colour,made,price\n" + rows)
    told = init(str(tmp_path / "a.csv"), ["price"], str(tmp_path / "run.yaml"))
    assert "label, regression" in told
    assert "did you" not in told
    config = load_config(tmp_path / "run.yaml")
    assert config.samples.sources[0].theirs("facts") == ("weight", "colour", "made")
    assert config.modalities["facts"].kind.name == "table"
    assert config.tasks["price"].kind.name == "regression"


def test_tables_as_other_tools_write_them(tmp_path: Path, read: Callable[..., list[dict[str, Any]]]) -> None:
    """Catches a table refused for a blank first line, an index without a name, a long cell or a byte order mark in
    JSON lines; lists as text that a run would refuse as single classes; embeddings that \"nothing here reads\"."""
    frame = pd.DataFrame({"text": [row["title"] for row in ROWS], "kind": [row["category"] for row in ROWS]})
    frame.loc[0, "text"] = "long " * 40_000
    frame["tags"] = [["a", "b"][: 1 + i % 2] for i in range(len(frame))]
    frame["v"] = [[float(i), 1.0] for i in range(len(frame))]
    (tmp_path / "a.csv").write_text("\n" + frame.to_csv())
    (tmp_path / "a.jsonl").write_text("\ufeff" + frame.to_json(orient="records", lines=True))
    frame.to_parquet(tmp_path / "a.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        rows = read(tmp_path / f"a.{suffix}", ["kind", "tags"])
        assert [row["kind"] for row in rows] == frame["kind"].tolist()
        assert [row["tags"] for row in rows] == frame["tags"].tolist()
        assert [row["v"] for row in rows] == frame["v"].tolist()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', "line 1: .* a list of 2: write each on a line of its own"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        ("a.csv", "text|kind\na|b\n", r"separated by '\|'"),
        ("a.csv", "kind,kind,,\na,b,c,d\n", r"\['kind'\] are there more than once"),
    ],
)
def test_what_is_no_such_table_is_told(tmp_path: Path, name: str, content: str, told: str) -> None:
    """Catches advice about columns where the file is another kind of file."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        init(str(tmp_path / name), ["kind"], str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("installed", "line"),
    [
        (False, "{kind: image, encoder: pixels}  # or cnn, torchvision, efficientnet-lite0 (of the extra pretrained)"),
        (True, "{kind: image, encoder: efficientnet-lite0}  # or pixels, cnn, torchvision"),
    ],
)
def test_encoders_that_are_offered(shop: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, line: str) -> None:
    """Catches a comment that offers the encoder that stands there, and one whose extra is not named."""
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: installed or None)
    init(str(shop), ["category"], str(shop.parent / "run.yaml"))
    assert f"  photo: {line}" in (shop.parent / "run.yaml").read_text().splitlines()
