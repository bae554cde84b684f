"""The one typed, frozen description of a run, read from YAML or built in Python.

Unknown keys are errors that name the nearest known key. A choice with options of its own may be written as its bare
name (`fusion: concat`) or as a mapping (`fusion: {name: hierarchical, depth: 2}`). Dimensions are derived, never stated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from mmkt_ray.errors import ConfigError, nearest, unknown_name

SPLITS = ("train", "val", "test")
SCHEMES = ("separate", "architecture", "task", "modality", "task_modality")


class Section(BaseModel):
    """Base of every part of the config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


# --- samples ---------------------------------------------------------------------------------------------------------


class SourceConfig(Section):
    """One set of shards that share a layout."""

    reader: Literal["parquet", "webdataset", "folders", "manifest"] = Field(description="layout of the shards")
    path: str = Field(description="file, folder, glob or URI; relative paths are under data_root")
    columns: dict[str, str] = Field(
        description="our column (modality, task, sample_id, split or key) -> the source's column, tar suffix or json field"
    )
    split: Literal["train", "val", "test"] | None = Field(
        None, description="split of all rows here; null: from a split column, the folder's name, or a hash of the id"
    )
    encoding: str = Field("utf-8", description="text encoding of the raw files")
    limit: int | None = Field(None, ge=1, description="read at most this many rows of each shard (for a quick look)")
    allow_outside: bool = Field(
        False, description="manifest cells may be absolute paths or leave the manifest's folder"
    )


class SplitConfig(Section):
    """Shares of the rows that no source gives a split, drawn by a hash of the sample id (or of the join key)."""

    val_frac: float = Field(
        0.1, ge=0, lt=1, description="share for validation; also taken from given train rows if no source gives val"
    )
    test_frac: float = Field(0.2, ge=0, lt=1, description="share for test")

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> SplitConfig:
        if self.val_frac + self.test_frac >= 1:
            raise ValueError("val_frac + test_frac must be below 1, or nothing is left to train on")
        return self


class UnionCombine(Section):
    """Unpaired rows one after another, nulls elsewhere."""

    name: Literal["union"] = "union"


class JoinCombine(Section):
    """Rows with the same `key` become one sample."""

    name: Literal["join"] = "join"
    how: Literal["inner", "outer"] = Field(
        "inner", description="outer keeps rows without a partner (missing modalities)"
    )


class PairCombine(Section):
    """Synthetic pairs within a split: each row of one modality gets a random row of the other with the matching label."""

    name: Literal["pair"] = "pair"
    labels: dict[str, str] = Field(
        description="modality -> the task whose label decides the match, two entries; the first is kept once per row"
    )
    mapping: dict[str, str] | None = Field(
        None, description="class of the first label -> class of the second; null: the same class names"
    )


CombineConfig = Annotated[
    Annotated[UnionCombine, Tag("union")] | Annotated[JoinCombine, Tag("join")] | Annotated[PairCombine, Tag("pair")],
    Discriminator(lambda v: v.get("name", "") if isinstance(v, Mapping) else v.name),
    BeforeValidator(_named),
]


class SamplesConfig(Section):
    """Where the raw shards are and how their rows become samples."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="the sets of shards")
    combine: CombineConfig = Field(UnionCombine(), description="how rows of several sources become samples")
    split: SplitConfig = Field(SplitConfig(), description="shares of val and test where none is given")
    max_image_pixels: int = Field(64_000_000, ge=1, description="images with more pixels are rejected unread")
    max_reject_frac: float = Field(0.01, ge=0, le=1, description="the job stops when more rows than this are rejected")


# --- modalities ------------------------------------------------------------------------------------------------------


class CnnEncoder(Section):
    """Small convolutional network, trained here on one modality and one task, then frozen."""

    name: Literal["cnn"] = "cnn"
    pretrain: str = Field(description="the task it is trained on")
    image_size: int = Field(32, ge=9, le=256, description="side in pixels that images are resized to")
    width: int = Field(64, ge=8, description="channels of the first block; later blocks are multiples")
    epochs: int = Field(10, ge=1, description="passes over the train split")
    batch_size: int = Field(500, ge=2, description="images per optimiser step, over all workers")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: the recipe's")
    augment: tuple[Literal["flip", "crop", "cutout"], ...] = Field(
        ("flip", "crop"), description="training augmentation; cutout pays in longer runs"
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="arithmetic of training and encoding")
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 trains in one process on all its cores")


class PixelsEncoder(Section):
    """Shallow image features without training: colour thumbnail and oriented-gradient histograms."""

    name: Literal["pixels"] = "pixels"
    image_size: int = Field(32, ge=8, le=256, description="side in pixels that images are resized to")


class TfidfEncoder(Section):
    """TF-IDF with scikit-learn's options and results, fitted in one distributed pass."""

    name: Literal["tfidf"] = "tfidf"
    lowercase: bool = Field(True, description="lower-case before tokenising")
    ngram_range: tuple[int, int] = Field((1, 1), description="shortest and longest n-gram")
    min_df: int = Field(1, ge=1, description="drop terms in fewer documents")
    max_df: float = Field(1.0, gt=0, le=1, description="drop terms in more than this share of documents")
    max_features: int | None = Field(None, ge=1, description="keep the most frequent terms only")
    stop_words: Literal["english"] | None = Field(None, description="stop word list")
    sublinear_tf: bool = Field(False, description="1 + log(tf) in place of tf")
    norm: Literal["l1", "l2"] | None = Field("l2", description="row normalisation")


class CustomEncoder(Section):
    """An encoder of the user's, named `module:Class`."""

    name: str = Field(description="module:Class, importable on every node")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of its constructor")


ENCODERS: dict[str, type[Section]] = {"cnn": CnnEncoder, "pixels": PixelsEncoder, "tfidf": TfidfEncoder}


def _encoder_tag(value: Any) -> str:
    name = value.get("name", "") if isinstance(value, Mapping) else value.name
    if name not in ENCODERS and ":" not in str(name):
        raise unknown_name("encoder", str(name), [*ENCODERS, "your.module:Class"])
    return "custom" if ":" in name else name


EncoderConfig = Annotated[
    Annotated[CnnEncoder, Tag("cnn")]
    | Annotated[PixelsEncoder, Tag("pixels")]
    | Annotated[TfidfEncoder, Tag("tfidf")]
    | Annotated[CustomEncoder, Tag("custom")],
    Discriminator(_encoder_tag),
    BeforeValidator(_named),
]


class ReduceConfig(Section):
    """Linear reduction of one modality's features, fitted exactly on the train split."""

    name: Literal["pca", "svd", "standardize"] = Field(
        description="pca (centred), svd (uncentred, sparse input too), standardize (no change of width)"
    )
    dim: int | None = Field(None, ge=1, description="features kept (pca and svd)")

    @model_validator(mode="after")
    def _dim_where_it_means_something(self) -> ReduceConfig:
        if (self.name == "standardize") != (self.dim is None):
            raise ValueError("pca and svd need dim; standardize takes none")
        return self


class ModalityConfig(Section):
    """One modality: what it is, how it is encoded, how its features are reduced."""

    kind: Literal["image", "text"] = Field(description="what the column holds: image = encoded bytes, text = string")
    encoder: EncoderConfig = Field(description="raw values -> feature vectors")
    reduce: Annotated[ReduceConfig, BeforeValidator(_named)] | None = Field(
        None, description="features -> fewer features"
    )
    hidden_dim: int | None = Field(
        None, ge=1, description="tower width under sharing: separate; null: from the features' width"
    )


class TaskConfig(Section):
    """One label column to predict."""

    kind: Literal["multiclass"] = Field("multiclass", description="one class per sample")


# --- model and training ----------------------------------------------------------------------------------------------


class FusionConfig(Section):
    """How the modalities' representations become one."""

    name: Literal["concat", "hierarchical", "decision"] = Field(
        "concat", description="feature-level, level upon level, or per-modality decisions"
    )
    depth: int = Field(1, ge=1, le=16, description="levels of hierarchical fusion")

    @model_validator(mode="after")
    def _depth_is_hierarchical(self) -> FusionConfig:
        if self.name != "hierarchical" and self.depth != 1:
            raise ValueError(f"depth is for hierarchical fusion; {self.name} has none")
        return self


class ModelConfig(Section):
    """The fused, parameter-sharing model over the features."""

    modalities: tuple[str, ...] | None = Field(None, description="modalities it reads; null: all")
    tasks: tuple[str, ...] | None = Field(None, description="tasks it predicts; null: all")
    fusion: Annotated[FusionConfig, BeforeValidator(_named)] = Field(FusionConfig(), description="fusion method")
    sharing: str | tuple[str, ...] = Field(
        "task", description="sharing scheme of the towers, or one per level, bottom to top: " + ", ".join(SCHEMES)
    )
    num_levels: int = Field(1, ge=0, le=16, description="tower levels; 0: features go straight into the fusion")
    hidden_dim: int = Field(256, ge=1, description="width of towers and fusion")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout in towers and fusion")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input features")

    @model_validator(mode="after")
    def _known_schemes(self) -> ModelConfig:
        for scheme in self.schemes:
            if scheme not in SCHEMES:
                raise unknown_name("sharing scheme", scheme, SCHEMES)
        if len(self.schemes) != self.num_levels:
            raise ValueError(f"sharing names {len(self.schemes)} levels but num_levels is {self.num_levels}")
        return self

    @property
    def schemes(self) -> tuple[str, ...]:
        """One scheme per tower level, bottom to top."""
        return (self.sharing,) * self.num_levels if isinstance(self.sharing, str) else self.sharing


class TrainingConfig(Section):
    """How the model is fitted."""

    epochs: int = Field(30, ge=1, description="passes over the train split at most")
    batch_size_per_worker: int = Field(256, ge=1, description="samples per step on each worker")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (AdamW, linear warm-up, cosine decay)")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Literal["balanced"] | None = Field(
        None, description="balanced: weight classes by inverse train frequency"
    )
    patience: int = Field(
        0,
        ge=0,
        description="stop after this many epochs without a better validation score; 0: never; the best epoch is kept",
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 runs in this process without ceremony")


class EvaluationConfig(Section):
    """How results are told."""

    bootstrap_samples: int = Field(1000, ge=100, description="resamples of the test rows for each interval")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="coverage of the intervals")
    baselines: bool = Field(True, description="majority class and logistic regression, each modality and concatenated")


class ExtractConfig(Section):
    """How raw shards stream through the encoders."""

    chunk_rows: int = Field(1024, ge=1, description="rows of one unit of work and of one Parquet part")
    chunk_bytes: int = Field(
        32_000_000, ge=1, description="raw bytes of one unit of work at most (one sample may exceed it)"
    )
    encode_batch_size: int = Field(256, ge=1, description="samples per forward pass; fixed, the last one is padded")
    num_actors: int | None = Field(
        None, ge=1, description="encoder actors; null: one per GPU, or one per two logical CPUs"
    )
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of each encoder actor; null: 1 if the cluster has any, else 0"
    )


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
            _set_dotted(raw, key, value)
        return parse_config(raw)

    def expand_variants(self) -> dict[str, Config]:
        """Each compared model's own full config, without variants; one named `model` when there are none."""
        base = self.model_copy(update={"variants": {}})
        return {name: base.with_overrides(o) for name, o in self.variants.items()} or {"model": base}


# --- reading, errors, fingerprints -----------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML config and apply dotted overrides.

    Raises: ConfigError if the file is missing, is not YAML, or says something unknown or impossible.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config at '{path}'; the ones that come with the project are in jobs/configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"'{path}' must be a mapping of keys, got {type(raw).__name__}")
    for key, value in (overrides or {}).items():
        _set_dotted(raw, key, value)
    config = parse_config(raw)
    config.expand_variants()  # a wrong variant is told now, not after an hour of extraction
    return config


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a raw mapping. Raises: ConfigError with one line per fault."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(e)) for e in error.errors())) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=c` into a dotted key and a YAML value. Raises: ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, got '{text}'; e.g. --set training.epochs=5")
    return key.strip(), yaml.safe_load(value)


def fingerprint(value: Any, length: int = 16) -> str:
    """Hex digest of any JSON-able value or config section; equal content gives equal digests on every machine."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of the config as (dotted key, default, description): the source of the CLI's help and of the docs."""
    for name, field in section.model_fields.items():
        default = (
            "required" if field.is_required() else json.dumps(_plain(field.get_default(call_default_factory=True)))
        )
        children = list(_sections(field.annotation))
        yield f"{prefix}{name}", default if not children or field.is_required() else "", field.description or ""
        for mark, child in children:
            yield from describe_fields(child, f"{prefix}{name}{mark}.")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _sections(annotation: Any, mark: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The sections inside a field's type, with the mark that its key takes (`[]` in lists, `.<name>` in mappings)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        name = annotation.model_fields.get("name")
        chosen = get_args(name.annotation) if name is not None else ()
        yield mark + (f"({chosen[0]})" if len(chosen) == 1 else ""), annotation
        return
    origin = get_origin(annotation)
    inner = "[]" if origin is tuple else ".<name>" if origin is dict else ""
    for part in get_args(annotation):
        yield from _sections(part, mark + inner)


def _set_dotted(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = raw
    for part in parents:
        child = _child(node, part, dotted)
        if child is None or isinstance(child, str):  # absent, or a bare name that now gets options
            child = {} if child is None else {"name": child}
            _assign(node, part, child)
        node = child
    _child(node, last, dotted)
    _assign(node, last, value)


def _child(node: Any, part: str, dotted: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    raise ConfigError(f"cannot set '{dotted}': '{part}' is not inside a mapping or list here")


def _assign(node: Any, part: str, value: Any) -> None:
    node[int(part) if isinstance(node, list) else part] = value


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: where, what, and for an unknown key the nearest known one."""
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return f"unknown key '{where}': {nearest(str(key), _known_keys(parents))}"
    if error["type"] == "missing":
        return f"'{where}' is missing"
    if error["type"] == "union_tag_invalid":
        return f"{where}: unknown name '{error['ctx']['tag']}': known: {error['ctx']['expected_tags']}"
    got = error.get("input")
    shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) else ""
    return (
        f"{where}: {error['msg'].removeprefix('Value error, ')}{shown}"
        if where
        else error["msg"].removeprefix("Value error, ")
    )


def _known_keys(parents: list[Any]) -> list[str]:
    """The fields of the section found by walking `parents` (which may hold list indices, mapping keys and union tags)."""
    section: type[Section] = Config
    candidates: list[type[Section]] = [Config]
    for part in parents:
        fields = [c.model_fields[part] for c in candidates if isinstance(part, str) and part in c.model_fields]
        if fields:
            candidates = [s for f in fields for _, s in _sections(f.annotation)]
        else:  # an index, a mapping's key or a union's tag: narrow by tag where it is one
            candidates = [c for c in candidates if _tag(c) == part] or candidates
    return sorted({name for c in candidates or [section] for name in c.model_fields})


def _tag(section: type[Section]) -> str | None:
    name = section.model_fields.get("name")
    values = get_args(name.annotation) if name is not None else ()
    return values[0] if len(values) == 1 else None
