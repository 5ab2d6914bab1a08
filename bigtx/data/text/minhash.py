"""MinHash signatures of documents (Broder, "On the resemblance and containment of documents", 1997).

The smallest hash of a document's n-grams under one of many hash functions is equal in two documents with the
probability of their n-grams' Jaccard similarity; so the share of equal entries in two signatures estimates it.
"""

from __future__ import annotations

import numpy as np

from bigtx.config.schema import NearDuplicateConfig
from bigtx.data.text.words import PIECE_CHARACTERS, Words, hash_ngrams, hash_words, hash_words_in_parts
from bigtx.utils.hashing import hash64

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
