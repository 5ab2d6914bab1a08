"""Symbols that users define are one piece each, and any text comes back as it was."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.tokenizer import words
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError

SYMBOLS = ["<code>", "<co", "New York", "4 2", "42", "é", "e ", " the", "\n\t", 'a,"b', "  ", "self.", "你好"]
TEXT = st.one_of(
    st.text(st.sampled_from(list(' <code>NewYork42é\n\tath,"bself.你好\u2581'))),
    st.lists(st.sampled_from([*SYMBOLS, "▁", " ", "4", "f.s", "<", "x"])).map("".join),
)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=800, method=request.param, user_defined_symbols=SYMBOLS), texts[:3])


def expected_symbols(text: str) -> list[str]:
    """The symbols in a text: from the left, the longest of those that begin at one place."""
    return re.findall("|".join(map(re.escape, sorted(SYMBOLS, key=len, reverse=True))), text)


def check(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    own = {tokenizer.encode(symbol)[0]: symbol for symbol in SYMBOLS}
    assert len(own) == len(SYMBOLS)
    assert tokenizer.decode(ids) == text
    assert [own[i] for i in ids if i in own] == expected_symbols(text)


@given(TEXT)
def test_symbols_are_never_split_and_come_back(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)
    assert tokenizer.encode(text) == tokenizer.model.encode_batch([text])[0]


def test_every_symbol_is_one_id_between_any_others(tokenizer: Tokenizer) -> None:
    for symbol in SYMBOLS:
        assert len(tokenizer.encode(symbol)) == 1
    for before, symbol, behind in itertools.product(["", "x", " ", "4", "<"], SYMBOLS, ["", "y", " ", "2", ">"]):
        check(tokenizer, before + symbol + behind)


@given(text=TEXT, limit=st.integers(1, 12))
def test_a_long_text_with_symbols_in_parts_has_the_ids_of_the_whole(
    tokenizer: Tokenizer, text: str, limit: int
) -> None:
    whole = tokenizer.model.encode_batch([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "PART_CHARACTERS", limit)
        assert tokenizer.encode(text) == whole


def test_a_symbol_with_a_space_leaves_long_texts_in_parts(texts: list[str]) -> None:
    tokenizer = train(TokenizerTrainConfig(vocab_size=800, user_defined_symbols=["New York"]), texts[:3])
    assert tokenizer.model.words


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ([""], "an empty text is not a symbol"),
        (["<mask>"], "'<mask>' is the name of a reserved id"),
        (["<|user|>"], "'<|user|>' is the name of a reserved id"),
        (["<0x41>"], "'<0x41>' is the name of a reserved id"),
        (["a\u2581b"], "no symbol can have"),
        (["\0"], "no symbol can have"),
        (["\ud800"], "no symbol can have"),
        (["ab", "cd", "ab"], "'ab' is a duplicate"),
    ],
)
def test_unfit_symbols_are_refused(symbols: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"user_defined_symbols: .*{message}|user_defined_symbols: {message}"):
        train(TokenizerTrainConfig(vocab_size=512, user_defined_symbols=symbols), ["some text"])
