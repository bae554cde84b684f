"""Files that a row names: read only from inside the folder of its shard, unless the source allows more."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import pyarrow.fs as pafs

from mmkt_ray import storage
from mmkt_ray.samples.addresses import is_address
from mmkt_ray.samples.columns import MAX_FILE_BYTES, Reading

# what the name itself is to blame for; any other error of the storage may pass, and stops the job
_FAULTS_OF_A_NAME = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOENT}


class FileReader:
    """Reads files by their paths relative to `base`, by default the folder that the shard is in."""

    def __init__(self, reading: Reading, base: str | None = None) -> None:
        self.base = base or reading.shard.uri.rpartition("/")[0] or "/"
        self.allow_outside = reading.source.allow_outside
        self.fetched: dict[str, bytes | ValueError] = {}  # address -> what was there, of the rows at hand
        self._real_folders: dict[str, str] = {}  # folder -> where its links lead

    def read_cell(self, cell: str) -> bytes | ValueError:
        """The file's bytes, or why it cannot be read."""
        if cell in self.fetched:
            return self.fetched[cell]
        try:
            return self.read(cell)
        except ValueError as error:
            return error

    def read(self, cell: str) -> bytes:
        """The file's bytes. Raises: ValueError as `find` does."""
        if is_address(cell):
            raise ValueError(f"'{cell:.200}' is an address: to fetch such cells set allow_http: true for the source")
        fs, path = self.find(cell)
        with _told(cell), fs.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    def find(self, cell: str, max_bytes: int | None = MAX_FILE_BYTES) -> tuple[pafs.FileSystem, str]:
        """Where the file is. Raises: ValueError if it is missing, too large, no file or outside."""
        folder = posixpath.normpath(posixpath.dirname(cell))
        outside = "://" in cell or posixpath.isabs(cell) or folder.split("/")[0] == ".."
        if outside and not self.allow_outside:  # before the name can mean anything, such as a server to ask
            raise self._told_outside(cell)
        in_uri = "://" in self.base and not outside  # there the name's own characters must not mean anything
        fs, path = storage.resolve(storage.join(self.base, quote(cell) if in_uri else cell))
        if not self.allow_outside and self._leads_outside(fs, path):
            raise self._told_outside(cell)
        with _told(cell):
            info = fs.get_file_info(path)
            if info.type == pafs.FileType.NotFound:
                raise ValueError(f"no file '{cell}' in '{self.base}'")
            _check_readable(info, max_bytes)
        return fs, path

    def _told_outside(self, cell: str) -> ValueError:
        return ValueError(
            f"'{cell}' is outside of the folder '{self.base}': move the file, or set allow_outside: true for the "
            "source"
        )

    def _leads_outside(self, fs: pafs.FileSystem, path: str) -> bool:
        """True if a symbolic link on a local path leads out of the folder."""
        if not isinstance(fs, pafs.LocalFileSystem):
            return False
        if os.path.islink(path):
            path = os.path.realpath(path)
        base, folder = self._real(storage.resolve(self.base)[1]), self._real(posixpath.dirname(path))
        return folder != base and not folder.startswith(base.rstrip("/") + "/")

    def _real(self, folder: str) -> str:
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return self._real_folders[folder]


@contextmanager
def _told(cell: str) -> Iterator[None]:
    """Raises: ValueError for an error of the storage that the name is to blame for."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS_OF_A_NAME:
            raise
        raise ValueError(f"cannot read '{cell:.200}': {os.strerror(error.errno)}") from None


def _check_readable(info: pafs.FileInfo, max_bytes: int | None) -> None:
    """Raises: ValueError for a folder, a device or a file of more than `max_bytes`."""
    if info.type != pafs.FileType.File:
        raise ValueError(f"'{info.base_name}' is no regular file")
    if max_bytes is not None and info.size is not None and info.size > max_bytes:
        limit = f"more than the {max_bytes:,} of one sample at most"
        raise ValueError(f"'{info.base_name}' has {info.size:,} bytes, {limit}")
