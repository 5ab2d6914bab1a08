"""C4's rules for web pages (arXiv:1910.10683, 2.2, and its published code), which remove lines from a text.

Its list of bad words is left out (it removes much that is harmless), and so are its repeated spans of three sentences:
near duplicates and repetition are found by other means here.
"""

from __future__ import annotations

import re

from bigtx.config.schema import FilterConfig

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
        if self._c4 and "lorem ipsum" in text.lower():
            return "lorem ipsum"
        return ""

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
