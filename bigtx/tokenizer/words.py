"""Encoding in parts: where no piece of a BPE reaches from one part into the next, each part is encoded by itself.

BPE joins two neighbouring symbols only if what they spell is a piece. So between two characters that stand side by side
in no piece nothing is ever joined: a text's ids are those of what is before this border and of what is behind it,
exactly. Two uses are made of it:

- A word, here a run of spaces and what follows it up to the next space, is encoded once and looked up from then on.
  Words repeat (Zipf's law), and looking one up takes a small part of the time that sentencepiece takes for it. This
  needs pieces that have no space after another character. Symbols that the user defined may have one: they are cut
  out of the text first, as the model does, and are words of their own.
- A long text is taken in parts of bounded length, with or without spaces (Chinese, digits, base64).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from bigtx.tokenizer.special import SPACE_MARK

WORDS = re.compile(" *[^ ]+| +")
"""A word, with the spaces before it."""

PART_CHARACTERS = 1 << 17
"""Characters that are taken at once, unless there is no border among them: some 10 MiB of memory."""
_MAX_WORDS = 1 << 18
"""Words remembered, about 40 MiB; then all are forgotten."""
_MAX_CHARACTERS = 64
"""A longer word will hardly come again, and is forgotten at once."""
_WINDOW = 1 << 12
"""Characters among which a border is looked for at once."""


class Borders:
    """Where texts may be cut so that the ids of the parts are those of the whole.

    Args:
        pieces: all pieces that text can become, bytes left out.
        symbols: further ones, which are cut out of the text before anything is joined.
    """

    def __init__(self, pieces: Iterable[str], symbols: Sequence[str] = ()) -> None:
        pairs, in_symbols = _pairs_of(pieces), _pairs_of(symbols)
        self._joined = np.array(sorted(_pairs(pair).item() for pair in pairs | in_symbols) or [0], np.uint64)
        self.are_at_spaces = not any(map(_is_space_behind, pairs))
        spelled = [symbol.replace(SPACE_MARK, " ") for symbol in symbols]
        self._symbols = symbol_pattern(spelled) if any(map(_is_space_behind, in_symbols)) else None

    def words(self, text: str) -> list[str]:
        """Return the text's words; a symbol with a space inside is one of them."""
        if self._symbols is None:
            return WORDS.findall(text)
        parts = self._symbols.split(text)
        return [word for i, part in enumerate(parts) for word in ([part] if i % 2 else WORDS.findall(part))]

    def cut(self, text: str) -> Iterator[str]:
        """Yield the text in parts of at most PART_CHARACTERS; one is longer where it has no border inside."""
        begin = 0
        while len(text) - begin > PART_CHARACTERS:
            end = begin + PART_CHARACTERS
            at = self._last(text, begin, end) or self._first(text, end)
            if at == len(text):
                break
            yield text[begin:at]
            begin = at
        yield text[begin:]

    def _last(self, text: str, begin: int, end: int) -> int | None:
        """Return the last border behind `begin`, and at `end` at the latest."""
        for last in range(end, begin, -_WINDOW):
            first = max(begin, last - _WINDOW)
            found = self._between(text[first : last + 1])
            if len(found):
                return first + int(found[-1])
        return None

    def _first(self, text: str, begin: int) -> int:
        """Return the first border behind `begin`; the text's end if there is none."""
        for first in range(begin, len(text), _WINDOW):
            found = self._between(text[first : first + _WINDOW + 1])
            if len(found):
                return first + int(found[0])
        return len(text)

    def _between(self, text: str) -> np.ndarray:
        """Return the borders inside a short text: int64 [n] places, from 1, before which it may be cut."""
        pairs = _pairs(text)
        found = np.minimum(np.searchsorted(self._joined, pairs), len(self._joined) - 1)
        return np.flatnonzero(self._joined[found] != pairs) + 1


def symbol_pattern(symbols: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that finds symbols as sentencepiece does: from the left, and the longest of those that begin at
    one place.
    """
    return re.compile(f"({'|'.join(map(re.escape, sorted(symbols, key=len, reverse=True)))})")


def _pairs_of(pieces: Iterable[str]) -> set[str]:
    return {piece[place : place + 2] for piece in pieces for place in range(len(piece) - 1)}


def _is_space_behind(pair: str) -> bool:
    return pair[0] != SPACE_MARK == pair[1]


def _pairs(text: str) -> np.ndarray:
    """Return a number for each two characters side by side: uint64 [characters - 1]."""
    codes = np.frombuffer(text.replace(" ", SPACE_MARK).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    return codes[:-1] << np.uint64(32) | codes[1:]


class WordEncoder:
    """Encodes texts by a table of words.

    Args:
        encode: the ids of each of several texts, by the model itself.
        vocab_size: of the model.
        borders: of the model's pieces; they are at all spaces.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], vocab_size: int, borders: Borders) -> None:
        assert borders.are_at_spaces
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.borders = borders
        self._encode = encode
        self._table: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str], end: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts, each followed by those of `end`; beside them little memory is used.

        Returns:
            ids: [sum of lengths] in `dtype`, of all texts one after the other.
            lengths: int64 [texts] ids of each.
        """
        contents, ends, end_bytes = bytearray(), [0], self._bytes(end)
        short = iter(self._look_up([text for text in texts if len(text) <= PART_CHARACTERS]))
        for text in texts:
            if len(text) <= PART_CHARACTERS:
                contents += next(short)
            else:
                for part in self.borders.cut(text):
                    contents += self._look_up([part])[0]
            contents += end_bytes
            ends.append(len(contents))
        return np.frombuffer(contents, self.dtype), np.diff(ends) // self.dtype.itemsize

    def _look_up(self, texts: list[str]) -> list[bytes]:
        """Return the ids of each text, as the bytes of an array in `dtype`."""
        words = [self.borders.words(text) for text in texts]
        new = set().union(*words).difference(self._table)
        if new and len(self._table) + len(new) > _MAX_WORDS:
            self._table.clear()
            new = set().union(*words)
        # A call of the model is dear, so all words go into one.
        if new:
            self._table.update(zip(new, map(self._bytes, self._encode(list(new))), strict=True))
        contents = [b"".join(map(self._table.__getitem__, own)) for own in words]
        for word in new:
            if len(word) > _MAX_CHARACTERS:
                del self._table[word]
        return contents

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return array(self.dtype.char, ids).tobytes()


def exact_borders(data: bytes) -> Borders | None:
    """Return where texts may be cut for a sentencepiece model; None if nowhere.

    The model has to be a BPE (a unigram model compares sums of scores over the whole text, whose last bits may differ),
    leave text as it is before it splits it, have bytes for what it does not know (unknown characters would merge), and
    have no piece with a space after another character.

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
    if not (trained.model_type == sentencepiece_model_pb2.TrainerSpec.BPE and trained.byte_fallback and is_plain):
        return None
    # Bytes and control pieces are spelled in characters that text cannot produce them from.
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    borders = Borders(
        (piece.piece for piece in model.pieces if piece.type in (kind.NORMAL, kind.UNUSED)),
        [piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED],
    )
    return borders if borders.are_at_spaces else None
