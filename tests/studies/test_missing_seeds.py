"""Missing-modality curves over training seeds, and what `repeat` tells of a multilabel task."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from mmkt_ray import storage
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.scoring.seeds import further_seed_scores
from mmkt_ray.studies.missing_results import MissingCurves
from mmkt_ray.studies.missing_seeds import missing_over_seeds
from mmkt_ray.studies.repeats import repeat
from mmkt_ray.studies.seeds_results import seeds_table
from tests.evaluation.runs import KINDS, SINGLES, draw_samples, make_config, write_store
from tests.labels import labels_of

pytestmark = pytest.mark.slow

SEEDS = [0, 1]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """A run of two seeds: its config, stores, folder and what `repeat` said."""
    folder = tmp_path_factory.mktemp("seeds")
    variants = {**SINGLES, "concat": {}}
    config = make_config(folder, variants, {"tags": "multilabel", "warm": "binary"}, training__epochs=3)
    store = write_store(str(folder / "store"), draw_samples(300), tasks={t: KINDS[t] for t in ("tags", "warm")})
    stores = {name: store for name in variants}
    return config, stores, str(folder / "run"), repeat(config, stores, str(folder / "run"), len(SEEDS))


def test_the_ends_are_the_means_of_the_models_of_all_seeds(repeated):
    """Catches curves of one seed's model, references of another seed or modality, and hidden rows that stay."""
    config, stores, uri, _ = repeated
    found = missing_over_seeds(config, stores, uri, SEEDS)
    written = storage.read_json(storage.join(uri, "missing_seeds.json"))
    assert found == {name: MissingCurves.from_dict(curves, "missing_seeds.json") for name, curves in written.items()}
    assert set(found) == {"concat"}
    models = found["concat"].about.models
    assert {f"seeds/{seed}/{name}" for seed in SEEDS for name in ("concat", "image", "text")} == set(models)
    assert all(models.values()), "a model without its fingerprint"
    table = stores["concat"].table()
    rows = table.take(np.flatnonzero((table.split == "test") & table.present["image"] & table.present["text"]))

    def accuracy(variant, drop):
        models = [load_model(storage.join(uri, "seeds", str(seed), variant))[0] for seed in SEEDS]
        return np.mean(
            [(predict_table(m, rows, drop=drop)["warm"].argmax(1) == rows.labels["warm"].values).mean() for m in models]
        )

    curve, reference, difference = (
        part["text"]["warm"].by_metric["accuracy"]
        for part in (found["concat"].curves, found["concat"].reference, found["concat"].difference)
    )
    assert curve[0][0] == pytest.approx(accuracy("concat", []))
    assert curve[-1][0] == pytest.approx(accuracy("concat", ["text"]))
    assert reference[-1][0] == pytest.approx(accuracy("image", []))
    for d, own, other in zip(difference, curve, reference, strict=True):
        assert d[0] == pytest.approx(own[0] - other[0])


def test_repeats_of_a_multilabel_task_tell_its_own_scores(repeated):
    """Catches averages that differ from those of `mmkt evaluate`, scores of other rows,
    and a gain of another metric."""
    _, stores, uri, result = repeated
    found = result.tasks["tags"]
    table = stores["concat"].table()
    both = table.present["image"] & table.present["text"] & table.labels["tags"].known
    rows = table.take(np.flatnonzero(both & (table.split == "test")))
    by_seed = []
    for seed in SEEDS:
        model, _ = load_model(storage.join(uri, "seeds", str(seed), "concat"))
        proba = predict_table(model, rows)["tags"]
        by_seed.append(Multilabel().scores(rows.labels["tags"], proba, rows.class_names["tags"]))
    concat = found.models["concat"]
    for metric in Multilabel.seed_metrics:
        assert concat[metric]["value"] == pytest.approx(np.mean([scores[metric] for scores in by_seed]))
        assert concat[metric]["low"] <= concat[metric]["value"] <= concat[metric]["high"]
        gain = concat[metric]["value"] - found.models[found.reference][metric]["value"]
        assert concat.versus[metric]["value"] == pytest.approx(gain)
    assert "average precision" in seeds_table(result)
    assert not set(Multilabel.seed_metrics) & set(result.tasks["warm"].models["concat"].intervals)


def test_average_precision_counts_ties_together_and_leaves_out_classes_without_a_sample():
    """Catches ties in the order of the rows, and a class that nobody has counted as nothing found."""
    rng = np.random.default_rng(0)
    labels = (rng.random((80, 4)) < [0.5, 0.3, 0.1, 0.0]).astype(np.int8)
    proba = (rng.integers(0, 5, (1, 80, 4)) / 4 * 0.5 + 0.3 * labels).astype(np.float32)
    drawn = further_seed_scores(labels_of(labels), [proba], 5, seed=0)["macro_average_precision"]
    expected = np.mean([average_precision_score(labels[:, c], proba[0, :, c]) for c in range(3)])
    assert drawn[0, 0] == pytest.approx(expected)
