"""The whole config of a run: its sections, and what must agree between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field, model_validator

from mmkt_ray.config.modality_config import ModalityConfig, TaskConfig
from mmkt_ray.config.model_config import ModelConfig
from mmkt_ray.config.parsing import parse, set_dotted
from mmkt_ray.config.samples_config import PairCombine, SamplesConfig, SourceConfig
from mmkt_ray.config.search_config import SearchConfig
from mmkt_ray.config.tracking_config import TrackingConfig
from mmkt_ray.config.training_config import (
    CHOSEN,
    EvaluationConfig,
    ExtractConfig,
    TrainingConfig,
    TransferMatrixConfig,
)
from mmkt_ray.encoders.catalog import ENCODERS
from mmkt_ray.errors import ConfigError, nearest
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.section import Name, Section

OWN_COLUMNS = ("sample_id", "split", "key", "cleaned", "missing")
OWN_MODELS = {"majority", "search_winner"}


class Config(Section):
    """A run: samples -> features -> models -> report."""

    name: Name = Field(description="name of the run and of its folder")
    seed: int = Field(0, ge=0, lt=2**53, description="seed of everything random")
    data_root: str = Field("data", min_length=1, description="folder or URI that source paths are relative to")
    run_root: str = Field("runs", min_length=1, description="folder or URI under which the run folder lies")
    samples: SamplesConfig = Field(description="raw shards -> samples")
    modalities: dict[Name, ModalityConfig] = Field(min_length=1, description="modality -> kind, encoder, reduction")
    tasks: dict[Name, TaskConfig] = Field(min_length=1, description="task -> kind of label")
    extract: ExtractConfig = Field(ExtractConfig(), description="streaming of shards through encoders")
    model: ModelConfig = Field(ModelConfig(), description="fusion and sharing")
    training: TrainingConfig = Field(TrainingConfig(), description="fitting")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="metrics and intervals")
    transfer: TransferMatrixConfig = Field(TransferMatrixConfig(), description="what `mmkt transfer` compares")
    search: SearchConfig | None = Field(None, description="what `mmkt search` tries; null: its defaults")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where results are also written")
    variants: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="models to compare: name -> dotted overrides of this config; none: one model, 'model'",
    )

    @model_validator(mode="before")
    @classmethod
    def _what_is_chosen(cls, raw: Any) -> Any:
        """`training: auto` spelt out: every setting of CHOSEN that is not given is chosen."""
        if not isinstance(raw, Mapping):
            return raw
        training = {} if raw.get("training") in (None, "auto") else raw["training"]
        model = {} if raw.get("model") is None else raw["model"]
        if not isinstance(training, Mapping) or not isinstance(model, Mapping):
            return raw
        auto = training.get("auto", True)
        if isinstance(auto, bool):
            given = {f"training.{key}" for key in training} | {f"model.{key}" for key in model}
            auto = [key for key in CHOSEN if key not in _answered(given)] if auto else []
        return {**raw, "training": {**training, "auto": auto}}

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        reserved = {"sample_id", "split", "key"}
        names = [*self.modalities, *self.tasks]
        self._check_columns(names)
        if clash := OWN_MODELS & self.variants.keys():
            raise ConfigError(f"variants: {', '.join(sorted(clash))} is the name of a model that a run makes by itself")
        for source in self.samples.sources:
            for column in source.columns:
                if column not in reserved and column not in names:
                    raise ConfigError(
                        f"source '{source.path}' fills column '{column}', which is no modality and no task; "
                        + nearest(column, [*names, *reserved])
                    )
            self._check_several(source)
        filled = {c for s in self.samples.sources for c in s.columns}
        for name in names:
            if name not in filled:
                raise ConfigError(
                    f"no source fills '{name}': add it to a source's columns, or drop it from modalities or tasks"
                )
        for name, modality in self.modalities.items():
            task, encoder = modality.encoder.task, ENCODERS.get(modality.encoder.name)
            if task is not None and task not in self.tasks:
                raise ConfigError(
                    f"modalities.{name}.encoder is trained on an unknown task '{task}': {nearest(task, self.tasks)}"
                )
            adapts = getattr(modality.encoder, "adapt", None) is not None
            if task is not None and not (adapts or self.tasks[task].kind.exclusive):
                raise ConfigError(
                    f"modalities.{name}.encoder is trained on a task: '{task}' is {self.tasks[task].kind.name}; "
                    "name a multiclass or binary task"
                )
            if task is not None and modality.kind.pooled:
                raise ConfigError(
                    f"modalities.{name}: '{modality.encoder.name}' is trained on single values: set kind.pool to "
                    "first"
                )
            labels_of = modality.reduce.labels_of if modality.reduce is not None else None
            if labels_of is not None and labels_of not in self.tasks:
                raise ConfigError(
                    f"modalities.{name}.reduce.task: unknown task '{labels_of}': {nearest(labels_of, self.tasks)}"
                )
            if labels_of is not None and not self.tasks[labels_of].kind.exclusive:
                raise ConfigError(f"modalities.{name}.reduce.task: '{labels_of}' must be a multiclass or binary task")
            if encoder is not None and modality.kind.name not in encoder.kinds:
                raise ConfigError(
                    f"modalities.{name}: encoder '{modality.encoder.name}' reads {' or '.join(encoder.kinds)}, the "
                    f"modality's kind is {modality.kind.name}"
                )
        for what, chosen, known in (
            ("modalities", self.model.modalities, self.modalities),
            ("tasks", self.model.tasks, self.tasks),
        ):
            for name in chosen or ():
                if name not in known:
                    raise ConfigError(f"model.{what}: unknown '{name}': {nearest(name, known)}")
        if self.model.missing == "generate" and len(self.model_modalities) > 1:
            for name in self.model_modalities:
                encoder = ENCODERS.get(self.modalities[name].encoder.name)
                modality = self.modalities[name]
                sparse = encoder is not None and getattr(modality.encoder, "sparse", encoder.sparse)
                if sparse and (modality.reduce is None or modality.reduce.keeps_sparse):
                    raise ConfigError(
                        f"model.missing: generate cannot predict sparse features: add modalities.{name}.reduce, "
                        "e.g. {name: svd, dim: 256}"
                    )
        for name, task_config in self.tasks.items():
            for modality_name in task_config.inputs or ():
                if modality_name not in self.modalities:
                    raise ConfigError(
                        f"tasks.{name}.inputs: unknown modality '{modality_name}': "
                        f"{nearest(modality_name, self.modalities)}"
                    )
            if name in self.model_tasks and not self.task_inputs(name):
                raise ConfigError(
                    f"task '{name}' reads {list(task_config.inputs or ())}, the model only "
                    f"{list(self.model_modalities)}: add a modality to model.modalities, or leave the task out of "
                    "model.tasks"
                )
        for modality_name in self.training.transfer.init:
            if modality_name not in self.modalities:
                raise ConfigError(
                    f"training.transfer.init: unknown modality '{modality_name}': "
                    f"{nearest(modality_name, self.modalities)}"
                )
        kinds = {name: task.kind for name, task in self.tasks.items()}
        self.training.objective.check("training.objective", kinds, self.model_tasks)
        if self.search is not None and self.search.objective is not None:
            self.search.objective.check("search.objective", kinds, self.model_tasks)
        self.training.check_combinations({t: self.task_inputs(t) for t in self.model_tasks}, kinds)
        if isinstance(self.samples.combine, PairCombine):
            self._check_pair(self.samples.combine)
        return self

    def _check_several(self, source: SourceConfig) -> None:
        """Raises: ConfigError where several of a source's columns fill one that takes a single one."""
        for column, theirs in source.columns.items():
            takes_several = column in self.modalities and self.modalities[column].kind.takes_several
            if not isinstance(theirs, str) and not takes_several:
                raise ConfigError(
                    f"source '{source.path}' fills '{column}' from a list: name one column, {column} takes no more"
                )
            takes_arrays = column in self.modalities and self.modalities[column].kind.takes_arrays
            if column in source.arrays("") and not (takes_arrays and source.reader in ("parquet", "manifest")):
                raise ConfigError(
                    f"source '{source.path}' fills '{column}' from '{theirs}': an array fills vectors alone, beside "
                    "shards of the readers parquet and manifest"
                )
            if source.reader not in ("parquet", "manifest") and not isinstance(theirs, str) and "*" in "".join(theirs):
                raise ConfigError(
                    f"source '{source.path}' fills '{column}' from a pattern: name each column, as reader "
                    f"'{source.reader}' knows none of them before it reads"
                )

    def _check_columns(self, names: list[str]) -> None:
        """Raises: ConfigError where two columns of features or predictions would have one name."""
        columns = [(own, "a column of every table") for own in OWN_COLUMNS]
        columns += [(name, f"'{name}' of modalities or tasks") for name in names]
        columns += [(f"{m}_{end}", f"modality '{m}'") for m in self.modalities for end in ("features", "hash")]
        columns += [
            (f"{t}_{end}", f"task '{t}'") for t in self.tasks for end in ("pred", "proba", "label", "low", "high")
        ]
        owners: dict[str, str] = {}
        for column, owner in columns:
            if column in owners:
                raise ConfigError(
                    f"column names must be distinct: '{column}' belongs to {owners[column]} and to {owner}: rename "
                    "one"
                )
            owners[column] = owner

    def _check_pair(self, pair: PairCombine) -> None:
        if len(pair.labels) != 2:
            raise ConfigError(
                "samples.combine.labels needs two modalities, each with the task whose label decides the match"
            )
        for modality, task in pair.labels.items():
            if modality not in self.modalities:
                raise ConfigError(
                    f"samples.combine.labels: unknown modality '{modality}': {nearest(modality, self.modalities)}"
                )
            if task not in self.tasks:
                raise ConfigError(f"samples.combine.labels: unknown task '{task}': {nearest(task, self.tasks)}")
            if not self.tasks[task].kind.classes:
                raise ConfigError(
                    f"samples.combine.labels: '{task}' is a {self.tasks[task].kind.name} task: pair by classes"
                )

    @property
    def task_kinds(self) -> dict[str, TaskKind]:
        """Kinds of the model's tasks, without what is fitted."""
        return {t: self.tasks[t].kind for t in self.model_tasks}

    @property
    def model_modalities(self) -> tuple[str, ...]:
        """Modalities the model reads, sorted."""
        return tuple(sorted(self.model.modalities or self.modalities))

    @property
    def model_tasks(self) -> tuple[str, ...]:
        """Tasks the model predicts, sorted."""
        return tuple(sorted(self.model.tasks or self.tasks))

    @property
    def training_seed(self) -> int:
        """What decides the initialisation, the order of batches and the dropout of a model."""
        return self.seed if self.training.seed is None else self.training.seed

    def reseeded(self, offset: int) -> Config:
        """The same run from another seed: `seed`, and `training.seed` where it is set, each plus `offset`."""
        seeds = {"seed": self.seed + offset}
        if self.training.seed is not None:
            seeds["training.seed"] = self.training.seed + offset
        return self.with_overrides(seeds)

    def label_fracs(self) -> dict[str, float]:
        """Share of its train labels that each task of the model uses."""
        shares = {t: self.tasks[t].label_frac for t in self.model_tasks}
        return {t: self.training.label_frac if share is None else share for t, share in shares.items()}

    def task_inputs(self, task: str) -> tuple[str, ...]:
        """Modalities that the model reads for a task, sorted."""
        allowed = self.tasks[task].inputs
        return tuple(m for m in self.model_modalities if allowed is None or m in allowed)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """A new config with dotted keys replaced, e.g. `{"model.fusion": "concat"}`; checked like any other."""
        raw = self.model_dump(mode="json")
        given = set(overrides)
        for section in ("training", "model"):
            if isinstance(overrides.get(section), Mapping):
                given |= {f"{section}.{key}" for key in overrides[section]}
        for key, value in overrides.items():
            set_dotted(raw, key, value)
        auto = raw["training"].get("auto", True) if isinstance(raw["training"], dict) else True
        if isinstance(auto, list | tuple):
            raw["training"]["auto"] = [key for key in auto if key not in _answered(given)]
        return parse_config(raw)

    def _variant(self, name: str, overrides: Mapping[str, Any]) -> Config:
        try:
            return self.with_overrides(overrides)
        except ConfigError as error:
            raise ConfigError(f"variants.{name}: {error}") from None

    def expand_variants(self) -> dict[str, Config]:
        """Each compared model's own full config, without variants; one named `model` when there are none.

        In the order to train them in: a model comes after those that it takes knowledge over from.
        Raises: ConfigError if one of these is unknown, or takes over from itself in the end.
        """
        base = self.model_copy(update={"variants": {}})
        configs = {name: base._variant(name, o) for name, o in self.variants.items()} or {"model": base}
        ordered: dict[str, Config] = {}
        while len(ordered) < len(configs):
            ready = {n: c for n, c in configs.items() if n not in ordered and c.sources <= ordered.keys()}
            if not ready:
                waiting = [n for n in configs if n not in ordered]
                for name in waiting:
                    for source in sorted(configs[name].sources - configs.keys()):
                        raise ConfigError(f"variants.{name} takes over from '{source}': {nearest(source, configs)}")
                raise ConfigError(f"these variants take over from each other in a circle: {', '.join(waiting)}")
            ordered |= ready
        return ordered

    @property
    def sources(self) -> set[str]:
        """Names of the variants that this model takes knowledge over from;
        what holds a slash is a model folder instead."""
        transfer = self.training.transfer
        return {name for name in (*transfer.init.values(), *transfer.teachers) if "/" not in name}


def _answered(given: Collection[str]) -> set[str]:
    """The keys of CHOSEN that need no choice where these keys are given."""
    return {*given, *(["training.steps"] if "training.epochs" in given else [])}


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a raw mapping. Raises: ConfigError with one line per fault."""
    return parse(Config, raw)
