"""Signatures: what they estimate, and what they do not depend on."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bigtx.config.schema import NearDuplicateConfig
from bigtx.data.text import ngrams
from bigtx.data.text.ngrams import NOTHING, SIGNATURE_DTYPE, Signer, hash_ngrams


def make_words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=6)) for _ in range(count)]


def test_agreement_estimates_the_similarity() -> None:
    """Over many hashes, and sets of n-grams that share a third, a half and nine tenths."""
    signer = Signer(NearDuplicateConfig(num_bands=500, rows_per_band=8))
    for common, alone in ((100, 100), (200, 100), (900, 50)):
        drawn = make_words(common + 2 * alone, seed=common)
        one, other = drawn[: common + alone], drawn[: -2 * alone] + drawn[-alone:]
        # With n-grams across the seam, the exact similarity is counted.
        ngrams = [{tuple(text[place : place + 5]) for place in range(len(text) - 4)} for text in (one, other)]
        exact = len(ngrams[0] & ngrams[1]) / len(ngrams[0] | ngrams[1])
        signatures = signer.sign([" ".join(one), " ".join(other)])
        agreement = float((signatures[0] == signatures[1]).mean())
        # 4,000 hashes: one standard deviation is at most 0.008.
        assert abs(agreement - exact) < 0.035, (common, exact, agreement)


def test_a_signature_does_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    signer = Signer(NearDuplicateConfig())
    texts = [" ".join(make_words(count, seed=count)) for count in (1, 2, 300, 4, 5, 0, 6, 77, 9, 1000)]
    together = signer.sign(texts)
    assert together.dtype == SIGNATURE_DTYPE and together.shape == (10, 112)
    assert (together == np.concatenate([signer.sign([text]) for text in texts])).all()
    monkeypatch.setattr(ngrams, "_BLOCK", 7)
    assert (together == signer.sign(texts)).all()


def test_a_long_text_in_parts_has_the_signature_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(make_words(count, seed=count)) for count in (5000, 3, 200)] + ["a" + " " * 3000 + "b", "." * 3000]
    whole = Signer(NearDuplicateConfig()).sign(texts)
    monkeypatch.setattr(ngrams, "PIECE_CHARACTERS", 100)
    ngrams._powers.cache_clear()
    num_words = []
    monkeypatch.setattr(
        ngrams, "hash_ngrams", lambda hashes, n: num_words.append(len(hashes)) or hash_ngrams(hashes, n)
    )
    assert (whole == Signer(NearDuplicateConfig()).sign(texts)).all()
    assert len(num_words) > 300 and max(num_words) < 30
    ngrams._powers.cache_clear()


def test_case_and_punctuation_do_not_count() -> None:
    signatures = Signer(NearDuplicateConfig()).sign(
        ["The cat sat on the mat today", "the cat: sat, on THE mat -- today!!", "the cat sat on the mat tomorrow"]
    )
    assert (signatures[0] == signatures[1]).all()
    assert (signatures[0] != signatures[2]).mean() > 0.2


def test_short_texts_count_as_a_whole_and_texts_without_words_as_nothing() -> None:
    signatures = Signer(NearDuplicateConfig()).sign(["two words", "Two words.", "two", "words", "", "...", "other two"])
    assert (signatures[0] == signatures[1]).all()
    assert (signatures[4:6] == NOTHING).all()
    different = signatures[[0, 2, 3, 6]]
    assert all((a != b).mean() > 0.9 for i, a in enumerate(different) for b in different[:i])


def test_the_seed_changes_all_hashes_and_the_machine_none() -> None:
    text = ["the quick brown fox jumps over the lazy dog"]
    one, other = (Signer(NearDuplicateConfig(seed=seed)).sign(text)[0] for seed in (1, 2))
    assert (one != other).mean() > 0.9
    assert one[:6].tolist() == [29685, 7676, 64165, 24397, 24947, 20854]


def test_words_alone_have_no_order() -> None:
    drawn = make_words(200, seed=1)
    texts = [" ".join(drawn), " ".join(reversed(drawn))]
    for ngram, are_equal in ((1, True), (2, False)):
        one, other = Signer(NearDuplicateConfig(ngram=ngram)).sign(texts)
        assert bool((one == other).all()) == are_equal
