"""Fitted encoders and stores from other runs under the same `run_root`: the same data is not extracted twice.

Their folders are named by fingerprints of all that decides their content. So a folder of the same name is copied as
it is (hard links on a local disk), and each run folder holds all that it needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pyarrow.fs as pafs

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.features.audit import Audit
from mmkt_ray.features.publish import published
from mmkt_ray.features.store import Store

log = logging.getLogger(__name__)


def copy_from_sibling(run_uri: str, place: str, last: str, is_whole: Callable[[str], bool]) -> bool:
    """Copy a folder from another run to the same place in this one. Returns whether there was one.

    place: in the run folder, e.g. `encoders/text-1a2b`. last: the file that is written last. is_whole: folder ->
    whether it can be used.
    """
    target = storage.join(run_uri, place)
    for other in _other_runs(run_uri):
        source = storage.join(other, place)
        try:
            if storage.exists(storage.join(source, last)) and is_whole(source):
                storage.remove_folder(target)  # what an unfinished fit has left there
                storage.adopt_folder(source, target, last)
                log.info("%s is taken over from %s", place, other)
                return True
        except (DataError, OSError) as error:  # it is damaged, being made anew, or not ours to read
            log.info("%s cannot be taken over from %s: %s", place, other, error)
    return False


def copy_store_from_sibling(run_uri: str, uri: str, units: list[str], source: Store | None = None) -> Store | None:
    """The store that belongs at `uri`, copied from another run that has it for exactly these units (and this source),
    or None.

    Label issues that the other run has found in it are left out.
    """
    place = f"features/{uri.rsplit('/', 1)[-1]}"

    def is_whole(folder: str) -> bool:
        return published(folder, units, source) is not None

    if storage.exists(uri) or not copy_from_sibling(run_uri, place, "manifest.json", is_whole):
        return None
    audit_uri = storage.join(uri, "audit.json")
    if audit := Audit.read_or_none(audit_uri):
        audit.with_label_issues(None).write(audit_uri)
    return published(uri, units, source)


def _other_runs(run_uri: str) -> list[str]:
    """The folders beside a run's."""
    root, _, name = run_uri.rstrip("/").rpartition("/")
    fs, path = storage.resolve(root)
    found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)
    return [storage.join(root, other) for other in names if other != name and not other.startswith(".")]
