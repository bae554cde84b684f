"""Fits encoders and reducers on the train split, as Ray tasks whose statistics merge in a fixed tree.

The tree is fixed so that the same shards give the same sums, bit for bit, whatever finishes first. A fit lies in
`<run>/encoders/<modality>-<config>-<shards>`. If shards were only added since, it is used again,
with a line in the log.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow.compute as pc
import ray

from mmkt_ray import cluster, storage
from mmkt_ray.config import Config, CustomEncoder, Section, fingerprint
from mmkt_ray.encoders.build import (
    ENCODER_CARD,
    build_encoder,
    build_reducer,
    load_fitted,
    read_encoder_card,
    save_fitted,
)
from mmkt_ray.encoders.encoder import fit_of
from mmkt_ray.errors import DataError
from mmkt_ray.features.decode import decoding
from mmkt_ray.features.publish import tell_reasons
from mmkt_ray.features.siblings import copy_from_sibling
from mmkt_ray.features.statistics import encoder_statistics, reducer_statistics
from mmkt_ray.features.store import Store
from mmkt_ray.kinds.content import NORMALISATION
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard

log = logging.getLogger(__name__)

SHARDS_EXPLAINED = 20  # that are read to say why there was nothing to fit on
FAN_IN = 8  # statistics that one merge takes


def fit_encoders(
    config: Config, run_uri: str, shards: list[Shard], leaking: Mapping[str, Sequence[str]] | None = None
) -> dict[str, str]:
    """Folders of the fitted encoders by modality; fits only what is not fitted yet.

    leaking: unit of a shard -> ids of its train rows to leave out (leakage.py).
    """
    return {name: fit_encoder(config, run_uri, name, shards, leaking or {}) for name in sorted(config.modalities)}


def fit_encoder(
    config: Config, run_uri: str, modality: str, shards: list[Shard], leaking: Mapping[str, Sequence[str]]
) -> str:
    """The folder of one modality's fitted encoder. Raises: DataError if its train split is empty."""
    section = config.modalities[modality].encoder
    encoder: Any = build_encoder(section)
    how = fit_of(encoder)
    trained = how == "training"
    if how == "none":
        uri = storage.join(run_uri, "encoders", f"{modality}-{fingerprint(section, 12)}")
        if not storage.exists(storage.join(uri, ENCODER_CARD)):
            _save(encoder, section, uri, [])
        return uri
    plan = ReadingPlan.of(config).only(modality, section.task)
    narrow = config.samples.model_copy(update={"sources": plan.sources})
    feeding = [s for s in shards if modality in config.samples.sources[s.source].columns]
    identity = [
        section.model_dump(mode="json"),
        config.seed if trained else 0,
        narrow.model_dump(
            mode="json",
            exclude={"max_reject_frac", "min_reject_budget", "combine", "drop_leakage", "decode_timeout_s", "decode"},
        ),
        NORMALISATION,
        config.samples.combine.name == "join",  # the split is then drawn by the key
    ]
    if section.task is not None and not (kind := plan.tasks[section.task].kind).exclusive:
        identity += [kind.as_json()]  # how a number is transformed, how grades are ordered
    left_out = {shard.unit: leaking[shard.unit] for shard in feeding if shard.unit in leaking}
    identity += [left_out] if left_out else []
    decoded = decoding(list(plan.modalities.values()), config.samples)
    identity += [decoded] if decoded else []
    prefix = f"{modality}-{fingerprint(identity, 12)}"
    units = [shard.unit for shard in feeding]
    if kept := find_fit(run_uri, prefix, units):
        return kept
    uri = storage.join(run_uri, "encoders", f"{prefix}-{fingerprint(units, 8)}")
    by_user = isinstance(section, CustomEncoder)  # whose code may have changed since
    if not by_user and copy_fit_from_sibling(run_uri, uri, units, partial(build_encoder, section)):
        return uri
    cluster.connect()
    start = time.perf_counter()
    log.info("fitting the %s encoder '%s' on the train split of %d shards", modality, section.name, len(feeding))
    if trained:
        from mmkt_ray.features.pretrain import Pretraining, pretrain  # with torch, which counting needs not

        pretrain(encoder, Pretraining(section, plan, config.samples, config.seed, uri), feeding, left_out)
    else:
        samples = config.samples
        groups = [partial(encoder_statistics, section, plan, samples, s, left_out.get(s.unit, ())) for s in feeding]
        total = merge_in_tree(groups, encoder.merge)
        if total is None:
            raise DataError(f"no sample of the train split has {modality}{why_none(plan, modality, feeding)}")
        encoder.finish(total)
    adapted = getattr(section, "adapt", None) is not None
    _save(encoder, section, uri, units, round(time.perf_counter() - start, 1) if adapted else None)
    return uri


def encoded_by_user(config: Config) -> bool:
    """Whether an encoder is the user's own code, which may have changed since another run used it."""
    return any(isinstance(modality.encoder, CustomEncoder) for modality in config.modalities.values())


def why_none(plan: ReadingPlan, modality: str, shards: list[Shard]) -> str:
    """Why no train row has a modality, as the end of a sentence; the shards are read once more."""
    look = ray.remote(what_is_read)
    found = ray.get([look.remote(plan, modality, shard) for shard in shards[:SHARDS_EXPLAINED]])
    with_it, without, reasons = (sum((Counter(f[i]) for f in found), Counter[str]()) for i in range(3))
    if with_it:
        held = ", ".join(f"{n} in {split}" for split, n in sorted(with_it.items()))
        return f", which is {held}: check the sources' split, or lower the fractions in samples.split"
    if without:
        return f": it is null in all {without.total()} rows that were read{tell_reasons(reasons)}; check the columns"
    return f": no row could be read{tell_reasons(reasons)}"


def what_is_read(plan: ReadingPlan, modality: str, shard: Shard) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Rows of a shard by split, with the modality and without it, and its rejects by reason."""
    with_it, without, reasons = Counter[str](), Counter[str](), Counter[str]()
    for chunk in read_chunks(plan, shard):
        present = chunk.table.column(modality).is_valid()
        with_it.update(chunk.table.column("split").filter(present).to_pylist())
        without.update(chunk.table.column("split").filter(pc.invert(present)).to_pylist())
        reasons.update(reject.reason for reject in chunk.rejects)
    return with_it, without, reasons


def find_fit(run_uri: str, prefix: str, units: list[str]) -> str | None:
    """The folder of a fit on exactly these shards, else of one on a part of them (shards were added), or None."""
    exact = storage.join(run_uri, "encoders", f"{prefix}-{fingerprint(units, 8)}")
    if storage.exists(storage.join(exact, ENCODER_CARD)):
        return exact
    for info in storage.list_files(storage.join(run_uri, "encoders"), ENCODER_CARD, recursive=True):
        folder = info.path.split("/")[-2]
        uri = storage.join(run_uri, "encoders", folder)
        if folder.startswith(f"{prefix}-") and set(seen := read_encoder_card(uri).units) < set(units):
            log.info(
                "%s stays as fitted on %d shards, %d were added since; remove %s to fit again",
                folder,
                len(seen),
                len(units) - len(seen),
                uri,
            )
            return uri
    return None


def copy_fit_from_sibling(run_uri: str, uri: str, units: list[str], build: Callable[[], Any]) -> bool:
    """Copy the fit on exactly these shards from another run. Returns whether one had it.
    build: makes an unfitted one."""

    def is_whole(folder: str) -> bool:
        return load_fitted(build(), folder) is not None and read_encoder_card(folder).units == units

    return copy_from_sibling(run_uri, f"encoders/{uri.rsplit('/', 1)[-1]}", ENCODER_CARD, is_whole)


def fit_reducers(config: Config, run_uri: str, encoded: Store) -> dict[str, str]:
    """Folders of the fitted reducers by modality, for the modalities that have one."""
    return {
        m: fit_reducer(config, run_uri, encoded, m)
        for m, c in sorted(config.modalities.items())
        if c.reduce is not None
    }


def fit_reducer(config: Config, run_uri: str, encoded: Store, modality: str) -> str:
    """The folder of one modality's fitted reducer."""
    section = config.modalities[modality].reduce
    assert section is not None
    units = encoded.manifest.units
    identity = [
        section.model_dump(mode="json"),
        encoded.manifest.modalities[modality].fingerprint,
        encoded.manifest.layout,
    ]
    prefix = f"{modality}-{section.name}-{fingerprint(identity, 12)}"
    if kept := find_fit(run_uri, prefix, units):
        return kept
    uri = storage.join(run_uri, "encoders", f"{prefix}-{fingerprint(units, 8)}")
    reducer = build_reducer(section)
    if not encoded_by_user(config) and copy_fit_from_sibling(run_uri, uri, units, partial(build_reducer, section)):
        return uri
    cluster.connect()
    log.info("fitting %s on the %s features of the train split", section.name, modality)
    while not reducer.fitted:  # svd of wide features takes several passes
        current = ray.put(reducer)
        groups = [
            partial(reducer_statistics, current, part, modality, encoded.dim(modality), section.labels_of)
            for part in encoded.parts()
        ]
        total = merge_in_tree(groups, build_reducer(section).merge)  # an unfitted one's: it travels with every task
        if total is None:
            labelled = f" and a label of {section.labels_of}" if section.labels_of else ""
            raise DataError(f"no sample of the train split has {modality}{labelled}: nothing to fit {section.name} on")
        reducer.finish(total)
    if hasattr(reducer, "name_features"):
        folder = storage.join(run_uri, "encoders", encoded.manifest.modalities[modality].folders[0])
        encoder = load_fitted(build_encoder(config.modalities[modality].encoder), folder)
        reducer.name_features(getattr(encoder, "feature_names", []))
    _save(reducer, section, uri, units)
    return uri


def merge_in_tree(statistics: Sequence[Callable[[], Any]], merge: Callable[[list[Any]], Any]) -> Any:
    """Run each call as a Ray task and merge what they return, FAN_IN at a time, in the order given;
    None if all are None.

    At most a few groups are under way at once, and FAN_IN merged ones are merged further at once, so that statistics
    do not pile up: about FAN_IN at each level of the tree are held.
    """
    compute = ray.remote(lambda call: call())
    combine = ray.remote(
        lambda *parts: merge([p for p in parts if p is not None]) if any(p is not None for p in parts) else None
    )
    levels: list[list[Any]] = []

    def add(statistic: Any, level: int) -> None:
        if level == len(levels):
            levels.append([])
        levels[level].append(statistic)
        if len(levels[level]) == FAN_IN:
            full, levels[level] = levels[level], []
            add(combine.remote(*full), level + 1)

    limit = max(2, int(ray.cluster_resources().get("CPU", 1)) // FAN_IN * 2)
    running: list[Any] = []
    for start in range(0, len(statistics), FAN_IN):
        if len(running) == limit:
            running = ray.wait(running, num_returns=1, fetch_local=False)[1]
        running.append(combine.remote(*[compute.remote(call) for call in statistics[start : start + FAN_IN]]))
        add(running[-1], 0)
    running.clear()
    level = 0
    while sum(map(len, levels)) > 1:  # what is left of a level is one more of the next
        rest, levels[level] = levels[level], []
        if rest:
            add(combine.remote(*rest), level + 1)
        level += 1
    return ray.get(next(s for left in levels for s in left))


def _save(fitted: Any, section: Section, uri: str, units: list[str], trained_s: float | None = None) -> None:
    card = save_fitted(fitted, section, uri, units, trained_s)
    log.info("fitted: %s (%d features)", uri, card.dim)
