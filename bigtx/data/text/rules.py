"""All rules for a text between reading and tokenizing.

text ──clean──▶ ──language──▶ ──C4's lines──▶ ──limits──▶ ──decontaminate──▶ text, or Dropped
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bigtx.config.schema import PrepareConfig
from bigtx.data.text.c4 import C4Lines
from bigtx.data.text.clean import Cleaner
from bigtx.data.text.decontaminate import Contamination
from bigtx.data.text.filters import Limits
from bigtx.data.text.language import LanguageFilter, primary_language
from bigtx.tokenizer.cut import utf8_length
from bigtx.utils.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Dropped:
    """A text that is left out: the setting that removes it, and the measured value with the allowed one."""

    rule: str
    detail: str


_MEMORY_PER_BYTE = 96
"""The most memory that the filters need for each byte of UTF-8: 7 to 76 were measured (docs/log.md)."""


class TextRules:
    """A config's rules, applied to one text after the other; the result depends only on the text.

    Args:
        config: a config that `check_rules` has accepted.
        contamination: the index of `build_contamination_index`; needed if the config has evaluation sets.
    """

    def __init__(self, config: PrepareConfig, contamination: Path | None = None) -> None:
        assert contamination is not None or not config.decontaminate.paths
        self._cleaner = Cleaner(config.clean)
        self._language = LanguageFilter(config.filters) if config.filters.languages else None
        self._lines = C4Lines(config.filters)
        self._limits = Limits(config.filters)
        self._contamination = Contamination(contamination) if contamination is not None else None
        self.is_empty = (
            self._cleaner.is_empty
            and self._language is None
            and self._lines.is_empty
            and self._limits.is_empty
            and self._contamination is None
        )

    def memory_for(self, text: str) -> int:
        """Return the most bytes of memory that the rules need for a text, besides a few copies of it.

        The filters make lists of its words and lines; all other rules process it in parts.
        """
        return 0 if self._lines.is_empty and self._limits.is_empty else _MEMORY_PER_BYTE * utf8_length(text)

    def apply(self, text: str, language: str | None = None) -> str | Dropped:
        """Return the text to keep, or the first rule that leaves it out.

        Args:
            text: not empty.
            language: the language of the text by its metadata, if it has one.
        """
        text = self._cleaner.clean(text)
        if not text:
            return Dropped("clean.repair_unicode", "no text is left")
        if self._language and (reason := self._language.refusal(text, language)):
            return Dropped("filters.languages", reason)
        if not self._lines.is_empty:
            if reason := self._lines.unfit(text):
                return Dropped("filters.c4", reason)
            text = self._lines.keep(text)
            if not text:
                return Dropped("filters.c4", "no line is left")
        if not self._limits.is_empty and (broken := self._limits.first_broken(text)):
            name, reason = broken
            return Dropped(f"filters.{name}", reason)
        if self._contamination and (ngram := self._contamination.find(text)):
            return Dropped("decontaminate", f"the evaluation sets have {ngram!r} too")
        return text


def check_rules(config: PrepareConfig) -> None:
    """Check, before the work starts, that each process can apply the rules.

    Raises:
        ConfigError: a package is not installed, or a language cannot be detected.
    """
    try:
        Cleaner(config.clean)
    except ImportError:
        raise ConfigError(
            "clean.repair_unicode=true needs ftfy, which is not installed: pip install 'bigtx[clean]'"
        ) from None
    if not config.filters.languages:
        return
    try:
        known = LanguageFilter(config.filters).labels
    except ImportError:
        raise ConfigError(
            "filters.languages needs py3langid, which is not installed: pip install 'bigtx[language]'"
        ) from None
    unknown = [language for language in config.filters.languages if primary_language(language) not in known]
    if unknown:
        raise ConfigError(
            f"filters.languages has {', '.join(unknown)}, which cannot be detected; write two-letter codes of ISO 639: "
            f"{', '.join(known)}"
        )
