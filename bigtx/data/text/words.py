"""Words and n-grams of words as 64-bit numbers, for batches of texts.

A word is a run of letters, marks and digits, compared in lower case; everything else separates words. In scripts that
are written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) every character is a word. Near duplicates and
evaluation texts are found by these words, so punctuation, white space and case do not matter.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bigtx.utils.hashing import splitmix64
from bigtx.utils.scripts import IDEOGRAPHS, UNSPACED

_OTHER, _LETTER, _WORD = 0, 1, 2
"""Kinds of characters: between words, part of a word, a word by itself."""

PIECE_CHARACTERS = 1 << 18
"""The number of characters that are processed at once: memory stays bounded, and the arrays fit into the cache."""
_CHARACTER_BASE = 0x9E3779B97F4A7C15
_WORD_BASE = 0xD6E8FEB86659FD93
"""Odd numbers, so that powers modulo 2^64 can be inverted."""


class Words(NamedTuple):
    """The words of several texts, one text after the other.

    Attributes:
        hashes: uint64 [words].
        counts: int64 [texts], the words of each text.
    """

    hashes: np.ndarray
    counts: np.ndarray


def hash_words(texts: list[str]) -> Words:
    """Return the hashes of all words; those of a text do not depend on the other texts or the machine."""
    hashes: list[np.ndarray] = []
    counts = np.zeros(len(texts), np.int64)
    for first, last, piece in _pieces(texts):
        words, starts = _hash_piece(piece)
        hashes.append(words)
        if first == last:
            counts[first] += len(words)
        else:
            ends = np.cumsum([len(text) + 1 for text in texts[first : last + 1]])
            counts[first : last + 1] = np.diff(np.searchsorted(starts, ends), prepend=0)
    return Words(np.concatenate(hashes) if hashes else np.zeros(0, np.uint64), counts)


def hash_words_in_parts(text: str, overlap: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the hashes of a text's words, some at a time, in little memory for a text of any length.

    Args:
        overlap: the number of words of each part that are the last ones of the previous part, if it has so many.

    Returns:
        The number of each part's first word, and its words: uint64 [words].
    """
    first, before = 0, np.zeros(0, np.uint64)
    for _, _, piece in _pieces([text]):
        words = np.concatenate([before, _hash_piece(piece)[0]])
        yield first, words
        before = words[max(0, len(words) - overlap) :]
        first += len(words) - len(before)


def hash_ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of each run of n words.

    Args:
        words: uint64 [words], at least n.

    Returns:
        uint64 [words - n + 1]; the order of the words matters.
    """
    count = len(words) - n + 1
    state = words[:count].copy()
    for place in range(1, n):
        state *= np.uint64(_WORD_BASE)
        state += words[place : place + count]
    return splitmix64(state)


def split_words(text: Iterable[str]) -> Iterator[str]:
    """Yield the words that `hash_words` hashes, as texts: slower, to show them."""
    kinds = _tables()[0]
    word = ""
    for character in text:
        kind = kinds[ord(character)] if ord(character) < IDEOGRAPHS else _WORD
        if kind == _LETTER:
            word += _lower(character)
            continue
        if word:
            yield word
            word = ""
        if kind == _WORD:
            yield _lower(character)
    if word:
        yield word


def words_at(text: str, place: int, count: int) -> list[str]:
    """Return `count` words from number `place` on, without splitting the text before them."""
    offset = 0
    for _, _, piece in _pieces([text]):
        starts = _hash_piece(piece)[1]
        if place < len(starts):
            rest = itertools.islice(text, offset + int(starts[place]), None)
            return list(itertools.islice(split_words(rest), count))
        place -= len(starts)
        offset += len(piece)
    return []


def _pieces(texts: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield short texts together and long ones in parts: the number of the first text, of the last one, and the
    characters.
    """
    first, size = 0, 0
    for number, text in enumerate(texts):
        if size and size + len(text) > PIECE_CHARACTERS:
            yield first, number - 1, "\n".join(texts[first:number])
            first, size = number, 0
        if len(text) > PIECE_CHARACTERS:
            for part in _parts(text):
                yield number, number, part
            first = number + 1
        else:
            size += len(text) + 1
    if first < len(texts):
        yield first, len(texts) - 1, "\n".join(texts[first:])


def _parts(text: str) -> Iterator[str]:
    """Yield a long text in parts that are cut at white space, or anywhere if a part has none."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE_CHARACTERS
        if end < len(text):
            end = max(text.rfind(" ", begin + 1, end), text.rfind("\n", begin + 1, end))
            end = begin + PIECE_CHARACTERS if end < 0 else end
        yield text[begin:end]
        begin = end


def _hash_piece(piece: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes and places of the words in a piece: a polynomial over the characters, taken from running
    sums.
    """
    kinds, values = _tables()
    codes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), np.uint32)
    if piece.isascii():
        kind, value = kinds[codes], values[codes]
    else:
        inside = np.minimum(codes, IDEOGRAPHS - 1)
        beyond = codes >= IDEOGRAPHS
        kind, value = kinds[inside], values[inside]
        kind[beyond] = _WORD
        value[beyond] = splitmix64(codes[beyond].astype(np.uint64))
    inner = np.zeros(len(codes) + 1, bool)  # Letters that continue the previous word.
    np.logical_and(kind[1:] == _LETTER, kind[:-1] == _LETTER, out=inner[1:-1])
    within = kind > _OTHER
    starts = np.flatnonzero(within & ~inner[:-1])
    ends = np.flatnonzero(within & ~inner[1:]) + 1
    powers, inverses = _powers()
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(value * powers[: len(codes)], out=sums[1:])
    return splitmix64((sums[ends] - sums[starts]) * inverses[starts]), starts


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the kind and value of each code point of the table: uint8, and uint64 that is 0 between words."""
    kinds = np.array([unicodedata.category(chr(code))[0] in "LMN" for code in range(IDEOGRAPHS)], np.uint8)
    for first, last in UNSPACED:
        kinds[first : last + 1] *= _WORD
    lowered = np.fromiter((ord(_lower(chr(code))) for code in range(IDEOGRAPHS)), np.uint64, IDEOGRAPHS)
    return kinds, np.where(kinds > _OTHER, splitmix64(lowered), np.uint64(0))


def _lower(character: str) -> str:
    """Return the character in lower case if that is one character too."""
    lower = character.lower()
    return lower if len(lower) == 1 else character


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Return the base's powers modulo 2^64, and their inverses, as many as a piece has characters."""

    def powers(base: int) -> np.ndarray:
        factors = np.full(PIECE_CHARACTERS, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors)

    return powers(_CHARACTER_BASE), powers(pow(_CHARACTER_BASE, -1, 1 << 64))
