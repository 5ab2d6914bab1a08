"""Words as numbers: the same for a text in any company, and equal just where the words are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from bigtx.data.text import ngrams as words_module
from bigtx.data.text.ngrams import hash_ngrams, hash_words, split_words, words_at


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the size of pieces."""

    def set_size(size: int) -> None:
        monkeypatch.setattr(words_module, "PIECE_CHARACTERS", size)
        words_module._powers.cache_clear()

    yield set_size
    words_module._powers.cache_clear()


TEXTS = [
    "The quick brown fox -- jumps!",
    "",
    "  the QUICK, brown\tfox\n",
    "don't 3.14 naïve Ärger \u0130stanbul",
    "机器学习 is 楽しい 𠀀𠀁",
    "नमस्ते दुनिया e\u0301",
    "... \x00 _ 🧙",
    "ends with a word",
    "starts",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, it's 42!", ["don", "t", "panic", "it", "s", "42"]),
        ("snake_case x", ["snake", "case", "x"]),
        ("机器 learning楽", ["机", "器", "learning", "楽"]),
        ("नमस्ते", ["नमस्ते"]),
        ("\u0130x 𠀀", ["\u0130x", "𠀀"]),
        ("--- 🧙 \x00", []),
    ],
)
def test_what_a_word_is(text: str, expected: list[str]) -> None:
    assert list(split_words(text)) == expected
    assert hash_words([text]).counts.tolist() == [len(expected)]


def test_equal_words_have_equal_hashes_and_others_have_others() -> None:
    hashes, counts = hash_words(TEXTS)
    words = [word for text in TEXTS for word in split_words(text)]
    assert counts.tolist() == [len(list(split_words(text))) for text in TEXTS]
    assert len(words) == len(hashes)
    assert len(set(zip(words, hashes.tolist(), strict=True))) == len(set(words)) == len(set(hashes.tolist()))


def test_a_texts_hashes_do_not_depend_on_its_company(cut_at: Callable[[int], None]) -> None:
    together, counts = hash_words(TEXTS * 3)
    apart = [hash_words([text]) for text in TEXTS] * 3
    assert counts.tolist() == [int(one.counts[0]) for one in apart]
    assert (together == np.concatenate([one.hashes for one in apart])).all()
    # Long texts are cut at white space.
    cut_at(40)
    cut, counts_cut = hash_words([*TEXTS, " ".join(TEXTS), *TEXTS])
    assert (cut == together).all()
    assert counts_cut.tolist() == [*counts[: len(TEXTS)].tolist(), counts[: len(TEXTS)].sum(), *counts[: len(TEXTS)]]


def test_a_word_longer_than_a_piece_ends_the_search_for_white_space(cut_at: Callable[[int], None]) -> None:
    cut_at(16)
    assert hash_words(["a" * 100, "b", "c " + "d" * 50]).counts.tolist() == [7, 1, 5]


def splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_the_hashes_are_those_of_plain_arithmetic() -> None:
    """So they are the same on every machine: polynomials modulo 2^64 of mixed code points, and of words."""
    hashes, _ = hash_words(["Hello, w\xd6rld 机 𠀀!"])
    expected = [
        splitmix(sum(splitmix(ord(letter)) * 0x9E3779B97F4A7C15**place for place, letter in enumerate(word)) % 2**64)
        for word in ("hello", "w\xf6rld", "机", "𠀀")
    ]
    assert hashes.tolist() == expected
    pairs = [splitmix((one * 0xD6E8FEB86659FD93 + other) % 2**64) for one, other in pairwise(expected)]
    assert hash_ngrams(hashes, 2).tolist() == pairs


def test_words_are_found_by_their_place(cut_at: Callable[[int], None]) -> None:
    cut_at(24)
    text = " ".join(TEXTS)
    words = list(split_words(text))
    assert all(words_at(text, place, 3) == words[place : place + 3] for place in range(len(words) + 2))


def test_ngrams_know_their_order_and_length() -> None:
    words, _ = hash_words(["a b a b c"])
    pairs = hash_ngrams(words, 2)
    assert len(pairs) == 4 and pairs[0] == pairs[2] != pairs[1]
    assert not set(pairs.tolist()) & set(hash_ngrams(words, 3).tolist())
    assert len(hash_ngrams(words, 5)) == 1
