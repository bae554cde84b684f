"""Word tokens of UTF-8 texts, counted per exact term: the compiled inner loops of TF-IDF.

A token is what scikit-learn's default pattern `(?u)\\b\\w\\w+\\b` matches: a run of two or more word characters.
Terms are looked up in an open-addressing table: `slots`, a power of two of term numbers or -1, and `entries`, one row
per term. An equal hash is confirmed by comparing bytes, so that terms which collide are told apart everywhere.

Axes: B texts, D terms. Texts and terms come as UTF-8 bytes (uint8), one after another, with offsets (B + 1,) int64.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

HASH, START, STOP, TEXTS, OCCURRENCES, LAST_TEXT = range(6)  # columns of `entries`, int64
HASH_MASK = np.int64(-1)  # bits of the hash that are used; tests clear some to make terms collide
FNV_OFFSET, FNV_PRIME = np.int64(-3750763034362895579), np.int64(1099511628211)  # 64-bit FNV-1a


class TermCounts(NamedTuple):
    """Distinct terms in order of first appearance, with counts (D,) int64."""

    term_bytes: np.ndarray
    term_offsets: np.ndarray
    text_counts: np.ndarray  # texts a term occurs in
    term_counts: np.ndarray  # its occurrences in all


def count_terms(data: np.ndarray, offsets: np.ndarray) -> TermCounts:
    """The terms of a chunk of texts and how often they occur."""
    entries = _count_terms(data, offsets, _word_characters(), HASH_MASK)
    terms, term_offsets = _copy_terms(data, entries)
    return TermCounts(terms, term_offsets, entries[:, TEXTS].copy(), entries[:, OCCURRENCES].copy())


class TermIndex:
    """A fixed vocabulary: finds each token's term, and none for a token that is no term."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> None:
        """`order` (D,): the terms' numbers, frequent ones first,
        so that their entries share the processor's cache."""
        self._terms, self._order = data, order.astype(np.int32)
        self._slots, self._entries = _index_terms(data, offsets, self._order, _word_characters(), HASH_MASK)

    def count(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compressed rows: counts float64, term numbers int32 (in order of appearance),
        row offsets (B + 1,) int64."""
        table = (self._terms, self._slots, self._entries)
        counts, found, row_offsets = _count_rows(data, offsets, _word_characters(), HASH_MASK, *table)
        return counts, self._order[found], row_offsets


@cache
def _word_characters() -> np.ndarray:
    """For each code point whether it is a word character, by asking Python's `re`: (0x110000,) bool."""
    codes = np.arange(sys.maxunicode + 1, dtype="<u4")
    characters = codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")  # without surrogates
    is_word = np.zeros(sys.maxunicode + 1, dtype=np.bool_)
    is_word[np.frombuffer("".join(re.findall(r"\w+", characters)).encode("utf-32-le"), np.uint32)] = True
    return is_word


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled without the GIL, cached on disk where package, home or NUMBA_CACHE_DIR can be written to."""
    compiled: Callable[..., Any]
    try:
        compiled = numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # numba found no folder for its cache: each process compiles for itself
        compiled = numba.njit(function, nogil=True)
    return compiled


@_compiled
def normalize_rows(values: np.ndarray, offsets: np.ndarray, squared: bool) -> None:
    """Divide each compressed row, in place, by its length (`squared`: l2), or by the sum of its sizes;
    rows of zeros stay.

    values: float64; offsets: (B + 1,). Adds in the order of scikit-learn's `normalize`,
    so its result is the same to the bit.
    """
    for row in range(len(offsets) - 1):
        total = 0.0
        for i in range(offsets[row], offsets[row + 1]):
            total += values[i] * values[i] if squared else abs(values[i])
        if total == 0.0:
            continue
        length = np.sqrt(total) if squared else total
        for i in range(offsets[row], offsets[row + 1]):
            values[i] /= length


@_compiled
def _code_point(text: np.ndarray, position: int) -> tuple[np.int64, int]:
    """(code point, bytes it takes) of the character at `position`; the text is valid UTF-8."""
    code, size = np.int64(text[position]), 1
    if code >= 0xF0:
        code, size = code & 0x07, 4
    elif code >= 0xE0:
        code, size = code & 0x0F, 3
    elif code >= 0x80:
        code, size = code & 0x1F, 2
    for i in range(1, size):
        code = code << 6 | np.int64(text[position + i]) & 0x3F
    return code, size


@_compiled
def _next_token(
    text: np.ndarray, position: int, end: int, is_word: np.ndarray, hash_mask: int
) -> tuple[np.int64, np.int64, np.int64]:
    """(start, stop, hash) of the first token in text[position:end]; start == stop if there is none.

    Unsigned indices: for others Numba asks at each byte whether it counts from the end.
    """
    here, last, one = np.uint64(position), np.uint64(end), np.uint64(1)
    while here < last:
        start, length, hash_ = here, 0, FNV_OFFSET
        while here < last:
            code, size = np.uint64(text[here]), one
            if code >= np.uint64(0x80):
                wide, num_bytes = _code_point(text, np.int64(here))
                code, size = np.uint64(wide), np.uint64(num_bytes)
            if not is_word[code]:
                break
            hash_ = (hash_ ^ np.int64(code)) * FNV_PRIME
            length += 1
            here += size
        if length >= 2:
            return np.int64(start), np.int64(here), hash_ & hash_mask
        if here < last:
            here += size
    return np.int64(end), np.int64(end), FNV_OFFSET


@_compiled
def _same_bytes(terms: np.ndarray, term_start: int, text: np.ndarray, start: int, num: int) -> bool:
    offset = 0
    while offset < num and terms[term_start + offset] == text[start + offset]:
        offset += 1
    return offset == num


@_compiled
def _find(
    slots: np.ndarray, entries: np.ndarray, terms: np.ndarray, text: np.ndarray, start: int, stop: int, hash_: int
) -> int:
    """The slot of the term text[start:stop], or the empty slot it would go to. `terms` holds the entries' bytes."""
    slot = hash_ & (len(slots) - 1)
    while slots[slot] >= 0:
        term = slots[slot]
        num_bytes = entries[term, STOP] - entries[term, START]
        same = entries[term, HASH] == hash_ and num_bytes == stop - start
        if same and _same_bytes(terms, entries[term, START], text, start, num_bytes):
            return slot
        slot = (slot + 1) & (len(slots) - 1)
    return slot


@_compiled
def _build_slots(entries: np.ndarray, num_slots: int) -> np.ndarray:
    """Slots for all rows of `entries`, which are distinct terms."""
    slots = np.full(num_slots, -1, np.int32)
    for term in range(len(entries)):
        slot = entries[term, HASH] & (num_slots - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (num_slots - 1)
        slots[slot] = term
    return slots


@_compiled
def _count_terms(text: np.ndarray, offsets: np.ndarray, is_word: np.ndarray, hash_mask: int) -> np.ndarray:
    """The filled rows of `entries`; START and STOP are where in `text` a term appears first."""
    entries = np.empty((1024, 6), np.int64)
    slots = _build_slots(entries[:0], 4 * len(entries))
    num_terms = 0
    for row in range(len(offsets) - 1):
        start, stop, hash_ = _next_token(text, offsets[row], offsets[row + 1], is_word, hash_mask)
        while start < stop:
            slot = _find(slots, entries, text, text, start, stop, hash_)
            term = slots[slot]
            if term < 0:
                term = num_terms
                slots[slot] = term
                entries[term, HASH], entries[term, START], entries[term, STOP] = hash_, start, stop
                entries[term, TEXTS], entries[term, OCCURRENCES], entries[term, LAST_TEXT] = 0, 0, -1
                num_terms += 1
            entries[term, OCCURRENCES] += 1
            if entries[term, LAST_TEXT] != row:
                entries[term, LAST_TEXT] = row
                entries[term, TEXTS] += 1
            if num_terms == len(entries):
                entries = np.concatenate((entries, np.empty_like(entries)))
                slots = _build_slots(entries[:num_terms], 4 * len(entries))
            start, stop, hash_ = _next_token(text, stop, offsets[row + 1], is_word, hash_mask)
    return entries[:num_terms]


@_compiled
def _copy_terms(text: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries' bytes one after another, and their offsets."""
    offsets = np.zeros(len(entries) + 1, np.int64)
    offsets[1:] = np.cumsum(entries[:, STOP] - entries[:, START])
    terms = np.empty(offsets[-1], np.uint8)
    for term in range(len(entries)):
        terms[offsets[term] : offsets[term + 1]] = text[entries[term, START] : entries[term, STOP]]
    return terms, offsets


@_compiled
def _index_terms(
    terms: np.ndarray, offsets: np.ndarray, order: np.ndarray, is_word: np.ndarray, hash_mask: int
) -> tuple[np.ndarray, np.ndarray]:
    """(slots, entries) of a vocabulary, entries in the given order; each term is one token."""
    entries = np.empty((len(order), 3), np.int64)
    for i in range(len(order)):
        start, stop, hash_ = _next_token(terms, offsets[order[i]], offsets[order[i] + 1], is_word, hash_mask)
        entries[i, HASH], entries[i, START], entries[i, STOP] = hash_, start, stop
    num_slots = 4
    while num_slots < 2 * len(entries):
        num_slots *= 2
    return _build_slots(entries, num_slots), entries


@_compiled
def _count_rows(
    text: np.ndarray,
    offsets: np.ndarray,
    is_word: np.ndarray,
    hash_mask: int,
    terms: np.ndarray,
    slots: np.ndarray,
    entries: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts, entries' numbers, row offsets): each row's terms in order of first appearance."""
    most = (len(text) + len(offsets)) // 3 + 1  # a token takes two bytes and, but for a text's last, a separator
    found = np.empty(most, np.int32)
    counts = np.empty(most, np.float64)
    row_offsets = np.zeros(len(offsets), np.int64)
    row_counts = np.zeros(len(entries), np.int64)
    used = 0
    for row in range(len(offsets) - 1):
        start, stop, hash_ = _next_token(text, offsets[row], offsets[row + 1], is_word, hash_mask)
        while start < stop:
            term = slots[_find(slots, entries, terms, text, start, stop, hash_)]
            if term >= 0:
                if row_counts[term] == 0:
                    found[used] = term
                    used += 1
                row_counts[term] += 1
            start, stop, hash_ = _next_token(text, stop, offsets[row + 1], is_word, hash_mask)
        for i in range(row_offsets[row], used):
            counts[i] = row_counts[found[i]]
            row_counts[found[i]] = 0
        row_offsets[row + 1] = used
    return counts[:used].copy(), found[:used].copy(), row_offsets
