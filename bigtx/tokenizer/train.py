"""Training of a lossless sentencepiece tokenizer.

Any text is restored exactly: no normalization, no space added or removed, and characters without a piece are
encoded as their UTF-8 bytes. Special ids are control pieces, which text cannot produce.
"""

from __future__ import annotations

import heapq
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from bigtx.config.nodes import Problem, raise_problems
from bigtx.config.schema import TokenizerTrainConfig
from bigtx.config.settings import find
from bigtx.tokenizer import special
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import cut, symbol_pattern
from bigtx.utils.errors import ConfigError, DataError

HELD_OUT_BYTES = 1_000_000
"""The bytes of text that are held out for measurements."""

_PIECE_CHARACTERS = 16_384
# One document in so many is held out.
_HELD_OUT_EVERY = 64


@dataclass
class Sample:
    """The drawn sample.

    Attributes:
        num_documents, num_bytes: the counts of the whole input (UTF-8).
        training: pieces of documents as UTF-8, in the order of their hashes.
        held_out: documents that are not in `training`; empty if there were few.
    """

    num_documents: int = 0
    num_bytes: int = 0
    training: list[bytes] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    @property
    def training_bytes(self) -> int:
        """Return the number of bytes of `training`."""
        return sum(map(len, self.training))


def draw_sample(documents: Iterable[str], max_bytes: int, seed: int) -> Sample:
    """Draw about `max_bytes` of UTF-8 text for training, and up to 1 MB of other documents for measurements.

    Args:
        documents: any number of texts of any length; long ones are sampled in pieces of lines.
    """
    sample = Sample()
    training, held_out = _Smallest(max_bytes), _Smallest(HELD_OUT_BYTES)
    for document in documents:
        data = document.encode()
        sample.num_documents += 1
        sample.num_bytes += len(data)
        place = xxhash.xxh3_64_intdigest(data, seed)
        if place % _HELD_OUT_EVERY == 0:
            held_out.add(place, data[:HELD_OUT_BYTES])
        else:
            for piece in _pieces(document, data):
                training.add(xxhash.xxh3_64_intdigest(piece, seed), piece)
    sample.training = training.in_order()
    if not sample.training:
        # There are so few documents that all would be held out.
        sample.training, held_out = held_out.in_order(), _Smallest(0)
    # A document that was cut at its size may end inside a character.
    sample.held_out = [data.decode(errors="ignore") for data in held_out.in_order()]
    return sample


def _pieces(document: str, data: bytes) -> Iterator[bytes]:
    if len(data) <= _PIECE_CHARACTERS:
        yield data
    else:
        yield from (piece.encode() for piece in cut(document, _PIECE_CHARACTERS))


class _Smallest:
    """The pieces with the smallest hashes that together just reach `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._heap: list[tuple[int, bytes]] = []

    def add(self, place: int, data: bytes) -> None:
        if self._num_bytes >= self._max_bytes and -self._heap[0][0] < place:
            return
        heapq.heappush(self._heap, (-place, data))
        self._num_bytes += len(data)
        while self._num_bytes - len(self._heap[0][1]) >= self._max_bytes:
            self._num_bytes -= len(heapq.heappop(self._heap)[1])

    def in_order(self) -> list[bytes]:
        return [data for _, data in sorted(self._heap, reverse=True)]


# A unigram model depends on how its sums are split over threads, and both models' files contain the number of threads;
# with one number for every machine, the same text and seed give the same file.
_NUM_THREADS = 16
# Above any piece of a sample: the trainer drops longer ones silently.
_MAX_PIECE_BYTES = 1 << 20
# The trainer drops a text with its own mark of an unknown character, and reads its mark of a space as a space:
# U+2585 and U+2581, here in UTF-8.
_TRAINER_MARKS = re.compile(b"\xe2\x96[\x81\x85]")
_IN_NO_SYMBOL = re.compile("[\0\u2581\u2585\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Sums of such scores are exact in float32 up to 262,144, some ten thousand pieces, in any order of addition. So
# ways to spell a text that are equally good are equally good for every program that reads the model.
_SCORE_STEPS = 64


def train(config: TokenizerTrainConfig, documents: Iterable[str]) -> Tokenizer:
    """Train a tokenizer on a seeded sample of the documents.

    The same documents, in any order, and the same settings give the same tokenizer, byte for byte.

    Args:
        documents: texts of any number and length; memory grows with config.max_bytes only.

    Raises:
        ConfigError: the vocabulary is too large or too small for the text, or a role's name or a symbol is not valid.
        DataError: there is no text.
    """
    raise_problems(problems(config))
    return train_on_sample(config, draw_sample(documents, config.max_bytes, config.seed))


def problems(config: TokenizerTrainConfig) -> Iterator[Problem]:
    """Yield a problem for names of roles and symbols that cannot be used, and for a vocabulary without space for text.

    These rules need the names of the reserved ids, which bigtx.config does not know.
    """
    for name in config.chat_roles:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            what = f"{name!r} cannot name a role; use lower-case letters, digits and _, e.g. assistant"
            yield Problem("chat_roles", "", what)
    if len(set(config.chat_roles)) < len(config.chat_roles):
        yield Problem("chat_roles", "", f"a name is a duplicate: {', '.join(config.chat_roles)}")
    yield from _symbol_problems(config)
    needed = _num_given(config)
    if config.vocab_size <= needed:
        symbols = ", the user-defined symbols" if config.user_defined_symbols else ""
        what = (
            f"is too small: the reserved ids{symbols} and the 256 bytes alone are {needed:,}. Useful sizes start at "
            "about 2,000; 16,384 to 131,072 are usual"
        )
        yield Problem("vocab_size", str(config.vocab_size), what, related=("chat_roles", "user_defined_symbols"))


def _num_given(config: TokenizerTrainConfig) -> int:
    """Return the number of ids that exist before training."""
    return len(_reserved(config)) + len(config.user_defined_symbols) + 256


def _reserved(config: TokenizerTrainConfig) -> list[str]:
    return [special.PAD, special.UNKNOWN, special.BEGIN, special.END, *special.control_pieces(config.chat_roles)]


def _symbol_problems(config: TokenizerTrainConfig) -> Iterator[Problem]:
    symbols, key = config.user_defined_symbols, "user_defined_symbols"
    for symbol in symbols:
        if not symbol:
            yield Problem(key, "", "an empty text is not a symbol; leave it out")
        elif symbol in _reserved(config) or _BYTE_PIECE.fullmatch(symbol):
            what = f"{symbol[:80]!r} is the name of a reserved id, which no text can produce; choose another text"
            yield Problem(key, "", what)
        elif _IN_NO_SYMBOL.search(symbol):
            what = f"{symbol[:80]!r} has NUL, U+2581, U+2585 or half a surrogate pair, which no symbol can have"
            yield Problem(key, "", f"{what}; leave it out")
    if len(set(symbols)) < len(symbols):
        twice = next(symbol for symbol in symbols if symbols.count(symbol) > 1)
        yield Problem(key, "", f"{twice[:80]!r} is a duplicate; name it once")


def train_on_sample(config: TokenizerTrainConfig, sample: Sample) -> Tokenizer:
    """Train as `train` does, with a sample that has been drawn.

    Raises:
        ConfigError, DataError: as in `train`.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_trainer_texts(sample), model_writer=model, **_trainer_settings(config)
        )
    except RuntimeError as error:
        raise _explain(str(error), config, sample) from error
    settings = ("method", "seed", "split_digits", "whitespace_pieces", "user_defined_symbols", "character_coverage")
    origin = {name: getattr(config, name) for name in settings}
    origin |= {name: getattr(sample, name) for name in ("num_documents", "num_bytes", "training_bytes")}
    data = _round_scores(model.getvalue()) if config.method == "unigram" else model.getvalue()
    return Tokenizer.from_sentencepiece_bytes(data, config.chat_roles, origin)


def _trainer_settings(config: TokenizerTrainConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "model_type": config.method,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "split_digits": config.split_digits,
        "allow_whitespace_only_pieces": config.whitespace_pieces,
        "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3,
        "pad_piece": special.PAD, "unk_piece": special.UNKNOWN, "bos_piece": special.BEGIN, "eos_piece": special.END,
        "control_symbols": special.control_pieces(config.chat_roles),
        "user_defined_symbols": [symbol.replace(" ", special.SPACE_MARK) for symbol in config.user_defined_symbols],
        "character_coverage": config.character_coverage,
        "max_sentence_length": _MAX_PIECE_BYTES,
        "num_threads": _NUM_THREADS,
        "minloglevel": 2,
    }  # fmt: skip


def _round_scores(data: bytes) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    for piece in model.pieces:
        piece.score = round(piece.score * _SCORE_STEPS) / _SCORE_STEPS
    return bytes(model.SerializeToString())


def _trainer_texts(sample: Sample) -> Iterator[bytes]:
    for piece in sample.training:
        yield from filter(None, _TRAINER_MARKS.split(piece))


def _explain(message: str, config: TokenizerTrainConfig, sample: Sample) -> Exception:
    """Return the error for a failure of sentencepiece."""
    text = f"{sample.training_bytes:,} bytes of text"
    if found := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        most, setting = int(found[1]), find(TokenizerTrainConfig, "vocab_size")
        assert setting is not None and setting.minimum is not None
        if most < setting.minimum:
            what = f"{text} are too few for a tokenizer: they have at most {most:,} different pieces"
            return DataError(f"{what}, but the smallest vocabulary has {setting.minimum:g}. Add more text.")
        return ConfigError(
            f"vocab_size={config.vocab_size} is larger than {text} allow: they have at most {most:,} "
            f"different pieces. Add more text, or set vocab_size={most} or less."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return _too_small(int(found[1]), config, sample)
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return DataError(f"There is no text for training in {sample.num_documents:,} documents ({text}).")
    return RuntimeError(f"sentencepiece could not train: {message}")


def _too_small(needed: int, config: TokenizerTrainConfig, sample: Sample) -> ConfigError:
    """Return the error, with advice, if the characters alone are more than the vocabulary."""
    problem = (
        f"vocab_size={config.vocab_size} is too small: the characters of the text, the reserved ids and the 256 "
        f"bytes alone are {needed:,}. Set vocab_size={needed} or more"
    )
    coverage = _coverage_for((config.vocab_size - _num_given(config)) // 2, config, sample)
    if coverage is None:
        return ConfigError(f"{problem}.")
    effect = "the rarest characters are then encoded as bytes, and half of this vocabulary is left for longer pieces"
    return ConfigError(f"{problem}, or character_coverage={coverage:g}: {effect}.")


def _coverage_for(most: int, config: TokenizerTrainConfig, sample: Sample) -> float | None:
    """Return the largest coverage that gives pieces to at most so many characters; None if no allowed coverage
    does.
    """
    setting = find(TokenizerTrainConfig, "character_coverage")
    assert setting is not None and setting.minimum is not None
    counts: Counter[str] = Counter()
    symbols = symbol_pattern(config.user_defined_symbols) if config.user_defined_symbols else None
    for data in _trainer_texts(sample):
        text = data.decode()
        for part in symbols.split(text)[::2] if symbols else [text]:
            counts.update(part)
    # As in the trainer: the most frequent characters, until their share of the text is reached.
    share = sum(count for _, count in counts.most_common(most)) / max(1, counts.total())
    coverage = math.floor(share * 10_000) / 10_000
    return coverage if coverage >= setting.minimum else None
