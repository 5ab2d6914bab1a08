"""The language of a text: by its metadata, else by py3langid (naive Bayes over byte n-grams, Lui 2012)."""

from __future__ import annotations

from bigtx.config.schema import FilterConfig

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
            language: the text's language by its metadata; it is detected only if there is none.
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
