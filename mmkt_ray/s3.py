"""S3 as pyarrow has it, but more patient: it waits longer at each try, and repeats reads that the SDK gives up.

Called by storage.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

S3_ATTEMPTS = 12  # at a request that is throttled or fails for a moment: waits double from 25 ms, 50 s in all


@lru_cache
def s3_filesystem(region: str, endpoint: str | None) -> pafs.FileSystem:
    """S3 that waits longer at each try (pyarrow's own: 0.2 s, for 6 s in all), and where a small file is one put.

    Not the strategy called standard: within pyarrow it has 100 retries for as long as the client lives,
    and then no more.
    """
    retries = pafs.AwsDefaultS3RetryStrategy(max_attempts=S3_ATTEMPTS)
    fs = pafs.S3FileSystem(region=region, endpoint_override=endpoint, retry_strategy=retries, allow_delayed_open=True)
    return pafs.PyFileSystem(PatientS3(fs))


def _as_is(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.fs, name)(*args)


class PatientS3(pafs.FileSystemHandler):
    """S3 but for its reads, see `PatientFile`."""

    get_file_info = get_file_info_selector = _as_is("get_file_info")
    delete_file, delete_dir = _as_is("delete_file"), _as_is("delete_dir")
    move, copy_file, normalize_path = _as_is("move"), _as_is("copy_file"), _as_is("normalize_path")
    delete_dir_contents, open_append_stream = _as_is("delete_dir_contents"), _as_is("open_append_stream")

    def __init__(self, fs: pafs.S3FileSystem) -> None:
        self.fs = fs

    def get_type_name(self) -> str:
        return "s3"

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody empties all buckets")

    def create_dir(self, path: str, recursive: bool) -> None:
        self.fs.create_dir(path, recursive=recursive)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(PatientFile(self.fs.open_input_file(path)), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self.fs.open_output_stream(path, compression=None, metadata=metadata)


class PatientFile:
    """Tries a read again if the reply was an error whose text is longer than the bytes that were asked for.

    The SDK has no room for that text then, and takes the error for one of its own that is not worth another attempt.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self.tell, self.seek, self.close, self.file = file.tell, file.seek, file.close, file

    @property
    def closed(self) -> bool:
        return self.file.closed

    def read(self, size: int | None = None) -> bytes:
        start = self.file.tell()
        for attempt in range(S3_ATTEMPTS - 1):
            try:
                return self.file.read(size)
            except OSError as error:
                if "Failed to flush response stream" not in str(error):
                    raise
            time.sleep(0.025 * 2**attempt)
            self.file.seek(start)
        return self.file.read(size)
