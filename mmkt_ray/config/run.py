"""The whole config of a run: its sections, and what must agree between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from mmkt_ray.config.modalities import ModalityConfig, TaskConfig
from mmkt_ray.config.model import ModelConfig
from mmkt_ray.config.parsing import parse, set_dotted
from mmkt_ray.config.samples import PairCombine, SamplesConfig
from mmkt_ray.config.section import Section
from mmkt_ray.config.training import EvaluationConfig, ExtractConfig, TrainingConfig
from mmkt_ray.errors import ConfigError, nearest


class Config(Section):
    """A run: samples -> features -> models -> report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder")
    seed: int = Field(0, ge=0, description="seed of everything random")
    data_root: str = Field("data", description="folder or URI that source paths are relative to")
    run_root: str = Field("runs", description="folder or URI under which the run folder lies")
    samples: SamplesConfig = Field(description="raw shards -> samples")
    modalities: dict[str, ModalityConfig] = Field(min_length=1, description="modality -> kind, encoder, reduction")
    tasks: dict[str, TaskConfig] = Field(min_length=1, description="task -> kind of label")
    extract: ExtractConfig = Field(ExtractConfig(), description="streaming of shards through encoders")
    model: ModelConfig = Field(ModelConfig(), description="fusion and sharing")
    training: TrainingConfig = Field(TrainingConfig(), description="fitting")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="metrics and intervals")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="models to compare: name -> dotted overrides of this config; none: one model, 'model'",
    )

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        reserved = {"sample_id", "split", "key"}
        names = [*self.modalities, *self.tasks]
        if clash := (reserved & set(names)) | {n for n in names if names.count(n) > 1}:
            raise ConfigError(f"column names must be distinct and not {sorted(reserved)}: {sorted(clash)}")
        for source in self.samples.sources:
            for column in source.columns:
                if column not in reserved and column not in names:
                    raise ConfigError(
                        f"source '{source.path}' fills column '{column}', which is no modality and no task; "
                        + nearest(column, [*names, *reserved])
                    )
        filled = {c for s in self.samples.sources for c in s.columns}
        for name in names:
            if name not in filled:
                raise ConfigError(
                    f"no source fills '{name}': add it to a source's columns, or drop it from modalities or tasks"
                )
        for name, modality in self.modalities.items():
            task = getattr(modality.encoder, "pretrain", None)
            if task is not None and task not in self.tasks:
                raise ConfigError(
                    f"modalities.{name}.encoder.pretrain: unknown task '{task}': {nearest(task, self.tasks)}"
                )
            kind = {"cnn": "image", "pixels": "image", "tfidf": "text"}.get(modality.encoder.name, modality.kind)
            if kind != modality.kind:
                raise ConfigError(
                    f"modalities.{name}: encoder '{modality.encoder.name}' reads {kind}, the modality's kind is {modality.kind}"
                )
        for what, chosen, known in (
            ("modalities", self.model.modalities, self.modalities),
            ("tasks", self.model.tasks, self.tasks),
        ):
            for name in chosen or ():
                if name not in known:
                    raise ConfigError(f"model.{what}: unknown '{name}': {nearest(name, known)}")
        if isinstance(self.samples.combine, PairCombine):
            self._check_pair(self.samples.combine)
        return self

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

    @property
    def model_modalities(self) -> tuple[str, ...]:
        """Modalities the model reads, sorted."""
        return tuple(sorted(self.model.modalities or self.modalities))

    @property
    def model_tasks(self) -> tuple[str, ...]:
        """Tasks the model predicts, sorted."""
        return tuple(sorted(self.model.tasks or self.tasks))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Config:
        """A new config with dotted keys replaced, e.g. `{"model.fusion": "concat"}`; checked like any other."""
        raw = self.model_dump(mode="json")
        for key, value in overrides.items():
            set_dotted(raw, key, value)
        return parse_config(raw)

    def expand_variants(self) -> dict[str, Config]:
        """Each compared model's own full config, without variants; one named `model` when there are none."""
        base = self.model_copy(update={"variants": {}})
        return {name: base.with_overrides(o) for name, o in self.variants.items()} or {"model": base}


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a raw mapping. Raises: ConfigError with one line per fault."""
    return parse(Config, raw)
