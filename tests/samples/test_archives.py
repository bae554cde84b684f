"""Tar archives and class folders: grouping, labels and splits from names, and what odd tars hold."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
from collections import Counter

import pytest

from mmkt_ray.errors import DataError
from mmkt_ray.samples import archives
from mmkt_ray.samples.readers import find_samples, read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import UNMAPPED
from mmkt_ray.samples.shards import list_shards

WEBDATASET = {
    "reader": "webdataset",
    "path": "a.tar",
    "columns": {"image": "jpg,png", "text": "txt", "label": "json.kind"},
}
FOLDERS = {"reader": "folders", "path": "a.tar", "columns": {"text": "content", "label": "folder"}}


def header(name: str, kind: bytes, linkname: str = "", size: int = 0) -> tarfile.TarInfo:
    """A tar header without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, linkname, size
    return info


# --- WebDataset --------------------


def test_webdataset_groups_suffixes_and_json(make_config, read_all, write_tar, png, tmp_path):
    """Catches wrong grouping, alternatives not taken in order, and a missing member that costs the sample."""
    entries = [
        *[
            ("d/k1.png", png(1)),
            ("d/k1.txt", b"one"),
            ("d/k1.json", b'{"kind": 3.0}'),
            ("d/k1.seg.png", b"no"),
        ],
        *[("d/k2.png", png(2)), ("d/k2.JPG", b"jpg first")],
        *[("./d/k3.txt", b"three"), ("d/._k3.txt", b"hidden"), ("d/k3.json", b"{not json")],
        ("k4.npy", b"nothing wanted"),
    ]
    write_tar(tmp_path / "a.tar", entries)
    source = {**WEBDATASET, "columns": {**WEBDATASET["columns"], "key": "__key__"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert table.select(["sample_id", "key", "image", "text", "label"]).to_pylist() == [
        {"sample_id": "a.tar#d/k1", "key": "d/k1", "image": png(1), "text": "one", "label": "3"},
        {"sample_id": "a.tar#d/k2", "key": "d/k2", "image": b"jpg first", "text": None, "label": None},
    ]
    assert [(r.sample_id, r.num_rows) for r in rejects if r.stage == UNMAPPED] == [("seg.png", 1), ("npy", 1)]
    reasons = {r.sample_id: r.reason for r in rejects if r.stage != UNMAPPED}
    assert reasons.keys() == {"a.tar#d/k3", "a.tar#k4"}
    assert reasons["a.tar#d/k3"].startswith("label: its json member is not valid JSON")
    assert reasons["a.tar#k4"] == "no modality is present"


@pytest.mark.parametrize("gap", [[], [("other.txt", b"o")]])
def test_duplicate_key_is_rejected_once(make_config, read_all, write_tar, tmp_path, gap):
    """Catches two samples with one id, next to each other or far apart."""
    sample = [("k.txt", b"one"), ("k.json", b'{"kind": "a"}')]
    write_tar(tmp_path / "a.tar", [*sample, *gap, *sample])
    table, rejects = read_all(make_config(tmp_path, WEBDATASET))
    assert table["sample_id"].to_pylist() == ["a.tar#k", *["a.tar#other" for _ in gap]]
    assert [(r.sample_id, r.reason.split(":")[0]) for r in rejects] == [("a.tar#k", "duplicate sample id")]


def test_keys_with_dots_are_as_many_rejects_as_samples(make_config, read_all, write_tar, png, tmp_path):
    """Catches sixty samples, named by a phone, that are one reject as the key ends at the first dot of a name."""
    named = [f"2024.05.{day:02d}-{hour}h" for day in range(1, 31) for hour in (10, 11)]
    entries = [(f"{key}.{s}", data) for key in ["1", "2", *named] for s, data in (("png", png(1)), ("txt", b"text"))]
    write_tar(tmp_path / "a.tar", entries)
    table, rejects = read_all(make_config(tmp_path, WEBDATASET))
    assert table["sample_id"].to_pylist() == ["a.tar#1", "a.tar#2"]
    lost = [r for r in rejects if r.stage != UNMAPPED]
    assert sorted(r.sample_id for r in lost) == [f"a.tar#{key}" for key in named]
    assert "suffix is '05.01-10h.png' of the key '2024', which no column maps; rename" in lost[0].reason
    assert sum(r.num_rows for r in rejects if r.stage == UNMAPPED) == 120


def test_a_tar_sorted_by_extension_says_sort_by_name(make_config, read_all, write_tar, png, tmp_path):
    """Catches samples in two halves, of which the second passes for a mere repetition of the first."""
    keys = [f"{i:02d}" for i in range(6)]
    write_tar(tmp_path / "a.tar", [(f"{key}.{suffix}", b"text") for suffix in ("png", "txt") for key in keys])
    _, rejects = read_all(make_config(tmp_path, WEBDATASET))
    assert [r.sample_id for r in rejects] == [f"a.tar#{key}" for key in keys]
    assert all("sort the archive by name" in r.reason for r in rejects)


@pytest.mark.parametrize("layout", ["tar", "padded", "gzip of each", "gzip of all", "gzip in pieces"])
def test_concatenated_archives_are_read_to_the_end(make_config, read_all, write_tar, tmp_path, layout):
    """Catches `cat a.tar b.tar`, and what bgzip and pigz write, of which the first part passes for all.
    Right: tar -i."""
    for name in "ab":
        write_tar(tmp_path / f"{name}.part", [(f"{name}/{i}.txt", os.urandom(3000).hex().encode()) for i in range(5)])
    parts = [(tmp_path / f"{name}.part").read_bytes() for name in "ab"]
    parts = [part + bytes(10240 * 3) for part in parts] if layout == "padded" else parts
    pieces = [b"".join(parts)[i : i + 7000] for i in range(0, sum(map(len, parts)), 7000)]
    written = {"gzip of each": parts, "gzip of all": [b"".join(parts)], "gzip in pieces": pieces}
    name = "c.tar.gz" if layout in written else "c.tar"
    (tmp_path / name).write_bytes(b"".join(map(gzip.compress, written[layout]) if layout in written else parts))
    listed = subprocess.run(["tar", "-i", "-tf", tmp_path / name], capture_output=True, text=True, check=True).stdout
    table, rejects = read_all(make_config(tmp_path, FOLDERS | {"path": name}))
    assert table["sample_id"].to_pylist() == [f"{name}/{member}" for member in listed.split()]
    assert table.num_rows == 10
    assert not rejects


def test_what_follows_an_archive_and_is_none_is_told(make_config, read_all, write_tar, tmp_path):
    """Catches a second archive, damaged at its first header, that passes for padding."""
    write_tar(tmp_path / "a.tar", [("a/1.txt", b"one")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + b"damaged" * 300)
    table, rejects = read_all(make_config(tmp_path, FOLDERS))
    assert table.num_rows == 1
    assert [r.sample_id for r in rejects] == ["a.tar"]


@pytest.mark.parametrize(("num_zeros", "is_damage"), [(1 << 20, False), (3 << 20, True)])
def test_zeros_in_place_of_members_are_damage(make_config, read_all, write_tar, tmp_path, num_zeros, is_damage):
    """Catches rows lost in silence as a transfer broke off in a file of its final size;
    `tar -b 2048` fills up one mebibyte."""
    write_tar(tmp_path / "a.tar", [("1.txt", b"one"), ("1.cls", b"a")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2048] + bytes(num_zeros))
    source = {"reader": "webdataset", "path": "a.tar", "columns": {"text": "txt", "label": "cls"}}
    table, rejects = read_all(make_config(tmp_path, source))
    assert [("nothing but zeros" in r.reason, r.stage) for r in rejects] == [(True, "damage")] * is_damage
    assert table.num_rows == 1 - is_damage


@pytest.mark.parametrize("comp", ["bz2", "xz"])
def test_an_archive_packed_in_another_way_is_told(make_config, read_all, write_tar, tmp_path, comp):
    """Catches "truncated header" of an archive that is whole."""
    write_tar(tmp_path / "a.tar", [("1.txt", b"one"), ("1.cls", b"a")], mode=f"w:{comp}")
    source = {"reader": "webdataset", "path": "a.tar", "columns": {"text": "txt", "label": "cls"}}
    assert "the shard is packed by" in read_all(make_config(tmp_path, source))[1][0].reason


def test_a_flipped_bit_in_a_compressed_archive_is_damage(make_config, read_all, write_tar, tmp_path):
    """Catches other texts than were written, as nobody compares gzip's checksum."""
    write_tar(tmp_path / "a.tar", [(f"a/{i}.txt", b"text %d" % i) for i in range(20)])
    data = bytearray(gzip.compress((tmp_path / "a.tar").read_bytes(), compresslevel=0))
    data[data.index(b"text 19")] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(data)
    _, rejects = read_all(make_config(tmp_path, FOLDERS | {"path": "a.tar.gz"}))
    assert ["CRC" in r.reason for r in rejects] == [True]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("source", [WEBDATASET, FOLDERS])
def test_links_and_devices_are_rejected(make_config, read_all, write_tar, tmp_path, kind, source):
    """Catches a link in an archive that reads a file of this machine, and a device that never ends."""
    entries = [("a/1.txt", b"one"), header("a/2.txt", kind, linkname="/etc/passwd"), ("a/3.txt", b"three")]
    write_tar(tmp_path / "a.tar", entries)
    table, rejects = read_all(make_config(tmp_path, source))
    assert table["text"].to_pylist() == ["one", "three"]
    assert [r.sample_id for r in rejects] == ["a.tar#a/2" if source is WEBDATASET else "a.tar/a/2.txt"]
    assert "link" in rejects[0].reason or "no regular file" in rejects[0].reason


def test_a_member_that_cannot_be_read_costs_its_modality(make_config, read_all, write_tar, png, tmp_path):
    """Catches a sample lost to one of its members; and one whose label is unreadable that passes as unlabelled."""
    link = header("a/1.png", tarfile.SYMTYPE, linkname="/etc/passwd")
    entries = [link, ("a/1.txt", b"one"), ("a/2.png", png(2)), ("a/2.json", b"{broken"), ("a/3.png", png(3))]
    write_tar(tmp_path / "a.tar", entries)
    table, rejects = read_all(make_config(tmp_path, WEBDATASET))
    assert table.select(["text", "image"]).to_pylist() == [
        {"text": "one", "image": None},
        {"text": None, "image": png(3)},
    ]
    assert sorted((r.sample_id, r.stage) for r in rejects) == [("a.tar#a/1", "modality"), ("a.tar#a/2", "read")]
    caption = {**WEBDATASET, "columns": {"image": "png", "text": "json.caption", "label": "txt"}}
    table, rejects = read_all(make_config(tmp_path, caption))
    assert table["image"].to_pylist() == [png(2), png(3)]
    assert ("a.tar#a/2", "modality") in [(r.sample_id, r.stage) for r in rejects]


@pytest.mark.parametrize("name", ["../../escaped.txt", "/tmp/escaped.txt"])
def test_names_that_leave_the_archive_write_nothing(make_config, read_all, write_tar, tmp_path, name):
    """Catches extraction to disk: a name with .. is only a name here."""
    (tmp_path / "d" / "e").mkdir(parents=True)
    write_tar(tmp_path / "d" / "e" / "a.tar", [(name, b"text")])
    before = sorted(tmp_path.rglob("*"))
    table, rejects = read_all(make_config(tmp_path, {**FOLDERS, "path": "d/e/a.tar"}))
    assert table["sample_id"].to_pylist() == [f"d/e/a.tar/{name}"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not rejects


def test_member_beyond_the_size_limit_is_not_read(make_config, read_all, write_tar, tmp_path, monkeypatch):
    """Catches a single huge member that fills the memory."""
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 10)
    write_tar(tmp_path / "a.tar", [("a/1.txt", b"x" * 11), ("a/2.txt", b"x" * 10)])
    table, rejects = read_all(make_config(tmp_path, FOLDERS))
    assert table.num_rows == 1
    assert "has 11 bytes, more than the 10" in rejects[0].reason


def test_huge_extended_header_is_damage(make_config, read_all, tmp_path):
    """Catches a tar bomb in a long-name header, which tarfile would read into memory as a whole."""
    long_name = header("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=3_000_000_000)
    (tmp_path / "a.tar").write_bytes(long_name.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    table, rejects = read_all(make_config(tmp_path, FOLDERS))
    assert table.num_rows == 0
    assert "an extended header of 3,000,000,000 bytes" in rejects[0].reason


# --- damage --------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("cut", [1024, 2 * 1024, 2 * 1024 + 100, 2 * 1024 + 512 + 3])
def test_truncated_tar_keeps_the_rows_before(make_config, read_all, write_tar, tmp_path, compress, cut):
    """Catches a tar cut between members or in a header, which tarfile takes for a regular end."""
    write_tar(tmp_path / "whole.tar", [(f"a/{i}.txt", b"text %d" % i) for i in range(4)])
    data = (tmp_path / "whole.tar").read_bytes()[:cut]  # a member is 1024 bytes
    name = "a.tar.gz" if compress else "a.tar"
    (tmp_path / name).write_bytes(gzip.compress(data) if compress else data)
    table, rejects = read_all(make_config(tmp_path, {**FOLDERS, "path": name}))
    assert table["text"].to_pylist() == [f"text {i}" for i in range(cut // 1024)]
    assert [(r.sample_id, r.source) for r in rejects] == [(name, name)]
    assert "damaged" in rejects[0].reason


def test_truncated_compression_is_damage(make_config, read_all, write_tar, tmp_path):
    """Catches an aborted download that passes as a complete archive."""
    write_tar(
        tmp_path / "a.tar.gz",
        [(f"a/{i}.txt", os.urandom(5000).hex().encode()) for i in range(10)],
        mode="w:gz",
    )
    data = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
    table, rejects = read_all(make_config(tmp_path, {**FOLDERS, "path": "a.tar.gz"}))
    assert 0 < table.num_rows < 10
    assert [r.sample_id for r in rejects] == ["a.tar.gz"]


def test_the_sample_at_the_break_is_not_kept_in_part(make_config, read_all, write_tar, tmp_path):
    """Catches a sample that lost its text to the damage and passes as one without a text."""
    write_tar(tmp_path / "a.tar", [("1.png", b"i"), ("1.txt", b"t"), ("2.png", b"i"), ("2.txt", b"t")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 3 * 1024])
    table, rejects = read_all(
        make_config(tmp_path, WEBDATASET | {"columns": {"image": "png", "text": "txt", "label": "cls"}})
    )
    assert table["sample_id"].to_pylist() == ["a.tar#1"]
    assert len(rejects) == 1


@pytest.mark.parametrize("data", [b"", b"this is no archive " * 100, gzip.compress(b"nor is this", mtime=0)])
def test_not_a_tar_is_one_reject(make_config, read_all, tmp_path, data):
    """Catches an error page saved as an archive that stops the job."""
    (tmp_path / "a.tar").write_bytes(data)
    table, rejects = read_all(make_config(tmp_path, WEBDATASET))
    assert table.num_rows == 0
    assert [r.sample_id for r in rejects] == ["a.tar"]


# --- class folders --------------------


@pytest.mark.parametrize("layout", ["plain", "a.tar", "a.tar.gz", "a.tgz"])
def test_class_folders_plain_and_archived_agree(make_config, read_all, write_tar, tmp_path, layout):
    """Catches a wrong class or split from the path; a class called `test` says no split."""
    files = [
        "set_train/cats/1.txt",
        "set_train/test/2.txt",
        "set-valid/cats/1.txt",
        "set_train/cats/.DS_Store",
    ]
    if layout == "plain":
        for name in files:
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name).write_text("text")
        path = "d"
    else:
        path = layout
        write_tar(tmp_path / path, [(name, b"text") for name in files], mode="w:gz" if "gz" in layout else "w")
    config = make_config(tmp_path, {**FOLDERS, "path": path}, samples={"split": {"val_frac": 0}})
    table, rejects = read_all(config)
    rows = {(r["sample_id"], r["label"], r["split"]) for r in table.to_pylist()}
    assert rows == {
        (f"{path}/set_train/cats/1.txt", "cats", "train"),
        (f"{path}/set_train/test/2.txt", "test", "train"),
        (f"{path}/set-valid/cats/1.txt", "cats", "val"),
    }
    assert not rejects


def test_split_of_the_innermost_folder_where_no_class_is_read(make_config, read_all, tmp_path):
    """Catches `train/` and `test/` folders of unlabelled files that are taken for classes."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "7.txt").write_text("text")
    source = {**FOLDERS, "path": "test", "columns": {"text": "content", "label": "name"}}
    table, _ = read_all(make_config(tmp_path, source))
    assert table.select(["split", "label"]).to_pylist() == [{"split": "test", "label": "7"}]


def test_unknown_folder_column(make_config, tmp_path):
    """Catches a misspelt column name that becomes nulls."""
    (tmp_path / "a.tar").write_bytes(b"")
    config = make_config(tmp_path, {**FOLDERS, "columns": {"text": "contents", "label": "folder"}})
    with pytest.raises(DataError, match="has no 'contents'; did you mean 'content'"):
        list(read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0]))


def test_undecodable_member_names(make_config, read_all, tmp_path):
    """Catches file names that are no UTF-8, which no Arrow string can hold."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(header("caf\xe9/1.txt", tarfile.REGTYPE))
        tar.addfile(header("caf\xe9/2.txt", tarfile.SYMTYPE, linkname="caf\xe9"))
    table, rejects = read_all(make_config(tmp_path, FOLDERS | {"columns": {"text": "content", "label": "name"}}))
    assert table.num_rows == 0
    assert sorted(r.sample_id for r in rejects) == ["a.tar/caf%E9/1.txt", "a.tar/caf%E9/2.txt"]


# --- real data --------------------


@pytest.mark.slow
def test_20news(make_config, read_all, data_dir):
    """Catches posts lost to encoding or an odd name, in the archive of scikit-learn's numbers."""
    source = {**FOLDERS, "path": "20news-bydate.tar.gz", "encoding": "latin-1"}
    config = make_config(data_dir, source, samples={"split": {"val_frac": 0}})
    table, rejects = read_all(config)
    assert Counter(table["split"].to_pylist()) == {"train": 11_314, "test": 7_532}
    assert len(set(table["label"].to_pylist())) == 20
    assert not rejects
    wanted = table["sample_id"][100].as_py()
    assert find_samples(ReadingPlan.of(config), [wanted])["text"].to_pylist() == [table["text"][100].as_py()]


@pytest.mark.slow
def test_emoji_of_two_vendors_share_their_keys(make_config, read_all, data_dir):
    """Catches keys that hold the shard's name, so that a join finds no partners."""
    columns = {"image": "png", "text": "txt", "label": "json.category", "key": "__key__"}
    config = make_config(data_dir, {**WEBDATASET, "path": "emoji", "columns": columns})
    table, rejects = read_all(config)
    assert (table.num_rows, len(rejects)) == (2 * 1906, 0)
    assert set(Counter(table["key"].to_pylist()).values()) == {2}
    assert table["text"].null_count == table["image"].null_count == table["label"].null_count == 0
