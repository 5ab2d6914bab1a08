"""Texts that end others: nothing of them comes out, wherever the borders of tokens are."""

from __future__ import annotations

import itertools

import pytest

from bigtx.config.schema import TokenizerTrainConfig
from bigtx.model.write import StopStream
from bigtx.tokenizer.train import train


class Pieces:
    """A stream whose ids are places in a list of texts."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, i: int) -> str:
        return self.pieces[i]

    def flush(self) -> str:
        return self.rest


def come_out(pieces: list[str], stops: list[str], rest: str = "") -> tuple[list[str], bool]:
    stream = StopStream(Pieces(pieces, rest), stops)
    out = [stream.push(i) for i in range(len(pieces))]
    return [*out, stream.flush()], stream.has_stopped


def cuts(text: str) -> list[list[str]]:
    """A text in all its divisions."""
    found = []
    for borders in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for is_border, letter in zip(borders, text[1:], strict=True):
            if is_border:
                pieces.append("")
            pieces[-1] += letter
        found.append(pieces)
    return found


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcdef", ["cd"], "ab"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd", "xx"], "abc"),
        ("abcd", ["abcd", "bc"], "a"),  # The one that is complete first.
        ("abab", ["abc"], "abab"),
        ("é\n\né", ["\n\n"], "é"),
        ("abc", ["abc"], ""),
    ],
)
def test_the_same_text_comes_out_of_any_pieces(text: str, stops: list[str], expected: str) -> None:
    for pieces in cuts(text):
        out, has_stopped = come_out(pieces, stops)
        assert "".join(out) == expected and has_stopped == (expected != text), pieces


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    assert come_out(["one <", "|b", "> two <|", "end|> three"], ["<|end|>"])[0] == ["one ", "<|b", "> two ", "", ""]
    assert come_out(["one <", "|"], ["<|end|>"], rest="\ufffd")[0] == ["one ", "", "<|\ufffd"]


def test_bytes_of_characters_without_a_piece() -> None:
    tokenizer = train(TokenizerTrainConfig(vocab_size=400), ["a plain text of letters, and no more. " * 50])
    ids = tokenizer.encode("a 木 and 林木 more")
    assert any(map(tokenizer.is_byte, ids))
    stream = StopStream(tokenizer.stream(), ["林"])
    out = []
    for i in ids:
        out.append(stream.push(i))
        if stream.has_stopped:
            break
    assert "".join(out) == "a 木 and " and stream.flush() == ""
