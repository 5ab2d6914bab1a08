"""Encoding word by word gives the ids that sentencepiece gives for the whole text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bigtx.tokenizer import words
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import WordEncoder, splits_at_spaces

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


def test_documents_end_with_the_end_id(bpe: Tokenizer, unigram: Tokenizer) -> None:
    for tokenizer in (bpe, unigram):
        ids, lengths = tokenizer.encode_documents(HARD)
        documents = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
        assert documents == [[*tokenizer.encode(text), tokenizer.end_id] for text in HARD]


def test_the_table_of_words_stays_bounded(
    bpe: Tokenizer, processor: sentencepiece.SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 10)
    encoder = WordEncoder(lambda texts: processor.encode(texts), bpe.vocab_size)
    text = " ".join(f"word{number}" for number in range(100)) + " " + "long" * 100
    for part in (text, "some words", "few words more", text):
        (content,) = encoder.encode([part])
        assert np.frombuffer(content, encoder.dtype).tolist() == processor.encode(part)
        assert not any(len(word) > 64 for word in encoder._table)
    encoder.encode(["some words"])
    assert 0 < len(encoder._table) <= 10


def test_a_word_without_end_is_cut(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bpe.encode("0123456789" * 100)
    monkeypatch.setattr(words, "MAX_ENCODE_CHARACTERS", 100)
    in_parts = bpe.encode("0123456789" * 100)
    assert bpe.decode(in_parts) == "0123456789" * 100 and len(in_parts) >= len(whole)


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
    assert splits_at_spaces(model)
    changed = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(changed)
    assert not splits_at_spaces(changed.SerializeToString())


def test_imdb_reviews_have_the_ids_of_the_whole(bpe: Tokenizer, processor, imdb_jsonl: Path) -> None:
    with imdb_jsonl.open(encoding="utf-8") as lines:
        texts = [line for line, _ in zip(lines, range(1000), strict=False)]
    assert bpe.encode_batch(texts) == processor.encode(texts, num_threads=1)
