"""Which models, features and settings a result file is about, so that the page shows none that is about others.

Whoever writes a result file adds `about`, {models: {folder in the run: fingerprint}, stores [fingerprints], recipes {variant, or
"" for the config without variants: digest of what decides its training, but for seeds}}, each where it applies. A file
without it is of an older version and can't be checked; it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint, parse_config
from mmkt_ray.scoring.results import Results
from mmkt_ray.scoring.run_file import RunFile


def model_fingerprint(uri: str) -> str | None:
    """That of the model in a folder; None if there is no model, or none with a fingerprint."""
    path = storage.join(uri, "config.json")
    return storage.read_json(path).get("fingerprint") if storage.exists(path) else None


def about(
    run_uri: str, folders: Iterable[str] = (), stores: Iterable[str | None] = (), recipes: Mapping[str, Config] | None = None
) -> dict[str, Any]:
    """What goes into a result file. folders: of models, in the run; stores: fingerprints; recipes: configs by name."""
    return {
        "models": {f: model_fingerprint(storage.join(run_uri, f)) for f in sorted({*folders})},
        "stores": sorted({s for s in stores if s is not None}),
        "recipes": {name: recipe(config) for name, config in (recipes or {}).items()},
    }


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
    left_out: list[dict[str, str]] = field(default_factory=list)  # {file, command}

    @classmethod
    def of(cls, run_uri: str, run: RunFile, results: Results) -> Current:
        """What a run holds by its results and its run.json."""
        stores = frozenset(m.store for m in results.models.values() if m.store)
        recipes = {}
        if run.config:
            config = parse_config(run.config)
            recipes = {"": recipe(config)} | {name: recipe(v) for name, v in config.expand_variants().items()}
        return cls(run_uri, stores, recipes)

    def read(self, name: str, command: str) -> Any:
        """A JSON file of the run; None if it is not there, or is about something that is no more. command: what makes it."""
        path = storage.join(self.run_uri, name)
        if not storage.exists(path):
            return None
        found = storage.read_json(path)
        if self.holds(found.get("about") or {}):
            return found
        self.left_out.append({"file": name, "command": command})
        return None

    def holds(self, told: Mapping[str, Any]) -> bool:
        """Whether all models, features and recipes that a file is about are still those of the run."""
        models, recipes = told.get("models", {}), told.get("recipes", {})
        return (
            all(model_fingerprint(storage.join(self.run_uri, f)) == digest for f, digest in models.items())
            and (not self.stores or {*told.get("stores", ())} <= self.stores)
            and (not self.recipes or all(self.recipes.get(name) == digest for name, digest in recipes.items()))
        )
