"""Selected features against scikit-learn's scores, however rows are cut into shards."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn import feature_selection

from mmkt_ray.config import parse_config
from mmkt_ray.encoders.build import build_reducer, load_reducer, save_fitted
from mmkt_ray.encoders.select import SCORES, SelectReducer
from mmkt_ray.errors import ConfigError, DataError

Chunks = list[tuple[Any, np.ndarray]]


def data(sparse: bool) -> tuple[Any, np.ndarray]:
    """Features (300, 40), of which every fourth one depends on the class, and classes."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    features = rng.normal(size=(300, 40)) + (labels == "b")[:, None] * (np.arange(40) % 4 == 0)
    features[:, 7] = 1.5  # constant
    if sparse:
        features = np.where(features > 0.8, features, 0)
    return (sp.csr_matrix(features.astype(np.float32)) if sparse else features.astype(np.float32)), labels


def select(by: str, dim: int, chunks: Chunks) -> Any:
    section: Any = SelectReducer.Section
    reducer = build_reducer(section(by=by, task="t", dim=dim))
    while not reducer.fitted:
        parts = [read_only(reducer.partial(features, labels.tolist())) for features, labels in chunks]
        reducer.finish(read_only(reducer.merge([read_only(reducer.merge(parts[:2])), *parts[2:]])))
    return reducer


def read_only(sums: Any) -> Any:
    """As what comes from Ray's object store."""
    arrays = [sums.num_rows, sums.squares]
    arrays += [sums.sums.data, sums.sums.indices, sums.sums.indptr] if sp.issparse(sums.sums) else [sums.sums]
    for array in arrays:
        array.flags.writeable = False
    return sums


def cut(features: Any, labels: np.ndarray, *at: int) -> Chunks:
    return [(features[a:b], labels[a:b]) for a, b in zip([0, *at], [*at, len(labels)], strict=True)]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("by", SCORES)
def test_scores_are_scikit_learns(by: str, sparse: bool, tmp_path: Any) -> None:
    """Catches a score of another formula, a class that a shard lacks, sparse features that become dense;
    a lossy state."""
    features, labels = data(sparse)
    if by == "chi2" and not sparse:
        features = np.abs(features)
    order = np.argsort(labels, kind="stable")  # shards with one class only
    features, labels = features[order], labels[order]
    reducer = select(by, 8, cut(features, labels, 50, 200, 201))
    if by == "mutual_info":
        discrete = (features != 0).toarray() if sparse else reducer.bins(features)
        scores = feature_selection.mutual_info_classif(discrete, labels, discrete_features=True)
    else:
        scores = getattr(feature_selection, {"chi2": "chi2", "anova": "f_classif"}[by])(
            features.astype(np.float64), labels
        )[0]
    scores = np.nan_to_num(scores, nan=-1)
    best = np.sort(np.argsort(-scores, kind="stable")[:8])
    tensors, _ = reducer.state()
    np.testing.assert_array_equal(tensors["columns"], best)
    np.testing.assert_allclose(tensors["scores"], scores[best], rtol=1e-6)
    chosen = reducer.encode(features)
    assert sp.issparse(chosen) == reducer.sparse == sparse
    np.testing.assert_array_equal(
        chosen.toarray() if sparse else chosen, (features.toarray() if sparse else features)[:, best]
    )
    reducer.name_features([f"term{i}" for i in range(40)])
    card = save_fitted(reducer, SelectReducer.Section(by=by, task="t", dim=8), str(tmp_path))  # type: ignore[arg-type]
    named = card.found["selected"]
    assert named[0] == [f"term{scores.argmax()}", pytest.approx(scores.max(), rel=1e-5)]
    again = load_reducer(str(tmp_path))
    assert (again.sparse, again.dim) == (sparse, 8)
    assert abs(again.encode(features) - chosen).max() == 0


def test_bins_of_dense_features_hold_about_as_many() -> None:
    """Catches edges in which all values fall into one bin, of which nothing can be learnt."""
    features, labels = data(False)
    reducer = select("mutual_info", 1, cut(features * 1000 + 5000, labels, 100))
    shares = np.bincount(reducer.bins(features * 1000 + 5000)[:, 1], minlength=8) / 300
    assert (shares > 0.05).all()
    assert (shares < 0.25).all()


def test_what_cannot_be_selected_is_told() -> None:
    """Catches chi2 of negative numbers, one class, more features than there are."""
    features, labels = data(False)
    with pytest.raises(DataError, match="chi2 is of counts, and features go down to -"):
        select("chi2", 3, cut(features, labels, 10))
    with pytest.raises(DataError, match=r"needs two classes of 't' in the train split, got \['a'\]"):
        select("anova", 3, cut(features, np.full(300, "a"), 10))
    with pytest.raises(DataError, match="select of dim=41 is impossible, there are 40 features"):
        select("anova", 41, cut(features, labels, 10))
    features[3, 3] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        select("anova", 3, cut(features, labels, 10))


def test_the_task_must_be_one_of_classes() -> None:
    """Catches a selection for a task that is misspelt or has several classes a row;
    sparse features to be predicted."""
    source = {"reader": "parquet", "path": "a", "columns": {"text": "t", "label": "l", "tags": "m"}}
    reduce = {"name": "select", "by": "chi2", "task": "label", "dim": 2}
    raw: dict[str, Any] = {
        "name": "t",
        "samples": {"sources": [source]},
        "modalities": {"text": {"kind": "text", "encoder": "tfidf", "reduce": reduce}},
        "tasks": {"label": {}, "tags": {"kind": "multilabel"}},
    }
    config = parse_config(raw)
    with pytest.raises(ConfigError, match=r"reduce\.task: unknown task 'lable': did you mean 'label'"):
        config.with_overrides({"modalities.text.reduce.task": "lable"})
    with pytest.raises(ConfigError, match="'tags' must be a multiclass or binary task"):
        config.with_overrides({"modalities.text.reduce.task": "tags"})
    table = {"kind": "table", "encoder": {"name": "table", "sparse": True}}
    columns = {**source["columns"], "table": ["x"]}  # type: ignore[dict-item]
    both = {"samples.sources.0.columns": columns, "modalities.table": table, "model.missing": "generate"}
    with pytest.raises(ConfigError, match=r"cannot predict sparse features: add modalities\.table\.reduce"):
        config.with_overrides(both)
    dense = {"modalities.table.encoder.sparse": False}
    with pytest.raises(ConfigError, match=r"cannot predict sparse features: add modalities\.text\.reduce"):
        config.with_overrides(both | dense)
    config.with_overrides(both | dense | {"modalities.text.reduce": {"name": "svd", "dim": 2}})
