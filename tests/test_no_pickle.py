"""A pickle in every place where a file is read: it is refused or taken for the bytes that it is, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401  (registers its Arrow types, one of which unpickles)

from mmkt_ray import storage
from mmkt_ray.config import parse_config
from mmkt_ray.config.reading import load_config
from mmkt_ray.config.training_config import TransferConfig
from mmkt_ray.encoders.build import build_encoder, load_fitted, read_encoder_card
from mmkt_ray.encoders.pretrained.huggingface import HuggingFaceEncoder
from mmkt_ray.encoders.pretrained.weights import read_weights
from mmkt_ray.errors import UserError
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import Card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.rows import read_parts
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.kinds.sounds import decode_audio
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.space import Space
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.methods.transfer import load_knowledge
from tests.samples.fuzz_seeds import tar_bytes

ROOT = Path(__file__).parents[1]


class Plant:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


@pytest.fixture
def marker(tmp_path):
    """The folder that the pickle would make; at the end of the test it must not be there."""
    path = tmp_path / "the pickle was loaded"
    yield path
    assert not path.exists()


@pytest.fixture
def plant(marker) -> bytes:
    """The pickle."""
    return pickle.dumps(Plant(marker))


@pytest.fixture(params=["pickle", "torch", "numpy"])
def disguised(request, marker) -> bytes:
    """The pickle by itself, as torch.save and as numpy.save write one."""
    buffer = io.BytesIO()
    if request.param == "pickle":
        return pickle.dumps(Plant(marker))
    if request.param == "numpy":
        np.save(buffer, np.array([Plant(marker)], object), allow_pickle=True)
        return buffer.getvalue()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Plant(marker)))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def test_the_plant_grows(marker, plant):
    """Catches a plant that does nothing, for which all other tests here would pass."""
    pickle.loads(plant)
    assert marker.is_dir()
    marker.rmdir()


# --- shards --------------------


def read(root: Path, reader: str, path: str, columns: dict[str, str]) -> int:
    """Read and decode the source's shards; the number of samples and rejects."""
    config = parse_config(
        {
            "name": "t",
            "data_root": str(root),
            "samples": {"sources": [{"reader": reader, "path": path, "encoding": "latin-1", "columns": columns}]},
            "modalities": {
                m: {"kind": m, "encoder": encoder}
                for m, encoder in (
                    ("image", "pixels"),
                    ("text", "tfidf"),
                    ("audio", {"name": "logmel_cnn", "pretrain": "label"}),
                )
                if m in columns
            },
            "tasks": {
                t: {"kind": kind} for t, kind in (("label", "multiclass"), ("tags", "multilabel")) if t in columns
            },
        }
    )
    seen = 0
    for shard in list_shards(ReadingPlan.of(config)):
        for chunk in read_chunks(ReadingPlan.of(config), shard):
            seen += chunk.table.num_rows + len(chunk.rejects)
            for row in chunk.table.to_pylist():
                for name, decode in (("image", lambda data: decode_image(data, 1_000)), ("audio", decode_audio)):
                    if row.get(name) is not None:
                        with pytest.raises(ValueError, match="not a readable"):
                            decode(row[name])
    return seen


LAYOUTS = {
    "webdataset": ("a.tar", {"image": "png", "text": "txt", "audio": "wav", "label": "json.kind"}),
    "folders": ("a.tar", {"text": "content", "label": "folder"}),
    "parquet": ("a.parquet", {"image": "image", "text": "text", "label": "label"}),
    "manifest": ("a.csv", {"image": "image", "text": "text", "label": "label"}),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "jsonl", "manifest parquet", "tar.gz"])
def test_pickle_as_a_shard(tmp_path, disguised, layout):
    """Catches a reader that falls back on unpickling a file that it does not know."""
    reader = {"jsonl": "manifest", "manifest parquet": "manifest", "tar.gz": "folders"}.get(layout, layout)
    path, columns = LAYOUTS[reader]
    path = {"jsonl": "a.jsonl", "manifest parquet": "a.parquet", "tar.gz": "a.tar.gz"}.get(layout, path)
    (tmp_path / path).write_bytes(disguised)
    try:
        assert read(tmp_path, reader, path, columns) >= 1
    except UserError as error:
        assert any(told in str(error) for told in ("has no column", "is no table"))  # noqa: PT017 (any end is right)


def test_pickle_in_a_tar(tmp_path, disguised):
    """Catches members that are decoded by their suffix as some WebDataset readers do:
    .pyd, .pth and .npy by unpickling."""
    suffixes = ("png", "txt", "wav", "json", "pkl", "pyd", "pth", "npy", "cls")
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"cats/1.{suffix}", disguised) for suffix in suffixes]))
    assert read(tmp_path, "webdataset", "a.tar", LAYOUTS["webdataset"][1]) >= 1
    assert read(tmp_path, "webdataset", "a.tar", {"image": "pkl,pyd", "text": "pth", "label": "cls"}) >= 1
    assert read(tmp_path, "folders", "a.tar", LAYOUTS["folders"][1]) == len(suffixes)


def test_pickle_in_a_class_folder(tmp_path, disguised):
    """Catches a cache beside the data that is loaded."""
    for name in ("1.txt", "cache.pkl", "20news-bydate_py3.pkz"):
        (tmp_path / "d" / "cats").mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "cats" / name).write_bytes(disguised)
    assert read(tmp_path, "folders", "d", LAYOUTS["folders"][1]) == 3


@pytest.mark.parametrize("reader", ["parquet", "manifest"])
def test_pickle_in_a_cell(tmp_path, disguised, reader):
    """Catches cells, or files that cells name, that are unpickled."""
    (tmp_path / "x.png").write_bytes(disguised)
    image = [disguised] if reader == "parquet" else ["x.png"]
    table = pa.table({"image": image, "text": [disguised], "label": ["a"]})
    pq.write_table(table, tmp_path / "a.parquet")
    if reader == "manifest":
        (tmp_path / "a.csv").write_text("image,text,label\nx.png,y,a\n")
        assert read(tmp_path, reader, "a.csv", LAYOUTS["parquet"][1]) == 1
    assert read(tmp_path, reader, "a.parquet", LAYOUTS["parquet"][1]) >= 1


@pytest.mark.parametrize("reader", ["parquet", "manifest"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["ray.data.arrow_pickled_object", "arrow.py_extension_type"])
def test_pickle_as_an_arrow_type(tmp_path, plant, reader, nested, name):
    """Catches a Parquet column that says it is of Ray's or Arrow's type of pickled objects,
    whose cells or type are unpickled."""
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": plant if "py_" in name else b""}
    inner = pa.field("o", pa.large_binary(), metadata=metadata)
    kind = pa.list_(inner) if nested else pa.large_binary()
    values = pa.array([[plant]] if nested else [plant], kind)
    field = pa.field("tags", kind, metadata=None if nested else metadata)
    schema = pa.schema([pa.field("text", pa.string()), pa.field("label", pa.string()), field])
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["a"]), values], schema=schema), tmp_path / "a.parquet")
    try:
        seen = read(tmp_path, reader, "a.parquet", {"text": "text", "label": "label", "tags": "tags"})
    except UserError as error:
        assert "extension type" in str(error)  # noqa: PT017 (either end is right)
    else:
        assert seen == 1


# --- what a run leaves --------------------


def test_pickle_as_a_fitted_encoder(tmp_path, disguised):
    """Catches an encoder folder that runs code."""
    encoder = parse_config(_config(tmp_path)).modalities["image"].encoder
    (tmp_path / "encoder.json").write_bytes(disguised)
    (tmp_path / "state.safetensors").write_bytes(disguised)
    with pytest.raises(UserError, match="damaged"):
        read_encoder_card(str(tmp_path))
    (tmp_path / "encoder.json").write_text('{"rest": {}}')
    with pytest.raises(UserError, match="damaged"):
        load_fitted(build_encoder(encoder), str(tmp_path))


def test_pickle_as_a_model(tmp_path, disguised):
    """Catches a model folder, of this run or one to start from, that runs code."""
    (tmp_path / "config.json").write_bytes(disguised)
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(disguised)
    with pytest.raises(UserError, match="damaged"):
        load_model(str(tmp_path))
    spec = {"modalities": {}, "tasks": {}}
    (tmp_path / "config.json").write_text(
        f'{{"schema_version": {Card.schema_version}, "spec": {spec!r}}}'.replace("'", '"')
    )
    with pytest.raises(UserError, match="damaged"):
        load_model(str(tmp_path))


def test_pickle_as_a_checkpoint(tmp_path, disguised):
    """Catches a training that resumes by running what its checkpoint says."""
    (tmp_path / "checkpoint").write_bytes(disguised)
    with pytest.raises(UserError, match="damaged"):
        FileCheckpoint(str(tmp_path / "checkpoint")).load()


def test_pickle_as_a_store(tmp_path, disguised):
    """Catches a feature store whose manifest or parts run code."""
    (tmp_path / "manifest.json").write_bytes(disguised)
    with pytest.raises(UserError, match="damaged"):
        open_store(str(tmp_path))


@pytest.mark.parametrize("nested", [False, True])
def test_pickle_in_a_table_of_the_run(tmp_path, plant, nested):
    """Catches a part of a store, a leaderboard or predictions whose column says that it is of Ray's type of pickled
    objects."""
    metadata = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
    inner = pa.field("o", pa.large_binary(), metadata=metadata)
    field = pa.field("sample_id", pa.list_(inner)) if nested else inner.with_name("sample_id")
    table = pa.table([pa.array([[plant]] if nested else [plant], field.type)], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="extension type"):
        storage.read_table(str(tmp_path / "a.parquet"), ["sample_id"])


@pytest.mark.parametrize("columns", [["sample_id"], ["sample_id", "label"]])
def test_pickle_in_a_file_of_predictions(tmp_path, plant, columns):
    """Catches predictions that are read a few rows at a time, past the check of whole tables."""
    metadata = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": b""}
    schema = pa.schema([pa.field(name, pa.large_binary(), metadata=metadata) for name in columns])
    pq.write_table(pa.table([pa.array([plant])] * len(columns), schema=schema), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="extension type"):
        list(read_parts(str(tmp_path / "a.parquet"), columns))


@pytest.mark.parametrize("what", ["init", "teachers"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pickle_as_a_model_to_learn_from(tmp_path, disguised, what, name):
    """Catches a folder that training.transfer names and that runs code."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"schema_version": {Card.schema_version}, "spec": {{}}}}')
    for file in (name, "model.pt", "pytorch_model.bin", "optimizer.pkl"):
        (folder / file).write_bytes(disguised)
    given = {"init": {"init": {"image": "source"}}, "teachers": {"teachers": ["source"]}}[what]
    with pytest.raises(UserError, match=r"damaged|model\.safetensors"):
        load_knowledge(TransferConfig(**given), str(tmp_path))


@pytest.mark.slow
def test_pickles_in_a_hugging_face_folder(tmp_path, disguised):
    """Catches a text encoder that takes pytorch_model.bin, or a pickled tokenizer or config, where there are no
    safetensors, and safetensors that are none."""
    pytest.importorskip("transformers")
    card = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 9}
    for name in (
        "pytorch_model.bin",
        "tokenizer.pkl",
        "vocab.pkl",
        "training_args.bin",
        "model.ckpt",
        "tokenizer.json",
    ):
        (tmp_path / name).write_bytes(disguised)
    (tmp_path / "config.json").write_text(json.dumps(card))
    encoder = build_encoder(HuggingFaceEncoder.Section(folder=str(tmp_path), max_tokens=16))
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        encoder.load()
    (tmp_path / "model.safetensors").write_bytes(disguised)
    with pytest.raises(UserError, match="cannot load the model"):
        encoder.load()


def test_pickle_in_a_folder_of_a_search(tmp_path, disguised, plant):
    """Catches a search that goes on from a leaderboard of pickles, or from what Tune left beside it."""
    config = parse_config(_config(tmp_path))
    board = Leaderboard(str(tmp_path), Space(config, {}, {}), "d")
    (tmp_path / "parts").mkdir()
    for name in ("tuner.pkl", "trainable.pkl", "searcher-state.pkl", "experiment_state.json", "parts/tuner.pkl"):
        (tmp_path / name).write_bytes(disguised)
    assert board.trials() == []
    (tmp_path / "parts" / "d-000000.parquet").write_bytes(disguised)
    with pytest.raises((UserError, pa.ArrowInvalid)):
        board.trials()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.pt"])
def test_pickle_as_weights(tmp_path, disguised, name):
    """Catches pretrained weights that run code."""
    (tmp_path / name).write_bytes(disguised)
    with pytest.raises(UserError, match="cannot read the weights"):
        read_weights(str(tmp_path / name))


def test_pickle_as_a_config(tmp_path, marker, disguised):
    """Catches YAML that builds Python objects, and a pickle taken for YAML."""
    (tmp_path / "a.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(UserError):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_bytes(disguised)
    with pytest.raises(UserError):
        load_config(str(tmp_path / "b.yaml"))


def _config(root: Path) -> dict[str, Any]:
    columns = {"image": "image", "label": "label"}
    return {
        "name": "t",
        "data_root": str(root),
        "samples": {"sources": [{"reader": "parquet", "path": "a.parquet", "columns": columns}]},
        "modalities": {"image": {"kind": "image", "encoder": {"name": "cnn", "pretrain": "label"}}},
        "tasks": {"label": {}},
    }


# --- the code --------------------

LOADERS = re.compile(
    r"allow_pickle|\b(read_pickle|np\.load|numpy\.load|joblib\.load|shelve\.open|yaml\.(unsafe_|full_)?load)\b"
)


def test_no_loader_of_pickles_is_named():
    """Catches a call that test_layout.py has no rule for, such as pandas.read_pickle."""
    files = [path for folder in ("mmkt_ray", "jobs") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert not [(path, found[0]) for path in files if (found := LOADERS.search(path.read_text()))]
    assert LOADERS.search("pd.read_pickle(path)")
    assert LOADERS.search("np.load(path, allow_pickle=True)")
