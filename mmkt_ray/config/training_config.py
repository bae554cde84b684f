"""How models are fitted and evaluated, and how shards stream."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmkt_ray.errors import ConfigError, nearest, unknown_name
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.section import Once, Section


class ObjectiveConfig(Section):
    """The number on val by which epochs and candidates are compared."""

    task: str | None = Field(
        None, description="the task; null: all tasks. A model without it: the default metric of its own"
    )
    metric: str | None = Field(
        None,
        description="any metric of the task's kind in metrics.json, e.g. accuracy, balanced_accuracy, macro_recall, "
        "auroc, log_loss; precision, recall, f1 and average_precision are a binary task's positive class; null: "
        "macro_f1 of classes, r2 of numbers",
    )
    over: Literal["mean", "worst"] = Field("mean", description="of several tasks: their mean, or the worst of them")
    split: Literal["val"] = Field("val", description="test is for telling the result, once")

    def check(self, where: str, kinds: Mapping[str, TaskKind], tasks: Collection[str]) -> None:
        """kinds: of all tasks; tasks: the model's. Raises: ConfigError for an unknown task,
        or a metric that its kind lacks."""
        if self.task is not None and self.task not in kinds:
            raise ConfigError(f"{where}.task: unknown task '{self.task}': {nearest(self.task, kinds)}")
        if self.metric is None:
            return
        for task in [self.task] if self.task is not None else tasks:
            known = kinds[task].metrics
            if self.metric not in known:
                raise ConfigError(
                    f"{where}.metric: '{self.metric}' is no metric of '{task}', a {kinds[task].name} task: "
                    f"{nearest(self.metric, known)}"
                )


class AugmentConfig(Section):
    """Augmentation of features while training."""

    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of a text's terms that is left out; sparse text features only"
    )
    noise: float = Field(
        0.0, ge=0, description="standard deviation of Gaussian noise on dense features, which are at unit scale"
    )
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta distribution that mixes pairs of rows; 0: none")


class TransferConfig(Section):
    """What this model takes over from models that are trained already;
    each is named as a variant, or is a model folder."""

    init: dict[str, str] = Field(
        default_factory=dict,
        description="modality -> model whose input stage and towers of that modality start this one's",
    )
    tuning: Literal["finetune", "frozen", "gradual"] = Field(
        "finetune", description="what was taken over is trained on, kept, or unfrozen level by level from the top"
    )
    teachers: Annotated[tuple[str, ...], Once] = Field(
        (), description="models whose mean prediction this one learns to match (distillation)"
    )
    distill_weight: float = Field(
        0.5, ge=0, le=1, description="share of the distillation loss; the rest is the labels'"
    )
    temperature: float = Field(2.0, gt=0, description="softens the teachers' and the student's predictions")


CHOSEN = (  # what `training.auto` may choose: dotted keys of the config
    "training.lr",
    "training.weight_decay",
    "training.label_smoothing",
    "training.steps",
    "training.batch_size_per_worker",
    "model.dropout",
    "model.feature_dropout",
    "model.modality_dropout",
)


class TrainingConfig(Section):
    """How the model is fitted."""

    auto: Annotated[tuple[str, ...], Once] = Field(
        (),
        description="settings that are chosen by data, see docs/methods.md: by default all of "
        f"{', '.join(CHOSEN)} that the config does not give; [] or false: none, what is not given has its default "
        "here",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**53, description="seed of initialisation, batches and dropout; null: the run's"
    )
    epochs: int = Field(30, ge=1, description="passes over the train split at most")
    steps: int | None = Field(
        None,
        ge=1,
        description="steps of the optimiser at least, rounded up to whole epochs; null: as many as `epochs` take",
    )
    batch_size_per_worker: int = Field(256, ge=1, description="samples per step on each worker")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (AdamW, linear warm-up, cosine decay)")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    l2: float | None = Field(
        None,
        gt=0,
        description="penalty of a linear model (num_levels 0): weight of the squared weights against the summed "
        "losses, 1 / scikit-learn's C; null: chosen by cross-validation",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    label_frac: float = Field(
        1.0, gt=0, le=1, description="share of each task's train labels that is used, the same share of each class"
    )
    class_weights: Literal["balanced"] | None = Field(
        None, description="balanced: weight classes by inverse train frequency"
    )
    resample: Literal["balanced"] | None = Field(
        None, description="balanced: draw rows so that every class of every task comes up about equally often"
    )
    generate: Literal["smote", "mixup"] | None = Field(
        None,
        description="synthetic rows for rare classes: smote between neighbours of a class, mixup between any two of "
        "its rows",
    )
    logit_adjustment: float = Field(
        0.0, ge=0, description="times the log of the class frequencies added to the logits in training"
    )
    balance: Literal["ogm_ge", "gradient_blending", "mmpareto"] | None = Field(
        None, description="balance between modalities, so that the faster one does not hold up the others"
    )
    task_weighting: Literal["sum", "uncertainty", "gradnorm"] = Field(
        "sum", description="how the tasks' losses are weighted"
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="augmentation of features")
    transfer: TransferConfig = Field(TransferConfig(), description="knowledge taken over from other models")
    exclude: str | None = Field(
        None,
        description="Parquet file whose column sample_id names train rows to leave out; its path from the current "
        "folder",
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="what the best epoch is chosen by")
    patience: int = Field(
        0,
        ge=0,
        description="stop after this many epochs without a better validation score; 0: never; the best epoch is kept",
    )
    num_workers: int = Field(1, ge=1, description="Ray Train workers; 1 runs in this process without ceremony")

    @model_validator(mode="after")
    def _known_settings(self) -> TrainingConfig:
        for key in self.auto:
            if key not in CHOSEN:
                raise unknown_name("setting of training.auto", key, CHOSEN)
        return self

    @model_validator(mode="after")
    def _one_answer_to_imbalance(self) -> TrainingConfig:
        chosen = [name for name in ("class_weights", "resample", "logit_adjustment") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} each make up for the class frequencies; together rare classes count twice: "
                "keep one"
            )
        return self

    def check_combinations(self, inputs: Mapping[str, tuple[str, ...]], kinds: Mapping[str, TaskKind]) -> None:
        """inputs: task -> the modalities that the model reads for it; kinds: of all tasks. Raises: ConfigError for
        what makes no sense, or has no meaning for a kind of task."""
        for task in inputs:
            for setting, why in kinds[task].cannot.items():
                if getattr(self, setting):
                    raise ConfigError(
                        f"training.{setting}: '{task}' is a {kinds[task].name} task, {why}: leave it out, or leave "
                        "the task out of model.tasks"
                    )
        if self.balance and max(map(len, inputs.values())) < 2:
            raise ConfigError(
                f"training.balance: {self.balance} balances the modalities of a task, and no task of the model reads "
                "two: leave it out"
            )
        if self.task_weighting == "gradnorm" and len(inputs) < 2:
            raise ConfigError(
                "training.task_weighting: gradnorm balances several tasks, and the model has one: use sum"
            )


class TransferMatrixConfig(Section):
    """What `mmkt transfer` fits: sources against targets. A node is written `image:category`,
    `image+text:category`."""

    sources: Annotated[tuple[str, ...] | None, Once] = Field(
        None, description="nodes whose knowledge is tried; null: all"
    )
    targets: Annotated[tuple[str, ...] | None, Once] = Field(
        None, description="nodes that are to gain from it; null: all"
    )
    methods: Annotated[tuple[Literal["finetune", "frozen", "gradual", "distill", "joint"], ...], Once] = Field(
        ("finetune", "frozen", "distill", "joint"), description="ways to transfer, each tried where it applies"
    )
    label_fracs: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Once] = Field(
        (0.01, 0.1, 1.0), min_length=1, description="shares of the target's train labels; the source has all of its own"
    )
    seeds: int = Field(3, ge=1, description="runs of each cell")


class EvaluationConfig(Section):
    """How results are reported."""

    bootstrap_samples: int = Field(1000, ge=100, description="resamples of the test rows for each interval")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="coverage of the intervals")
    calibrate: bool = Field(
        True, description="fit one temperature per task on held-out rows, so that probabilities mean what they say"
    )
    studies: Annotated[tuple[Literal["insight", "scores", "suspects", "missing"], ...], Once] = Field(
        ("insight", "scores", "suspects", "missing"),
        description="what a run looks into beside the comparison: what each modality knows; how well features "
        "promised to serve; rows that contradict their label; scores of the main model when modalities go missing",
    )
    baselines: bool = Field(True, description="majority class and logistic regression, each modality and concatenated")


class ExtractConfig(Section):
    """How raw shards stream through the encoders."""

    chunk_rows: int = Field(1024, ge=1, description="rows of one unit of work and of one Parquet part")
    chunk_bytes: int = Field(
        32_000_000, ge=1, description="raw bytes of one unit of work at most (one sample may exceed it)"
    )
    feature_dtype: Literal["float32", "float16"] = Field(
        "float32", description="type of dense features in the store; float16 halves it"
    )
    encode_batch_size: int = Field(256, ge=1, description="samples per forward pass; fixed, the last one is padded")
    num_actors: int | None = Field(
        None, ge=1, description="encoder actors; null: one per GPU, or one per two logical CPUs"
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of each encoder actor, 0.25: four share one, for small networks; null: 1 if there are any, "
        "else 0",
    )

    @model_validator(mode="after")
    def _check_gpus(self) -> ExtractConfig:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus must be a share of one GPU or a whole number, got {self.num_gpus:g}")
        return self
