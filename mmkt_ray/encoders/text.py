"""TF-IDF with scikit-learn's options and results, from document frequencies that merge over shards.

Axes: B texts in a batch, D terms of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmkt_ray.encoders.encoder import EncoderSection, ListedEncoder, check_array
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import scipy.sparse as sp
    from sklearn.feature_extraction import text as sklearn_text

    from mmkt_ray.encoders import tokens
else:
    np, pa, pc, sp = lazy("numpy"), lazy("pyarrow"), lazy("pyarrow.compute"), lazy("scipy.sparse")
    tokens, sklearn_text = lazy("mmkt_ray.encoders.tokens"), lazy("sklearn.feature_extraction.text")


MAX_REPEATED = 4  # times as many rows as distinct terms, before they are added up


@cache
def term_schema() -> pa.Schema:
    """Of a table of terms: the texts that each is in, and its occurrences in all."""
    return pa.schema([("term", pa.large_string()), ("text_count", pa.int64()), ("term_count", pa.int64())])


@dataclass(frozen=True)
class TermStatistics:
    """What TF-IDF must know of a set of texts: at most some times as large as their vocabulary,
    whatever their number."""

    terms: pa.Table  # of `term_schema`; a term may have several rows, whose counts add up
    num_texts: int
    num_distinct: int  # terms when each last had one row


class TfidfEncoder(ListedEncoder):
    """Texts -> TF-IDF weights, equal to `TfidfVectorizer` with the same options, fitted on shards in any order.

    Single words go through the compiled `tokens`, n-grams through scikit-learn's own analyzer. Where neither n-grams
    nor stop words are asked for, scikit-learn is not imported:
    it takes each process of a pipeline more than a second.
    """

    kinds: ClassVar[tuple[str, ...]] = ("text",)
    sparse: ClassVar[bool] = True

    class Section(EncoderSection):
        """TF-IDF with scikit-learn's options and results, fitted in one distributed pass."""

        name: Literal["tfidf"] = "tfidf"
        lowercase: bool = Field(True, description="lower-case before tokenising")
        analyzer: Literal["word", "char", "char_wb"] = Field(
            "word", description="what n-grams are of: words, characters, or characters within words"
        )
        ngram_range: tuple[int, int] = Field((1, 1), description="shortest and longest n-gram")
        min_df: int = Field(1, ge=1, description="drop terms in fewer documents")
        max_df: float = Field(1.0, gt=0, le=1, description="drop terms in more than this share of documents")
        max_features: int | None = Field(None, ge=1, description="keep the most frequent terms only")
        stop_words: Literal["english"] | None = Field(None, description="stop word list")
        sublinear_tf: bool = Field(False, description="1 + log(tf) in place of tf")
        norm: Literal["l1", "l2"] | None = Field("l2", description="row normalisation")

        @model_validator(mode="after")
        def _words_alone_stop(self) -> Self:
            if self.stop_words and self.analyzer != "word":
                raise ValueError(f"stop_words are words: leave them out with analyzer: {self.analyzer}")
            return self

    def __init__(self, section: Section) -> None:
        super().__init__(section)
        self._section = section
        self._words_only = section.ngram_range == (1, 1) and section.analyzer == "word"
        self._terms: pa.LargeStringArray | None = None  # (D,) sorted by code point
        self._idf = np.empty(0)  # (D,) float64
        self._index: Any = None  # finds terms, a TermIndex or for n-grams a dict; made by the first `encode`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    @cached_property
    def _vectorizer(self) -> sklearn_text.TfidfVectorizer:
        options = self._section.model_dump(include={"lowercase", "analyzer", "ngram_range", "stop_words"})
        return sklearn_text.TfidfVectorizer(**options)

    @property
    def dim(self) -> int:
        """D."""
        return len(self._fitted_terms())

    @property
    def terms(self) -> list[str]:
        """The vocabulary in column order."""
        terms: list[str] = self._fitted_terms().to_pylist()
        return terms

    def vocabulary(self) -> dict[str, Any]:
        """Options of a `TfidfVectorizer` of scikit-learn that gives the same, terms in column order, their idf."""
        section = self._section
        names = {"lowercase", "analyzer", "ngram_range", "stop_words", "sublinear_tf", "norm"}
        options = section.model_dump(mode="json", include=names)
        return {"options": options, "terms": self.terms, "idf": self._idf.tolist()}

    @property
    def feature_names(self) -> list[str]:
        """The same as `terms`: what each feature is of."""
        return self.terms

    def partial(self, values: Sequence[str]) -> TermStatistics:
        """Term statistics of one chunk of texts."""
        columns = self._count_words(values) if self._words_only else self._count_ngrams(values)
        table = pa.table(columns, schema=term_schema())
        return TermStatistics(table, len(values), len(table))

    def merge(self, parts: list[TermStatistics]) -> TermStatistics:
        """Statistics of all parts together. Rows of the same term are added up now and then: at each merge it would
        take longer than all counting."""
        table = pa.concat_tables([term_schema().empty_table(), *(part.terms for part in parts)])
        num_texts = sum(part.num_texts for part in parts)
        num_distinct = max((part.num_distinct for part in parts), default=0)
        if len(table) > MAX_REPEATED * num_distinct:
            table = _added_up(table)
            num_distinct = len(table)
        return TermStatistics(table, num_texts, num_distinct)

    def finish(self, total: TermStatistics) -> None:
        """Choose the vocabulary and its inverse document frequencies. Raises: DataError if no term is left."""
        table = _added_up(total.terms).sort_by("term")
        kept = self._kept_rows(table, total.num_texts)
        text_counts = table["text_count"].to_numpy()[kept]
        self._terms = table["term"].take(kept).combine_chunks()
        self._idf = np.log((total.num_texts + 1) / (text_counts + 1.0)) + 1
        self._index = None

    def encode(self, values: Sequence[str]) -> sp.csr_matrix:
        """Weights (B, D) float32, columns sorted within rows. Raises: DataError before it is fitted."""
        terms = self._fitted_terms()
        counts = self._look_up_words(values, terms) if self._words_only else self._look_up_ngrams(values, terms)
        counts.sort_indices()
        if self._section.sublinear_tf:
            counts.data = np.log(counts.data) + 1
        counts.data *= self._idf[counts.indices]
        if self._section.norm is not None and len(values):
            tokens.normalize_rows(counts.data, counts.indptr, self._section.norm == "l2")
        return counts.astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Terms as UTF-8 bytes with offsets (D + 1,), and their idf (D,)."""
        term_bytes, term_offsets = _to_utf8(self._fitted_terms())
        return {"term_bytes": term_bytes, "term_offsets": term_offsets, "idf": self._idf}, {}

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Become what `state` was taken of. Raises: ValueError, KeyError if that was no state:
        compiled code trusts it."""
        data = check_array("term_bytes", tensors["term_bytes"], "uint8", (None,))
        offsets = check_array("term_offsets", tensors["term_offsets"], "int64", (None,))
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
            raise ValueError(f"term_offsets do not ascend from 0 to the {len(data)} bytes of the terms")
        terms = _from_utf8(data, offsets)
        terms.validate(full=True)  # UTF-8
        self._idf = check_array("idf", tensors["idf"], "float64", (len(terms),))
        self._terms, self._index = terms, None

    def _fitted_terms(self) -> pa.LargeStringArray:
        if self._terms is None:
            raise DataError("this TF-IDF encoder is not fitted: fit it on the train split, or load its state, first")
        return self._terms

    def _count_words(self, values: Sequence[str]) -> list[pa.Array]:
        counts = tokens.count_terms(*_to_utf8(self._prepared(values)))
        terms = _from_utf8(counts.term_bytes, counts.term_offsets)
        columns = [pa.array(column) for column in (terms, counts.text_counts, counts.term_counts)]
        if self._section.stop_words is None:
            return columns
        stop_words = pa.array(self._vectorizer.get_stop_words(), pa.large_string())
        kept = pc.invert(pc.is_in(terms, stop_words))
        return [column.filter(kept) for column in columns]

    def _count_ngrams(self, values: Sequence[str]) -> list[list[Any]]:
        analyze = self._vectorizer.build_analyzer()
        text_counts: Counter[str] = Counter()
        term_counts: Counter[str] = Counter()
        for value in values:
            counts = Counter(analyze(value))
            text_counts.update(counts.keys())
            term_counts.update(counts)
        return [list(text_counts), list(text_counts.values()), [term_counts[term] for term in text_counts]]

    def _kept_rows(self, table: pa.Table, num_texts: int) -> np.ndarray:
        """Rows of the sorted `table` that min_df, max_df and max_features leave, ascending."""
        section = self._section
        if not len(table):
            raise DataError(
                f"no term in the {num_texts} texts of the train split: are they empty, or stop words only? "
                "Look at the text column of samples.sources, and at the encoder's stop_words"
            )
        text_counts = table["text_count"].to_numpy()
        kept = np.flatnonzero((text_counts >= section.min_df) & (text_counts <= section.max_df * num_texts))
        if not len(kept):
            raise DataError(
                f"none of the {len(table)} terms is in at least min_df={section.min_df} texts and in at most "
                f"max_df={section.max_df} of all {num_texts}: lower min_df or raise max_df"
            )
        if section.max_features is not None and len(kept) > section.max_features:
            # Literally scikit-learn's expression: its sort is unstable, and ties must be broken as it breaks them.
            order = (-table["term_count"].to_numpy()[kept].astype(np.float64)).argsort()
            kept = np.sort(kept[order[: section.max_features]])
        return kept

    def _look_up_words(self, values: Sequence[str], terms: pa.LargeStringArray) -> sp.csr_matrix:
        """Occurrences (B, D) float64 of the vocabulary's terms, columns in any order."""
        if self._index is None:
            self._index = tokens.TermIndex(*_to_utf8(terms), order=self._idf.argsort())
        return sp.csr_matrix(self._index.count(*_to_utf8(self._prepared(values))), shape=(len(values), len(terms)))

    def _look_up_ngrams(self, values: Sequence[str], terms: pa.LargeStringArray) -> sp.csr_matrix:
        """The same for n-grams."""
        if self._index is None:
            self._index = {term: column for column, term in enumerate(terms.to_pylist())}
        index, analyze = self._index, self._vectorizer.build_analyzer()
        rows = [Counter(index[term] for term in analyze(value) if term in index) for value in values]
        offsets = np.cumsum([0, *map(len, rows)])
        columns = np.fromiter((column for row in rows for column in row), np.int32, offsets[-1])
        counts = np.fromiter((count for row in rows for count in row.values()), np.float64, offsets[-1])
        return sp.csr_matrix((counts, columns, offsets), shape=(len(rows), len(terms)))

    def _prepared(self, values: Sequence[str]) -> pa.LargeStringArray:
        """The texts as the tokenizer takes them."""
        return pa.array([v.lower() for v in values] if self._section.lowercase else values, pa.large_string())


def _added_up(terms: pa.Table) -> pa.Table:
    """Each term once."""
    counts = terms.group_by("term", use_threads=False).aggregate([("text_count", "sum"), ("term_count", "sum")])
    return pa.table(counts.columns, schema=term_schema())


def _to_utf8(texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (uint8) of all texts, and the offsets (B + 1,) int64 of each text among them."""
    _, offsets_buffer, data = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64, len(texts) + 1, texts.offset * 8)
    data = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def _from_utf8(data: np.ndarray, offsets: np.ndarray) -> pa.LargeStringArray:
    buffers = [pa.py_buffer(np.ascontiguousarray(array)) for array in (offsets, data)]
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, *buffers)


def compile_kernels() -> None:
    """Compile the token kernels into their cache on disk, so that the first job does not (about 6 s, in every
    process)."""
    encoder = TfidfEncoder(TfidfEncoder.Section())
    encoder.finish(encoder.partial(["to be compiled"]))
    encoder.encode(["compiled"])
