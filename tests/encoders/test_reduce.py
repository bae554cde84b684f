"""Reducers: equal to scikit-learn's, however the fit is split, and without ever making wide sparse features dense."""

import json
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from scipy.sparse.linalg import svds
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

from mmkt_ray.encoders.build import build_reducer
from mmkt_ray.encoders.catalog import REDUCERS
from mmkt_ray.encoders.encoder import Mergeable
from mmkt_ray.encoders.reduce import EXACT_WIDTH
from mmkt_ray.errors import DataError


def build(name, dim=None):
    return build_reducer(REDUCERS[name].Section(dim=dim))


def chunks_of(features, rows=64):
    return [features[i : i + rows] for i in range(0, features.shape[0], rows)]


def fit(reducer, chunks):
    """As a cluster does it: workers hold pickled copies, and make the statistics."""
    num_passes = 0
    while not reducer.fitted:
        copy = pickle.loads(pickle.dumps(reducer))
        parts = pickle.loads(pickle.dumps([copy.partial(chunk) for chunk in chunks]))
        assert reducer.finish(reducer.merge(parts)) is None
        num_passes += 1
    assert num_passes == reducer.num_passes
    return reducer


def components(reducer):
    return reducer.state()[0]["components"].astype(np.float64)


def smallest_cosine(reducer, reference):
    """Of the principal angles between our subspace and the one spanned by the rows of `reference` (K, D)."""
    return np.linalg.svd(reference @ components(reducer), compute_uv=False).min()


def correlated(num_rows=500, width=40, offset=100.0, seed=0):
    """Dense features far from zero, with a decaying spectrum."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((width, width)) * np.geomspace(1, 0.01, width)[:, None]
    return (generator.standard_normal((num_rows, width)) @ mixing + offset).astype(np.float32)


def skewed_sparse(num_rows, width, per_row, seed=0):
    """Sparse features like word counts: few columns are frequent, most are rare."""
    generator = np.random.default_rng(seed)
    columns = (width * generator.random((num_rows, per_row)) ** 3).astype(np.int64)
    rows = np.repeat(np.arange(num_rows), per_row)
    values = generator.random(num_rows * per_row).astype(np.float32)
    return sp.csr_matrix((values, (rows, columns.ravel())), shape=(num_rows, width))


def test_pca_equals_sklearn():
    """Second moments that cancel far from zero, a missing centring, other signs than scikit-learn's."""
    features = correlated(offset=1000.0)
    ours = fit(build("pca", 12), chunks_of(features))
    reference = PCA(12, svd_solver="full").fit(features.astype(np.float64))
    np.testing.assert_allclose(components(ours).T, reference.components_, atol=2e-5)
    np.testing.assert_allclose(ours.encode(features), reference.transform(features.astype(np.float64)), atol=2e-3)
    assert ours.encode(features).dtype == np.float32
    assert ours.dim == 12
    assert ours.state()[1]["kept_frac"] == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-6)


def test_standardizer_equals_sklearn():
    """A division by zero for a constant feature, a sample instead of a population variance, cancellation."""
    features = correlated(offset=1e4)
    features[:, 3], features[:, 5] = 0.1, 0
    ours, reference = fit(build("standardize"), chunks_of(features)), StandardScaler().fit(features.astype(np.float64))
    np.testing.assert_allclose(ours.encode(features), reference.transform(features.astype(np.float64)), atol=1e-4)
    assert ours.encode(features).dtype == np.float32
    assert ours.dim == features.shape[1]


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
def test_narrow_svd_equals_sklearn(kind):
    """A centring that TruncatedSVD does not do, or a sparse path that differs from the dense one."""
    features = correlated(offset=0.5)
    ours = fit(build("svd", 8), chunks_of(kind(features)))
    reference = TruncatedSVD(8, algorithm="arpack", random_state=0).fit(features.astype(np.float64))
    assert ours.num_passes == 1
    np.testing.assert_allclose(components(ours).T, reference.components_, atol=1e-5)
    np.testing.assert_allclose(ours.encode(kind(features)), reference.transform(features), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix], ids=["dense", "sparse"])
def test_wide_svd_equals_sklearn(kind):
    """Too few passes or a wrong recurrence: some of the singular vectors are not the leading ones."""
    features = skewed_sparse(700, EXACT_WIDTH + 500, 30)
    features = kind(features.toarray())
    ours = fit(build("svd", 10), chunks_of(features, 200))
    reference = TruncatedSVD(10, algorithm="arpack", random_state=0).fit(features.astype(np.float64))
    assert smallest_cosine(ours, reference.components_) >= 0.9999
    np.testing.assert_allclose(components(ours).T @ components(ours), np.eye(10), atol=1e-5)
    np.testing.assert_allclose(ours.encode(features), reference.transform(features), atol=2e-3)


@pytest.mark.slow
def test_svd_of_newsgroups_tfidf(data_dir):
    """A method that suits steep spectra only: TF-IDF's 100th and 101st singular values differ by less than 1 %."""
    texts = []
    with tarfile.open(data_dir / "20news-bydate.tar.gz", "r|gz") as archive:
        for member in archive:
            if member.isfile():
                texts.append(archive.extractfile(member).read().decode("latin-1"))
    features = sp.csr_matrix(TfidfVectorizer(dtype=np.float32).fit_transform(texts[::10]))
    ours = fit(build("svd", 100), chunks_of(features, 1024))
    reference = TruncatedSVD(100, algorithm="arpack", random_state=0).fit(features.astype(np.float64))
    assert smallest_cosine(ours, reference.components_) >= 0.9999


@pytest.mark.slow
def test_wide_sparse_features_are_never_dense():
    """`toarray()` or a D x D matrix anywhere: 16 GB of dense features, or 320 GB of second moments."""
    features = skewed_sparse(20_000, 200_000, 20)
    tracemalloc.start()
    ours = fit(build("svd", 5), chunks_of(features, 5000))
    ours.encode(features)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1e9
    best = (svds(features.astype(np.float64), 5, return_singular_vectors=False) ** 2).sum() / features.power(2).sum()
    assert ours.state()[1]["kept_frac"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("name", "dim"), [("pca", 5), ("svd", 5), ("standardize", None)])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_merge_is_associative(name, dim, wide):
    """Statistics that depend on how shards are grouped, on their order, or on empty shards."""
    features = skewed_sparse(400, EXACT_WIDTH + 200, 20) if wide and name == "svd" else correlated(400)
    reducer = build(name, dim)
    bounds = [(0, 10), (10, 200), (200, 230), (230, 400)]
    a, b, c, d = (reducer.partial(features[start:stop]) for start, stop in bounds)
    empty, merge = reducer.partial(features[:0]), reducer.merge
    expected = vars(reducer.partial(features))
    for tree in (
        merge([a, b, c, d]),
        merge([merge([a, b]), merge([c, d])]),
        merge([d, merge([empty, merge([c, a])]), b]),
        merge([merge([merge([empty, empty]), a]), merge([b, merge([c, d])])]),
    ):
        for field, value in vars(tree).items():
            np.testing.assert_allclose(value, expected[field], rtol=1e-4, atol=1e-4, err_msg=field)


@pytest.mark.parametrize(("name", "dim"), [("pca", 4), ("svd", 4), ("standardize", None)])
def test_state_round_trip(name, dim):
    """A fitted reducer that changes on its way through safetensors and JSON."""
    features = correlated(100, 10)
    reducer = fit(build(name, dim), [features])
    tensors, rest = reducer.state()
    loaded = build(name, dim)
    loaded.load_state(load_tensors(save_tensors(tensors)), json.loads(json.dumps(rest)))
    assert loaded.dim == reducer.dim
    np.testing.assert_array_equal(loaded.encode(features), reducer.encode(features))


def test_fit_is_deterministic():
    """A random start that differs between processes: shards would be multiplied by different blocks."""
    chunks = chunks_of(skewed_sparse(300, EXACT_WIDTH + 100, 20), 100)
    np.testing.assert_array_equal(components(fit(build("svd", 5), chunks)), components(fit(build("svd", 5), chunks)))


def test_svd_of_fewer_rows_than_the_block_has_columns():
    """Rounding errors blown up to singular vectors once the Krylov space is all there is."""
    features = skewed_sparse(15, EXACT_WIDTH + 100, 40)
    ours = fit(build("svd", 14), chunks_of(features, 4))
    reference = TruncatedSVD(14, algorithm="arpack", random_state=0).fit(features.astype(np.float64))
    assert smallest_cosine(ours, reference.components_) >= 0.9999


def test_more_dimensions_than_rank_is_an_error():
    """Noise directions handed out as features."""
    low_rank = correlated(50, 6) @ np.ones((6, 20), np.float32)
    cases = [
        ("pca", correlated(5, 20), 5, "have rank 4"),
        ("pca", correlated(50, 20), 21, "have rank 20"),
        ("svd", correlated(5, 20), 6, "have rank 5"),
        ("svd", low_rank, 2, "have rank 1; set reduce.dim to 1 or less"),
        ("svd", skewed_sparse(15, EXACT_WIDTH + 100, 40), 16, "have rank 15"),
        ("svd", sp.vstack([skewed_sparse(15, EXACT_WIDTH + 100, 40)] * 3).tocsr(), 16, "have rank 15"),
    ]
    for name, features, dim, message in cases:
        with pytest.raises(DataError, match=message):
            fit(build(name, dim), [features])


def test_wide_sparse_features_for_centring_reducers_is_an_error():
    """Memory that runs out where `svd` would have done."""
    for reducer in (build("pca", 5), build("standardize")):
        with pytest.raises(DataError, match=r"use `reduce: \{name: svd"):
            reducer.partial(skewed_sparse(10, EXACT_WIDTH + 1, 5))


@pytest.mark.parametrize(("name", "dim"), [("pca", 2), ("svd", 2), ("standardize", None)])
def test_unusable_input_is_an_error(name, dim):
    """NaN components, or numpy's words for a wrong width, an empty train split, a forgotten fit."""
    features = correlated(20, 5)
    reducer = build(name, dim)
    for use in (lambda: reducer.encode(features), reducer.state):
        with pytest.raises(DataError, match="not fitted"):
            use()
    with pytest.raises(DataError, match="no features to fit"):
        reducer.merge([])
    broken = features.copy()
    broken[3, 1] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        fit(build(name, dim), [features, broken])
    with pytest.raises(DataError, match="of width 5, got shape"):
        fit(reducer, [features]).encode(features[:, :4])
    with pytest.raises(DataError, match=r"have rank 0|no features to fit"):
        fit(build(name, dim), [features[:0]])


def test_choices():
    """An entry under another name than its section's, or one that can't be fitted."""
    for name, kind in REDUCERS.items():
        options = {"standardize": {}, "select": {"dim": 3, "by": "anova", "task": "t"}}.get(name, {"dim": 3})
        reducer = kind(kind.Section(**options))
        assert type(reducer) is kind
        assert kind.Section.model_fields["name"].default == name
        assert isinstance(reducer, Mergeable)
