"""Filters: each measure against a value worked out by hand or from its definition, and the limits that groups set."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bigtx.config.schema import FilterConfig
from bigtx.data.text import filters
from bigtx.data.text.filters import C4Lines, Limits, Page

PROSE = (
    "The committee met again on Tuesday, and its members agreed with the proposal that had been sent to them. "
    "Several neighbours who were asked about the new bridge said they would rather keep their old ferry. "
    "Nobody could explain why so much money should be spent before any survey of traffic existed, however small. "
)
WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=30)


@pytest.mark.parametrize(
    ("measure", "text", "expected"),
    [
        (filters.MEASURES["min_words"], "one  two\nthree", 3),
        (filters.mean_word_length, "a bbb ccccc", 3),
        (filters.symbol_ratio, "#a #b c... d… e…", 0.6),
        (filters.symbol_ratio, "#a #b c d", 0.5),
        (filters.bullet_lines, "- one\n\n  • two\n* three\nfour", 0.75),
        (filters.ellipsis_lines, "one...\ntwo… \n\nthree\nfour.", 0.5),
        (filters.alphabetic_words, "one 2 3! -- 4th", 0.4),
        (filters.stop_words, "The cat and THE dog, be with me", 4),
        (filters.stop_words, "them bean toad", 0),
        (filters.MEASURES["max_duplicate_lines"], "a\nb\n a \n\na\nc", 0.4),
        (filters.MEASURES["max_duplicate_line_characters"], "aaaa\nb\naaaa\nc", 0.4),
        (filters.MEASURES["max_duplicate_paragraphs"], "a\nb\n\nc\n \na\nb", 1 / 3),
        (filters.MEASURES["max_duplicate_paragraph_characters"], "aaa\n\nb\n\naaa\n\nccc", 0.3),
        (filters.sentences, 'One. Two? "Three!" 3.14 four (five.) e.g.this 终。', 5),
        (lambda page: filters.top_ngram(page, 2), "x y aa b x y c x y", 6 / 10),
        (lambda page: filters.top_ngram(page, 2), "a b c d", 0),
        (lambda page: filters.top_ngram(page, 2), "x y long word x y long word", 16 / 20),
        (lambda page: filters.top_ngram(page, 2), "la la la la", 1),
        (lambda page: filters.duplicate_ngrams(page, 5), "a b c d e f a b c d e g", 5 / 12),
        (lambda page: filters.duplicate_ngrams(page, 6), "a b c d e f a b c d e g", 0),
        (lambda page: filters.duplicate_ngrams(page, 2), "la la la la", 0.75),
    ],
)
def test_measures(measure: object, text: str, expected: float) -> None:
    assert measure(Page(text)) == pytest.approx(expected)  # type: ignore[operator]


@pytest.mark.parametrize("measure", filters.MEASURES.values())
def test_every_measure_of_nothing_is_a_number(measure: object) -> None:
    for text in (" ", "\n\n", "."):
        assert 0 <= measure(Page(text)) <= 1  # type: ignore[operator]


@given(WORDS, st.integers(2, 6))
def test_ngram_measures_are_those_of_their_definition(words: list[str], n: int) -> None:
    """Copies beyond the first for duplicates, all copies of the most frequent n-gram; overlaps count once."""
    ngrams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
    total = sum(map(len, words))

    def share(places: list[int]) -> float:
        covered = {place + offset for place in places for offset in range(n)}
        return sum(len(words[place]) for place in covered) / total

    page = Page(" ".join(words))
    repeated = [place for place, ngram in enumerate(ngrams) if ngram in ngrams[:place]]
    assert filters.duplicate_ngrams(page, n) == pytest.approx(share(repeated) if repeated else 0)
    counts = Counter(ngrams)
    most = max(counts.values(), default=1)
    tops = [ngram for ngram, count in counts.items() if count == most > 1]
    expected = max((share([p for p, ngram in enumerate(ngrams) if ngram == top]) for top in tops), default=0)
    assert filters.top_ngram(page, n) == pytest.approx(expected)


def test_nothing_is_limited_by_default() -> None:
    limits = Limits(FilterConfig())
    assert limits.is_empty and limits.first_broken("") is None


def test_prose_keeps_all_limits() -> None:
    limits = Limits(FilterConfig(gopher_quality=True, gopher_repetition=True, c4=True))
    assert not limits.is_empty and limits.first_broken(PROSE) is None


@pytest.mark.parametrize(
    ("text", "name", "detail"),
    [
        ("too short", "min_words", "2, at least 50"),
        ("a be " * 60, "min_mean_word_length", "1.500, at least 3"),
        ("incomprehensibilities " * 60, "max_mean_word_length", "21, at most 10"),
        (PROSE + "#tag " * 20, "max_symbol_ratio", "0.270, at most 0.100"),
        ("\n".join("- " + line for line in PROSE.split(". ")), "max_bullet_lines", "1, at most 0.900"),
        (PROSE.replace(". ", " ...\n").strip(), "max_ellipsis_lines", "1, at most 0.300"),
        (PROSE + "1234 " * 20, "min_alphabetic_words", "0.730, at least 0.800"),
        ("katze hund vogel fisch " * 20, "min_stop_words", "0, at least 2"),
        (PROSE + "\nshort\nshort\nshort", "max_duplicate_lines", "0.500, at most 0.300"),
        (PROSE + "\n" + PROSE, "max_duplicate_lines", "0.500, at most 0.300"),
        (PROSE + "spam eggs " * 25, "max_top_ngrams", "2-grams: 0.436, at most 0.200"),
        (PROSE + " ".join(PROSE.split()[:40]), "max_duplicate_ngrams", "5-grams: 0.423, at most 0.150"),
    ],
)
def test_each_rule_of_gophers_finds_its_text(text: str, name: str, detail: str) -> None:
    broken = Limits(FilterConfig(gopher_quality=True, gopher_repetition=True)).first_broken(text)
    assert broken == (name, detail)


def test_a_measure_just_at_its_limit_is_kept() -> None:
    lines = [f"line {number}" for number in range(7)] + ["line 0"] * 3
    assert Limits(FilterConfig(max_duplicate_lines=0.3)).first_broken("\n".join(lines)) is None
    assert Limits(FilterConfig(max_duplicate_lines=0.29)).first_broken("\n".join(lines)) is not None
    assert Limits(FilterConfig(min_words=2, max_words=2)).first_broken("two words") is None


def test_single_limits_count_without_their_group_and_before_it() -> None:
    assert Limits(FilterConfig(min_words=3)).first_broken("two words") == ("min_words", "2, at least 3")
    assert Limits(FilterConfig(gopher_quality=True, min_words=0, min_stop_words=0)).first_broken("two words") is None
    assert Limits(FilterConfig(max_top_ngrams=[0.5])).first_broken("a b a b") == (
        "max_top_ngrams",
        "2-grams: 1, at most 0.500",
    )
    assert Limits(FilterConfig(gopher_repetition=True, max_top_ngrams=[1.0])).first_broken("a b a b c") is None


ALONE: dict[str, tuple[Any, str]] = {
    "min_words": (3, "two words"),
    "max_words": (1, "two words"),
    "min_mean_word_length": (5.0, "two words"),
    "max_mean_word_length": (2.0, "two words"),
    "max_symbol_ratio": (0.1, "#two words"),
    "max_bullet_lines": (0.5, "- two words"),
    "max_ellipsis_lines": (0.5, "two words..."),
    "min_alphabetic_words": (0.9, "2 words"),
    "min_stop_words": (1, "two words"),
    "max_duplicate_lines": (0.2, "a line\nanother\na line"),
    "max_duplicate_line_characters": (0.2, "a line\nanother\na line"),
    "max_duplicate_paragraphs": (0.2, "a line\n\nanother\n\na line"),
    "max_duplicate_paragraph_characters": (0.2, "a line\n\nanother\n\na line"),
    "max_top_ngrams": ([0.5], "a b a b"),
}
"""Each limit by itself, and a text that breaks it."""


@pytest.mark.parametrize("limit", ALONE)
def test_each_limit_by_itself(limit: str) -> None:
    value, text = ALONE[limit]
    broken = Limits(FilterConfig(**{limit: value})).first_broken(text)
    assert broken is not None and broken[0] == limit
    assert Limits(FilterConfig()).first_broken(text) is None


def test_a_long_text_is_measured_whole() -> None:
    draw = random.Random(1)
    words = [draw.choice("abcdefgh") * draw.randint(1, 9) for _ in range(50_000)]
    page = Page(" ".join(words))
    assert filters.duplicate_ngrams(page, 10) == 0 and filters.top_ngram(page, 2) < 0.02
    assert filters.duplicate_ngrams(Page(" ".join(words + words)), 10) == pytest.approx(0.5)


PAGE = """Home | About us
This first line is long enough to stay.
This one ends in nothing
Too short.
Please enable JavaScript in your browser to go on.
Read our Privacy Policy before you use this page.
Trailing off at its very end is no ending...
A claim of some importance.[12] It is repeated here.[citation needed]
“Quoted speech ends with a mark of its own.”"""


def test_c4_keeps_the_lines_of_prose() -> None:
    c4 = C4Lines(FilterConfig(c4=True))
    assert not c4.is_empty and not c4.unfit(PAGE)
    assert c4.keep(PAGE).split("\n") == [
        "This first line is long enough to stay.",
        "A claim of some importance. It is repeated here.",
        "“Quoted speech ends with a mark of its own.”",
    ]
    assert c4.keep("x" * 1001 + " is a word of a thousand letters.") == ""


def test_c4s_rules_can_be_chosen_one_by_one() -> None:
    without = C4Lines(FilterConfig(c4=True, terminal_punctuation=False)).keep(PAGE)
    assert "This one ends in nothing" in without and "Home" not in without and "JavaScript" not in without
    punctuated = C4Lines(FilterConfig(terminal_punctuation=True)).keep(PAGE)
    assert "Too short." in punctuated and "JavaScript" in punctuated
    assert "ends in nothing" not in punctuated and "[citation needed]" not in punctuated
    assert C4Lines(FilterConfig(min_line_words=4)).keep("one two three\nfour words are here") == "four words are here"
    assert C4Lines(FilterConfig(min_line_words=0)).is_empty


@pytest.mark.parametrize(("text", "reason"), [("int f() { }", "a curly bracket"), ("Lorem Ipsum dolor", "lorem ipsum")])
def test_c4_leaves_out_pages_of_code_and_of_filling(text: str, reason: str) -> None:
    assert C4Lines(FilterConfig(c4=True)).unfit(text) == reason
    assert C4Lines(FilterConfig(terminal_punctuation=True)).unfit(text) == ""
