from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
from sentencepiece import sentencepiece_model_pb2

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.tokenizer import report
from bigtx.tokenizer.report import Measures, example, measure, remark_on_size
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import HELD_OUT_BYTES, draw_sample, train
from bigtx.utils.errors import ConfigError, DataError


@pytest.mark.parametrize("method", ["bpe", "unigram"])
def test_the_same_text_and_seed_give_the_same_tokenizer_in_any_order(texts: list[str], method) -> None:
    config = TokenizerTrainConfig(vocab_size=800, method=method, max_bytes=100_000)
    first = train(config, texts)
    again = train(config, random.Random(0).sample(texts, len(texts)))
    assert first.fingerprint == again.fingerprint
    other_seed = TokenizerTrainConfig(vocab_size=800, method=method, max_bytes=100_000, seed=2)
    assert train(other_seed, texts).fingerprint != first.fingerprint


def test_white_space_and_line_ends_are_learned(bpe: Tokenizer) -> None:
    pieces = {bpe.decode([i]) for i in range(bpe.vocab_size)}
    assert {" " * 4, " " * 8, "\n", ":\n", "\t"} <= pieces


def test_settings_shape_the_pieces(texts: list[str]) -> None:
    plain = train(TokenizerTrainConfig(vocab_size=800, whitespace_pieces=False, chat_roles=["pilot"]), texts)
    assert " " * 4 not in {plain.decode([i]) for i in range(plain.vocab_size)}
    assert plain.role_ids == {"pilot": 105}
    with_digits = [*texts, "2026 " * 1000]
    digits = train(TokenizerTrainConfig(vocab_size=800, split_digits=False), with_digits)
    assert len(digits.encode(" 2026")) == 1
    assert len(train(TokenizerTrainConfig(vocab_size=800), with_digits).encode(" 2026")) == 5


def test_methods_differ(texts: list[str]) -> None:
    bpe, unigram = (train(TokenizerTrainConfig(vocab_size=800, method=each), texts) for each in ("bpe", "unigram"))  # type: ignore[arg-type]
    assert bpe.vocab_size == unigram.vocab_size and bpe.fingerprint != unigram.fingerprint


def test_a_sample_of_the_text_is_learned_from(texts: list[str]) -> None:
    whole, sample = (train(TokenizerTrainConfig(vocab_size=600, max_bytes=size), texts) for size in (10**8, 20_000))
    assert sum(map(len, texts)) > 20_000 and whole.fingerprint != sample.fingerprint


def test_texts_of_any_length_are_learned_from() -> None:
    # One line of 3 MB, which sentencepiece by itself would skip.
    tokenizer = train(TokenizerTrainConfig(vocab_size=440), ["lorem ipsum dolor sit amet consectetur " * 80_000])
    assert len(tokenizer.encode(" consectetur")) == 1


def test_marks_of_the_trainer_do_not_hide_the_text_around_them() -> None:
    text = "\u2585\u2581".join(f"some{i % 7} words{i % 11} that{i % 13} matter " for i in range(3000))
    tokenizer = train(TokenizerTrainConfig(vocab_size=415), [text])
    assert len(tokenizer.encode(" matter")) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("method", ["bpe", "unigram"])
def test_a_vocabulary_beyond_the_text_names_the_largest_that_works(method) -> None:
    documents = [
        "the quick brown fox jumps over the lazy dog while pigs and geese and horses stand and stare " * 5,
        "pack my box with five dozen liquor jugs and send them to the harbour before the ship sails " * 5,
        "".join(f"{a}{b}{c}x " for a in "abcdefghij" for b in "klmnopqrstuvwx" for c in "aeiou") * 3,
    ]
    with pytest.raises(ConfigError, match=r"set vocab_size=\d+ or less") as error:
        train(TokenizerTrainConfig(vocab_size=8000, method=method), documents)
    largest = int(str(error.value).rpartition("vocab_size=")[2].split()[0])
    assert train(TokenizerTrainConfig(vocab_size=largest, method=method), documents).vocab_size == largest


def test_text_too_short_for_any_vocabulary_says_only_that() -> None:
    few = ["ab " * 5]
    with pytest.raises(DataError, match=r"smallest vocabulary has 384\. Add more text\.$") as error:
        train(TokenizerTrainConfig(vocab_size=64_000), few)
    assert "set vocab_size" not in str(error.value)


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="365"):
        train(TokenizerTrainConfig(vocab_size=365), ["a"])


@pytest.mark.parametrize("method", ["bpe", "unigram"])
@pytest.mark.parametrize("symbols", [[], ["一丁", "<code>"]])
def test_the_advice_for_a_script_with_many_characters_works(method, symbols: list[str]) -> None:
    draw = random.Random(1)
    common = [chr(0x4E00 + i) for i in range(100)]
    rare = "".join(chr(0x5000 + i) for i in range(2000))
    words = ["".join(draw.choices(common, k=2)) for _ in range(400)]
    documents = [*(" ".join(draw.choices(words, k=100)) for _ in range(900)), rare]
    config = TokenizerTrainConfig(vocab_size=600, method=method, user_defined_symbols=symbols)
    with pytest.raises(ConfigError, match="characters of the text") as error:
        train(config, documents)
    found = re.search(r"Set vocab_size=(\d+) or more, or character_coverage=([\d.]+):", str(error.value))
    assert found
    by_coverage = train(replace(config, character_coverage=float(found[2])), documents)
    assert by_coverage.vocab_size == 600
    assert any(len(by_coverage.decode([i])) > 1 for i in range(400, 600))
    by_size = train(replace(config, vocab_size=int(found[1])), documents)
    for tokenizer in (by_coverage, by_size):
        assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_a_coverage_that_is_no_help_is_not_offered() -> None:
    many = ["".join(chr(0x4E00 + i) for i in range(3000))]
    with pytest.raises(ConfigError, match=r"Set vocab_size=\d+ or more\.$") as error:
        train(TokenizerTrainConfig(vocab_size=512), many)
    needed = int(str(error.value).rpartition("vocab_size=")[2].split()[0])
    assert train(TokenizerTrainConfig(vocab_size=needed), many).vocab_size == needed


@pytest.mark.parametrize("documents", [[], ["\x00"], ["\u2581\u2585"]])
def test_nothing_to_learn_from_is_an_error(documents: list[str]) -> None:
    with pytest.raises(DataError, match="no text for training"):
        train(TokenizerTrainConfig(vocab_size=512), documents)


@pytest.mark.parametrize("roles", [["User"], ["a,b"], ["user", "user"], [""]])
def test_unfit_names_of_roles_are_refused(roles: list[str]) -> None:
    with pytest.raises(ConfigError, match="chat_roles"):
        train(TokenizerTrainConfig(vocab_size=512, chat_roles=roles), ["a"])


def test_a_vocabulary_too_large_for_its_text_is_remarked_on(bpe: Tokenizer, texts: list[str]) -> None:
    measures = measure(bpe, texts)
    large = train(TokenizerTrainConfig(vocab_size=12_000), texts)
    remark = remark_on_size(large, measure(large, texts), num_bytes=measures.num_bytes)
    assert "12,000 ids are many" in remark and "vocab_size=2k would fit" in remark
    assert remark_on_size(bpe, measures, num_bytes=measures.num_bytes) == ""
    assert remark_on_size(large, measures, num_bytes=10_000_000) == ""


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "suited"),
    [(1000, 8000, 2), (1000, 7999, None), (1_600_000, 64_000, 16), (1_599_999, 64_000, 8), (1_600_000, 63_999, None)],
)
def test_the_vocabulary_that_fits_has_100_tokens_for_each_id(
    num_tokens: int, vocab_size: int, suited: int | None
) -> None:
    """It is a power of two, at least 2k, and is named from four times its size on."""
    measures = Measures(1, num_bytes=8, num_tokens=4, num_lossless=1, tokens=Counter(), seconds=1.0)
    tokenizer: Any = SimpleNamespace(vocab_size=vocab_size)
    remark = remark_on_size(tokenizer, measures, num_bytes=2 * num_tokens)
    assert remark.endswith(f" vocab_size={suited}k would fit." if suited else "") and bool(remark) == bool(suited)


def test_the_pieces_of_an_example_are_shown(bpe: Tokenizer) -> None:
    assert example(bpe, " return") == "·return  (1 tokens)"
    assert example(bpe, " return é return") == "·return|·|[é: 2 bytes]|·return  (5 tokens)"
    pieces, _, count = example(bpe, "    return self.argument_default").partition("  (")
    assert pieces.replace("|", "") == "····return·self.argument_default"
    assert int(count.split()[0]) == pieces.count("|") + 1 > 3


@pytest.mark.parametrize("method", ["bpe", "unigram"])
def test_the_model_of_every_machine_is_trained_with_16_threads(method: str, request: pytest.FixtureRequest) -> None:
    """The number is in the file, so with another one the same text would give another fingerprint."""
    data = request.getfixturevalue(method).model.data
    assert sentencepiece_model_pb2.ModelProto.FromString(data).trainer_spec.num_threads == 16


def test_the_trainer_is_silent(capfd: pytest.CaptureFixture[str], texts: list[str]) -> None:
    train(TokenizerTrainConfig(vocab_size=600), texts[:2])
    with pytest.raises(ConfigError):
        train(TokenizerTrainConfig(vocab_size=100_000), texts[:2])
    assert capfd.readouterr() == ("", "")


def test_a_sample_has_the_size_asked_for_whatever_the_order() -> None:
    documents = [f"document {i} " * 20 for i in range(2000)]
    whole = draw_sample(documents, 10**9, seed=1)
    assert whole.num_documents == 2000
    assert whole.num_bytes == sum(map(len, documents))
    assert whole.training_bytes + sum(map(len, whole.held_out)) == whole.num_bytes
    places = {xxhash.xxh3_64_intdigest(text.encode(), 1): text for text in documents}
    assert whole.held_out == [places[place] for place in sorted(places) if place % 64 == 0]

    part = draw_sample(documents, 50_000, seed=1)
    assert 50_000 <= part.training_bytes <= 50_000 + max(map(len, documents))
    assert part.training == draw_sample(documents[::-1], 50_000, seed=1).training
    assert part.training == whole.training[: len(part.training)]
    assert part.training != draw_sample(documents, 50_000, seed=2).training
    assert not set(part.training) & {text.encode() for text in part.held_out}


def test_one_long_document_is_sampled_in_parts() -> None:
    document = "".join(f"line {i} of many\n" for i in range(200_000))
    sample = draw_sample([document], 100_000, seed=1)
    assert 100_000 <= sample.training_bytes <= 100_000 + 16_384
    assert all(piece.decode() in document for piece in sample.training[:3])


def test_a_document_too_long_to_be_held_out_whole_is_cut_to_characters() -> None:
    documents = ["é" * HELD_OUT_BYTES + str(i) for i in range(200)]
    sample = draw_sample(documents[:200], 1000, seed=1)
    assert sample.held_out
    assert all(set(text) == {"é"} for text in sample.held_out)


def test_a_lone_document_is_learned_from() -> None:
    for i in range(300):
        assert draw_sample([f"text {i}"], 1000, seed=1).training


def test_sums_of_unigram_scores_are_exact(unigram: Tokenizer) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(unigram.model.data)
    scores = {piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    assert len(scores) > 100
    assert all((score * 64).is_integer() for score in scores)


def test_long_texts_are_measured_in_parts(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def area(self):\n    return self.width**2\n" * 200
    whole = measure(bpe, [text, "", "x"])
    longest: list[int] = []
    encode = bpe.encode_batch
    monkeypatch.setattr(report, "_PART_CHARACTERS", 100)
    monkeypatch.setattr(bpe, "encode_batch", lambda parts: longest.extend(map(len, parts)) or encode(parts))
    parts = measure(bpe, [text, "", "x"])
    assert max(longest) <= 100
    assert (parts.num_texts, parts.num_bytes, parts.num_lossless) == (3, len(text) + 1, 3)
    assert parts.tokens == whole.tokens
    monkeypatch.setattr(bpe, "decode", lambda ids: "x")
    assert measure(bpe, [text, "", "x"]).num_lossless == 2
