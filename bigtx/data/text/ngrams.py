"""Words and n-grams of words as 64-bit numbers, for batches of texts, and MinHash signatures of documents.

A word is a run of letters, marks and digits, compared in lower case; everything else separates words. In scripts that
are written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) every character is a word. Near duplicates and
evaluation texts are found by these words, so punctuation, white space and case do not matter.

The smallest hash of a document's n-grams under one of many hash functions is equal in two documents with the
probability of their n-grams' Jaccard similarity; so the share of equal entries in two signatures estimates it (Broder,
"On the resemblance and containment of documents", 1997).
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bigtx.config.schema import NearDuplicateConfig
from bigtx.tokenizer.words import IDEOGRAPHS, UNSPACED
from bigtx.utils.hashing import hash64, splitmix64

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
            yield from ((number, number, part) for part in _parts(text))
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


SIGNATURE_DTYPE = np.dtype("<u2")
"""The kept part of each hash, 16 bits (b-bit minwise hashing, arXiv:0910.3349): two of 65,536 agree by chance."""
NOTHING = 0xFFFF
"""The value of all entries of a document without words, which is not similar to any."""

_BLOCK = 1 << 15
"""The number of n-grams that are hashed at once: they fit into the processor's cache."""


class Signer:
    """The computation of signatures; they are equal for equal settings, on every machine.

    A document of fewer words than an n-gram counts as one n-gram of its own length.
    """

    def __init__(self, config: NearDuplicateConfig) -> None:
        self.num_hashes = config.num_bands * config.rows_per_band
        self._n = config.ngram
        # For well mixed numbers, odd multiples modulo 2^32 are as good as hashes: all orders are equally likely.
        self._factors = (hash64(config.seed, np.arange(self.num_hashes)) >> np.uint64(32)).astype(np.uint32) | 1

    def sign(self, texts: list[str]) -> np.ndarray:
        """Return the signatures of texts.

        Returns:
            SIGNATURE_DTYPE [texts, num_hashes].
        """
        long = {number for number, text in enumerate(texts) if len(text) > PIECE_CHARACTERS}
        short = ["" if number in long else text for number, text in enumerate(texts)]
        signatures = self._signatures(hash_words(short))
        for number in long:
            signatures[number] = self._sign_long(texts[number])
        return signatures

    def _sign_long(self, text: str) -> np.ndarray:
        """Return the signature of one text, [num_hashes], in memory that does not grow with it."""
        smallest, words = np.full((self.num_hashes, 1), 0xFFFFFFFF, np.uint32), np.zeros(0, np.uint64)
        is_short = True
        for _, words in hash_words_in_parts(text, self._n - 1):
            if len(words) >= self._n:
                is_short = False
                np.minimum(smallest, self._smallest(*_ngrams(_one_text(words), self._n)), out=smallest)
        return self._signatures(_one_text(words))[0] if is_short else _shortened(smallest)[0]

    def _signatures(self, words: Words) -> np.ndarray:
        """Return the signatures of texts by their words: [texts, num_hashes]."""
        signatures = np.full((len(words.counts), self.num_hashes), NOTHING, SIGNATURE_DTYPE)
        speaking = np.flatnonzero(words.counts)
        if len(speaking):
            smallest = self._smallest(*_ngrams(Words(words.hashes, words.counts[speaking]), self._n))
            signatures[speaking] = _shortened(smallest)
        return signatures

    def _smallest(self, ngrams: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the smallest hashes of documents whose n-grams begin at `starts`: [num_hashes, documents] uint32."""
        smallest = np.full((self.num_hashes, len(starts)), 0xFFFFFFFF, np.uint32)
        buffer = np.empty(min(_BLOCK, len(ngrams)), np.uint32)
        for begin in range(0, len(ngrams), _BLOCK):
            block = ngrams[begin : begin + _BLOCK]
            hashes = buffer[: len(block)]
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts, begin + len(block)))
            places = np.maximum(starts[first:last] - begin, 0)
            for number, factor in enumerate(self._factors):
                np.multiply(block, factor, out=hashes)
                chosen = smallest[number, first:last]
                np.minimum(chosen, np.minimum.reduceat(hashes, places), out=chosen)
        return smallest


def _one_text(words: np.ndarray) -> Words:
    return Words(words, np.array([len(words)], np.int64))


def _shortened(smallest: np.ndarray) -> np.ndarray:
    """Convert uint32 [num_hashes, texts] to signatures [texts, num_hashes]."""
    return (smallest ^ (smallest >> np.uint32(16))).T.astype(SIGNATURE_DTYPE)


def _ngrams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n-grams of texts that have words, uint32 [n-grams], and where those of each text start."""
    hashes, counts = words
    if counts.min() < n:
        # Short texts are padded with a word that does not exist.
        padded = np.maximum(counts, n)
        shifts = np.cumsum(padded) - padded - (np.cumsum(counts) - counts)
        filled = np.zeros(int(padded.sum()), np.uint64)
        filled[np.arange(len(hashes)) + np.repeat(shifts, counts)] = hashes
        hashes, counts = filled, padded
    ends = np.cumsum(counts)
    whole = np.ones(len(hashes), bool)
    for place in range(1, n):
        whole[ends - place] = False  # Too close to the text's end for the start of an n-gram.
    ngrams = hash_ngrams(hashes, n) >> np.uint64(32)
    num_ngrams = counts - (n - 1)
    return ngrams[whole[: len(ngrams)]].astype(np.uint32), np.cumsum(num_ngrams) - num_ngrams
