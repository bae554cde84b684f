"""The models of a run: those of its variants, of their experts and of each modality alone, trained side by side.

Called by steps.py; each model is trained by trainer.py. What several models need (settings that are chosen once, an
expert of several variants) is a call of its own that they come after.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from mmkt_ray import storage
from mmkt_ray.cluster.side_by_side import Call, SideBySide, run_here
from mmkt_ray.config import Config
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.store import Store, open_store
from mmkt_ray.inference.training_record import Outcome
from mmkt_ray.training.chosen_settings import find_settings, settings_uri
from mmkt_ray.training.composite import train_expert
from mmkt_ray.training.experts import expert_configs, single_configs
from mmkt_ray.training.fingerprint import find_model, has_experts, is_trained, linear_place, training_fingerprint
from mmkt_ray.training.linear import is_linear
from mmkt_ray.training.trainer import train
from mmkt_ray.training.wide import is_wide, wide_config

log = logging.getLogger(__name__)

MODEL = "model "  # begins the names of calls whose values are asked for


def train_variants(
    variants: Mapping[str, Config], stores: Mapping[str, Store], folder: str
) -> Iterator[tuple[str, Outcome]]:
    """Variant and how it was trained, as each one ends; `folder/<variant>` holds the model.

    Variants that learn from another one of them, or on several workers each, follow one after the other.
    Raises: as `train`.
    """
    after = {
        name
        for name, variant in variants.items()
        if {*variant.training.transfer.init.values(), *variant.training.transfer.teachers} & {*variants}
        or (variant.training.num_workers > 1 and not is_linear(variant))
    }
    calls = _Calls({name: variant for name, variant in variants.items() if name not in after}, stores, folder)
    num_bytes = max((store.table_bytes() for store in stores.values()), default=0)
    for name, value in SideBySide(calls.todo, calls.num, gpu=True, num_bytes=num_bytes):
        if name.startswith(MODEL):
            yield name.removeprefix(MODEL), value
    for name, variant in variants.items():
        if f"{MODEL}{name}" not in calls.todo:  # those that are up to date too
            yield name, train(variant, stores[name].uri, storage.join(folder, name))


def train_singles(variants: dict[str, Config], store: Store, folder: str) -> dict[str, str]:
    """Modality -> folder of a model of it alone, trained like the fused ones of these variants;
    experts that are such are used.

    folder: where the models of the variants lie. See `single_configs` for what is left out.
    """
    modalities = sorted({m for v in variants.values() for m in v.model_modalities})
    tasks = sorted({t for v in variants.values() for t in v.model_tasks})
    found = {}
    for m, config in single_configs(variants, store.table(modalities, tasks)).items():
        scratch = storage.join(folder, f".single-{m}")
        try:
            found[m] = train_expert(config, store, scratch, folder, train)
        except (ConfigError, DataError) as error:
            log.warning("no model of %s alone: %s", m, error)
        storage.remove_folder(scratch)
    return found


@dataclass
class _Calls:
    """What must be done for some variants that learn from none of the others."""

    variants: Mapping[str, Config]
    stores: Mapping[str, Store]
    folder: str
    todo: dict[str, Call] = field(default_factory=dict)
    num: int = 0  # with those that were done before

    def __post_init__(self) -> None:
        digests = {n: training_fingerprint(v, self.stores[n], self.folder) for n, v in self.variants.items()}
        models = {digest: f"{MODEL}{name}" for name, digest in digests.items()}
        for name, variant in sorted(self.variants.items(), key=lambda item: has_experts(item[1])):
            store, uri = self.stores[name], storage.join(self.folder, name)
            done = is_trained(uri, digests[name])
            before = [self._settings(variant, store), self._wide(variant, store, done)]
            if has_experts(variant):
                table = store.table(variant.model_modalities, variant.model_tasks)
                experts = expert_configs(variant, table).values()
                del table
                before += [self._expert(expert, store, models, done) for expert in experts]
            self._add(f"{MODEL}{name}", Call(_train, (variant, store.uri, uri), [b for b in before if b]), done)
        for store in {s.uri: s for s in self.stores.values()}.values():
            own = {n: v for n, v in self.variants.items() if self.stores[n].uri == store.uri}
            if own:
                modalities = sorted({m for v in own.values() for m in v.model_modalities})
                tasks = sorted({t for v in own.values() for t in v.model_tasks})
                for config in single_configs(own, store.table(modalities, tasks)).values():
                    self._expert(config, store, models, False)

    def _add(self, name: str, call: Call, done: bool) -> str:
        if name not in self.todo:
            self.num += 1
            if not done:
                self.todo[name] = call
        return name

    def _settings(self, config: Config, store: Store) -> str:
        """The call that chooses the settings of this model and of others like it;
        empty if nothing is to be chosen."""
        fused = config.with_overrides({"model.experts": False})
        if not fused.training.auto or is_linear(fused):
            return ""
        uri = settings_uri(fused, store)
        return self._add(f"settings {uri}", Call(_settle, (fused, store.uri)), storage.exists(f"{uri}.json"))

    def _wide(self, config: Config, store: Store, done: bool) -> str:
        """The call that solves the linear model beside this model's network; empty if there is none."""
        if not is_wide(config):
            return ""
        own = wide_config(config)
        uri = linear_place(own, store, self.folder)
        done = done or is_trained(uri, training_fingerprint(own, store, self.folder))
        return self._add(f"linear {uri}", Call(_train, (own, store.uri, uri)), done)

    def _expert(self, config: Config, store: Store, models: Mapping[str, str], done: bool) -> str:
        """The call that trains an expert, or the variant that is the same model."""
        digest = training_fingerprint(config, store, self.folder)
        if digest in models:
            return models[digest]
        done = done or find_model(config, store, self.folder) is not None
        before = [w for w in [self._wide(config, store, done)] if w]
        return self._add(
            f"expert {digest}", Call(_train_expert, (config, store.uri, self.folder, digest), before), done
        )


def _settle(config: Config, store_uri: str) -> None:
    find_settings(config, open_store(store_uri), run_here)


def _train(config: Config, store_uri: str, model_uri: str) -> Outcome:
    return train(config, store_uri, model_uri, run=run_here)


def _train_expert(config: Config, store_uri: str, folder: str, digest: str) -> None:
    """Whoever asks for one that cannot be trained next says so."""
    scratch = storage.join(folder, ".experts", f"{digest}.parts")
    with suppress(ConfigError, DataError):
        train_expert(config, open_store(store_uri), scratch, folder, partial(train, run=run_here))
    storage.remove_folder(scratch)
