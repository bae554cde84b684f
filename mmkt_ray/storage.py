"""Files of a run on any pyarrow filesystem: local paths and object-store URIs alike. Writes are atomic.

A *uri* is an absolute local path or anything `pyarrow.fs.FileSystem.from_uri` takes (s3://, gs://, file://).
"""

from __future__ import annotations

import fnmatch
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mmkt_ray.errors import DataError, ResourceError

_GLOB = set("*?[")


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `uri` and the path inside it. Raises: DataError for a scheme that pyarrow does not know."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"cannot open '{uri}': {error}; use a local path or a URI such as s3://bucket/folder") from None


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


def glob(uri: str) -> list[pafs.FileInfo]:
    """Files and folders that match a path whose last part, or any part, has wildcards; sorted by path."""
    fs, path = resolve(uri)
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if _GLOB & set(part)), len(parts))
    infos = [fs.get_file_info("/".join(parts[:first]) or "/")]
    for part in parts[first:]:
        inside = [
            c for i in infos if i.type == pafs.FileType.Directory for c in fs.get_file_info(pafs.FileSelector(i.path))
        ]
        infos = [c for c in inside if fnmatch.fnmatchcase(c.base_name, part)]
    return sorted((i for i in infos if i.type != pafs.FileType.NotFound), key=lambda i: i.path)


def make_dir(uri: str) -> None:
    """Create a folder and its parents. Raises: ResourceError if it can't be written."""
    fs, path = resolve(uri)
    try:
        fs.create_dir(path, recursive=True)
        if isinstance(fs, pafs.LocalFileSystem) and not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise ResourceError(
            f"cannot write to '{uri}': {error}; choose another folder, e.g. --set run_root=/path"
        ) from None


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises: FileNotFoundError."""
    fs, path = resolve(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write aside, then rename: a reader sees the old file or the new one, never a part (an object store's put is atomic)."""
    with atomic(uri) as (fs, path), fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def write_table(uri: str, table: pa.Table) -> None:
    """One Parquet file, atomically; zstd, no dictionary for numbers."""
    strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
    with atomic(uri) as (fs, path):
        pq.write_table(table, path, filesystem=fs, compression="zstd", compression_level=1, use_dictionary=strings)


class atomic:
    """Context manager: yields (filesystem, temporary path); on success the file is renamed to `uri`, on error removed."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.path = resolve(uri)
        self.local = isinstance(self.fs, pafs.LocalFileSystem)
        # object stores publish on close and have no rename, so they are written under the final name
        self.temporary = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp" if self.local else self.path

    def __enter__(self) -> tuple[pafs.FileSystem, str]:
        self.fs.create_dir(self.path.rpartition("/")[0], recursive=True)
        return self.fs, self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self.local:
            return
        if kind is None:
            os.replace(self.temporary, self.path)
            return
        Path(self.temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == 28:
            raise ResourceError(
                f"disk full while writing '{self.uri}': free some space and run the same command again"
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
    """Copy the files of a folder (not of folders in it), each atomically."""
    for info in list_files(source):
        write_bytes(join(target, info.base_name), read_bytes(join(source, info.base_name)))


def read_json(uri: str) -> Any:
    """Parse a JSON file. Raises: FileNotFoundError, DataError if it is damaged."""
    try:
        return json.loads(read_bytes(uri))
    except json.JSONDecodeError as error:
        raise DataError(f"'{uri}' is damaged ({error}): remove it and run the same command again") from None


def write_json(uri: str, value: Any) -> None:
    """Write readable JSON, atomically."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_chunks(uri: str, size: int = 1 << 20) -> Iterator[bytes]:
    """The file in pieces of at most `size` bytes."""
    fs, path = resolve(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        while piece := stream.read(size):
            yield piece
