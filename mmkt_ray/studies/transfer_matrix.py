"""What transfers? Every source of knowledge against every target, over label budgets and seeds.

A node is a set of modalities and a task, written `image+text:category`: each modality alone and all together, for
each task. A cell fits the target with what the source knows, by one method:

    finetune, frozen, gradual   start from the source's towers of the modalities that both read (any task)
    distill                     imitate the source's predictions of the same task, read from modalities that the
                                target lacks
    joint                       train on both at once with all parameters of the towers shared (another task, other
                                modalities)

The source is trained on all its labels, the target on a share of its own. The gain is the paired difference in the
mean score of the test rows against the target from scratch with the same seed and labels;
below 0 it is negative transfer.

Axes: S seeds, N test rows, R resamples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmkt_ray import storage
from mmkt_ray.cluster.side_by_side import Call, SideBySide
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import ConfigError, nearest
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store, open_store
from mmkt_ray.inference.outputs import score_rows
from mmkt_ray.record import About
from mmkt_ray.scoring import provenance
from mmkt_ray.scoring.intervals import Interval, agreeing, holm, paired_p
from mmkt_ray.scoring.seeds import mean_interval
from mmkt_ray.studies.transfer_results import Gain, Scratch, Transfers
from mmkt_ray.training.auto import usual_settings, with_settings
from mmkt_ray.training.fingerprint import training_fingerprint
from mmkt_ray.training.loop import fit
from mmkt_ray.training.methods.transfer import load_knowledge
from mmkt_ray.training.trainer import train

log = logging.getLogger(__name__)

INIT_METHODS = ("finetune", "frozen", "gradual")
SCRATCH = "scratch"
TOLD_FITS = 50  # after so many a line says how many are left
FEW_FITS = 24  # no more than these are fitted right here, sooner than workers have started


@dataclass(frozen=True, order=True)
class Node:
    """A set of modalities, read for one task."""

    modalities: tuple[str, ...]
    task: str

    def __str__(self) -> str:
        return f"{'+'.join(self.modalities)}:{self.task}"


@dataclass(frozen=True)
class Cell:
    """One fit: a target, perhaps with a source's knowledge."""

    target: Node
    label_frac: float
    seed: int
    method: str = SCRATCH
    source: Node | None = None


def transfer_matrix(config: Config, store: Store, run_uri: str) -> Transfers:
    """Fit all cells and write `<run>/transfer.json`; the same command after a kill fits only what is missing.

    Raises: ConfigError if a node is unknown or there is nothing to transfer; DataError as `fit`.
    """
    about = provenance.about(run_uri, (), [store.manifest.fingerprint], {"": config})
    # the same for all cells, or gains would be those of settings
    config = with_settings(config, usual_settings(config))
    config = config.with_overrides({"model.experts": False})  # what towers know is asked, and an expert has its own
    if config.training.exclude:  # workers have another current folder
        config = config.with_overrides({"training.exclude": storage.absolute(config.training.exclude)})
    nodes = list_nodes(config, store)
    sources, targets = (_chosen(nodes, names) for names in (config.transfer.sources, config.transfer.targets))
    cells = list(plan_cells(config, sources, targets))
    if all(cell.method == SCRATCH for cell in cells):
        raise ConfigError(
            f"nothing to transfer: no method of {list(config.transfer.methods)} fits any source and target"
        )
    folder = storage.join(run_uri, "transfer")
    scores = fit_cells(config, store, folder, cells)
    result = gains_over_scratch(config, cells, scores, about)
    result.write(storage.join(run_uri, "transfer.json"))
    return result


def list_nodes(config: Config, store: Store) -> list[Node]:
    """Each modality alone and all together for each task, where the store has rows that carry both."""
    table = store.table(config.model_modalities, config.model_tasks)
    nodes = []
    for task in config.model_tasks:
        inputs = config.task_inputs(task)
        for modalities in [*[(m,) for m in inputs], *([inputs] if len(inputs) > 1 else [])]:
            node = Node(modalities, task)
            if all(node_rows(table, node, split).any() for split in ("train", "test")):
                nodes.append(node)
    return nodes


def node_rows(table: FeatureTable, node: Node, split: str) -> np.ndarray:
    """(N,) bool: the labelled rows of a split that have all of the node's modalities."""
    there = [table.present[m] for m in node.modalities]
    return np.asarray(np.logical_and.reduce([table.split == split, table.labels[node.task].labelled, *there]))


def _chosen(nodes: list[Node], names: tuple[str, ...] | None) -> list[Node]:
    by_name = {str(node): node for node in nodes}
    for name in names or ():
        if name not in by_name:
            raise ConfigError(f"transfer: unknown node '{name}': {nearest(name, by_name)}")
    return [by_name[name] for name in names] if names else nodes


def plan_cells(config: Config, sources: list[Node], targets: list[Node]) -> Iterator[Cell]:
    """All fits, each target from scratch first."""
    for target in targets:
        for label_frac in config.transfer.label_fracs:
            for seed in range(config.seed, config.seed + config.transfer.seeds):
                yield Cell(target, label_frac, seed)
                for source in sources:
                    for method in methods_for(source, target):
                        if method in config.transfer.methods:
                            yield Cell(target, label_frac, seed, method, source)


def methods_for(source: Node, target: Node) -> tuple[str, ...]:
    """By which methods a source can help a target."""
    if source == target:
        return ()
    common = set(source.modalities) & set(target.modalities)
    methods = INIT_METHODS if common else ()
    if source.task == target.task:
        return (*methods, "distill")
    return methods if common else ("joint",)


# --- fitting --------------------------------------------------------------------------------------------------------


def node_config(config: Config, node: Node, seed: int, label_frac: float = 1.0) -> Config:
    """The config of one node's own model: a network alone, since it is what a network has learnt that transfers."""
    chosen: dict[str, Any] = {
        "model.modalities": list(node.modalities),
        "model.tasks": [node.task],
        "model.wide": False,
    }
    again = config.reseeded(seed - config.seed)
    return again.with_overrides({**chosen, "training.label_frac": label_frac, "variants": {}})


def cell_config(config: Config, cell: Cell, source_uri: str | None) -> Config:
    """The config of a cell's fit. The source is named by its model folder."""
    own = node_config(config, cell.target, cell.seed, cell.label_frac)
    if cell.source is None:
        return own
    if cell.method == "joint":
        both = (cell.source, cell.target)
        return own.with_overrides(
            {
                "model.modalities": sorted({m for node in both for m in node.modalities}),
                "model.tasks": sorted({node.task for node in both}),
                "model.sharing": "task_modality",
                **{f"tasks.{node.task}.inputs": list(node.modalities) for node in both},
                f"tasks.{cell.source.task}.label_frac": 1.0,
            }
        )
    if cell.method == "distill":
        return own.with_overrides({"training.transfer.teachers": [source_uri]})
    common = sorted(set(cell.source.modalities) & set(cell.target.modalities))
    start = {"training.transfer.init": {m: source_uri for m in common}, "training.transfer.tuning": cell.method}
    return own.with_overrides(start)


def fit_cells(config: Config, store: Store, folder: str, cells: list[Cell]) -> dict[Cell, np.ndarray]:
    """Scores of the target's test rows (N,) for each cell, fitted as Ray tasks where they are many; those on disk are
    not fitted again."""
    sources: dict[tuple[Node, int], str] = {}
    for cell in cells:
        if cell.source is not None and cell.method != "joint" and (cell.source, cell.seed) not in sources:
            uri = storage.join(folder, "sources", f"{str(cell.source).replace(':', '-')}-seed{cell.seed}")
            train(node_config(config, cell.source, cell.seed), store.uri, uri)
            sources[cell.source, cell.seed] = uri
    jobs = {}
    for cell in cells:
        own = cell_config(config, cell, sources.get((cell.source, cell.seed)) if cell.source else None)
        digest = fingerprint([training_fingerprint(own, store, folder), cell.target.task, cell.target.modalities])
        jobs[storage.join(folder, "cells", f"{digest}.parquet")] = (cell, own)
    todo = {uri: job for uri, job in jobs.items() if not storage.exists(uri)}
    log.info("transfer: %d of %d fits to do", len(todo), len(jobs))
    if len(todo) <= FEW_FITS:
        for uri, (cell, own) in todo.items():
            _fit_cell(own, cell, store.uri, uri)
    else:
        calls = {uri: Call(_fit_cell, (own, cell, store.uri, uri)) for uri, (cell, own) in todo.items()}
        for done, _ in enumerate(SideBySide(calls, num_bytes=store.table_bytes()), start=1):
            if done % TOLD_FITS == 0 or done == len(calls):
                log.info("transfer: %d fits left", len(calls) - done)
    return {cell: _read_scores(uri) for uri, (cell, _) in jobs.items()}


def _fit_cell(config: Config, cell: Cell, store_uri: str, uri: str) -> None:
    """Fit one cell and keep the scores of its target's test rows."""
    torch.set_num_threads(1)
    store = open_store(store_uri)
    knowledge = load_knowledge(config.training.transfer, folder="")
    table = store.table(sorted({*config.model_modalities, *knowledge.modalities}), config.model_tasks)
    model = fit(config, table, knowledge=knowledge).model
    scores = score_rows(model, table, cell.target.task, node_rows(table, cell.target, "test"))
    storage.write_table(uri, pa.table({"score": scores}))


def _read_scores(uri: str) -> np.ndarray:
    return np.asarray(storage.read_table(uri).column("score").to_numpy())


# --- what came out --------------------------------------------------------------------------------------------------


def gains_over_scratch(config: Config, cells: list[Cell], scores: dict[Cell, np.ndarray], about: About) -> Transfers:
    """What each transfer gains; scores: of each cell's test rows (N,), see `fit_cells`."""
    seeds = range(config.seed, config.seed + config.transfer.seeds)
    num, confidence = config.evaluation.bootstrap_samples, config.evaluation.confidence
    targets, found, tests = list[Scratch](), list[tuple[Cell, Node, Interval]](), list[float]()
    for cell in (c for c in cells if c.seed == config.seed):
        each = np.stack([scores[replace(cell, seed=s)] for s in seeds])
        if cell.source is None:
            targets.append(Scratch(target=str(cell.target), label_frac=cell.label_frac, score=float(each.mean())))
            continue
        scratch = np.stack([scores[Cell(cell.target, cell.label_frac, s)] for s in seeds])
        tests.append(paired_p((each - scratch).mean(axis=0)))
        gain = agreeing(mean_interval(each - scratch, num, confidence, config.seed), tests[-1], confidence)
        found.append((cell, cell.source, gain))
    return Transfers(
        nodes=sorted({str(c.target) for c in cells} | {str(c.source) for c in cells if c.source}),
        label_fracs=list(config.transfer.label_fracs),
        seeds=len(seeds),
        confidence=confidence,
        targets=targets,
        cells=[
            Gain(
                source=str(source),
                target=str(cell.target),
                method=cell.method,
                label_frac=cell.label_frac,
                gain=gain["value"],
                low=gain["low"],
                high=gain["high"],
                seeds=len(seeds),
                p_holm=p,
                verdict=_verdict(gain, p < 1 - confidence),
            )
            for (cell, source, gain), p in zip(found, holm(tests), strict=True)
        ],
        about=about,
    )


def _verdict(gain: Interval, shown: bool) -> str:
    """shown: the test tells a difference."""
    if not shown:
        return "none shown"
    return "positive" if gain["low"] > 0 else "negative" if gain["high"] < 0 else "none shown"
