"""TF-IDF: equal to scikit-learn for any texts and options, however the fit is split, whatever the hashes do."""

import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from sklearn.feature_extraction.text import TfidfVectorizer

from mmkt_ray.encoders import tokens
from mmkt_ray.encoders.encoder import Encoder, Mergeable
from mmkt_ray.encoders.text import MAX_REPEATED, TfidfEncoder
from mmkt_ray.errors import DataError

TEXTS = [
    "The cat sat on the mat; the CAT_2 saw 42 mats, and 7 x-rays.",
    "",
    "Straße, STRASSE, naïve cafe\u0301s: ΟΔΟΣ οδός İstanbul, K\u212aelvin",
    "the quick brown fox, the lazy dog. the end",
    "Привет, мир! привет",
    "\u6f22\u5b57\u304b\u306a \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \u0664\u0662",
    "nul\x00byte a\x00bc  __init__ _ __ \U0001d400\U0001d401 \U0001f600ok\U0001f600",
    "a b c d",
    "cat dog cat dog cat fox\nmat\tmat\x0bmat\x1cmat\x85mat",
]
OPTIONS = [
    {},
    {"lowercase": False},
    {"stop_words": "english"},
    {"lowercase": False, "stop_words": "english", "norm": "l1"},
    {"sublinear_tf": True},
    {"norm": None},
    {"min_df": 2},
    {"max_df": 0.3},
    {"max_features": 5},
    {"max_features": 7, "min_df": 2, "max_df": 0.9, "sublinear_tf": True},
    {"max_features": 10_000},
    {"ngram_range": (1, 2)},
    {"analyzer": "char_wb", "ngram_range": (3, 5), "min_df": 2, "sublinear_tf": True},
    {"analyzer": "char", "lowercase": False},
    {"ngram_range": (2, 3), "stop_words": "english", "max_features": 12},
    {"ngram_range": (1, 3), "lowercase": False, "min_df": 2},
]

PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.text("abAB_09 \u0301\u00df\u0130\u03a3\u212a\u4e2d\U0001d400\x00", max_size=6),
    st.sampled_from(["the ", "The", " cat", "cats ", " ", "\n", "x"]),
)


def build(**options):
    return TfidfEncoder(TfidfEncoder.Section(**options))


def fit(texts, chunk_rows=3, **options):
    encoder = build(**options)
    chunks = [texts[i : i + chunk_rows] for i in range(0, len(texts), chunk_rows)]
    encoder.finish(encoder.merge([encoder.partial(chunk) for chunk in chunks]))
    return encoder


def assert_equal_to_sklearn(encoder, texts, more_texts=(), **options):
    reference = TfidfVectorizer(**options).fit(texts)
    assert encoder.terms == list(reference.get_feature_names_out())
    assert encoder.dim == len(encoder.terms)
    values = [*texts, *more_texts]
    assert_same_features(encoder.encode(values), reference.transform(values))


def assert_same_features(features, expected):
    expected.sort_indices()
    assert features.dtype == np.float32
    assert features.shape == expected.shape
    np.testing.assert_array_equal(features.indptr, expected.indptr)
    np.testing.assert_array_equal(features.indices, expected.indices)
    np.testing.assert_allclose(features.data, expected.data, rtol=1e-6, atol=1e-6)


def as_dict(statistics):
    counts = dict[str, tuple[int, int]]()
    for term, text_count, term_count in zip(*statistics.terms.to_pydict().values(), strict=True):
        others = counts.get(term, (0, 0))
        counts[term] = others[0] + text_count, others[1] + term_count
    return statistics.num_texts, counts


def test_statistics_grow_with_the_vocabulary_alone():
    """Catches statistics of a shard that hold the terms of each of its chunks."""
    encoder = TfidfEncoder(TfidfEncoder.Section())
    part = encoder.partial(TEXTS)
    total = part
    for _ in range(50):
        total = encoder.merge([total, part])
        assert len(total.terms) <= MAX_REPEATED * len(part.terms)
    assert as_dict(total) == (51 * len(TEXTS), {t: (51 * a, 51 * b) for t, (a, b) in as_dict(part)[1].items()})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_sklearn(options):
    """An option that is ignored, or means something else than in scikit-learn."""
    more = ["the cat and an unknown word", "", "ΟΔΟΣ ὈΔΌΣ mats"]
    assert_equal_to_sklearn(fit(TEXTS, **options), TEXTS, more, **options)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=6),
    options=st.sampled_from(OPTIONS),
)
def test_equals_sklearn_on_any_unicode(texts, options):
    """A character that the compiled tokenizer or its UTF-8 decoder sees otherwise than Python's `re`."""
    try:
        TfidfVectorizer(**options).fit(texts)
    except ValueError:
        with pytest.raises(DataError):
            fit(texts, **options)
    else:
        assert_equal_to_sklearn(fit(texts, **options), texts, **options)


def test_every_letter_and_separator():
    """A script whose letters the tokenizer takes for separators, or the reverse: each character between letters."""
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code <= 0xDFFF]
    texts = [" ".join(f"q{c}q" for c in characters[i : i + 4096]) for i in range(0, len(characters), 4096)]
    analyze = TfidfVectorizer(lowercase=False).build_analyzer()
    assert fit(texts, lowercase=False).terms == sorted({term for text in texts for term in analyze(text)})


def test_ties_of_max_features_break_as_in_sklearn():
    """A stable sort, or another order before sorting, where many terms have the same count."""
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in generator.integers(0, 3000, 40)) for _ in range(150)]
    for limit in (10, 100, 1000):
        assert_equal_to_sklearn(fit(texts, max_features=limit), texts, max_features=limit)


@pytest.mark.parametrize("options", [{}, {"ngram_range": (1, 2)}], ids=str)
def test_merge_is_associative_and_commutative(options):
    """Counts that depend on how shards are grouped, on their order, or on empty shards."""
    encoder = build(**options)
    a, b, c, d = (encoder.partial(TEXTS[i::4]) for i in range(4))
    merge, empty = encoder.merge, encoder.partial([])
    flat = merge([a, b, c, d])
    assert as_dict(flat) == as_dict(encoder.partial(TEXTS))
    for tree in (
        merge([merge([a, b]), merge([c, d])]),
        merge([merge([merge([a, b]), c]), d]),
        merge([a, merge([b, merge([c, d])])]),
    ):
        assert tree.terms.equals(flat.terms)
    assert as_dict(merge([d, empty, merge([b, a]), merge([]), c])) == as_dict(flat)
    assert as_dict(pickle.loads(pickle.dumps(flat))) == as_dict(flat)


@pytest.mark.parametrize("mask", [0, 3], ids=["all collide", "most collide"])
def test_colliding_hashes_stay_apart(mask, monkeypatch):
    """Terms merged, or unknown tokens counted as known ones, because their hashes are equal."""
    monkeypatch.setattr(tokens, "HASH_MASK", np.int64(mask))
    generator = np.random.default_rng(1)
    texts = [*TEXTS, *(" ".join(f"w{i}" for i in generator.integers(0, 1500, 100)) for _ in range(40))]
    unknown = ["zebra w1 gnu cats th thee", "w15000 w"]
    assert_equal_to_sklearn(fit(texts, chunk_rows=30), texts, unknown)


def test_many_distinct_terms_in_one_chunk():
    """A table that loses or doubles terms when it grows."""
    texts = [" ".join(f"t{i}" for i in range(start, start + 5000)) for start in range(0, 20_000, 2500)]
    assert_equal_to_sklearn(fit(texts, chunk_rows=100), texts)


def test_texts_without_known_terms():
    """NaN rows from a norm of zero, or rows left out."""
    encoder = fit(TEXTS)
    assert encoder.encode(["unheard of zzz", "", "?!"]).toarray().tolist() == [[0.0] * encoder.dim] * 3
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_encoding_teaches_nothing():
    """Test texts that leak into vocabulary or document frequencies."""
    encoder = fit(TEXTS)
    before, terms = encoder.encode(TEXTS), encoder.terms
    encoder.encode(["entirely new words", "the the the"] * 50)
    assert encoder.terms == terms
    assert (encoder.encode(TEXTS) != before).nnz == 0


@pytest.mark.parametrize("options", [{}, {"ngram_range": (1, 2), "max_features": 9}], ids=str)
def test_state_round_trip(options):
    """A fitted encoder that cannot be saved and loaded, or pickled after use, or changes on the way."""
    encoder = fit(TEXTS, **options)
    features = encoder.encode(TEXTS)
    tensors, rest = encoder.state()
    loaded = build(**options)
    loaded.load_state(load_tensors(save_tensors(tensors)), json.loads(json.dumps(rest)))
    for copy in (loaded, pickle.loads(pickle.dumps(encoder))):
        assert copy.terms == encoder.terms
        assert copy.dim == encoder.dim
        assert (copy.encode(TEXTS) != features).nnz == 0


def test_array_of_objects_as_ray_hands_it_out():
    """A batch column, a numpy array of objects, taken otherwise than a list."""
    values = np.array(TEXTS, dtype=object)
    for options in ({}, {"lowercase": False}, {"ngram_range": (1, 2)}):
        assert (fit(values, **options).encode(values) != fit(TEXTS, **options).encode(TEXTS)).nnz == 0


def test_protocols():
    """A renamed method: the extraction would take the encoder for one that needs no fit."""
    assert isinstance(fit(TEXTS), Encoder)
    assert isinstance(build(), Mergeable)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no term in the 0 texts"),
        (["", "a", "?!"], {}, "no term in the 3 texts"),
        (["the and of"], {"stop_words": "english"}, "stop words only"),
        (["one two"], {"min_df": 2}, "lower min_df"),
        (["one two", "one two"], {"max_df": 0.5}, "raise max_df"),
        (["a", "b"], {"ngram_range": (2, 2)}, "no term in the 2 texts"),
    ],
)
def test_no_vocabulary_is_an_error(texts, options, message):
    """A model fitted on zero features."""
    with pytest.raises(DataError, match=message):
        fit(texts, **options)


def test_stop_words_of_characters_are_refused():
    """An option that scikit-learn ignores with a warning."""
    with pytest.raises(ValueError, match="stop_words are words: leave them out with analyzer: char_wb"):
        build(analyzer="char_wb", stop_words="english")


def test_use_before_fit_is_an_error():
    """A stack trace from numpy where the user forgot to fit."""
    for use in (lambda e: e.encode(TEXTS), lambda e: e.dim, lambda e: e.state(), lambda e: e.terms):
        with pytest.raises(DataError, match="not fitted"):
            use(build())


@pytest.mark.slow
def test_no_writable_cache_folder():
    """A crash at import where neither package nor home can be written to, as in many containers."""
    source = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from mmkt_ray.encoders import tokens\n"
        "print(tokens._compiled(lambda x: x + 1)(1))\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=root)
    assert result.stdout == "2\n", result.stderr


@pytest.mark.slow
def test_twenty_newsgroups(data_dir):
    """Anything that only 22 MB of real mail brings to light."""
    with tarfile.open(data_dir / "20news-bydate.tar.gz", "r|gz") as archive:
        members = (m for m in archive if m.isfile() and m.name.startswith("20news-bydate-train/"))
        texts = [archive.extractfile(member).read().decode("latin-1") for member in members]
    encoder, reference = fit(texts, chunk_rows=1024), TfidfVectorizer()
    assert_same_features(encoder.encode(texts), reference.fit_transform(texts))
    assert encoder.terms == list(reference.get_feature_names_out())
    assert (len(texts), encoder.dim) == (11_314, 130_107)


@pytest.mark.slow
def test_words_need_no_scikit_learn():
    """Catches an import that costs each process of a pipeline more than a second."""
    code = (
        "import sys; from mmkt_ray.encoders.text import compile_kernels; compile_kernels(); "
        "print([m for m in sys.modules if m.startswith(('sklearn', 'torch'))])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert told.stdout == "[]\n"
