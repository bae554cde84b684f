"""`mmkt plan`: hours, node-hours, bytes and cost of a run that is larger than any yet, and what breaks first.

A step takes core seconds per sample (rates.py) times samples, over the cores that share it; what one process does for
all is not shared. A straight line through small runs: it knows nothing of stragglers, slow storage or lost nodes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkt_ray import cluster
from mmkt_ray.config import Config, SearchConfig
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.encoder import fit_of
from mmkt_ray.errors import ConfigError
from mmkt_ray.plan import rates as known
from mmkt_ray.plan.rates import Rates, rates_of, size, table_bytes

DRIVER = "the driver alone"


@dataclass(frozen=True)
class Machines:
    """Nodes of one kind; the head is not counted."""

    nodes: int
    cpus: int  # cores of each
    gpus: int = 0  # of each
    price: float | None = None  # of a node and hour

    @property
    def all_cpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.cpus

    @property
    def memory_bytes(self) -> int:
        """Of a node."""
        return self.cpus * known.MEMORY_PER_CPU


@dataclass(frozen=True)
class PlannedStep:
    """One line of the table."""

    name: str
    core_s: float  # of work
    seconds: float  # until it is done
    place: str  # who does it
    part: bool = False  # of a later line, where its work counts


@dataclass(frozen=True)
class Limit:
    """What does not grow with machines."""

    at: float  # samples, or candidates, that reach it
    what: str
    change: str  # what would move it
    unit: str = "samples"


def plan_command(args: argparse.Namespace, config: Config, run_uri: str) -> str:
    """What the parsed command line asks for, as text. Raises: ConfigError."""
    cpus = cluster.cores() if args.cpus_per_node is None else args.cpus_per_node
    machines = Machines(args.nodes, cpus, args.gpus_per_node, args.price_per_node_hour)
    if not math.isfinite(args.samples):
        raise ConfigError(f"--samples must be a finite number, got {args.samples}")
    if min(args.samples, machines.nodes, machines.cpus) < 1 or min(args.candidates, machines.gpus) < 0:
        raise ConfigError("--samples, --nodes and --cpus-per-node are at least 1; --candidates and --gpus-per-node 0")
    return plan(config, rates_of(config, run_uri), machines, args.samples, args.candidates)


def plan(config: Config, rates: Rates, machines: Machines, samples: float, candidates: float = 0) -> str:
    """The whole answer as text."""
    steps = [*fit_steps(config, rates, machines, samples), *extract_steps(config, rates, machines, samples)]
    steps += [*reduce_steps(config, rates, machines, samples), *train_steps(config, rates, machines, samples)]
    steps += [search_step(config, rates, machines, samples, candidates)] if candidates else []
    limits = sorted(find_limits(config, rates, machines, candidates), key=lambda limit: limit.at)
    kind = f"{machines.nodes:,} x {machines.cpus} CPUs" + (f" and {machines.gpus} GPUs" if machines.gpus else "")
    title = f"{samples:.3g} samples on {kind}; rates: {rates.source}"
    return "\n\n".join(
        [
            title,
            step_table(steps),
            "\n".join(totals(config, rates, machines, samples, steps)),
            limit_table(limits, samples, candidates),
        ]
    )


def fit_steps(config: Config, rates: Rates, machines: Machines, samples: float) -> Iterator[PlannedStep]:
    """Encoders that learn from the samples read them all once,
    or decode them all and go over them again and again."""
    rows = samples * rates.train_frac
    for name, modality in sorted(config.modalities.items()):
        section = modality.encoder
        encoder = build_encoder(section)
        if section.name in known.FIT_S:
            core_s = samples * rates.stages["read"] + rows * known.FIT_S[section.name]
            yield PlannedStep(f"fit {name}", core_s, core_s / machines.all_cpus, "all CPUs")
        elif fit_of(encoder) == "training":
            core_s = samples * (rates.stages["read"] + rates.stages["decode"])
            yield PlannedStep(f"decode {name} to train on", core_s, core_s / machines.all_cpus, "all CPUs")
            asked: Any = section
            adapts = getattr(section, "adapt", None) is not None
            each = known.FORTH_AND_BACK * rates.stages[f"encode {name}"] if adapts else known.PRETRAIN_S
            core_s = rows * asked.epochs * each
            workers = min(asked.num_workers, machines.nodes)
            seconds = core_s / (workers * machines.cpus)
            yield PlannedStep(f"train {name} encoder", core_s, seconds, f"{workers} worker(s)")


def extract_steps(config: Config, rates: Rates, machines: Machines, samples: float) -> Iterator[PlannedStep]:
    """The pipeline: encoders beside readers and writers, as slow as the slowest of these and the driver;
    then publishing."""
    work = {stage: samples * seconds for stage, seconds in rates.stages.items()}
    for stage, core_s in work.items():
        where = "GPUs: not measured" if machines.gpus and stage.startswith("encode") else ""
        yield PlannedStep(f"  {stage}", 0.0 if where else core_s, 0.0, where, part=True)
    moving = work["read"] + work["write"]
    chunks_s = samples / config.extract.chunk_rows * known.CHUNK_S
    if machines.gpus:
        moving += work["decode"]
        paces = {f"{machines.all_cpus:,} CPUs read, decode, write": moving / machines.all_cpus, DRIVER: chunks_s}
        core_s = moving
    else:
        actors = num_actors(config, machines)
        core_s = sum(work.values())
        paces = {
            f"{actors:,} encoders": (core_s - moving) / actors,
            f"{machines.all_cpus - actors:,} CPUs read, write": moving / max(1, machines.all_cpus - actors),
            DRIVER: chunks_s,
        }
    slowest = max(paces, key=lambda who: paces[who])
    yield PlannedStep("extract", core_s, paces[slowest], f"held up by: {slowest}")
    yield publish_step("features", samples)


def num_actors(config: Config, machines: Machines) -> int:
    """Encoder actors on CPUs, as extraction chooses them."""
    return config.extract.num_actors or max(1, machines.all_cpus // 2)


def publish_step(what: str, samples: float) -> PlannedStep:
    """Ids, counts and duplicates, part after part."""
    return PlannedStep(f"publish {what}", samples * known.PUBLISH_S, samples * known.PUBLISH_S, DRIVER)


def reduce_steps(config: Config, rates: Rates, machines: Machines, samples: float) -> Iterator[PlannedStep]:
    """Reducers: fitted over the stored train rows, then applied to all."""
    reducers = {name: modality.reduce.name for name, modality in sorted(config.modalities.items()) if modality.reduce}
    for name, reducer in reducers.items():
        core_s = samples * rates.train_frac * known.FIT_S[reducer]
        yield PlannedStep(f"fit {reducer} of {name}", core_s, core_s / machines.all_cpus, "all CPUs")
    if reducers:
        core_s, chunks_s = samples * rates.reduce, samples / config.extract.chunk_rows * known.CHUNK_S
        yield PlannedStep("reduce", core_s, max(core_s / machines.all_cpus, chunks_s), "all CPUs and the driver")
        yield publish_step("reduced", samples)


def train_steps(config: Config, rates: Rates, machines: Machines, samples: float) -> Iterator[PlannedStep]:
    """Each variant on as many workers as it asks for, and the experts that are no variant,
    each at what its variant costs."""
    from mmkt_ray.training.experts import expert_fits

    experts = expert_fits(config)
    for name, variant in config.expand_variants().items():
        workers = min(variant.training.num_workers, machines.all_cpus)
        work = samples * rates.train_frac * variant.training.epochs * rates.train[name]
        for what in (name, *(f"expert of {m}, beside {name}" for m in experts[name])):
            yield PlannedStep(f"train {what}", work * known.WORKER_CPUS, work / workers, f"{workers} worker(s)")


def search_step(config: Config, rates: Rates, machines: Machines, samples: float, candidates: float) -> PlannedStep:
    """Candidates in stacks, most of them stopped early; one CPU a trial."""
    core_s = candidates * mean_epochs(config) * samples * rates.train_frac * known.CANDIDATE_S
    return PlannedStep(f"search {candidates:.3g} candidates", core_s, core_s / machines.all_cpus, "all CPUs")


def mean_epochs(config: Config) -> float:
    """Epochs that a candidate trains on average under successive halving."""
    from mmkt_ray.search.halving import rungs_of

    search = config.search or SearchConfig()
    rungs = [0, *rungs_of(config.training.epochs, search.rungs, search.eta)]
    return float(sum((rungs[i + 1] - rungs[i]) / search.eta**i for i in range(len(rungs) - 1)))


def find_limits(config: Config, rates: Rates, machines: Machines, candidates: float) -> Iterator[Limit]:
    """What breaks, and when."""
    gib = f"{machines.memory_bytes / 2**30:.0f} GiB"
    yield Limit(
        machines.memory_bytes / table_bytes(config),
        f"each training worker holds all features: {table_bytes(config):,.0f} bytes a row, {gib} a node",
        "workers that stream parts in shuffled windows",
    )
    yield Limit(
        machines.memory_bytes / known.PUBLISH_BYTES,
        f"the driver holds the ids of all rows to publish them: {known.PUBLISH_BYTES} bytes a row",
        "ids checked and counted in a tree of tasks, split by hash",
    )
    if config.samples.combine.name != "union":
        yield Limit(
            machines.memory_bytes / (known.PUBLISH_BYTES + known.COMBINE_BYTES),
            f"{config.samples.combine.name} holds ids, keys and labels of all rows on the driver",
            "a hash join in Ray tasks",
        )
    for name, modality in sorted(config.modalities.items()):
        encoder: Any = build_encoder(modality.encoder)
        if fit_of(encoder) == "training":
            value_bytes = math.prod(encoder.prepared_shape) * np.dtype(encoder.prepared_dtype).itemsize
            yield Limit(
                known.DISK_BYTES / (value_bytes * rates.train_frac),
                f"each worker that trains the {name} encoder writes all its inputs to its disk: {value_bytes:,} "
                "bytes each, 1 TB",
                "training on a sample of the shards",
            )
    if candidates:
        from mmkt_ray.search.trial import stacks_per_trial

        search = config.search or SearchConfig()
        each = search.population * stacks_per_trial(search.model_copy(update={"max_candidates": int(candidates)}), 1)
        yield Limit(
            known.MAX_TRIALS * each,
            f"{known.MAX_TRIALS:,} trials of {each} candidates: what one Ray Tune experiment is tested for",
            "a larger search.population",
            "candidates",
        )


def totals(config: Config, rates: Rates, machines: Machines, samples: float, steps: list[PlannedStep]) -> Iterator[str]:
    """Sentences below the table."""
    hours = sum(step.seconds for step in steps) / 3600
    busy = sum(step.core_s for step in steps if not step.part) / 3600 / (hours * machines.all_cpus)
    least = "at least " if machines.gpus else ""
    cost = f", cost {least}{hours * machines.nodes * machines.price:,.0f}" if machines.price is not None else ""
    took = f"{least}{time_text(hours * 3600)}, {hours * machines.nodes:,.1f} node-hours"
    yield f"together   {took}{cost}; CPUs busy {busy:.0%} of it"
    extract_s = next(step.seconds for step in steps if step.name == "extract")
    stored = samples * rates.store_bytes
    yield f"storage    {size(stored)} of features; {size(stored / extract_s)}/s at most while extracting"
    rows = config.extract.chunk_rows
    yield (
        f"Ray        {samples / rows:,.0f} chunks, {3 * samples / rows:,.0f} tasks and calls, "
        f"{samples / rows / extract_s:,.1f} chunks/s; a driver passes on {1 / known.CHUNK_S:,.0f}/s, "
        f"{rows / known.CHUNK_S:,.0f} samples/s, on any number of nodes"
    )
    yield f"memory     {size(3 * config.extract.chunk_bytes * machines.cpus)} of chunks on each node at most"
    if machines.gpus:
        pace = samples / extract_s / (machines.nodes * machines.gpus)
        yield (
            f"GPUs       each must encode {pace:,.0f} samples/s or it holds up the rest: measure one on a few "
            "shards"
        )


def step_table(steps: list[PlannedStep]) -> str:
    """One line a step."""
    lines = [f"{'step':30}{'core-hours':>14}{'time':>12}  "]
    for step in steps:
        work = f"{step.core_s / 3600:,.{0 if step.core_s > 360_000 else 2}f}" if step.core_s else ""
        lines.append(f"{step.name:30}{work:>14}{time_text(step.seconds):>12}  {step.place}".rstrip())
    return "\n".join(lines)


def time_text(seconds: float) -> str:
    """A time in a unit that fits; nothing for none."""
    if not seconds:
        return ""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.{1 if seconds < 360_000 else 0}f} h"


def limit_table(limits: list[Limit], samples: float, candidates: float) -> str:
    """Soonest first."""
    lines = ["limits, the soonest first"]
    for limit in limits:
        asked = samples if limit.unit == "samples" else candidates
        mark = "BREAKS" if asked > limit.at else "holds"
        lines.append(
            f"  {mark:7} at {limit.at:.1e} {limit.unit}: {limit.what}\n{'':10} would change it: {limit.change}"
        )
    return "\n".join(lines)
