"""Missing-modality curves of models from several seeds: which loss is luck of the training.

Each draw of hidden rows asks the models of another seed, the one in question and the single-modality models of the
same seed beside it. So the intervals hold the rows of the split, those that happen to be hidden, and the seed; they
are those of one model, not of the mean over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table, score_rows
from mmkt_ray.inference.rows import readable
from mmkt_ray.models import Predictor
from mmkt_ray.scoring import provenance
from mmkt_ray.studies.missing import Draws, HiddenPredictions, Single, Subject, curves_of, predict_hidden
from mmkt_ray.studies.missing_results import MissingCurves


def missing_over_seeds(
    config: Config, stores: Mapping[str, Store], run_uri: str, seeds: Sequence[int]
) -> dict[str, MissingCurves]:
    """Of every variant of several modalities what `missing_curves` says, but for the patterns, on the test split.

    The models are those that `repeat` left in `<run>/seeds/<seed>/<variant>`. Written to `<run>/missing_seeds.json`.
    Returns: variant -> result. Raises: DataError if a model is not there.
    """
    variants = config.expand_variants()
    fused = [name for name, variant in variants.items() if len(variant.model_modalities) > 1]
    found = {}
    for name in fused:
        single = {
            n: v for n, v in variants.items() if len(v.model_modalities) == 1 and stores[n].uri == stores[name].uri
        }
        folders = [storage.join(run_uri, "seeds", str(seed)) for seed in seeds]
        models = [_predictions(name, variants[name], single, stores[name], folder) for folder in folders]
        places = [storage.join("seeds", str(seed), n) for seed in seeds for n in (name, *single)]
        about = provenance.about(run_uri, places, [stores[name].manifest.fingerprint])
        subject = Subject(name, "test", variants[name].model_modalities, about)
        draws = Draws.of(config.evaluation, variants[name].seed, num_seeds=len(seeds))
        found[name] = curves_of(subject, models, variants[name], draws)
    storage.write_json(
        storage.join(run_uri, "missing_seeds.json"), {n: curves.to_dict() for n, curves in found.items()}
    )
    return found


def _predictions(
    name: str, config: Config, single: Mapping[str, Config], store: Store, folder: str
) -> dict[str, HiddenPredictions]:
    """Task -> what the variant's model of one seed predicts, and the single-modality models beside it."""
    model, _ = load_model(storage.join(folder, name))
    table = store.table(config.model_modalities, config.model_tasks)
    test = table.take(np.flatnonzero((table.split == "test") & readable(table, config.model_modalities)))
    loaded = {n: load_model(storage.join(folder, n))[0] for n in single}
    best = {}
    for task in config.model_tasks:
        able = {n: m for n, m in loaded.items() if task in single[n].model_tasks}
        singles = [(m, _single(n, able[n], table, test, task, m)) for n in able for m in single[n].model_modalities]
        singles = [(m, s) for m, s in singles if m in config.task_inputs(task)]
        best[task] = dict(sorted(singles, key=lambda pair: pair[1].score))
    return predict_hidden(model, predict_table(model, test), test, config, best)


def _single(name: str, model: Predictor, table: FeatureTable, test: FeatureTable, task: str, modality: str) -> Single:
    """A single-modality model as part of the reference; its score is on val, on test where there is no val row."""
    known = table.labels[task].labelled & table.present[modality]
    val = known & (table.split == "val")
    score = score_rows(model, table, task, val if val.any() else known & (table.split == "test"))
    pred = model.spec.kinds[task].predict(predict_table(model, test)[task])
    return Single(name, float(score.mean()), pred, test.present[modality])
