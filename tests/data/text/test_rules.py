"""The rules together: their order, what they say, and what they need."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from bigtx.config.schema import CleanConfig, DecontaminateConfig, FilterConfig, PrepareConfig
from bigtx.data.text.decontaminate import build_contamination_index
from bigtx.data.text.rules import Dropped, TextRules, check_rules
from bigtx.utils.errors import ConfigError

ENGLISH = "The old bridge was closed in spring, and since then the ferry has carried everybody across the river."
GERMAN = "Die alte Brücke wurde im Frühjahr gesperrt, und seitdem trägt die Fähre alle Leute über den breiten Fluss."


def test_nothing_happens_by_default() -> None:
    config = PrepareConfig()
    check_rules(config)
    rules = TextRules(config)
    assert rules.is_empty and rules.apply("  any text\n", None) == "  any text\n"


@pytest.mark.parametrize(
    "config",
    [
        PrepareConfig(clean=CleanConfig(replace_emails=True)),
        PrepareConfig(filters=FilterConfig(min_words=1)),
        PrepareConfig(filters=FilterConfig(c4=True)),
        PrepareConfig(filters=FilterConfig(max_duplicate_ngrams=[0.5])),
    ],
)
def test_one_rule_is_something(config: PrepareConfig) -> None:
    assert not TextRules(config).is_empty


def test_a_dropped_text_says_why() -> None:
    rules = TextRules(PrepareConfig(filters=FilterConfig(min_words=5)))
    dropped = rules.apply("only three words", None)
    assert dropped == Dropped("filters.min_words", "3, at least 5")
    assert pickle.loads(pickle.dumps(dropped)) == dropped


def test_filters_judge_the_cleaned_text() -> None:
    pytest.importorskip("ftfy")
    filters = FilterConfig(c4=True, min_line_words=3, min_sentences=2, max_words=9)
    rules = TextRules(PrepareConfig(clean=CleanConfig(repair_unicode=True, replace_emails=True), filters=filters))
    assert rules.apply("A naÃ¯ve line. It stays!\nmenu\nWrite to a@b.org today.", None) == (
        "A naïve line. It stays!\nWrite to email@example.com today."
    )
    assert rules.apply("menu\nhome", None) == Dropped("filters.c4", "no line is left")
    assert rules.apply("if (x) { y }", None) == Dropped("filters.c4", "a curly bracket")
    assert rules.apply("Only one sentence here.", None) == Dropped("filters.min_sentences", "1, at least 2")
    assert rules.apply("\x00\x01", None) == Dropped("clean.repair_unicode", "no text is left")


def test_languages_are_those_of_the_metadata_or_detected() -> None:
    pytest.importorskip("py3langid")
    config = PrepareConfig(filters=FilterConfig(languages=["de", "fr"]))
    check_rules(config)
    rules = TextRules(config)
    assert rules.apply(GERMAN, None) == GERMAN
    assert rules.apply(ENGLISH, "DE_at") == ENGLISH
    assert rules.apply(GERMAN, "en-US") == Dropped("filters.languages", "in en, by its metadata")
    dropped = rules.apply(ENGLISH, "")
    assert isinstance(dropped, Dropped) and dropped.detail.startswith("in en with probability ")
    # What stands around the middle of a long text does not count.
    assert rules.apply("home about us contact " * 20 + GERMAN * 10 + " home about us contact" * 20, None) != dropped
    sure = TextRules(PrepareConfig(filters=FilterConfig(languages=["de"], min_language_probability=1.0)))
    assert rules.apply("Wie geht es", None) == "Wie geht es" and isinstance(sure.apply("Wie geht es", None), Dropped)


def test_evaluation_texts_are_dropped_after_cleaning(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text(ENGLISH)
    config = PrepareConfig(
        clean=CleanConfig(replace_emails=True), decontaminate=DecontaminateConfig(paths=[str(tmp_path / "set.txt")])
    )
    rules = TextRules(config, build_contamination_index(config.decontaminate, tmp_path))
    assert not rules.is_empty
    assert rules.apply(GERMAN, None) == GERMAN
    assert rules.apply(f"Before. {ENGLISH.upper()} After.", None) == Dropped(
        "decontaminate",
        "the evaluation sets have 'the old bridge was closed in spring and since then the ferry has' too",
    )


def test_evaluation_texts_may_stand_under_another_key(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"body": ENGLISH, "text": GERMAN}) + "\n")
    config = PrepareConfig(decontaminate=DecontaminateConfig(paths=[str(tmp_path / "set.jsonl")], text_field="body"))
    rules = TextRules(config, build_contamination_index(config.decontaminate, tmp_path))
    assert isinstance(rules.apply(ENGLISH, None), Dropped) and rules.apply(GERMAN, None) == GERMAN


@pytest.mark.parametrize(
    ("config", "package", "message"),
    [
        (PrepareConfig(clean=CleanConfig(repair_unicode=True)), "ftfy", r"pip install 'bigtx\[clean\]'"),
        (PrepareConfig(filters=FilterConfig(languages=["en"])), "py3langid", r"pip install 'bigtx\[language\]'"),
    ],
)
def test_a_package_that_is_missing_is_named_before_the_work(
    config: PrepareConfig, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.langid", raising=False)
    with pytest.raises(ConfigError, match=message):
        check_rules(config)


def test_a_language_that_cannot_be_detected_is_refused() -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ConfigError, match=r"filters\.languages has english, which cannot be detected.* en, "):
        check_rules(PrepareConfig(filters=FilterConfig(languages=["de", "english"])))
