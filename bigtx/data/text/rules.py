"""The steps between reading and tokenizing of a document's text, and the documents that are too long for `memory`.

    text ──clean──▶ ──language──▶ ──C4's lines──▶ ──limits──▶ ──decontaminate──▶ text, or Dropped

Cleaning repairs wrongly decoded characters and replaces personal data. The language is that of the text's metadata,
else what py3langid says (naive Bayes over byte n-grams, Lui 2012).

Most steps process a text in parts. The filters, and a tokenizer that has to read it as a whole, need a multiple of
its size. One text may use half of `memory` for this, and only one process at a time works on such a text. So which
documents are too long depends on `memory` only, not on the number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from bigtx.config.schema import CleanConfig, FilterConfig, PrepareConfig
from bigtx.config.settings import find
from bigtx.data.raw.documents import Document, Reject
from bigtx.data.text.decontaminate import Contamination
from bigtx.data.text.filters import C4Lines, Limits
from bigtx.data.workers import alone
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import utf8_length
from bigtx.utils.errors import ConfigError, require
from bigtx.utils.units import format_size

EMAIL = "email@example.com"
IPV4 = "192.0.2.1"
IPV6 = "2001:db8::1"
"""The replacements of personal data: names and addresses that are reserved for documentation (RFC 2606, 5737, 3849)."""

# The part before the @ has at most 64 characters (RFC 5321, 4.5.3.1.1); the bound also keeps the search linear.
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,63}")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![\w.]){_OCTET}(?:\.{_OCTET}){{3}}(?!\.?\w)")
_LIKE_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")  # A quick test for texts without addresses.
# All addresses that are assigned so far start with the bits 001 (RFC 4291, 2.4).
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")

# Not public (RFC 6890 and its updates); our own table, because Python's table changes between releases.
_RESERVED = [
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("2001:db8::/32", "3fff::/20"),
    )
]

# ASCII text with none of these needs no repair: neither entities nor control characters.
_DOUBTFUL_ASCII = re.compile(r"[&\x00-\x08\x0b\x0e-\x1f\x7f]")


class Cleaner:
    """The steps of cleaning that the config switches on, for one text after the other."""

    def __init__(self, config: CleanConfig) -> None:
        """Set up the steps; raises ImportError if a step's package is missing."""
        self._steps: list[Callable[[str], str]] = []
        if config.repair_unicode:
            self._steps.append(unicode_repair())
        if config.replace_emails:
            self._steps.append(replace_emails)
        if config.replace_ip_addresses:
            self._steps.append(replace_ip_addresses)
        self.is_empty = not self._steps

    def clean(self, text: str) -> str:
        """Return the text after all steps."""
        for step in self._steps:
            text = step(text)
        return text


def unicode_repair() -> Callable[[str], str]:
    """Return a function that repairs wrongly decoded text, by ftfy (Speer 2019, doi:10.5281/zenodo.2591652).

    HTML entities are resolved in texts without tags, and terminal escapes, control characters and surrogates are
    removed. The result has the normal form NFC. Quotation marks, ligatures, wide forms and line ends are not changed:
    they are style, not damage.
    """
    from ftfy import TextFixerConfig, fix_text

    config = TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, fix_line_breaks=False, explain=False
    )

    def repair(text: str) -> str:
        return text if text.isascii() and not _DOUBTFUL_ASCII.search(text) else fix_text(text, config)

    return repair


def replace_emails(text: str) -> str:
    """Return the text with mail addresses replaced by EMAIL."""
    return _EMAIL.sub(EMAIL, text) if "@" in text else text


def replace_ip_addresses(text: str) -> str:
    """Return the text with public IP addresses replaced by IPV4 and IPV6; private and reserved ones identify no person
    and stay.
    """
    if _LIKE_IPV4.search(text):
        text = _IPV4.sub(_public, text)
    return _IPV6.sub(_public, text) if ":" in text else text


def _public(match: re.Match[str]) -> str:
    try:
        address = ip_address(match[0])
    except ValueError:
        return match[0]
    is_reserved = any(address in network for network in _RESERVED)
    return match[0] if is_reserved else IPV4 if address.version == 4 else IPV6


_CHARACTERS = 512
"""The number of characters that are examined, from the text's middle: pages begin and end with menus in any language.
"""


class LanguageFilter:
    """A filter that keeps the texts of some languages."""

    def __init__(self, config: FilterConfig) -> None:
        """Set up the filter; raises ImportError if py3langid is missing."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._allowed = {primary_language(language) for language in config.languages}
        self._least = config.min_language_probability
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    @property
    def labels(self) -> list[str]:
        """Return the languages that can be detected, as ISO 639 codes."""
        return sorted(self._identifier.labels)

    def refusal(self, text: str, language: str | None) -> str:
        """Return why a text is not kept; empty if it is.

        Args:
            language: the text's language by its metadata; if it is empty, the language is detected.
        """
        if language:
            known = primary_language(language)
            return "" if known in self._allowed else f"in {known}, by its metadata"
        begin = max(0, (len(text) - _CHARACTERS) // 2)
        found, probability = self._identifier.classify(text[begin : begin + _CHARACTERS])
        if found in self._allowed and probability >= self._least:
            return ""
        return f"in {found} with probability {probability:.2f}, at least {self._least:.2f}"


def primary_language(code: str) -> str:
    """Return `en` for en, EN-us or en_US."""
    return code.strip().lower().replace("_", "-").partition("-")[0]


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
    if config.clean.repair_unicode:
        what = "clean.repair_unicode=true needs ftfy, which is not installed: pip install 'bigtx[clean]'"
        require("ftfy", what, ConfigError)
    if not config.filters.languages:
        return
    what = "filters.languages needs py3langid, which is not installed: pip install 'bigtx[language]'"
    require("py3langid", what, ConfigError)
    known = LanguageFilter(config.filters).labels
    unknown = [language for language in config.filters.languages if primary_language(language) not in known]
    if unknown:
        raise ConfigError(
            f"filters.languages has {', '.join(unknown)}, which cannot be detected; write two-letter codes of ISO 639: "
            f"{', '.join(known)}"
        )


_NEVER_LARGE = 1 << 18
"""Characters that every process may hold in addition to its buffers."""


@dataclass
class Needs:
    """The bytes of memory that documents need: they determine with which `memory` the same documents are kept.

    Attributes:
        kept: the most that a document that was kept needed.
        rejected: the least that a rejected document would have needed; None if no document was rejected.
    """

    kept: int = 0
    rejected: int | None = None

    def add(self, other: Needs) -> None:
        """Add the documents of others."""
        self.kept = max(self.kept, other.kept)
        if other.rejected is not None:
            self.rejected = min(other.rejected, self.rejected or other.rejected)

    def allows(self, memory: int) -> bool:
        """Return whether the same documents are kept with another `memory`."""
        most = most_for_a_text(memory)
        return self.kept <= most and (self.rejected is None or self.rejected > most)

    def memory_mib(self) -> int:
        """Return the least `memory`, in MiB, with which the same documents are kept."""
        setting = find(PrepareConfig, "memory")
        assert setting is not None and setting.minimum is not None
        return max(-(-2 * self.kept >> 20), int(setting.minimum) >> 20)

    @property
    def agree(self) -> bool:
        """Return whether there is any `memory` with which these documents are kept and rejected."""
        return self.rejected is None or self.rejected > self.kept


def most_for_a_text(memory: int) -> int:
    """Return the bytes that one text may take of all `memory`."""
    return memory // 2


class TextPreparation:
    """The rules, and the search for texts that are too long for memory.

    Args:
        rules: the rules of the config.
        num_processes: the number of processes that share the memory.
    """

    def __init__(self, config: PrepareConfig, tokenizer: Tokenizer, rules: TextRules, num_processes: int) -> None:
        self._most = most_for_a_text(config.memory)
        self._large = max(_NEVER_LARGE, self._most // num_processes // tokenizer.model.memory_per_byte)
        self._tokenizer = tokenizer
        self._rules = rules

    def turn(self, texts: Iterable[str]) -> AbstractContextManager[object]:
        """Wait until no other process works on a large text, if one of the texts is large."""
        return alone() if any(len(text) > self._large for text in texts) else nullcontext()

    def apply(self, document: Document, needs: Needs) -> str | Dropped | Reject:
        """Return the text to tokenize, or why the document is left out.

        Args:
            needs: counts what the document needs.
        """
        text = document.text
        with self.turn([text]):
            if not self._rules.is_empty:
                if reject := self._reject(document, self._rules.memory_for(text), "the filters", needs):
                    return reject
                outcome = self._rules.apply(text, document.language)
                if isinstance(outcome, Dropped):
                    return outcome
                text = outcome
            return self._reject(document, self._tokenizer.memory_for(text), "the tokenizer", needs) or text

    def _reject(self, document: Document, needed: int, who: str, needs: Needs) -> Reject | None:
        if needed <= self._most:
            needs.add(Needs(needed))
            return None
        needs.add(Needs(rejected=needed))
        reason = (
            f"too long for memory={format_size(2 * self._most)}: {who} would need up to {format_size(needed)} for its "
            f"{len(document.text):,} characters; memory={-(-2 * needed >> 20)}MiB is enough"
        )
        return Reject(document.file, document.line, reason)
