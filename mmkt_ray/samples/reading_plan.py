"""What reading shards takes of a config: where they are, their columns and kinds, the split rule,
the limits of a chunk."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmkt_ray.config import Config, SourceConfig, TaskConfig
from mmkt_ray.config.samples_config import SplitConfig
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.section import as_mapping


@dataclass(frozen=True)
class ReadingPlan:
    """Equal plans read equal samples from equal shards."""

    data_root: str
    sources: tuple[SourceConfig, ...]
    modalities: Mapping[str, ModalityKind]
    tasks: Mapping[str, TaskConfig]
    split: SplitConfig
    joins: bool  # samples are joined by a key, which then decides the split
    chunk_rows: int
    chunk_bytes: int
    named: tuple[tuple[str, ...], ...]  # by source: its columns that the config names, which no pattern takes in

    @classmethod
    def of(cls, config: Config) -> ReadingPlan:
        """How a run reads its shards."""
        samples, limits = config.samples, config.extract
        return cls(
            data_root=config.data_root,
            sources=samples.sources,
            modalities={m: modality.kind for m, modality in config.modalities.items()},
            tasks=config.tasks,
            split=samples.split,
            joins=samples.combine.name == "join",
            chunk_rows=limits.chunk_rows,
            chunk_bytes=limits.chunk_bytes,
            named=tuple(map(_named, samples.sources)),
        )

    def only_source(self, number: int, limit: int | None = None) -> ReadingPlan:
        """One source alone, at most `limit` rows of each of its shards."""
        source = self.sources[number]
        if limit is not None:
            source = source.model_copy(update={"limit": min(source.limit or limit, limit)})
        return replace(self, sources=(source,), named=(self.named[number],))

    def only(self, modality: str, task: str | None = None) -> ReadingPlan:
        """The same rows, read for one modality and one task at most: no other column is touched."""
        wanted = {modality, task, "sample_id", "split", "key"}
        sources = [
            s.model_copy(update={"columns": {k: v for k, v in s.columns.items() if k in wanted}}) for s in self.sources
        ]
        tasks = {} if task is None else {task: self.tasks[task]}
        return replace(self, sources=tuple(sources), modalities={modality: self.modalities[modality]}, tasks=tasks)

    def with_columns(self, source: int, columns: Collection[str]) -> ReadingPlan:
        """The same plan with only these of a source's columns."""
        kept = {c: theirs for c, theirs in self.sources[source].columns.items() if c in columns}
        return self.with_source(source, columns=kept)

    def with_source(self, source: int, **changes: Any) -> ReadingPlan:
        """The same plan with other fields of a source."""
        sources = list(self.sources)
        sources[source] = sources[source].model_copy(update=changes)
        return replace(self, sources=tuple(sources))

    def to_json(self) -> dict[str, Any]:
        """For a child process."""
        kinds = {m: [_name_of(kind), kind.model_dump(mode="json")] for m, kind in self.modalities.items()}
        return vars(self) | {
            "sources": [source.model_dump(mode="json") for source in self.sources],
            "modalities": kinds,
            "tasks": {t: [type(task.kind).__module__, task.model_dump(mode="json")] for t, task in self.tasks.items()},
            "split": self.split.model_dump(mode="json"),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> ReadingPlan:
        """The plan that `to_json` was called on, in a process that may not have imported its kinds yet."""
        parts: dict[str, Any] = {
            "sources": tuple(SourceConfig(**source) for source in saved["sources"]),
            "modalities": {
                m: _class_of(name).model_validate(as_mapping(kind)) for m, (name, kind) in saved["modalities"].items()
            },
            "tasks": {t: _imported(module)(**task) for t, (module, task) in saved["tasks"].items()},
            "split": SplitConfig(**saved["split"]),
            "named": tuple(map(tuple, saved["named"])),
        }
        return cls(**{**saved, **parts})


def _named(source: SourceConfig) -> tuple[str, ...]:
    """The columns of a source that the config names in full."""
    found = {theirs for theirs in source.columns.values() if isinstance(theirs, str)}
    found |= {name for column in source.columns for name in source.theirs(column) if "*" not in name}
    return tuple(sorted(found))


def _imported(module: str) -> type[TaskConfig]:
    """The section of a task, once the module of the task's kind has made its entry."""
    importlib.import_module(module)
    return TaskConfig


def _name_of(kind: ModalityKind) -> str:
    return f"{type(kind).__module__}:{type(kind).__qualname__}"


def _class_of(name: str) -> type[ModalityKind]:
    module, _, attribute = name.partition(":")
    found: type[ModalityKind] = getattr(importlib.import_module(module), attribute)
    return found
