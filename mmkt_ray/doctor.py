"""What would stop a run, found before anything is paid for: `mmkt doctor`, and the start of every extraction.

`quick_findings` needs no Ray and a few seconds at most; `cluster_findings` asks every node of the cluster.
"""

from __future__ import annotations

import platform
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mmkt_ray import __version__, cluster, storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.errors import DataError, ResourceError, UserError
from mmkt_ray.features.extract import encoder_pool
from mmkt_ray.features.publish import is_spent, without_details
from mmkt_ray.plan.rates import size, stored_bytes
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard
from mmkt_ray.samples.shards import has_suffix, list_shards
from mmkt_ray.samples.survey import survey_source

LOOK_ROWS = 64  # read of the first shard of each source
# at each column whose cells can be judged without reading what they stand for: all of them, if they are not more
LOOK_S = 3.0
LOOK_SHARDS = 3  # of a source whose first shards are empty or damaged
ENOUGH_FAULTS, FAULTY_FRAC = 10, 0.5  # of the rows that were looked at: with more of them a run would only fail later
NODE_TIMEOUT_S = 120.0  # for the nodes' answers: their processes start, and import torch


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    text: str  # what was found; or what is wrong and what to do
    ok: bool = True
    stops: bool = True  # if not ok; else a run goes on: it may reject what was seen and find more

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'problem':9}{self.what}: {self.text}"


def examine(config: Config, run_uri: str) -> list[Finding]:
    """All findings; a Ray is started or asked only where the rest leaves hope."""
    findings = quick_findings(config, run_uri)
    if all(finding.ok for finding in findings):
        return findings + list(cluster_findings(config, run_uri))
    return [*findings, Finding("cluster", "not asked: mend the rest first", ok=False)]


def check_before_work(config: Config, run_uri: str, trains: bool) -> None:
    """Before a run's first work; nodes are asked where there are several, training workers placed if it `trains`.

    Raises: DataError with all that is wrong.
    """
    refuse(quick_findings(config, run_uri))
    refuse(list(cluster_findings(config, run_uri, trains=trains, one_node=False)))


def refuse(findings: list[Finding]) -> None:
    """Raises: DataError with those that stop a run."""
    if wrong := [f"{finding.what}: {finding.text}" for finding in findings if not finding.ok and finding.stops]:
        raise DataError("\n".join(["nothing was done yet:", *wrong]))


def attempt(what: str, check: Callable[[], str]) -> Finding:
    """What the check says, or the user's error that it raises."""
    try:
        return Finding(what, check())
    except UserError as error:
        return Finding(what, str(error), ok=False)


# --- this machine --------------------


def quick_findings(config: Config, run_uri: str) -> list[Finding]:
    """Sources, encoders and storage, as seen from here."""
    sources = [look_at_source(config, number) for number in range(len(config.samples.sources))]
    total = sum(rows for _, rows in sources)
    findings = [
        look_at_columns(config, number, finding, total) if finding.ok else finding
        for number, (finding, _) in enumerate(sources)
    ]
    findings += [attempt(f"encoder {name}", check) for name, check in encoder_checks(config)]
    known = all(finding.ok for finding in findings)
    needed = total * stored_bytes(config) if known else 0.0
    return [*findings, attempt("run folder", partial(check_storage, run_uri, needed))]


def look_at_source(config: Config, number: int) -> tuple[Finding, int]:
    """Whether a source's path and columns are there; and how many rows it has, about."""
    source = config.samples.sources[number]
    alone = ReadingPlan.of(config).only_source(number, LOOK_ROWS)  # so that a wrong source does not hide the next
    what = f"source {number} ({source.path})"
    try:
        shards = list_shards(alone)
        first, samples, faults = first_samples(alone, shards)
    except UserError as error:
        return Finding(what, str(error).replace("sources[0]", f"sources[{number}]"), ok=False), 0
    reasons, lost = tell_faults(faults), len(faults)
    spent = lost >= ENOUGH_FAULTS and lost > max(config.samples.max_reject_frac, FAULTY_FRAC) * (lost + len(samples))
    if not len(samples):
        text = f"no sample in the first rows of '{first.name}': {reasons or 'it is empty'}"
        return Finding(what, text, ok=False, stops=spent), 0
    if spent:
        text = f"in the first rows of '{first.name}' {lost} are rejected or lack a modality: {reasons}"
        return Finding(what, text, ok=False), 0
    rows = estimate_rows(shards, first, samples, source.limit)
    gaps = tell_gaps(samples, list(source.columns))
    try:
        looks = [(m, kind.look(samples[m])) for m, kind in sorted(alone.modalities.items()) if m in source.columns]
    except UserError as error:
        return Finding(what, f"in the first rows of '{first.name}': {error}", ok=False, stops=False), rows
    notes = "".join(f"; {m}: {look}" for m, look in looks if look)
    return Finding(what, f"{len(shards):,} shards, about {rows:,} rows{gaps}{notes}"), rows


def look_at_columns(config: Config, number: int, found: Finding, total: int) -> Finding:
    """What was found in a source's first rows, with what its split names and paths say of all rows, or of as many as
    LOOK_S allows. total: rows of the config, about."""
    alone = ReadingPlan.of(config).only_source(number)
    try:
        surveys = survey_source(alone, list_shards(alone), LOOK_S)
    except UserError as error:
        return Finding(found.what, str(error).replace("sources[0]", f"sources[{number}]"), ok=False)
    text = found.text
    for survey in surveys:
        what = "split names" if survey.column == "split" else f"files of {survey.column}"
        rows = f"{'all' if survey.whole else 'the first'} {survey.num_rows:,} rows"
        lost = f": {len(survey.reasons):,} will be rejected or lack a modality: {tell_faults(survey.reasons)}"
        text += f"; {what} of {rows} looked at{lost if survey.reasons else ''}"
        if is_spent(config.samples, len(survey.reasons), max(total, survey.num_rows)):
            return Finding(found.what, text, ok=False)
    return Finding(found.what, text)


def first_samples(plan: ReadingPlan, shards: list[Shard]) -> tuple[Shard, pa.Table, list[str]]:
    """Samples of the first shard that has any, with that shard, else none;
    and the reasons of the rejects up to there."""
    reasons: list[str] = []
    for shard in shards[:LOOK_SHARDS]:
        for chunk in read_chunks(plan, shard):
            reasons += [reject.reason for reject in chunk.rejects]
            if len(chunk.table):
                return shard, chunk.table, reasons
    return shards[0], chunk.table, reasons


def tell_faults(reasons: list[str]) -> str:
    """The most frequent kinds of reasons, each with its first one as it is."""
    first = {without_details(reason): reason for reason in reversed(reasons)}
    return "; ".join(f"{n} x {first[kind]}" for kind, n in Counter(map(without_details, reasons)).most_common(3))


def estimate_rows(shards: list[Shard], first: Shard, samples: pa.Table, limit: int | None) -> int:
    """Rows of all shards, about: as many in each as in three of them."""
    some = {first.uri: first} | {shard.uri: shard for shard in (shards[len(shards) // 2], shards[-1])}
    counts = [min(rows_in(shard, samples), limit or 2**63) for shard in some.values()]
    return len(shards) * sum(counts) // len(counts)


def tell_gaps(table: pa.Table, columns: list[str]) -> str:
    """Columns without any value, and unreadable cells, which may be meant."""
    empty = [name for name in columns if table[name].null_count == len(table)]
    return f"; no {' and no '.join(empty)} in the first {len(table)}: is the name right?" if empty else ""


def rows_in(shard: Shard, first: pa.Table) -> int:
    """Rows of a shard, about, in a compressed archive more; `first`: some of it, or of another one of the source."""
    fs, path = storage.resolve(shard.uri)
    info = fs.get_file_info(path)
    if has_suffix(path, (".parquet",)):
        with suppress(pa.ArrowInvalid, OSError):  # damaged
            return int(pq.read_metadata(path, filesystem=fs).num_rows)
        return 0
    if info.type == pafs.FileType.Directory:
        return len(storage.list_files(shard.uri))
    if has_suffix(path, (".csv", ".jsonl")):
        start = next(storage.read_pieces(shard.uri), b"")
        return int(start.count(b"\n") * info.size / max(1, len(start)))
    return int(max(len(first), info.size * len(first) / first.nbytes))


def encoder_checks(config: Config) -> Iterator[tuple[str, Callable[[], str]]]:
    """For each encoder of the config and its variants: whether it can be built here."""
    seen: set[str] = set()
    for variant in config.expand_variants().values():
        for name, modality in sorted(variant.modalities.items()):
            if (digest := fingerprint([name, modality.encoder.model_dump(mode="json")])) not in seen:
                seen.add(digest)
                yield name, partial(check_encoder, variant, name)


def check_encoder(config: Config, name: str) -> str:
    """Build an encoder, and what decodes its input. Raises: ConfigError, DataError for a missing extra,
    class or file."""
    modality = config.modalities[name]
    modality.kind.check()
    build_encoder(modality.encoder)
    return modality.encoder.name


def check_storage(run_uri: str, needed: float) -> str:
    """Write and remove a file; compare with the disk's free space. Raises: ResourceError."""
    probe = storage.join(run_uri, f".doctor-{uuid.uuid4().hex[:8]}")
    storage.make_dir(run_uri)
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise ResourceError(f"cannot write to '{run_uri}': {error}; choose another with --set run_root=...") from None
    if "://" in run_uri:
        return f"{run_uri}: writable; features will take about {size(needed)}"
    free = shutil.disk_usage(run_uri).free
    if needed > free + sum(info.size for info in storage.list_files(storage.join(run_uri, "features"), recursive=True)):
        raise ResourceError(
            f"features will take about {size(needed)}, and '{run_uri}' has {size(free)} left: choose another disk "
            "with --set run_root=..., or reduce features (modalities.<name>.reduce, extract.feature_dtype=float16)"
        )
    return f"{run_uri}: writable; features will take about {size(needed)} of {size(free)}"


# --- the cluster --------------------


def cluster_findings(config: Config, run_uri: str, trains: bool = True, one_node: bool = True) -> Iterator[Finding]:
    """Whether the work fits, and what each node says; one_node: also where there is but one."""
    import ray

    try:
        resources = cluster.connect()
    except UserError as error:
        yield Finding("cluster", str(error), ok=False)
        return
    yield attempt("resources", partial(check_resources, config, resources, trains))
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and not one_node:
        return
    probe = storage.join(run_uri, f".doctor-{uuid.uuid4().hex[:8]}")
    storage.write_bytes(storage.join(probe, "driver"), b"")
    try:
        answers = ask_nodes(nodes, config, probe)
        seen = {info.base_name for info in storage.list_files(probe)}
    finally:
        storage.remove_folder(probe)
    for number, node in enumerate(nodes):
        yield judge_node(f"node {number + 1} of {len(nodes)}", own_versions(), answers[node], node in seen, run_uri)


def check_resources(config: Config, resources: cluster.Resources, trains: bool = True) -> str:
    """Encoder actors with a CPU to spare, and training workers if it `trains`. Raises: ResourceError."""
    num_actors, num_gpus = encoder_pool(config, resources)
    cluster.check_fits(resources, num_actors, 1, num_gpus)
    workers = max(variant.training.num_workers for variant in config.expand_variants().values())
    if trains and workers > 1 and workers + 1 > resources.num_cpus:
        raise ResourceError(
            f"training.num_workers is {workers}; with their driver they need {workers + 1} CPUs and the cluster has "
            f"{resources.num_cpus:g}: set it to at most {max(1, int(resources.num_cpus) - 1)}, or add nodes"
        )
    return (
        f"{resources.num_cpus:g} CPUs, {resources.num_gpus:g} GPUs; {num_actors} encoder actors, {workers} training "
        "workers"
    )


def own_versions() -> dict[str, str]:
    """Of what must be the same on all nodes."""
    return {"python": platform.python_version(), "mmkt_ray": __version__} | {
        name: metadata.version(name) for name in ("ray", "torch", "pyarrow")
    }


def ask_nodes(nodes: list[str], config: Config, probe: str) -> dict[str, dict[str, Any] | str]:
    """By node what `look_around` returns there, or why there is no answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {
        node: ray.remote(look_around)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(node, config, probe)
        for node in nodes
    }
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
    answers: dict[str, dict[str, Any] | str] = {}
    for node, reference in asked.items():
        if reference not in done:
            answers[node] = f"no answer in {NODE_TIMEOUT_S:.0f} s: look at its logs with `ray logs cluster`"
            continue
        try:
            answers[node] = ray.get(reference)
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            answers[node] = f"{last}; is mmkt_ray installed there, in the version of this machine?"
    return answers


def look_around(node: str, config: Config, probe: str) -> dict[str, Any]:
    """On a node: its versions, whether it sees the driver's file and the sources,
    and encoders that it can't build."""
    sees = storage.exists(storage.join(probe, "driver"))
    if sees:  # else the folder would be made on a disk of its own, and stay
        storage.write_bytes(storage.join(probe, node), b"")
    checks = [attempt(f"encoder {name}", check) for name, check in encoder_checks(config)]
    checks.append(attempt("sources", lambda: str(len(list_shards(ReadingPlan.of(config))))))
    wrong = [f"{finding.what}: {finding.text}" for finding in checks if not finding.ok]
    return {"versions": own_versions(), "sees": sees, "wrong": wrong}


def judge_node(
    what: str, here: Mapping[str, str], answer: Mapping[str, Any] | str, wrote: bool, run_uri: str
) -> Finding:
    """What a node's answer means. here: the driver's versions;
    wrote: the driver sees the file that the node wrote."""
    if isinstance(answer, str):
        return Finding(what, answer, ok=False)
    wrong = [
        f"{name} {answer['versions'][name]}, this process has {version}: install the same everywhere"
        for name, version in here.items()
        if answer["versions"][name] != version
    ]
    if not (answer["sees"] and wrote):
        wrong.append(f"it does not share '{run_uri}': set run_root to storage that all nodes see")
    wrong += answer["wrong"]
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    return Finding(what, "; ".join(wrong) or f"{versions}; shares the run folder", ok=not wrong)
