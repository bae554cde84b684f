"""Files of a run on any pyarrow filesystem: local paths and object-store URIs alike. Writes are atomic.

A *uri* is an absolute local path or anything `pyarrow.fs.FileSystem.from_uri` takes (s3://, gs://, file://) without a
query string: server, region and keys of an object store are in the environment (docs/storage.md).
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

from mmkt_ray.credentials import credentials_at, refusal
from mmkt_ray.errors import DataError, ResourceError
from mmkt_ray.s3 import s3_filesystem

MAX_FILE_BYTES = 64 * 2**30  # of a file that is read as a whole
MAX_JSON_BYTES = 256 * 2**20  # parsed, it takes up to twenty times as much


FULL = {errno.ENOSPC, errno.EDQUOT}

_GLOB = set("*?[")
_URI_SIGNS = "/:%@*!$&'()+,;=~"  # what stays as it is; blanks and the signs of a pattern are quoted


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `uri` and the path inside it. Raises: DataError for a scheme that pyarrow does not
    know, and for credentials or a NUL in it."""
    if "\0" in uri:
        raise DataError(f"'{uri}' has a NUL in it, which no file's name can have")
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    if (at := credentials_at(uri)) is not None:
        raise DataError(refusal(uri, at))
    try:
        fs, path = pafs.FileSystem.from_uri(quote(uri, safe=_URI_SIGNS))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"cannot open '{uri}': {error}; use a local path or a URI such as s3://bucket/folder") from None
    if isinstance(fs, pafs.S3FileSystem):
        return s3_filesystem(
            fs.region, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        ), path
    return fs, path


def absolute(uri: str) -> str:
    """The same place, said so that workers with another current folder find it."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """`uri` extended by path parts; an absolute or URI part replaces what stands before it."""
    for part in parts:
        uri = part if "://" in part or os.path.isabs(part) else f"{uri.rstrip('/')}/{part}"
    return uri


def exists(uri: str) -> bool:
    """True if a file or a folder is there."""
    fs, path = resolve(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str, pattern: str = "*", recursive: bool = False) -> list[pafs.FileInfo]:
    """Files in a folder whose base name matches `pattern`, sorted by path; empty if there is no such folder."""
    fs, path = resolve(uri)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    files = [f for f in found if f.type == pafs.FileType.File and fnmatch.fnmatchcase(f.base_name, pattern)]
    return sorted(files, key=lambda f: f.path)


def glob(uri: str, fixed: str = "") -> list[pafs.FileInfo]:
    """Files and folders that match a path any part of which may have wildcards; sorted by path, each one once.

    `**` stands for folders at any depth, or for none; hidden names match a part that begins with a dot alone. A part
    that is there as it is written is taken as that: `test[1].parquet`.
    fixed: the beginning of `uri` whose signs are characters.
    """
    fs, path = resolve(uri)
    parts = path.split("/")
    start = resolve(fixed)[1].rstrip("/") if fixed else ""
    num_fixed = start.count("/") + 1 if f"{path}/".startswith(f"{start}/") else 0
    first = next((i for i in range(num_fixed, len(parts)) if _GLOB & set(parts[i])), len(parts))
    infos = [fs.get_file_info("/".join(parts[:first]) or "/")]
    for part in parts[first:]:
        infos = [c for i in infos if i.type == pafs.FileType.Directory for c in _matching(fs, i, part)]
    found = {i.path: i for i in infos if i.type != pafs.FileType.NotFound}
    return [found[path] for path in sorted(found)]


def _matching(fs: pafs.FileSystem, folder: pafs.FileInfo, part: str) -> list[pafs.FileInfo]:
    """What one part of a pattern matches in a folder."""
    inside = fs.get_file_info(pafs.FileSelector(folder.path, recursive=part == "**"))
    if part == "**":
        return [folder, *(c for c in inside if "/." not in c.path.removeprefix(folder.path))]
    named = [c for c in inside if c.base_name == part]
    shown = [c for c in inside if part.startswith(".") or not c.base_name.startswith(".")]
    return named or [c for c in shown if fnmatch.fnmatchcase(c.base_name, part)]


def make_dir(uri: str) -> None:
    """Create a folder and its parents. Raises: ResourceError if it can't be written."""
    fs, path = resolve(uri)
    try:
        fs.create_dir(path, recursive=True)
        if isinstance(fs, pafs.LocalFileSystem) and not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise ResourceError(
            f"cannot write to '{uri}': {error}; choose another folder, by --out or --set run_root=/path"
        ) from None


def read_bytes(uri: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """The whole file. Raises: FileNotFoundError; DataError if it is no regular file,
    or has more than `limit` bytes."""
    size = check_regular(uri, limit)
    fs, path = resolve(uri)
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            return stream.read(size)
    except NotADirectoryError:  # a file is where its folder would be
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from None


def check_regular(uri: str, limit: int | None = None) -> int | None:
    """The size of a local file; None for others, and where nothing is.

    Raises: DataError for a file of more than `limit` bytes, and for a local pipe, socket, device or folder. Reading
    some of these hangs, or never ends; so do files of /proc, whose size is 0.
    """
    fs, path = resolve(uri)
    try:
        found = os.stat(path) if isinstance(fs, pafs.LocalFileSystem) else None
    except OSError:
        return None
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise DataError(f"'{uri}' is a pipe, a device or a folder where a regular file is wanted: remove it")
    if limit is not None and (found.st_size if found else fs.get_file_info(path).size or 0) > limit:
        raise DataError(f"'{uri}' has more than {limit:,} bytes, so it is no file that mmkt wrote: remove it")
    return found.st_size if found else None


def checksum(data: Any) -> str:
    """Of bytes: 64 bits of XXH3, which find damage but no forgery."""
    return xxhash.xxh3_64_hexdigest(data)


def file_checksum(uri: str) -> str:
    """The `checksum` of a file's bytes. Raises: FileNotFoundError."""
    digest = xxhash.xxh3_64()
    for piece in read_pieces(uri):
        digest.update(piece)
    return digest.hexdigest()


def check_bytes(uri: str, data: Any, expected: str) -> None:
    """Raises: DataError if bytes that were read from `uri` are not those that were written there."""
    if (found := checksum(data)) != expected:
        raise DataError(
            f"'{uri}' is damaged: its checksum is {found}, and was {expected} when it was written; remove it and run "
            "the same command again, or copy it again from where it is whole"
        )


def write_bytes(uri: str, data: bytes) -> None:
    """Replace a file: a reader sees the old one or the new one, never a part."""
    fs, path = resolve(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        return _put(fs, path, data)
    with atomic(uri) as (fs, path), fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def _put(fs: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """A whole object in one write: a stream that breaks off between two is closed by pyarrow,
    and what it has is published.

    Raises: ResourceError if the store refuses it.
    """
    try:
        with fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)
    except OSError as error:
        raise ResourceError(
            f"cannot write '{path}' in the object store: {error}; mend that and give the same command again"
        ) from None


def read_table(
    uri: str, columns: Iterable[str] | None = None, filters: Any = None, expected: str | None = None
) -> pa.Table:
    """A Parquet file, or some of its columns, of the rows that the filters leave (as pyarrow.parquet.read_table takes
    them).

    expected: checksum of the file, which is then read as a whole and compared.
    Without it the pages that are read are.
    Raises: FileNotFoundError; DataError for damage, and for a column of an extension type.
    """
    fs, path = resolve(uri)
    options = {"columns": list(columns) if columns is not None else None, "filters": filters}
    options |= {"page_checksum_verification": True}
    if expected is None:
        check_regular(uri)
        source: Any = path
    else:
        data = read_bytes(uri)
        check_bytes(uri, data, expected)
        fs, source = None, pa.BufferReader(data)
    try:
        table = pq.read_table(source, filesystem=fs, **options)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"cannot read '{uri}': {error}; if it is damaged, remove it and run the same command again"
        ) from error
    for field in table.schema:
        if name := extension_in(field.type):
            raise DataError(
                f"'{uri}' has '{field.name}' as '{name}', an extension type, whose code would run on the file's "
                "values (Ray's unpickles them): this is no file that mmkt wrote; remove it and run the same command "
                "again"
            )
    return table


def extension_in(kind: pa.DataType) -> str | None:
    """The name of the extension type that a type is or has in it."""
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    if isinstance(kind, pa.DictionaryType):
        return extension_in(kind.value_type)
    return next(filter(None, (extension_in(kind.field(i).type) for i in range(kind.num_fields))), None)


def write_table(uri: str, table: pa.Table) -> str:
    """One Parquet file, atomically; zstd, no dictionary for numbers, pages with checksums.
    Returns the file's checksum."""
    strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}
    with atomic(uri) as (fs, path):
        pq.write_table(table, path, filesystem=fs, use_dictionary=strings, **options)
        return file_checksum(path)


class atomic:
    """Context manager: yields (filesystem, temporary path); on success the file becomes `uri`,
    on error it is removed.

    Local files are written beside their place and renamed. Object stores have no rename, and publish what a stream
    has when it is closed, be it by an error: the file is written to a local folder and put as a whole.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.path = resolve(uri)
        self.local = isinstance(self.fs, pafs.LocalFileSystem)
        aside = self.path if self.local else os.path.join(tempfile.gettempdir(), "mmkt")
        self.temporary = f"{aside}.{uuid.uuid4().hex[:8]}.tmp"

    def __enter__(self) -> tuple[pafs.FileSystem, str]:
        with self._telling():
            os.makedirs(os.path.dirname(self.temporary), exist_ok=True)
        return pafs.LocalFileSystem(), self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            with self._telling():
                if error is not None:
                    raise error
                self._publish()
        finally:
            Path(self.temporary).unlink(missing_ok=True)

    def _publish(self) -> None:
        if self.local:
            with open(self.temporary, "rb") as file:
                os.fsync(file)  # a machine that loses its power may keep the name and lose what was not yet on the disk
            os.replace(self.temporary, self.path)
        else:
            with pa.memory_map(self.temporary) as file:
                _put(self.fs, self.path, file.read_buffer())

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Raises: ResourceError if the disk, or what the user may have of it, is full."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ResourceError(
                f"disk full while writing '{self.uri}': free some space in '{os.path.dirname(self.temporary)}' and "
                "run the same command again"
            ) from error


def move(source: str, target: str) -> None:
    """Rename a file, making the target's folder."""
    (fs, path), (_, target_path) = resolve(source), resolve(target)
    fs.create_dir(target_path.rpartition("/")[0], recursive=True)
    fs.move(path, target_path)


def remove(uri: str) -> None:
    """Remove a file if it is there."""
    fs, path = resolve(uri)
    if fs.get_file_info(path).type == pafs.FileType.File:
        fs.delete_file(path)


def remove_folder(uri: str) -> None:
    """Remove a folder and all in it, if it is there."""
    fs, path = resolve(uri)
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)


def copy_folder(source: str, target: str) -> None:
    """Copy the files of a folder (not of folders in it), each atomically; those that are there already stay."""
    there = {info.base_name: info.size for info in list_files(target)}
    for info in list_files(source):
        data, place = read_bytes(join(source, info.base_name)), join(target, info.base_name)
        if there.get(info.base_name) != info.size or read_bytes(place) != data:
            write_bytes(place, data)


def adopt_folder(source: str, target: str, last: str) -> None:
    """Copy all files below a folder, the file `last` after all others;
    on a local disk as hard links where it has them.

    Files here are replaced, never written into, so what later happens to one of the two leaves the other as it is.
    Raises: OSError if a file goes away meanwhile.
    """
    (fs, start), (target_fs, end) = resolve(source), resolve(target)
    found = [info.path for info in list_files(source, recursive=True) if not info.base_name.startswith(".lock")]
    for path in sorted(found, key=lambda p: p == f"{start}/{last}"):
        place = f"{end}/{path.removeprefix(start + '/')}"
        if isinstance(fs, pafs.LocalFileSystem):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            temporary = f"{place}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                os.link(path, temporary)
            except PermissionError:  # a disk without links, or files of another user
                shutil.copyfile(path, temporary)
            os.replace(temporary, place)
        else:
            pafs.copy_files(path, place, source_filesystem=fs, destination_filesystem=target_fs)


def read_json(uri: str) -> Any:
    """Parse a JSON file. Raises: FileNotFoundError, DataError if it is damaged or larger than MAX_JSON_BYTES."""
    data = read_bytes(uri, MAX_JSON_BYTES)
    try:
        value = json.loads(data)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return value
    except (ValueError, RecursionError) as error:  # ValueError: bytes that are no text, too
        raise DataError(f"'{uri}' is damaged ({error}): remove it and run the same command again") from None


def write_json(uri: str, value: Any) -> None:
    """Write readable JSON, atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_pieces(uri: str, size: int = 1 << 20) -> Iterator[bytes]:
    """The file in pieces of at most `size` bytes. Raises: FileNotFoundError; DataError if it is no regular file."""
    check_regular(uri)
    fs, path = resolve(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        while piece := stream.read(size):
            yield piece
