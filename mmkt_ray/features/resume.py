"""What earlier runs left of a store: chunks that are written, parts that are reduced,
other stores of the same encoders.

Called by extract.py, so that no chunk is encoded twice.
"""

from __future__ import annotations

import logging
from typing import Any

import pyarrow.parquet as pq

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.features.decode import decoding
from mmkt_ray.kinds.content import NORMALISATION

log = logging.getLogger(__name__)


def stored_chunks(uri: str) -> tuple[dict[str, set[int]], set[str]]:
    """Chunks that are written already, by unit; and the units of which every chunk is."""
    done: dict[str, set[int]] = {}
    ends: dict[str, int] = {}
    for info in storage.list_files(storage.join(uri, "data"), "*.parquet"):
        unit, index, *end = info.base_name.removesuffix(".parquet").split("-")
        done.setdefault(unit, set()).add(int(index))
        if end:
            ends[unit] = int(index)
    return done, {unit for unit, last in ends.items() if len(done[unit]) == last + 1}


def same_length(uri: str, other_uri: str, name: str) -> bool:
    """Whether two stores' parts of one name have as many rows:
    publishing may have taken duplicates out of one since."""
    parts = [storage.resolve(storage.join(u, "data", name)) for u in (uri, other_uri)]
    lengths = {pq.read_metadata(path, filesystem=fs).num_rows for fs, path in parts}
    return len(lengths) == 1


def find_reusable(run_uri: str, uri: str, plan: dict[str, Any]) -> dict[str, str]:
    """Modalities that another store of this run read in the same way through the same encoder:
    modality -> that store."""
    reuse: dict[str, str] = {}
    for info in storage.list_files(storage.join(run_uri, "features"), "plan.json", recursive=True):
        other_uri = storage.join(run_uri, "features", info.path.split("/")[-2])
        other = storage.read_json(storage.join(other_uri, "plan.json"))
        if other_uri == uri or other["layout"] != plan["layout"]:
            continue
        same = (m for m, print_ in plan["encoders"].items() if other["encoders"].get(m) == print_)
        reuse |= {m: other_uri for m in same}
    for modality, other_uri in reuse.items():
        log.info("%s features are taken from %s where they are there", modality, other_uri)
    return reuse


def reading_layout(config: Config) -> dict[str, Any]:
    """All that decides which rows a chunk holds and what is in them before encoding."""
    apart = {"max_reject_frac", "min_reject_budget", "combine", "drop_leakage", "decode_timeout_s", "decode"}
    samples = config.samples.model_dump(mode="json", exclude=apart)
    return {
        "samples": samples,
        "normalisation": NORMALISATION,
        "by_key": config.samples.combine.name == "join",  # the split is then drawn by the key
        "columns": {
            "modalities": {m: c.kind.model_dump(mode="json") for m, c in sorted(config.modalities.items())},
            "tasks": [c.kind.reading(t, c.separator) for t, c in sorted(config.tasks.items())],
        },
        "chunk": [config.extract.chunk_rows, config.extract.chunk_bytes],
        **decoding([modality.kind for modality in config.modalities.values()], config.samples),
    } | ({} if config.extract.feature_dtype == "float32" else {"dtype": config.extract.feature_dtype})
