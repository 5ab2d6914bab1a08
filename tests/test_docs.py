"""The documents: links lead somewhere, and the recipes that they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doors import ROOT

from bigtx.config.runs import shipped_configs

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "tools" / "README.md"])
HISTORY = ("log.md", "decisions.md")
"""Pages that may name what is no longer there."""


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names by which a page's headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_recipes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])(?:configs/)?((?:pretrain|finetune|model|data)/[\w.-]+\.yaml)", text)
    assert set(named) <= set(shipped_configs())


def test_the_tests_that_pages_name_exist() -> None:
    made = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.name != "log.md"]
    named = {name for text in pages for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) > 50 and named <= made, sorted(named - made)


def test_every_page_is_linked_to() -> None:
    """From another page, so that a reader finds it."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s:]+)\)", text_of(page))
        if not target.startswith("#")
    }
    assert {page for page in PAGES if page.parent == ROOT / "docs"} <= linked
