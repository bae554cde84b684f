"""Samples in tar archives and class folders: WebDataset shards, archived and plain class folders.

Archives are streamed, compressed or not, and nothing is ever written to disk: a name such as `../x` does no
harm.
"""

from __future__ import annotations

import gzip
import io
import json
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tarfile import HeaderError, TarFile
from typing import Any, NamedTuple, Self, cast

from mmkt_ray import storage
from mmkt_ray.errors import DataError, nearest
from mmkt_ray.kinds.cells import json_int
from mmkt_ray.kinds.content import what_else
from mmkt_ray.samples.columns import MAX_FILE_BYTES, MAX_ROW_BYTES, Reading, Row
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.json_rows import find_repeated
from mmkt_ray.samples.schema import UNMAPPED, Reject
from mmkt_ray.samples.shards import SUFFIXES, has_suffix, visible
from mmkt_ray.samples.splits import split_in_name

_SPARSE = "a sparse file, whose list of holes may be of any length: write the archive without --sparse"
MAX_SUFFIXES, OTHERS = 100, "(others)"  # of members that no column maps, told of one shard
_DOTS = (
    "no modality is present: a member's key ends at the first dot of its name, so its suffix is '{suffix}' of the "
    "key '{key}', which no column maps; rename the members, e.g. with - for the dots"
)
_NOT_ADJACENT = (
    "its members do not stand side by side in the archive, so that it comes in parts: sort the archive by name, e.g. "
    "with tar --sort=name"
)
_MAX_HEADER_BYTES = 1_000_000  # of a tar's extended header: long names, attributes
_MAX_ZEROS = 2 * 2048  # blocks behind an archive: `tar -b 2048` fills up a mebibyte
_EXTENDED_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# `tarfile` ends an archive silently at any faulty header but the kind that it calls subsequent. These kinds, and the
# list of members below, are in the module but not in its type stubs
_EndOfArchive: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_DamagedHeader: type[Exception] = tarfile.SubsequentHeaderError  # type: ignore[attr-defined]
# `tarfile` checks little of what it parses: numbers, text, the length of a header,
# how deep headers follow one another
_DAMAGE = (
    *(tarfile.TarError, EOFError, ValueError, TypeError, OverflowError, RecursionError),
    *(gzip.BadGzipFile, zlib.error),
)
_NothingLeft: type[Exception] = tarfile.EmptyHeaderError  # type: ignore[attr-defined]


# --- tar --------------------


class _Tar(TarFile):
    """An archive, or several one after another: `tar -i`, or `cat a.tar b.tar`."""

    num_zeros = 0  # blocks of zeros in a row, which mark an end


class _StrictTarInfo(tarfile.TarInfo):
    """Reports a tar that ends early or has a damaged header; `tarfile` takes both for a regular end."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        assert isinstance(tarfile, _Tar)
        try:
            info = super().fromtarfile(tarfile)
        except _EndOfArchive:
            tarfile.num_zeros += 1
            if tarfile.num_zeros > _MAX_ZEROS:
                raise _DamagedHeader(
                    f"nothing but zeros at byte {tarfile.offset:,}, as a transfer that broke off"
                ) from None
            raise
        except HeaderError as error:
            if tarfile.num_zeros and isinstance(error, _NothingLeft):
                raise
            raise _DamagedHeader(f"{error} at byte {tarfile.offset:,}") from None
        tarfile.num_zeros = 0
        return info

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENDED_HEADERS and info.size > _MAX_HEADER_BYTES:
            raise _DamagedHeader(f"an extended header of {info.size:,} bytes")  # it would be read as a whole
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise _DamagedHeader(_SPARSE)
        return info

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise _DamagedHeader(_SPARSE)


class _Counting(io.RawIOBase):
    """A stream that counts the bytes that were read."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.num_bytes = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = int(self.stream.readinto(buffer))
        self.num_bytes += num_bytes
        return num_bytes


class _Ending(io.BufferedReader):
    """A stream that says when it has ended: `tarfile` goes on reading for as many bytes as a member's header
    states."""

    num_empty = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_empty += not data
        if self.num_empty > 10:  # a few are regular, where the archive's last blocks are not there
            raise EOFError("it ends within a member")
        return data


class Member(NamedTuple):
    """A file in an archive or a folder."""

    name: str
    data: bytes | ValueError  # empty if not wanted; why it could not be read
    end: int = 0  # of an archive's: about as many bytes of the file were read so far


def _members(reading: Reading, wanted: Callable[[str], bool]) -> Iterator[Member | Reject]:
    """The visible files of an archive in order, wanted ones with data; last a reject if it is damaged."""
    fs, path = storage.resolve(reading.shard.uri)
    with fs.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
        counting = _Counting(stream)
        file = io.BufferedReader(counting, 1 << 15)
        # no other compression: xz takes as much memory as the file states
        start = file.peek(64)[:64]
        is_packed = start[:2] == b"\x1f\x8b"
        raw = _Ending(cast(Any, gzip.GzipFile(fileobj=file) if is_packed else file), 1 << 15)
        try:
            with _Tar.open(
                fileobj=raw, mode="r|", tarinfo=_StrictTarInfo, encoding="utf-8", bufsize=1 << 15, ignore_zeros=True
            ) as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else they all stay in memory
                    archive.pax_headers.clear()  # type: ignore[attr-defined]
                    if not info.isdir() and visible(info.name):
                        member = _read_member(archive, info) if wanted(info.name) else Member(info.name, b"")
                        yield member._replace(end=counting.num_bytes)
        except _DAMAGE as error:
            yield reading.unreadable(error, "" if is_packed else what_else(start))


def _read_member(archive: TarFile, info: tarfile.TarInfo) -> Member:
    if info.issym() or info.islnk():
        link = f"'{info.name}' is a link to '{info.linkname}'; links in archives are not followed"
        return Member(info.name, ValueError(link))
    if not info.isreg() or info.issparse():
        return Member(info.name, ValueError(f"'{info.name}' is no regular file"))
    if info.size > MAX_FILE_BYTES:
        limit = f"more than the {MAX_FILE_BYTES:,} of one sample at most"
        return Member(info.name, ValueError(f"'{info.name}' has {info.size:,} bytes, {limit}"))
    stream = archive.extractfile(info)
    assert stream is not None, "a regular file has content"
    return Member(info.name, stream.read())


# --- WebDataset --------------------


@dataclass
class _Group:
    """The members of one WebDataset sample."""

    key: str
    suffixes: set[str] = field(default_factory=set)
    data: dict[str, bytes | ValueError] = field(default_factory=dict)  # the wanted suffixes -> content
    is_again: bool = False  # members with this key and other suffixes came before, and others between


def read_webdataset(reading: Reading) -> Iterator[Row | Reject]:
    """Rows of a tar in which consecutive members with the same name up to the first dot are one sample.

    A column names a suffix (`png`), a field of a JSON member (`json.category`), alternatives of both
    (`jpg,jpeg,png`: the first that is there) or `__key__`. A sample without the member has a null there.
    The sample in which an archive breaks off is lost with those after it: its other members may be missing. Members
    whose suffix no column maps are counted in rejects of the stage `unmapped`, the last ones.
    """
    specs = [spec for column in reading.paths for spec in _specs(column)]
    wanted = {"json" if spec.startswith("json.") else spec for spec in specs}
    unmapped: Counter[str] = Counter()
    for group in _groups(reading, wanted):
        if isinstance(group, Reject):
            yield group
            continue
        unmapped.update(suffix if len(unmapped) < MAX_SUFFIXES else OTHERS for suffix in group.suffixes - wanted)
        if dotted := {} if group.data else _dotted_keys(group, wanted):
            for key, suffix in dotted.items():
                yield reading.reject(reading.place("#", key), _DOTS.format(suffix=suffix, key=group.key))
        elif group.is_again:
            yield reading.reject(reading.place("#", group.key), _NOT_ADJACENT)
        else:
            yield _webdataset_row(reading, group)
    for suffix, num_members in unmapped.items():
        yield reading.reject(suffix, "no column maps this suffix of an archive's members", UNMAPPED, num_members)


def _dotted_keys(group: _Group, wanted: set[str]) -> dict[str, str]:
    """Of members that no column maps: what a user takes for their samples' keys -> the suffix of one."""
    found: dict[str, str] = {}
    for suffix in sorted(group.suffixes):
        more, dot, last = suffix.rpartition(".")
        if dot and last in wanted:
            found.setdefault(f"{group.key}.{more}", suffix)
    return found


def _groups(reading: Reading, wanted: set[str]) -> Iterator[_Group | Reject]:
    group: _Group | None = None
    seen: dict[str, frozenset[str]] = {}  # key -> suffixes of the samples so far, which are few different ones
    kinds: dict[frozenset[str], frozenset[str]] = {}
    for member in _members(reading, lambda name: _key_and_suffix(name)[1] in wanted):
        if isinstance(member, Reject):
            yield member
            return
        key, suffix = _key_and_suffix(member.name)
        if group is None or key != group.key or suffix in group.suffixes:
            if group is not None:
                suffixes = frozenset(group.suffixes)
                seen[group.key] = kinds.setdefault(suffixes, suffixes)
                yield group
            # also for a suffix that repeats: a second sample with the same key
            group = _Group(key, is_again=suffix not in seen.get(key, (suffix,)))
        group.suffixes.add(suffix)
        if suffix in wanted:
            group.data[suffix] = member.data
    if group is not None:
        yield group


def _specs(column: str) -> list[str]:
    """Suffixes in lower case, as those of members are taken; a json field keeps its case."""
    specs = [spec.strip().removeprefix(".").partition(".") for spec in column.split(",")]
    return ["".join((head.lower(), dot, rest if head.lower() == "json" else rest.lower())) for head, dot, rest in specs]


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _webdataset_row(reading: Reading, group: _Group) -> Row | Reject:
    fields = _parse_json(reading, group.data.get("json"))
    cells = reading.gather(lambda column: _first_there(_specs(column), group, fields))
    return reading.convert(reading.place("#", group.key), cells)


def _parse_json(reading: Reading, data: bytes | ValueError | None) -> Any:
    if data is None or isinstance(data, ValueError):
        return data
    if len(data) > MAX_ROW_BYTES:
        return ValueError(f"its json member has {len(data):,} bytes, more than {MAX_ROW_BYTES:,}")
    try:
        text = _json_text(data, reading.source.encoding)
        fields = json.loads(text, parse_int=json_int)
    except (ValueError, RecursionError) as error:
        return ValueError(f"its json member is not valid JSON: {error}")
    specs = [spec for column in reading.paths for spec in _specs(column)]
    twice = find_repeated(text, [spec.removeprefix("json.") for spec in specs if spec.startswith("json.")])
    return ValueError(f"its json member has '{twice}' twice: rename or remove one") if twice else fields


def _json_text(data: bytes, encoding: str) -> str:
    """In the Unicode encoding that the bytes show, else in the source's. Raises: UnicodeDecodeError."""
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        return data.decode(encoding)


def _first_there(specs: list[str], group: _Group, fields: Any) -> Any:
    for spec in specs:
        if spec == "__key__":
            return group.key
        in_json = spec.startswith("json.")
        value = _json_field(fields, spec.removeprefix("json.")) if in_json else group.data.get(spec)
        if value is not None:
            return value
    return None


def _json_field(fields: Any, path: str) -> Any:
    if isinstance(fields, ValueError):
        return fields
    for part in path.split("."):
        fields = fields.get(part) if isinstance(fields, dict) else None
    return fields


def count_samples(reading: Reading, max_bytes: int) -> tuple[int, int]:
    """Samples at the beginning of an archive, and how many bytes of the file they take, about `max_bytes` at most."""
    is_folders = reading.source.reader == "folders"
    num_samples = num_bytes = 0
    before = ""
    for member in _members(reading, lambda name: False):
        if isinstance(member, Reject) or member.end > max_bytes:
            break
        key, num_bytes = _key_and_suffix(member.name)[0], member.end
        num_samples, before = num_samples + (is_folders or key != before), key
    return num_samples, num_bytes


# --- class folders --------------------

_FOLDER_COLUMNS = ("content", "folder", "name")


def read_folders(reading: Reading) -> Iterator[Row | Reject]:
    """Rows of an archive of class folders, or of one plain folder: a file is a sample.

    A column names `content` (what the file holds), `folder` (the name of the folder it is in: its class) or
    `name` (the file's name up to its last dot). The innermost folder whose name is or ends in a split's says
    the split.

    Raises: DataError if a column names anything else.
    """
    for column in reading.paths:
        if column not in _FOLDER_COLUMNS:
            where = f"samples.sources[{reading.shard.source}].columns"
            raise DataError(f"{where}: reader 'folders' has no '{column}'; {nearest(column, _FOLDER_COLUMNS)}")
    is_archive = has_suffix(reading.shard.name, SUFFIXES["folders"])
    for member in _members(reading, lambda name: True) if is_archive else _folder_files(reading):
        yield member if isinstance(member, Reject) else _folder_row(reading, member, is_archive)


def _folder_files(reading: Reading) -> Iterator[Member]:
    """The visible files of a plain folder; the archives in it are shards of their own."""
    files = FileReader(reading, base=reading.shard.uri)
    for info in storage.list_files(reading.shard.uri):
        if visible(info.base_name) and not has_suffix(info.base_name, SUFFIXES["folders"]):
            yield Member(info.base_name, files.read_cell(info.base_name))


def _folder_row(reading: Reading, member: Member, is_archive: bool) -> Row | Reject:
    path = member.name.removeprefix("./")
    place = reading.place("/", path)
    folders = path.split("/")[:-1] if is_archive else [posixpath.basename(storage.resolve(reading.shard.uri)[1])]
    raw: dict[str, Any] = {
        "content": member.data,
        "folder": folders[-1] if folders else None,
        "name": posixpath.splitext(posixpath.basename(path))[0],
    }
    cells = reading.gather(raw.__getitem__)
    if "split" not in cells:
        cells["split"] = _split_in_path(reading, f"{reading.shard.name}/{path}".split("/")[:-1])
    return reading.convert(place, cells)


def _split_in_path(reading: Reading, folders: list[str]) -> str | None:
    """The split that the innermost telling folder says; a class folder says none, be it called `test`."""
    if "folder" in reading.paths and not has_suffix(folders[-1], SUFFIXES["folders"]):
        folders = folders[:-1]
    for folder in reversed(folders):
        stem = next((folder[: -len(s)] for s in SUFFIXES["folders"] if has_suffix(folder, (s,))), folder)
        if (split := split_in_name(stem)) is not None:
            return split
    return None
