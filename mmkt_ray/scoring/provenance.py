"""Which models, features and settings a result file is about, so that the page shows none that is about others.

Whoever writes a result file adds `about`. A file without it is of an older version and can't be checked; it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint, parse_config
from mmkt_ray.record import About, IfAny, Record
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.scoring.run_file import RunFile


class Study(Record, frozen=True):
    """A result file that says what it is about."""

    about: IfAny[About] = None


T = TypeVar("T", bound=Study)
ABOUT = b"mmkt.about"  # key in a Parquet file's metadata: `About` as JSON


@dataclass(frozen=True)
class LeftOut:
    """A file that is about something that is no more, and the command that makes it anew."""

    file: str
    command: str


def model_fingerprint(uri: str) -> str | None:
    """That of the model in a folder; None if there is no model, or none with a fingerprint."""
    path = storage.join(uri, "config.json")
    return storage.read_json(path).get("fingerprint") if storage.exists(path) else None


def about(
    run_uri: str,
    folders: Iterable[str] = (),
    stores: Iterable[str | None] = (),
    recipes: Mapping[str, Config] | None = None,
) -> About:
    """What goes into a result file. folders: of models, in the run; stores: fingerprints;
    recipes: configs by name."""
    return About(
        models={f: model_fingerprint(storage.join(run_uri, f)) for f in sorted({*folders})},
        stores=sorted({s for s in stores if s is not None}),
        recipes={name: recipe(config) for name, config in (recipes or {}).items()},
    )


def with_about(table: pa.Table, about: About) -> pa.Table:
    """A table that says in its metadata what it is about; as a Parquet file it keeps that."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), ABOUT: json.dumps(about.to_dict())})


def about_table(uri: str) -> About | None:
    """What a Parquet file says that it is about; None if it does not say. Raises: FileNotFoundError, DataError."""
    said = (storage.read_table(uri, ()).schema.metadata or {}).get(ABOUT)
    return About.from_dict(json.loads(said), uri) if said is not None else None


def recipe(config: Config) -> str:
    """Digest of what decides how a config's model is trained, but for seeds and variants."""
    parts = config.model_dump(mode="json", include={"model", "training", "tasks"})
    parts["training"].pop("seed")
    return fingerprint(parts)


@dataclass
class Current:
    """What a run holds now, and which files were left out because they are about something else."""

    run_uri: str
    stores: frozenset[str] = frozenset()  # fingerprints; none: not checked
    recipes: Mapping[str, str] = field(default_factory=dict)  # none: not checked
    left_out: list[LeftOut] = field(default_factory=list)

    @classmethod
    def of(cls, run_uri: str, run: RunFile, results: ResultsFile) -> Current:
        """What a run holds by its results and its run.json."""
        stores = frozenset(m.store for m in results.models.values() if m.store)
        recipes = {}
        if run.config:
            config = parse_config(run.config)
            recipes = {"": recipe(config)} | {name: recipe(v) for name, v in config.expand_variants().items()}
        return cls(run_uri, stores, recipes)

    def read(self, kind: type[T], name: str, command: str) -> T | None:
        """A result file of the run; None if it is not there, or is about something that is no more.
        command: what makes it.

        Raises: DataError if the file is damaged or holds something else.
        """
        found = kind.read_or_none(storage.join(self.run_uri, name))
        return found if found is not None and self.check(found.about, name, command) else None

    def check(self, about: About | None, name: str, command: str) -> bool:
        """Whether what a file is about is still there; if not, the file is added to those left out, once."""
        if self.holds(about):
            return True
        left = LeftOut(name, command)
        self.left_out += [left] if left not in self.left_out else []
        return False

    def holds(self, about: About | None) -> bool:
        """Whether all models, features and recipes that a file is about are still those of the run."""
        return about is None or (
            all(model_fingerprint(storage.join(self.run_uri, f)) == digest for f, digest in about.models.items())
            and (not self.stores or {*about.stores} <= self.stores)
            and (not self.recipes or all(self.recipes.get(name) == digest for name, digest in about.recipes.items()))
        )
