"""From the config's source paths to shards: one file each, or one folder of files."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable
from itertools import groupby
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from mmkt_ray import storage
from mmkt_ray.config import SourceConfig
from mmkt_ray.errors import DataError, nearest
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard

SUFFIXES = {
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "folders": (".tar", ".tar.gz", ".tgz"),
    "manifest": (".csv", ".jsonl", ".parquet"),
}
_MAX_LISTED = 20  # names in an error message


def list_shards(plan: ReadingPlan) -> list[Shard]:
    """The shards of all sources, in the order of the sources and sorted by path within each.

    A path may be a file, a folder, a glob (`**`: folders at any depth) or a URI. A folder means the files of the
    reader's kind in it; for `reader: folders` each folder below it that holds files itself is a shard,
    and so is an archive.

    Raises: DataError for a path that matches nothing, or nothing that the reader reads.
    """
    shards = []
    for index, source in enumerate(plan.sources):
        uri = _source_uri(plan, source)
        found = [f for f in storage.glob(uri, _root(plan)) if visible(f.base_name) or uri.endswith(f.base_name)]
        if not found:
            raise DataError(f"samples.sources[{index}].path: {_nothing_at(uri)}")
        # a file that is found by itself and in its folder is one shard
        expanded = {shard.uri: shard for info in found for shard in _expand(plan, index, uri, info)}
        if not expanded:
            raise DataError(f"samples.sources[{index}].path: {_nothing_readable(uri, source, found)}")
        shards += [expanded[own] for own in sorted(expanded)]
    return shards


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is of a kind; `A.CSV` is as good as `a.csv`."""
    return name.lower().endswith(suffixes)


def visible(path: str) -> bool:
    """False for a relative path with a hidden part (a name that begins with a dot)."""
    return not any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def _root(plan: ReadingPlan) -> str:
    return storage.absolute(plan.data_root).rstrip("/")


def _source_uri(plan: ReadingPlan, source: SourceConfig) -> str:
    return storage.absolute(storage.join(plan.data_root, os.path.expanduser(source.path)))


def _expand(plan: ReadingPlan, index: int, uri: str, info: pafs.FileInfo) -> list[Shard]:
    """The shards in one file or folder that a source's path matches."""
    source = plan.sources[index]
    suffixes = SUFFIXES[source.reader]
    if info.type != pafs.FileType.Directory:
        return [_shard(plan, index, uri, info.path, [info])] if has_suffix(info.base_name, suffixes) else []
    folders = source.reader == "folders"
    files = [
        f
        for f in storage.list_files(_uri_at(uri, info.path, _root(plan)), recursive=folders)
        if visible(f.path.removeprefix(info.path)) and (folders or has_suffix(f.base_name, suffixes))
    ]
    if not folders:
        return [_shard(plan, index, uri, f.path, [f]) for f in files]
    archives = [f for f in files if has_suffix(f.base_name, suffixes)]
    plain = sorted((f for f in files if not has_suffix(f.base_name, suffixes)), key=lambda f: (_parent(f), f.path))
    leaves = [(folder, list(inside)) for folder, inside in groupby(plain, key=_parent)]
    return [_shard(plan, index, uri, f.path, [f]) for f in archives] + [
        _shard(plan, index, uri, folder, inside) for folder, inside in leaves
    ]


def _parent(info: pafs.FileInfo) -> str:
    return posixpath.dirname(str(info.path))


def _shard(plan: ReadingPlan, index: int, uri: str, path: str, files: Iterable[pafs.FileInfo]) -> Shard:
    root = _root(plan)
    own = _uri_at(uri, path, root)
    name = unquote(own.removeprefix(root + "/")) if own.startswith(root + "/") else own
    files = [*files, *_arrays_beside(plan.sources[index], own)]
    facts = "\n".join(f"{f.base_name}|{f.size}|{f.mtime_ns}" for f in files)
    return Shard(index, own, name, hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:16])


def _arrays_beside(source: SourceConfig, uri: str) -> list[pafs.FileInfo]:
    """The arrays that belong to a shard: when one changes, so does the shard."""
    fs, path = storage.resolve(uri)
    names = sorted(set(source.arrays(posixpath.basename(path)).values()))
    return [fs.get_file_info(posixpath.join(posixpath.dirname(path), name)) for name in names]


def _uri_at(uri: str, path: str, root: str) -> str:
    """`path` inside the filesystem of `uri`, as a URI of the same kind.
    root: its beginning, whose signs are no wildcards."""
    if "://" not in uri:
        return path
    fixed = f"{root}/" if uri.startswith(f"{root}/") else ""
    before = fixed + re.split(r"[*?[]", uri.removeprefix(fixed), maxsplit=1)[0]
    static = uri if before == uri else before.rpartition("/")[0]
    below = path.removeprefix(storage.resolve(static)[1])
    return static + quote(below)


def _nothing_at(uri: str) -> str:
    """Where the path stops existing, and what is there instead."""
    missing, above = "", uri
    while not storage.glob(above):
        scheme, mark, path = above.rpartition("://")
        parent = posixpath.dirname(path.rstrip("/"))
        if parent in ("", path):
            break
        above, missing = f"{scheme}{mark}{parent}", posixpath.basename(path.rstrip("/"))
    names = _shortened(name for name in _names_in(above, storage.glob(above)) if visible(name))
    if not names:
        return f"nothing at '{uri}', and nothing in '{above}' either; put the data there or set data_root"
    return f"nothing at '{uri}': '{above}' has no '{missing}'; {nearest(missing, names)}"


def _nothing_readable(uri: str, source: SourceConfig, found: list[pafs.FileInfo]) -> str:
    """What there is instead of files that the source's reader reads."""
    wanted = "files" if source.reader == "folders" else f"*{', *'.join(SUFFIXES[source.reader])}"
    names = _shortened(_names_in(uri, found) or [f.base_name for f in found])
    others = [r for r, own in SUFFIXES.items() if r != source.reader and any(has_suffix(name, own) for name in names)]
    advice = f"; for these set reader: {others[0]} (mmkt predict: --reader {others[0]})" if others else ""
    return f"no {wanted} for reader '{source.reader}' in '{uri}'; it holds: {', '.join(names) or 'nothing'}{advice}"


def _names_in(uri: str, found: Iterable[pafs.FileInfo]) -> list[str]:
    """Names in those of the found places that are folders."""
    fs = storage.resolve(uri)[0]
    folders = [f.path for f in found if f.type == pafs.FileType.Directory]
    return [c.base_name for folder in folders for c in fs.get_file_info(pafs.FileSelector(folder))]


def _shortened(names: Iterable[str]) -> list[str]:
    names = sorted(set(names))
    return names if len(names) <= _MAX_LISTED else [*names[:_MAX_LISTED], f"... ({len(names) - _MAX_LISTED} more)"]
