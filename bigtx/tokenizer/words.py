"""Encoding in parts: if no piece of a BPE crosses the border of two parts, each part can be encoded by itself.

BPE joins two neighbouring symbols only if their text is a piece. So between two characters that are adjacent
in no piece nothing is ever joined: a text's ids are those of the text before this border and those of the text after
it, exactly. There are two uses:

- A word, here a run of spaces and the text after it up to the next space, is encoded once and then looked up.
  Words repeat (Zipf's law), and looking one up takes a small part of the time that sentencepiece takes for it. This
  needs pieces that have no space after another character. Symbols that the user defined may have one: they are
  separated from the text first, as in the model, and are words of their own.
- A long text is encoded in parts of bounded length, with or without spaces (Chinese, digits, base64).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from bigtx.tokenizer.special import SPACE_MARK
from bigtx.utils.errors import DataError

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
)
"""Their code points, first and last, below `IDEOGRAPHS`."""
IDEOGRAPHS = 0x20000
"""From this code point on, almost all are ideographs."""


def is_unspaced(character: str) -> bool:
    """Return whether a character belongs to such a script."""
    code = ord(character)
    return code >= IDEOGRAPHS or any(first <= code <= last for first, last in UNSPACED)


WORDS = re.compile(" *[^ ]+| +")
"""A word, with the spaces before it."""

PART_CHARACTERS = 1 << 17
"""The number of characters that are encoded at once, unless they have no border: some 10 MiB of memory."""
_MAX_WORDS = 1 << 18
"""The number of cached words, about 40 MiB; then the cache is cleared."""
_MAX_CHARACTERS = 64
"""The longest word that is cached; longer ones are rarely repeated."""
_WINDOW = 1 << 12
"""The number of characters in which a border is searched at once."""


class Borders:
    """The borders at which texts may be cut so that the ids of the parts are those of the whole.

    Args:
        pieces: all pieces that text can become, without bytes.
        symbols: further ones, which are separated from the text before anything is joined.
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
        """Yield the text in parts of at most PART_CHARACTERS; a part without a border inside is longer."""
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
        """Return the last border after `begin`, at most at `end`."""
        for last in range(end, begin, -_WINDOW):
            first = max(begin, last - _WINDOW)
            found = self._between(text[first : last + 1])
            if len(found):
                return first + int(found[-1])
        return None

    def _first(self, text: str, begin: int) -> int:
        """Return the first border after `begin`, or the text's end without a border."""
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
    """Return a number for each two adjacent characters: uint64 [characters - 1]."""
    codes = np.frombuffer(text.replace(" ", SPACE_MARK).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    return codes[:-1] << np.uint64(32) | codes[1:]


class WordEncoder:
    """An encoder of texts by a table of words.

    Args:
        encode: a function that returns the ids of each of several texts, by the model itself.
        vocab_size: the size of the model's vocabulary.
        borders: the borders of the model's pieces; all spaces are borders.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], vocab_size: int, borders: Borders) -> None:
        assert borders.are_at_spaces
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.borders = borders
        self._encode = encode
        self._table: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str], end: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts, each followed by those of `end`, with little additional memory.

        Returns:
            ids: in `dtype` [sum of lengths], the ids of all texts one after the other.
            lengths: int64 [texts], the number of ids of each.
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
        # A call of the model is expensive, so there is one call for all words.
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
    """Return the borders at which texts may be cut for a sentencepiece model; None if there are none.

    The model has to be a BPE (a unigram model compares sums of scores over the whole text, whose last bits may differ),
    not change text before it splits it, have bytes for unknown characters (which would merge otherwise), and
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
    # Bytes and control pieces have spellings from which text cannot produce them.
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    borders = Borders(
        (piece.piece for piece in model.pieces if piece.type in (kind.NORMAL, kind.UNUSED)),
        [piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED],
    )
    return borders if borders.are_at_spaces else None


def cut(text: str, limit: int) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` characters; together they are the text.

    A piece ends with a line's end if there is one, otherwise before a space, otherwise at the limit.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        at = text.rfind("\n", start, end) + 1
        if at <= start:
            at = text.rfind(" ", start + 1, end)
        if at <= start:
            at = end
        yield text[start:at]
        start = at
    if start < len(text):
        yield text[start:]


def utf8_length(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Refuse texts that are not valid Unicode.

    Raises:
        DataError: a text has half a surrogate pair, which is not a character.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"A text has half a surrogate pair, at character {error.start + 1}.") from None
