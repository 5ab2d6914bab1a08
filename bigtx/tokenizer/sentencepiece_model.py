"""The sentencepiece model of a `Tokenizer`: encoding by the library, decoding by a table of each id's bytes."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from bigtx.tokenizer import special
from bigtx.tokenizer.special import SPACE_MARK, SpecialIds
from bigtx.tokenizer.words import WordEncoder, exact_borders, symbol_pattern
from bigtx.utils.errors import DataError

# Texts that show how a model treats white space.
_PROBES = ("a b", " a  b \n c ", "")


class SentencePieceModel:
    """A sentencepiece model that encodes and decodes.

    Sentencepiece converts the character U+2581 to a space. If the model has the 256 bytes as pieces and does not change
    white space, U+2581 is encoded as its three UTF-8 bytes instead, so that text is restored exactly.

    A symbol that the user defined is never split. A BPE model ensures this itself. A unigram model only makes its
    symbols likely, so they are separated from the text here.

    Attributes:
        writes_mark: whether U+2581 is encoded in this way.
    """

    kind = "sentencepiece"
    file_name = special.MODEL_FILES[kind]
    memory_per_byte = 64
    """Memory that encoding takes for each byte of UTF-8, at most: 27 to 57 were measured (docs/log.md)."""

    def __init__(self, data: bytes) -> None:
        """Args: data: a serialized ModelProto.

        Raises:
            DataError: it is not a sentencepiece model.
        """
        import sentencepiece

        self.data = data
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(data) and self._processor.LoadFromSerializedProto(data)
            self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        except (RuntimeError, UnicodeDecodeError):  # The second: a piece, or the text of the first, is not UTF-8.
            loaded = False
        if not loaded:
            raise DataError("not a sentencepiece model, or a damaged one")
        self.vocab_size: int = self._processor.vocab_size()
        # The probes need few pieces; the table of all is made when a text is decoded.
        self._adds_space = b"".join(map(self._bytes_of, self._encode("a"))).startswith(b" ")
        mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        keeps_space = all(b"".join(map(self._bytes_of, self._encode(text))) == text.encode() for text in _PROBES)
        self.writes_mark = keeps_space and not self._adds_space and all(map(self._processor.is_byte, mark_ids))
        self._mark_ids = mark_ids

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        return [self._bytes_of(i) for i in range(self.vocab_size)]

    @functools.cached_property
    def _bytes_with_special(self) -> list[bytes]:
        return [part or self.piece(i).encode() for i, part in enumerate(self._bytes)]

    @functools.cached_property
    def _apart(self) -> dict[str, list[int]]:
        """Return the ids of the symbols that are separated from texts before the model encodes them."""
        return {SPACE_MARK: self._mark_ids} | _unigram_symbols(self.data) if self.writes_mark else {}

    @functools.cached_property
    def words(self) -> WordEncoder | None:
        """Return an encoder of whole texts that is faster than the model and equal to it; None if the model does not
        work word by word.
        """
        borders = exact_borders(self.data)
        return WordEncoder(self.encode_batch, self.vocab_size, borders) if borders else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        apart = self._apart
        if not any(piece in text for piece in apart for text in texts):
            return self._encode(list(texts))
        pattern = symbol_pattern(apart)
        # Every second part is a symbol that the pattern found.
        parts = [pattern.split(text) for text in texts]
        encoded = iter(self._encode([part for own in parts for part in own[::2]]))
        return [
            list(chain.from_iterable(apart[part] if i % 2 else next(encoded) for i, part in enumerate(own)))
            for own in parts
        ]

    def bytes_of(self, ids: Sequence[int], keep_special: bool) -> bytes:
        """Return the UTF-8 bytes of ids, including a space that the model added at the start."""
        return b"".join(map((self._bytes_with_special if keep_special else self._bytes).__getitem__, ids))

    def decode(self, ids: Sequence[int], keep_special: bool, after: Sequence[int] = ()) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            after: the ids before them, whose text is left out.
        """
        text = self.bytes_of(ids, keep_special).decode(errors="replace")
        return text.removeprefix(" ") if self._begins_with_added_space(after) else text

    def stream(self, after: Sequence[int] = ()) -> Utf8Stream:
        """Return a decoder for ids that come one by one, after others."""
        return Utf8Stream(self._bytes, skips_space=self._begins_with_added_space(after))

    def _begins_with_added_space(self, after: Sequence[int]) -> bool:
        """Return whether a space after these ids is the one that the model adds before a text."""
        return self._adds_space and not self.bytes_of(after, keep_special=False)

    def piece(self, i: int) -> str:
        """Return the piece as in the model."""
        return str(self._processor.id_to_piece(i))

    def is_byte(self, i: int) -> bool:
        """Return whether the piece is a single byte of a character without a piece."""
        return bool(self._processor.is_byte(i))

    def special_ids(self, roles: Sequence[str]) -> SpecialIds:
        """Find the special ids by their kind and name.

        Raises:
            DataError: there is no id that ends a text.
        """
        processor = self._processor
        end = processor.eos_id()
        if end < 0:
            raise DataError("this sentencepiece model has no end-of-text piece (eos_id), which ends every document")

        def control(piece: str) -> int | None:
            i = processor.piece_to_id(piece)
            return i if processor.id_to_piece(i) == piece and processor.is_control(i) else None

        sentinels = (control(special.sentinel(number)) for number in range(special.NUM_SENTINELS))
        found_roles = {name: control(special.role(name)) for name in roles}
        return SpecialIds(
            pad=processor.pad_id() if processor.pad_id() >= 0 else end,
            unknown=processor.unk_id(),
            begin=processor.bos_id() if processor.bos_id() >= 0 else end,
            end=end,
            mask=control(special.MASK),
            sentinels=[i for i in sentinels if i is not None],
            roles={name: i for name, i in found_roles.items() if i is not None},
        )

    def check_decoding(self) -> None:
        """Compare bigtx's decoding with the library's.

        Raises:
            DataError: they differ, e.g. because the model rewrites text in decoding.
        """
        for text in _PROBES:
            ids = self._encode(text)
            if self.decode(ids, keep_special=False) != self._processor.decode(ids):
                raise DataError("the text of its pieces differs from its decoding, which bigtx does not support")

    def _encode(self, texts: Any) -> Any:
        # The library's own threads do not make lists faster; processes do.
        return self._processor.encode(texts, num_threads=1)

    def _bytes_of(self, i: int) -> bytes:
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        piece = self.piece(i)
        if self._processor.is_byte(i):
            match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
            assert match, piece
            return bytes.fromhex(match[1])
        return piece.replace(SPACE_MARK, " ").encode()


class Utf8Stream:
    """Text from ids one by one: a character is returned when its last byte is complete."""

    def __init__(self, bytes_of: Sequence[bytes], *, skips_space: bool = False) -> None:
        """Args: skips_space: whether a space before the first character is left out."""
        self._bytes_of = bytes_of
        self._skips_space = skips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """Return the text that id `i` completes, often empty."""
        content = self._bytes_of[i]
        if self._skips_space and content:
            self._skips_space = False
            content = content.removeprefix(b" ")
        return self._decoder.decode(content)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was cut short."""
        return self._decoder.decode(b"", final=True)


def _unigram_symbols(data: bytes) -> dict[str, list[int]]:
    """Return the symbols that the user of a unigram model defined, with their ids."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    if model.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.UNIGRAM:
        return {}
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return {piece.piece.replace(SPACE_MARK, " "): [i] for i, piece in enumerate(model.pieces) if piece.type == kind}
