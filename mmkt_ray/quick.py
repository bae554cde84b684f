"""A first answer on anybody's data: the run's config with few rows, few steps and no studies."""

from __future__ import annotations

from typing import Any

from mmkt_ray.config import Config
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards

ROWS = 600  # of all shards together
STEPS, LR = 150, 3e-3
CNN_EPOCHS = 2


def quick(config: Config) -> Config:
    """The same question asked quickly, in a run folder of its own, `<name>-quick`:
    one fused model, each modality alone.

    Read are the first ROWS rows, the same number of each shard:
    where a file is sorted by class, some classes are not seen.
    Raises: DataError where a source has no shards.
    """
    rows_each = max(1, ROWS // len(list_shards(ReadingPlan.of(config))))
    overrides: dict[str, Any] = {
        "name": f"{config.name}-quick",
        "variants": {},
        "model.experts": False,
        "training": {"auto": [], "steps": STEPS, "epochs": 1, "lr": LR, "batch_size_per_worker": 64},
        "evaluation.studies": [],
        "evaluation.baselines": False,
        "evaluation.bootstrap_samples": 200,
        "extract.num_actors": 1,
    }
    for number, source in enumerate(config.samples.sources):
        overrides[f"samples.sources.{number}.limit"] = min(source.limit or rows_each, rows_each)
    for name, modality in config.modalities.items():
        if "epochs" in type(modality.encoder).model_fields:
            overrides[f"modalities.{name}.encoder.epochs"] = min(modality.encoder.epochs, CNN_EPOCHS)  # type: ignore[attr-defined]
    return config.with_overrides(overrides)
