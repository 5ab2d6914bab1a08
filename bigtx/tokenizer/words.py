"""Encoding word by word: where no piece of a BPE reaches from one word into the next, each word is encoded once.

A word here is a run of spaces and what follows it up to the next space. BPE joins two neighbouring symbols only if
what they spell is a piece. If no piece has a space after another character, nothing is ever joined across the border
between two words, so a text's ids are its words' ids one after the other, exactly. Words repeat (Zipf's law), and
looking one up takes a small part of the time that sentencepiece takes for it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from bigtx.tokenizer.cut import MAX_ENCODE_CHARACTERS, cut

WORDS = re.compile(" *[^ ]+| +")
"""A word, with the spaces before it."""

_BORDER = re.compile("[^\u2581]\u2581")
_MAX_WORDS = 1 << 18
"""Words remembered, about 40 MiB; then all are forgotten."""
_MAX_CHARACTERS = 64
"""A longer word will hardly come again, and is forgotten at once."""


class WordEncoder:
    """Encodes texts by a table of words.

    Args:
        encode: the ids of each of several texts, by the model itself.
        vocab_size: of the model.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], vocab_size: int) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._encode = encode
        self._table: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as the bytes of an array in `dtype`."""
        words = [WORDS.findall(text) for text in texts]
        new = set().union(*words).difference(self._table)
        if new and len(self._table) + len(new) > _MAX_WORDS:
            self._table.clear()
            new = set().union(*words)
        long = [word for word in new if len(word) > _MAX_CHARACTERS]
        self._learn(list(new.difference(long)))
        for word in long:
            parts = self._encode(list(cut(word, MAX_ENCODE_CHARACTERS)))
            self._table[word] = self._bytes(list(chain.from_iterable(parts)))
        contents = [b"".join(map(self._table.__getitem__, own)) for own in words]
        for word in long:
            del self._table[word]
        return contents

    def _learn(self, words: list[str]) -> None:
        # A call of the model is dear, so all words go into one.
        if words:
            self._table.update(zip(words, map(self._bytes, self._encode(words)), strict=True))

    def _bytes(self, ids: list[int]) -> bytes:
        return array(self.dtype.char, ids).tobytes()


def splits_at_spaces(data: bytes) -> bool:
    """Whether a sentencepiece model encodes every text word by word.

    It does if it is a BPE (a unigram model compares sums of scores over the whole text, whose last bits may differ),
    leaves text as it is before it splits it, has bytes for what it does not know (unknown characters would merge), and
    has no piece that reaches over a border.

    Args:
        data: a serialized ModelProto.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    is_plain = not (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or trained.treat_whitespace_as_suffix
    )
    is_bpe = trained.model_type == sentencepiece_model_pb2.TrainerSpec.BPE and trained.byte_fallback
    return is_bpe and is_plain and not any(_BORDER.search(piece.piece) for piece in model.pieces)
