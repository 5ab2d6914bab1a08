"""Encoding word by word, and long texts in parts, gives the ids that sentencepiece gives for the whole text."""

from __future__ import annotations

import base64
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bigtx.tokenizer import words
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import Borders, WordEncoder, exact_borders, is_unspaced

HARD = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "\ta\r\n b\n\n  c",
    "你好 世界",
    "x" * 300 + " y",
    "\0 \ufeff é ́",
]


DRAW = random.Random(1)
LONG = {
    "prose": "def of(words):\n    return [word for word in words]  # of the text\n" * 60,
    "digits": "".join(DRAW.choices("0123456789", k=3000)),
    "base64": base64.b64encode(DRAW.randbytes(3000)).decode(),
    "chinese": "".join(chr(DRAW.randrange(0x4E00, 0x9FA5)) for _ in range(3000)),
    "one letter": "e" * 3000,
    "spaces": " " * 3000,
    "line ends": "\n" * 3000,
    "indented": "\n        x\t\t  =  \r\n" * 150,
    "mixed": "".join(DRAW.choices(" \n\t\r\0selfé你👍=_()\u0301\u200d", k=3000)),
}


@pytest.fixture(scope="session")
def model(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("bpe")
    bpe.save(folder)
    return (folder / "tokenizer.model").read_bytes()


@pytest.fixture(scope="session")
def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_real_texts_have_the_ids_of_the_whole(
    bpe: Tokenizer, processor: sentencepiece.SentencePieceProcessor, texts: list[str]
) -> None:
    for text in [*texts, *HARD]:
        assert bpe.encode(text) == processor.encode(text)


@given(st.text(st.sampled_from(list("ab \t\n(é你=.")) | st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_has_the_ids_of_the_whole(
    bpe: Tokenizer, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    if "\u2581" not in text:  # Which sentencepiece itself would take for a space.
        assert bpe.encode(text) == processor.encode(text)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        *(("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u1780", "\u17ff"), ("\u2e80", "\u2fdf"), ("\u3005", "\u3007")),
        *(("\u3040", "\u30ff"), ("\u31f0", "\u31ff"), ("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uf900", "\ufaff")),
    ],
)
def test_scripts_without_spaces(first: str, last: str) -> None:
    """The blocks of Unicode from Thai to Han, from their first to their last code point."""
    assert [is_unspaced(chr(ord(first) + step)) for step in (-1, 0)] == [False, True]
    assert [is_unspaced(chr(ord(last) + step)) for step in (0, 1)] == [True, False]
    assert is_unspaced("\U00020000") and not is_unspaced("\U0001ffff")


def test_documents_end_with_the_end_id(bpe: Tokenizer, unigram: Tokenizer) -> None:
    for tokenizer in (bpe, unigram):
        ids, lengths = tokenizer.encode_documents(HARD)
        documents = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
        assert documents == [[*tokenizer.encode(text), tokenizer.end_id] for text in HARD]


def test_the_table_of_words_stays_bounded(
    bpe: Tokenizer, processor: sentencepiece.SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 10)
    encoder = WordEncoder(lambda texts: processor.encode(texts), bpe.vocab_size, Borders([]))
    text = " ".join(f"word{number}" for number in range(100)) + " " + "long" * 100
    for part in (text, "some words", "few words more", text):
        assert encoder.encode([part])[0].tolist() == processor.encode(part)
        assert not any(len(word) > 64 for word in encoder._table)
    encoder.encode(["some words"])
    assert 0 < len(encoder._table) <= 10


@pytest.mark.parametrize("limit", [7, 100])
@pytest.mark.parametrize("kind", LONG)
def test_a_long_text_in_parts_has_the_ids_of_the_whole(
    bpe: Tokenizer,
    processor: sentencepiece.SentencePieceProcessor,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    limit: int,
) -> None:
    monkeypatch.setattr(words, "PART_CHARACTERS", limit)
    text = LONG[kind]
    assert bpe.model.words
    parts = list(bpe.model.words.borders.cut(text))
    assert "".join(parts) == text
    if kind not in ("spaces", "line ends"):  # Whose pieces are runs of themselves.
        assert len(parts) >= len(text) // limit / 2
    assert bpe.encode(text) == processor.encode(text)
    ids, lengths = bpe.encode_documents(["", text, "e"])
    assert lengths.tolist() == [1, len(processor.encode(text)) + 1, 2]
    assert ids.tolist() == [bpe.end_id, *processor.encode(text), bpe.end_id, *processor.encode("e"), bpe.end_id]


SYLLABLES = ["self", "re", "  ", " ", "\n", "\t", "(", "12", "你", "é", "👍", "==", "ment", "\u0301", "▁"]


@given(st.text(st.sampled_from("ab \n(é你=e1"), max_size=80), st.lists(st.sampled_from(SYLLABLES)), st.integers(1, 12))
def test_any_text_in_parts_has_the_ids_of_the_whole(bpe: Tokenizer, text: str, more: list[str], limit: int) -> None:
    text += "".join(more)
    whole = bpe.model.encode_batch([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "PART_CHARACTERS", limit)
        assert bpe.encode(text) == whole


def test_a_text_is_cut_only_between_characters_that_no_piece_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "PART_CHARACTERS", 4)
    borders = Borders(["a", "ab", "▁a", "bc", "x▁"])
    assert list(borders.cut("abcabcabcabc")) == ["abc"] * 4
    assert list(borders.cut("abababab")) == ["abab", "abab"]
    assert list(borders.cut("x a" * 3)) == ["x a"] * 3
    assert list(borders.cut("xxxxxxxx")) == ["xxxx", "xxxx"]
    assert not borders.are_at_spaces
    aa = Borders(["aa"])
    assert list(aa.cut("b" + "a" * 9)) == ["b", "a" * 9]
    assert list(aa.cut("a" * 9 + "bbb")) == ["a" * 9, "bbb"]
    assert list(aa.cut("a" * 10_000)) == ["a" * 10_000]
    assert list(aa.cut("")) == [""]


def test_memory_follows_from_the_longest_part(
    bpe: Tokenizer, unigram: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "PART_CHARACTERS", 100)
    assert bpe.memory_for("12" * 5000) == 100 * bpe.memory_for("1")
    assert bpe.memory_for(" " * 5000) == 5000 * bpe.memory_for(" ")
    assert unigram.memory_for("12" * 5000) == 10_000 * unigram.memory_for("1")
    assert unigram.memory_for("你") == 3 * unigram.memory_for("1") == 3 * unigram.model.memory_per_byte


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.trainer_spec, "model_type", 1),
        lambda model: setattr(model.trainer_spec, "byte_fallback", False),
        lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True),
        lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True),
        lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True),
        lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"rules"),
        lambda model: setattr(model.pieces[-1], "piece", "a▁b"),
    ],
)
def test_models_that_look_beyond_a_word_are_left_to_the_library(model: bytes, change) -> None:
    assert exact_borders(model)
    changed = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(changed)
    assert exact_borders(changed.SerializeToString()) is None


def test_imdb_reviews_have_the_ids_of_the_whole(bpe: Tokenizer, processor, imdb_reviews: list[str]) -> None:
    assert bpe.encode_batch(imdb_reviews) == processor.encode(imdb_reviews, num_threads=1)
