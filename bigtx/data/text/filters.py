"""Filters: the measures of a text, and the limits within which it is kept; and C4's rules, which remove lines.

Each measure is a function of a Page; the limit of the same name in FilterConfig starts with `min_` or `max_`. Gopher's
are those of arXiv:2112.11446 (A.1 and table A1), C4's those of arXiv:1910.10683 (2.2) and its published code. C4's list
of bad words is left out (it removes much that is harmless), and so are its repeated spans of three sentences: near
duplicates and repetition are found by other means here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from bigtx.config.schema import FilterConfig
from bigtx.utils.hashing import splitmix64

_END_MARKS = (".", "?", "!", '"', "”")
_ELLIPSIS = "..."
_MAX_WORD_LENGTH = 1000
_UNFIT = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


class C4Lines:
    """C4's rules, which remove unsuitable lines from texts and refuse unsuitable texts."""

    def __init__(self, config: FilterConfig) -> None:
        self._c4 = config.c4
        given = config.terminal_punctuation
        self._terminal_punctuation = config.c4 if given is None else given
        self._min_words = (5 if config.c4 else 0) if config.min_line_words is None else config.min_line_words
        self.is_empty = not (self._c4 or self._terminal_punctuation or self._min_words)

    def unfit(self, text: str) -> str:
        """Return why a text is not a page of prose; empty if it may be one."""
        if self._c4 and "{" in text:
            return "a curly bracket"
        return "lorem ipsum" if self._c4 and "lorem ipsum" in text.lower() else ""

    def keep(self, text: str) -> str:
        """Return the suitable lines, without white space around them and without citation marks."""
        lines = (line.strip() for line in text.split("\n"))
        if self._c4 and "[" in text:
            lines = (_CITATION.sub("", line).rstrip() for line in lines)
        lower = text.lower() if self._c4 else ""
        unfit = [phrase for phrase in _UNFIT if phrase in lower]
        return "\n".join(line for line in lines if self._fits(line, unfit))

    def _fits(self, line: str, unfit: list[str]) -> bool:
        """Return whether a line stays; `unfit` are the phrases that a line must not have, of those that the text
        has.
        """
        if self._terminal_punctuation and (not line.endswith(_END_MARKS) or line.endswith(_ELLIPSIS)):
            return False
        words = line.split()
        if len(words) < self._min_words:
            return False
        if self._c4 and max(map(len, words), default=0) > _MAX_WORD_LENGTH:
            return False
        return not unfit or not any(phrase in line.lower() for phrase in unfit)


GOPHER_QUALITY: dict[str, float] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_length": 3,
    "max_mean_word_length": 10,
    "max_symbol_ratio": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
}
GOPHER_REPETITION: dict[str, float] = {
    "max_duplicate_lines": 0.3,
    "max_duplicate_line_characters": 0.2,
    "max_duplicate_paragraphs": 0.3,
    "max_duplicate_paragraph_characters": 0.2,
}
TOP_NGRAMS = (0.2, 0.18, 0.16)
DUPLICATE_NGRAMS = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
"""Gopher's limits for n-grams of 2 to 4 and of 5 to 10 words."""

_STOP_WORDS = {
    written: word
    for word in ("the", "be", "to", "of", "and", "that", "have", "with")
    for written in (word, word.capitalize(), word.upper())
}
_BULLETS = ("•", "‣", "▶", "►", "◦", "▪", "■", "□", "●", "○", "·", "-", "–", "*")
_ELLIPSES = ("...", "…")
_HAS_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)|[。！？]")
_NGRAM_BASE = np.uint64(0xD6E8FEB86659FD93)


class Page:
    """A text with the quantities that several filters need, each computed once. Words are separated by white space."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()

    @functools.cached_property
    def lines(self) -> list[str]:
        """Return lines that are not blank, without the white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        """Return the parts that blank lines separate."""
        return [part for part in map(str.strip, _PARAGRAPH_BREAK.split(self.text)) if part]

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Return the different words, numbered as they appear."""
        return {word: number for number, word in enumerate(dict.fromkeys(self.words))}

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Return the characters of the words before each one, without white space: [words + 1]."""
        lengths = np.fromiter(map(len, self.words), np.int64, len(self.words))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @functools.cached_property
    def _ngrams(self) -> list[np.ndarray]:
        """Return numbers that are equal for equal n-grams: at index n - 1 those of n words; the list grows on
        demand.
        """
        numbers = np.fromiter(map(self.vocabulary.__getitem__, self.words), np.uint64, len(self.words))
        return [splitmix64(numbers)]

    def ngrams(self, n: int) -> np.ndarray:
        """Return uint64 [words - n + 1], equal for equal n-grams; empty if there are fewer words."""
        known = self._ngrams
        while len(known) < n:
            known.append(known[-1][:-1] * _NGRAM_BASE + known[0][len(known) :])
        return known[n - 1]

    @functools.cached_property
    def repeats_five(self) -> bool:
        """Return whether any five words in a row occur twice; if not, no longer run does."""
        ngrams = np.sort(self.ngrams(5))
        return bool((ngrams[1:] == ngrams[:-1]).any())


def mean_word_length(page: Page) -> float:
    """Return the mean number of characters of a word."""
    return int(page.ends[-1]) / max(1, len(page.words))


def symbol_ratio(page: Page) -> float:
    """Return the hash signs per word or the ellipses per word, the larger of the two."""
    ellipses = sum(page.text.count(ellipsis) for ellipsis in _ELLIPSES)
    return max(page.text.count("#"), ellipses) / max(1, len(page.words))


def bullet_lines(page: Page) -> float:
    """Return the share of lines that begin with a bullet."""
    return sum(line.startswith(_BULLETS) for line in page.lines) / max(1, len(page.lines))


def ellipsis_lines(page: Page) -> float:
    """Return the share of lines that end with an ellipsis."""
    return sum(line.endswith(_ELLIPSES) for line in page.lines) / max(1, len(page.lines))


def alphabetic_words(page: Page) -> float:
    """Return the share of words with at least one letter."""
    doubtful = [word for word in page.words if not word.isalpha()]
    without = sum(_HAS_LETTER.search(word) is None for word in doubtful)
    return (len(page.words) - without) / max(1, len(page.words))


def stop_words(page: Page) -> float:
    """Return how many of Gopher's eight English words are in the text."""
    return len({_STOP_WORDS[word] for word in _STOP_WORDS.keys() & page.vocabulary.keys()})


def sentences(page: Page) -> float:
    """Return the number of ends of sentences: marks that white space, or a closing quotation mark or bracket and then
    that, follows.
    """
    return sum(1 for _ in _SENTENCE_END.finditer(page.text))


def top_ngram(page: Page, n: int) -> float:
    """Return the share of the words' characters in the most frequent n-gram, if it occurs at least twice.

    Of equally frequent n-grams the one with most characters counts; a character in two of its copies counts
    once.
    """
    ngrams = page.ngrams(n)
    order = np.argsort(ngrams, kind="stable")
    ascending = ngrams[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])) if len(order) else order
    counts = np.diff(starts, append=len(order))
    if not len(counts) or counts.max() == 1:
        return 0.0
    most = counts == counts.max()
    places = order[np.repeat(most, counts)].reshape(-1, counts.max())
    following = np.concatenate([places[:, 1:], np.full((len(places), 1), len(page.words))], axis=1)
    covered = (page.ends[np.minimum(places + n, following)] - page.ends[places]).sum(axis=1)
    return int(covered.max()) / int(page.ends[-1])


def duplicate_ngrams(page: Page, n: int) -> float:
    """Return the share of the words' characters in n-grams that occur earlier; a character in several of them counts
    once.
    """
    if n >= 5 and not page.repeats_five:
        return 0.0
    ngrams = page.ngrams(n)
    order = np.argsort(ngrams, kind="stable")
    ascending = ngrams[order]
    places = np.sort(order[1:][ascending[1:] == ascending[:-1]])
    if not len(places):
        return 0.0
    following = np.append(places[1:], len(page.words))
    covered = page.ends[np.minimum(places + n, following)] - page.ends[places]
    return int(covered.sum()) / int(page.ends[-1])


MEASURES: dict[str, Callable[[Page], float]] = {
    "min_words": lambda page: len(page.words),
    "max_words": lambda page: len(page.words),
    "min_mean_word_length": mean_word_length,
    "max_mean_word_length": mean_word_length,
    "max_symbol_ratio": symbol_ratio,
    "max_bullet_lines": bullet_lines,
    "max_ellipsis_lines": ellipsis_lines,
    "min_alphabetic_words": alphabetic_words,
    "min_stop_words": stop_words,
    "max_duplicate_lines": lambda page: _repeated(page.lines),
    "max_duplicate_line_characters": lambda page: _repeated_characters(page.lines),
    "max_duplicate_paragraphs": lambda page: _repeated(page.paragraphs),
    "max_duplicate_paragraph_characters": lambda page: _repeated_characters(page.paragraphs),
    "min_sentences": sentences,
}
"""The measure of each limit; quick ones first."""


class Limits:
    """The limits that a config sets, by its groups and by single fields."""

    def __init__(self, config: FilterConfig) -> None:
        limits: dict[str, float | None] = dict.fromkeys(MEASURES)
        if config.gopher_quality:
            limits |= GOPHER_QUALITY
        if config.gopher_repetition:
            limits |= GOPHER_REPETITION
        if config.c4:
            limits["min_sentences"] = 3
        limits |= {name: given for name in MEASURES if (given := getattr(config, name)) is not None}
        self._single = {name: limit for name, limit in limits.items() if limit is not None}
        top, duplicates = (TOP_NGRAMS, DUPLICATE_NGRAMS) if config.gopher_repetition else ((), ())
        self._lists = [
            ("max_top_ngrams", top_ngram, 2, config.max_top_ngrams or top),
            ("max_duplicate_ngrams", duplicate_ngrams, 5, config.max_duplicate_ngrams or duplicates),
        ]
        self.is_empty = not self._single and not any(limits for *_, limits in self._lists)

    def first_broken(self, text: str) -> tuple[str, str] | None:
        """Return the first limit that a text violates: its name and the measured value, or None if it violates none."""
        page = Page(text)
        for name, limit in self._single.items():
            measured = MEASURES[name](page)
            if measured < limit if name.startswith("min_") else measured > limit:
                return name, f"{_figure(measured)}, {_sense(name)} {_figure(limit)}"
        for name, measure, first, limits in self._lists:
            for n, limit in enumerate(limits, first):
                measured = measure(page, n)
                if measured > limit:
                    return name, f"{n}-grams: {_figure(measured)}, {_sense(name)} {_figure(limit)}"
        return None


def _sense(name: str) -> str:
    return "at least" if name.startswith("min_") else "at most"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"


def _repeated(parts: list[str]) -> float:
    """Return the share of parts that are equal to an earlier one."""
    return (len(parts) - len(set(parts))) / max(1, len(parts))


def _repeated_characters(parts: list[str]) -> float:
    """Return the share by characters."""
    total = sum(map(len, parts))
    return (total - sum(map(len, set(parts)))) / max(1, total)
