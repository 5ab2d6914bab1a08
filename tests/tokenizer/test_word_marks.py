"""Where words begin, by what three kinds of tokenizers write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.pretraining.objectives import begins_word
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train

TEXTS = [
    "The movie, which I watched twice,\nwas surprisingly good; wasn't it?\n\tThe movies\r\n  I know are not.",
    "机器学习是人工智能的一个分支。",
    "สวัสดีชาวโลก",
    "naïve Ärger",
]
WORDS = "The movie, watched twice\nwas\tgood 机器学"


@pytest.fixture(params=["sentencepiece", "bytes", "byte_level", "word_piece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """One that knows the texts' characters, or (bytes) hardly any."""
    many = TEXTS * 20
    if request.param in ("sentencepiece", "bytes"):
        texts = many if request.param == "sentencepiece" else ["abcdefg hijklm nop " * 20]
        return train(TokenizerTrainConfig(vocab_size=460 if request.param == "sentencepiece" else 390), texts)
    made = pytest.importorskip("tokenizers")
    special = ["[UNK]", "[SEP]", "[MASK]"]
    if request.param == "byte_level":
        own = made.Tokenizer(made.models.BPE())
        own.pre_tokenizer = made.pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.decoder = made.decoders.ByteLevel()
        alphabet = made.pre_tokenizers.ByteLevel.alphabet()
        trainer = made.trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        )
    else:
        own = made.Tokenizer(made.models.WordPiece(unk_token="[UNK]"))
        own.pre_tokenizer = made.pre_tokenizers.BertPreTokenizer()
        own.decoder = made.decoders.WordPiece()
        trainer = made.trainers.WordPieceTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    own.train_from_iterator(many, trainer)
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"sep_token": "[SEP]", "mask_token": "[MASK]"}))
    return Tokenizer.from_huggingface(tmp_path)


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    begins, spaces = begins_word(tokenizer)
    assert len(begins) == len(spaces) == tokenizer.vocab_size
    words: list[list[int]] = [[]]
    for i in tokenizer.encode(text):
        if begins[i] or (words[-1] and spaces[words[-1][-1]]):
            words.append([])
        words[-1].append(i)
    decoded = [tokenizer.decode(word).strip().replace(" ##", "").removeprefix("##") for word in words]
    return [word for word in decoded if word]


def test_words_begin_after_white_space(tokenizer: Tokenizer) -> None:
    text = WORDS.partition(" 机")[0]
    expected = text.split()
    found = words_of(tokenizer, text)
    if "movie" in found:  # WordPiece knows punctuation as words.
        expected[1:2] = ["movie", ","]
    assert found == expected


def test_a_sentence_without_spaces_is_many_words(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.id_to_piece(i) for i in tokenizer.encode("机器学习是人工智能")]
    found = words_of(tokenizer, "机器学习是人工智能")
    assert all(piece.startswith("<0x") for piece in pieces) or len(found) > 1, (pieces, found)
