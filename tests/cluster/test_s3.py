"""Runs on an S3 server: sources, features, models and search results, through throttling,
errors and cut connections."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from mmkt_ray import storage
from mmkt_ray.config import parse_config
from mmkt_ray.errors import DataError, ResourceError
from mmkt_ray.features.store import open_store
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.configs import raw_config
from tests.shapes import COLOURS, SHAPES, png, write_shard

pytestmark = pytest.mark.slow

BUCKET = "s3://bucket"
NUM_ROWS = 96
SECRET = "planted-key-of-the-bucket"
SHARE = 0.1  # of the requests that fail
SESSION = """
import json, sys, traceback
from mmkt_ray.cli import main
for line in sys.stdin:
    try:
        status = main(json.loads(line))
    except Exception:
        traceback.print_exc()
        status = 1
    print("status", status, flush=True)
"""


class Server:
    """The server process of s3_server.py, seen from here."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self._ask("PUT", "/bucket")

    def _ask(self, method: str, path: str, data: bytes = b"") -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, method=method)) as reply:
            return reply.read()

    def faults(self, **faults: Any) -> None:
        """From now on; and all counts begin anew. See `Faults` in s3_server.py."""
        self._ask("POST", "/faults", json.dumps(faults).encode())

    def done(self) -> dict[str, int]:
        """How many requests came, and how many faults of each kind they met."""
        return json.loads(self._ask("GET", "/faults"))["done"]

    def writes(self) -> list[str]:
        """What was put and deleted."""
        return json.loads(self._ask("GET", "/faults"))["writes"]

    def stop(self) -> None:
        self.process.communicate()  # it ends with its stdin


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An S3 server, and the environment that points to it."""
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "fake")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield server
    server.stop()


@pytest.fixture
def s3(server: Server) -> Server:
    """The server without faults, its counts at zero."""
    server.faults()
    return server


# --- files --------------------


@pytest.mark.parametrize("share", [0.0, SHARE])
def test_files_of_a_run(s3: Server, share: float) -> None:
    """Catches functions that know local paths only, give up at the first error,
    or take a cut reply for the whole file."""
    s3.faults(share=share, seed=1)
    root, table = f"{BUCKET}/files-{share}", pa.table({"x": list(range(1000)), "y": ["a", "b"] * 500})
    big = np.random.default_rng(0).bytes(11_000_000)  # more than one part of a multipart upload
    storage.make_dir(root)
    storage.write_json(storage.join(root, "a", "x.json"), {"é": 1})
    storage.write_table(storage.join(root, "a", "t.parquet"), table)
    storage.write_bytes(storage.join(root, "b", "empty"), b"")
    if not share:  # moto, unlike S3, does not take the end of an upload twice
        storage.write_bytes(storage.join(root, "b", "big"), big)
        assert b"".join(storage.read_pieces(storage.join(root, "b", "big"))) == big
    assert storage.read_json(storage.join(root, "a", "x.json")) == {"é": 1}
    fs, path = storage.resolve(storage.join(root, "a", "t.parquet"))
    assert pq.read_table(path, filesystem=fs).equals(table)
    assert storage.read_bytes(storage.join(root, "b", "empty")) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "none"))

    assert [f.base_name for f in storage.list_files(storage.join(root, "a"))] == ["t.parquet", "x.json"]
    assert [f.base_name for f in storage.list_files(root, "*.json", recursive=True)] == ["x.json"]
    assert storage.list_files(storage.join(root, "none")) == []
    for pattern in ("*/*.json", "?/x.json", "[a]/x.*", "a/x.json"):
        assert [f.base_name for f in storage.glob(storage.join(root, pattern))] == ["x.json"], pattern

    storage.copy_folder(storage.join(root, "a"), storage.join(root, "c"))
    storage.move(storage.join(root, "c", "x.json"), storage.join(root, "d", "y.json"))
    storage.remove(storage.join(root, "a", "x.json"))
    storage.remove_folder(storage.join(root, "b"))
    there = {name: storage.exists(storage.join(root, name)) for name in ("a/x.json", "a", "b", "c/x.json", "d/y.json")}
    assert there == {"a/x.json": False, "a": True, "b": False, "c/x.json": False, "d/y.json": True}
    faults = {kind for kind in s3.done() if kind != "requests"}
    assert bool(faults) == bool(share)


def test_a_small_file_is_one_put(s3: Server) -> None:
    """Catches a manifest that takes several requests, between which a writer can die."""
    storage.write_json(f"{BUCKET}/put/manifest.json", {})
    storage.write_table(f"{BUCKET}/put/t.parquet", pa.table({"x": [1]}))
    assert s3.writes() == ["PUT bucket/put/manifest.json", "PUT bucket/put/t.parquet"]
    assert s3.done() == {"requests": 2}


def test_small_reads_and_long_lives(s3: Server) -> None:
    """Catches two limits of the SDK: no retry of a read that is shorter than the error's text,
    100 retries in a client's life."""
    storage.write_bytes(f"{BUCKET}/small", b"small")
    s3.faults(share=0.3, seed=6)
    for _ in range(130):
        assert storage.read_bytes(f"{BUCKET}/small") == b"small"
    faults = s3.done()
    assert sum(faults.values()) - faults["requests"] > 100


def test_a_writer_that_breaks_off_publishes_nothing(s3: Server) -> None:
    """Catches half a table under the final name: pyarrow closes its streams on errors,
    and S3 publishes what is closed."""
    uri, table = f"{BUCKET}/half/t.parquet", pa.table({"x": [1]})
    storage.write_table(uri, table)

    def write_half() -> None:
        with storage.atomic(uri) as (fs, path), pq.ParquetWriter(path, table.schema, filesystem=fs) as writer:
            writer.write_table(pa.table({"x": [2]}))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    fs, path = storage.resolve(uri)
    assert pq.read_table(path, filesystem=fs).equals(table)
    assert s3.writes() == ["PUT bucket/half/t.parquet"]


def test_an_upload_that_breaks_off_publishes_nothing(s3: Server) -> None:
    """Catches the parts that made it being put together to an object."""
    s3.faults(deny_put="/cut/", deny_after=1)
    with pytest.raises(ResourceError, match="bucket/cut/x"):
        storage.write_bytes(f"{BUCKET}/cut/x", bytes(25_000_000))
    assert s3.done()["deny"] >= 1
    assert s3.writes() == ["PUT bucket/cut/x"]  # the first part
    assert not storage.exists(f"{BUCKET}/cut/x")


def test_a_refused_write_says_where(s3: Server) -> None:
    """Catches a bare OSError for a missing right or a misspelt bucket."""
    s3.faults(deny_put="/closed/")
    with pytest.raises(ResourceError, match=r"bucket/closed/x.*ACCESS_DENIED"):
        storage.write_bytes(f"{BUCKET}/closed/x", b"x")
    with pytest.raises(ResourceError, match="choose another folder"):
        storage.make_dir("s3://no-such-bucket/runs")


@pytest.mark.parametrize(
    "uri", ["s3://bucket/run?endpoint_override=localhost:9000&scheme=http", "s3://key:secret@bucket/run"]
)
@pytest.mark.parametrize("name", ["", "features/*.parquet"])
def test_settings_in_a_uri_are_refused(uri: str, name: str) -> None:
    """Catches a query string that swallows the path joined to it, and keys that end up in every manifest and log."""
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL") as caught:
        storage.glob(storage.join(uri, name) if name else uri)
    assert "secret" not in str(caught.value)


def test_every_reader_reads_the_same_rows(s3: Server, tmp_path: Path) -> None:
    """Catches a reader that opens local files only, or takes a name's blank or sign for a part of the URI."""
    write_every_layout(tmp_path / "raw")
    for info in storage.list_files(str(tmp_path / "raw"), recursive=True):
        key = Path(info.path).relative_to(tmp_path).as_posix().replace(" ", "%20").replace("#", "%23")
        storage.write_bytes(f"{BUCKET}/{key}", Path(info.path).read_bytes())
    s3.faults(share=SHARE, seed=2)
    local, remote = read_rows(str(tmp_path / "raw")), read_rows(f"{BUCKET}/raw")
    assert len(local) == 18
    assert remote.equals(local)


def write_every_layout(root: Path) -> None:
    """Six samples as Parquet, three as a tar, six as a CSV manifest with paths, three as class folders."""
    write_shard(root / "parquet" / "a 1.parquet", 0, 3)
    write_shard(root / "parquet" / "a 2.parquet", 3, 3)
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "t.tar", "w") as archive:
        for i, colour in enumerate(COLOURS):
            for name, data in ((f"t{i}.png", png(colour, i)), (f"t{i}.txt", colour.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (root / "manifest" / "pictures").mkdir(parents=True)
    with open(root / "manifest" / "rows.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", "file", "colour"])
        for i, colour in enumerate([*COLOURS, *COLOURS]):
            (root / "manifest" / "pictures" / f"no {i}#.png").write_bytes(png(colour, 10 + i))
            rows.writerow([f"m{i}", f"pictures/no {i}#.png", colour])
    for i, colour in enumerate(COLOURS):
        (root / "folders" / f"light {colour}").mkdir(parents=True)
        (root / "folders" / f"light {colour}" / f"{i}.png").write_bytes(png(colour, 20 + i))


def read_rows(root: str) -> pa.Table:
    """All samples below `root`."""
    sources = [
        {"reader": "parquet", "path": "parquet/[a] ?.parquet", "columns": {"image": "image", "colour": "colour"}},
        {"reader": "webdataset", "path": "tars", "columns": {"image": "png", "colour": "txt"}},
        {"reader": "manifest", "path": "manifest/*.csv", "columns": {"image": "file", "colour": "colour"}},
        {"reader": "folders", "path": "folders", "columns": {"image": "content", "colour": "folder"}},
    ]
    modalities = {"image": {"kind": "image", "encoder": "pixels"}}
    config = parse_config(
        {
            "name": "x",
            "data_root": root,
            "samples": {"sources": sources},
            "modalities": modalities,
            "tasks": {"colour": {}},
        }
    )
    chunks = [
        chunk for shard in list_shards(ReadingPlan.of(config)) for chunk in read_chunks(ReadingPlan.of(config), shard)
    ]
    assert not [reject for chunk in chunks for reject in chunk.rejects]
    return pa.concat_tables([chunk.table for chunk in chunks])


# --- runs --------------------

Command = Callable[..., None]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the process of `mmkt` runs and logs."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def mmkt(server: Server, session: Path) -> Iterator[Command]:
    """mmkt("run", path): the command line, in a process with a Ray of its own that inherits the environment."""
    folder = session
    with open(folder / "log", "w+") as log:
        command = [sys.executable, "-c", SESSION]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, cwd=folder, text=True, **pipes)
        assert process.stdin is not None
        assert process.stdout is not None

        def call(*arguments: str, fails: bool = False) -> None:
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            told = next((line for line in process.stdout if line.startswith("status ")), "it broke off")
            assert told.strip() in (("status 1", "status 2") if fails else ("status 0",)), (
                f"mmkt {' '.join(arguments)}: {told} {(folder / 'log').read_text()[-4000:]}"
            )

        yield call
        process.communicate()


@pytest.fixture(scope="module")
def raw(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn shapes in a local folder and, the same, at BUCKET/data."""
    folder = tmp_path_factory.mktemp("raw")
    for k in range(3):
        write_shard(folder / "data" / f"{k}.parquet", 32 * k, NUM_ROWS // 3)
    storage.copy_folder(str(folder / "data"), f"{BUCKET}/data")
    return folder


def write_config(folder: Path, root: str, name: str) -> str:
    """A config with data and runs below `root`; returns its path."""
    raw = raw_config({"colour": "multiclass"}, SHAPES) | {
        "name": name,
        "data_root": storage.join(root, "data"),
        "run_root": storage.join(root, "runs"),
        "modalities": {
            "image": {
                "kind": "image",
                "encoder": {"name": "pixels", "image_size": 16},
                "reduce": {"name": "pca", "dim": 4},
            },
            "text": {"kind": "text", "encoder": "tfidf", "reduce": {"name": "svd", "dim": 4}},
        },
        "extract": {"chunk_rows": 16, "num_actors": 1},
        "model": {"hidden_dim": 8, "experts": False},
        "training": {"epochs": 2, "batch_size_per_worker": 32, "lr": 0.01, "auto": []},
        "evaluation": {"bootstrap_samples": 100},
        "search": {
            "space": {"model.fusion.name": {"choice": ["concat", "sum"]}, "training.lr": {"loguniform": [1e-3, 1e-1]}},
            "population": 3,
            "max_candidates": 12,
            "time_budget_s": None,
            "rungs": 2,
            "seeds": 1,
        },
    }
    path = folder / f"{name}-{'s3' if '://' in root else 'local'}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def read_features(store_uri: str) -> pa.Table:
    """All columns of a store by sample id."""
    parts = [storage.resolve(part) for part in open_store(store_uri).parts()]
    table = pa.concat_tables([pq.read_table(path, filesystem=fs) for fs, path in parts]).sort_by("sample_id")
    assert pc.count_distinct(table["sample_id"]).as_py() == len(table) == NUM_ROWS
    return table


def stores_of(run_uri: str) -> list[str]:
    """The complete stores of a run: encoded, then reduced."""
    found = [f.path for f in storage.glob(storage.join(run_uri, "features", "*", "manifest.json"))]
    return [storage.join(run_uri, "features", path.split("/")[-2]) for path in sorted(found)]


def check_same_features(run_uri: str, other_uri: str) -> None:
    """Equal ids, labels and feature values, bit by bit, in every store."""
    ours, theirs = stores_of(run_uri), stores_of(other_uri)
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert read_features(one).equals(read_features(other))


@pytest.fixture(scope="module")
def undisturbed(mmkt: Command, raw: Path) -> str:
    """A run on local files."""
    mmkt("run", write_config(raw, str(raw), "shapes"))
    return str(raw / "runs" / "shapes")


@pytest.fixture(scope="module")
def disturbed(server: Server, mmkt: Command, raw: Path) -> str:
    """The same run on S3, where a tenth of all requests fails."""
    server.faults(share=SHARE, seed=3)
    mmkt("run", write_config(raw, BUCKET, "shapes"))
    faults = server.done()
    assert sum(faults.values()) - faults["requests"] > 10
    assert len(faults) > 4  # of every kind some
    return f"{BUCKET}/runs/shapes"


@pytest.mark.cluster
def test_run_through_faults_equals_an_undisturbed_local_run(s3: Server, undisturbed: str, disturbed: str) -> None:
    """Catches rows lost, doubled or damaged by retries, and a step that knows local paths only."""
    check_same_features(disturbed, undisturbed)
    theirs, ours = (storage.join(uri, "models", "model") for uri in (undisturbed, disturbed))
    assert storage.read_json(f"{ours}/metrics.json")["tasks"] == storage.read_json(f"{theirs}/metrics.json")["tasks"]
    assert storage.read_bytes(f"{ours}/model.safetensors") == storage.read_bytes(f"{theirs}/model.safetensors")
    assert len(storage.read_bytes(f"{disturbed}/report/index.html")) > 10_000


@pytest.mark.cluster
def test_the_same_command_again_does_nothing(s3: Server, mmkt: Command, raw: Path, disturbed: str) -> None:
    """Catches work that is done again because its result is not seen in the object store."""
    mmkt("run", write_config(raw, BUCKET, "shapes"))
    results = ("/data/", "/runs/shapes/encoders/", "/manifest.json", "/model/model.safetensors", "/model/config.json")
    again = [write for write in s3.writes() if any(name in write for name in results)]
    assert again == []


@pytest.mark.cluster
def test_no_result_and_no_log_has_the_key(raw: Path, session: Path, undisturbed: str, disturbed: str) -> None:
    """Catches the environment in a report, in run.json or a config that is kept, or in what the command line says."""
    local = [path.read_bytes() for folder in (raw / "runs", session) for path in folder.rglob("*") if path.is_file()]
    found = storage.list_files(disturbed, recursive=True)
    remote = [storage.read_bytes(f"s3://{info.path}") for info in found]
    assert len(remote) > 20
    assert not any(SECRET.encode() in data for data in [*local, *remote])


@pytest.mark.cluster
def test_predict_from_there_to_there(s3: Server, mmkt: Command, raw: Path, undisturbed: str, disturbed: str) -> None:
    """Catches a model folder that can be used only where it was made."""
    s3.faults(share=SHARE, seed=4)
    mmkt("predict", f"{disturbed}/models/model", f"{BUCKET}/data/0.parquet", "--out", f"{BUCKET}/out")
    local = str(raw / "out")
    mmkt("predict", f"{undisturbed}/models/model", str(raw / "data" / "0.parquet"), "--out", local)
    fs, path = storage.resolve(f"{BUCKET}/out/predictions.parquet")
    ours, theirs = pq.read_table(path, filesystem=fs), pq.read_table(f"{local}/predictions.parquet")
    assert len(ours) == 32
    assert ours.equals(theirs)


@pytest.mark.cluster
def test_search_there_and_again(s3: Server, mmkt: Command, raw: Path, disturbed: str) -> None:
    """Catches candidates lost on the way to the object store, and finished trials that run again."""
    s3.faults(share=SHARE, seed=5)
    config = write_config(raw, BUCKET, "shapes")
    mmkt("search", config)
    fs, path = storage.resolve(f"{disturbed}/search/leaderboard.parquet")
    rows = pq.read_table(path, filesystem=fs).to_pandas()
    assert rows["candidate"].is_unique
    tried = storage.read_json(f"{disturbed}/search/result.json")["tried"]
    assert tried["candidates"] == 12
    assert len(rows) == tried["candidates"] + tried["references"]
    assert storage.exists(f"{disturbed}/models/search_winner/model.safetensors")
    s3.faults()
    mmkt("search", config)
    again = [write for write in s3.writes() if "/search/parts/" in write or "/finalists/" in write]
    assert again == []


@pytest.mark.cluster
def test_a_reader_never_sees_half_a_store(s3: Server, mmkt: Command, raw: Path, undisturbed: str) -> None:
    """Catches a store that opens before all its parts are there,
    and parts that are computed twice or differ afterwards."""
    config, run_uri = write_config(raw, BUCKET, "killed"), f"{BUCKET}/runs/killed"
    s3.faults(deny_put="/data/", deny_after=3)
    mmkt("extract", config, fails=True)
    assert s3.done()["deny"] >= 1
    (folder,) = [f.path.split("/")[-2] for f in storage.glob(f"{run_uri}/features/*/data")]
    store_uri = f"{run_uri}/features/{folder}"
    before = [f.base_name for f in storage.list_files(f"{store_uri}/data")]
    assert len(before) == 3
    assert stores_of(run_uri) == []
    with pytest.raises(DataError):
        open_store(store_uri)
    s3.faults()
    mmkt("extract", config)
    assert not [write for write in s3.writes() if write.endswith(tuple(before)) and folder in write]
    check_same_features(run_uri, undisturbed)
