"""Code, messages, documents and recipes are written in the plain English of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import ROOT

PLACES = ("bigtx", "configs", "docs", "slurm", "tools", "README.md", "CHANGELOG.md", "Makefile")
SUFFIXES = (".py", ".md", ".yaml", ".sh", ".sbatch", ".toml", "")
HISTORY = ("docs/log.md",)
"""Measurements with their dates, which are not rewritten."""

PATTERNS = {
    # Old or vague words.
    r"\banew\b": "it is fetched anew",
    r"\b(any|some|no|every)body\b": "nobody can tell",
    r"\b(who|what|which|where)(so)?ever\b": "whatever it holds",
    r"\bhowever (long|large|many|small|often|it|they)\b": "however long it is",
    r"\b(there|here|where)(in|of|upon|by|with)\b": "and therein the name",
    r"\b(shall|(?<!once )upon|whom)\b": "it shall end",
    r"\b(for ever|for good|in vain|once more|to no purpose)\b": "it waits for ever",
    r"\b(linger|fare|mend|heed|bear|befall)s?\b": "mend that and try again",
    r"\bas far as\b": "as far as it is known",
    r"\b(dear|hopeless|anybody's|own accord|at hand|at the mercy)\b": "a call is dear",
    r"\bhow[- ]manieth\b": "the how-manieth sequence",
    r"\brhythms?\b": "is no rhythm",
    r"\bkin\b": "Llama and its kin",
    r"\bforeseen\b": "larger than foreseen",
    r"\bhas a say\b": "where the last has a say",
    r"\bin spite of\b": "in spite of its name",
    r"\bthe one before\b(?! that)": "each follows the one before",
    r"\bthe ones? (to come|after it)\b": "the one to come",
    r"\bfrom (then|there|now|here) on\b": "from then on it says",
    # Images.
    r"\b(goes|go|going|went|gone) on\b": "training goes on",
    r"\bstand(s|ing)? (?!for\b|alone\b)": "what stands in a file",
    r"\bstands? alone\b": "JSON stands alone",
    r"\b(lies|lie|lay|lying)\b": "where the shards lie",
    r"\b(lives|lived|living|life)\b": "for the life of the run",
    r"\b(tells?|told|telling)\b": "the reader is told",
    r"\b(hears?|heard|hearing)\b": "an encoder that hears",
    r"\bsays? (nothing|all)\b": "it says nothing without",
    r"\b(speaks?|spoke) (of|alone)\b": "rank 0 speaks alone",
    r"\blook(s|ed|ing)? at\b": "the file is looked at",
    r"\btakes? (away|over|up|off|along)\b|\btaken (away|over|up|off)\b": "tensors that were taken over",
    r"\bcuts? out\b": "lines are cut out",
    r"\b(gives?|given|gave) (back|away)\b": "memory that was given back",
    r"\bcomes? (along|out|back|to)\b|\bcame (out|back|to be)\b": "a character comes out",
    r"\b(outlives?|outlived)\b": "the file outlives the process",
    r"\bat home in\b": "it is at home in the folder",
    r"\b(thrown|throws?) away\b": "what is thrown away",
    r"\bputs? (its own )?in(to)? the place\b": "puts its own in the place",
    r"\brooms?\b": "they make room",
    r"\bswallow(s|ed)?\b": "the lines that it swallowed",
    r"\bdo(es)? (nothing|no harm) without\b": "does nothing without problems",
    # Inverted or incomplete phrases.
    r"(?<!there )\b(is|are|was|were|be) no (?!longer\b|more than\b|less than\b)": "it is no tar archive",
    r"(?<!there )\b(is|are|was|ends? in) none of\b": "it is none of the classes",
    r"\bbeside\b(?!:)": "it is beside the file",
    r"(?<!left )\bbehind\b": "bytes behind the end",
    r"\bas (they|it) (came|come|stands?|lies?)\b": "it is kept as it came",
    r"\b(has|have) (it|them) (said|told|done)\b": "have it said in words",
    r"\bwhat (there is|is there|has to be|is to be)\b": "what there is of it",
    r"\balike\b(?! for)": "for the model and the plan alike",
    r"\bmuch the same\b": "much the same",
    r"\b(more|less) of them is\b": "more of them is not",
    r"\bhave to be of\b": "they have to be of one size",
    r"\bone by itself\b": "each one by itself",
    r"\bthat is meant\b": "the one that is meant",
}
"""Patterns of words and phrases, each with an example of what it finds."""

FIRST_WORDS = re.compile(
    r"[a-z]|(About|After|As|At|Before|Beside|Between|By|For|From|In|Into|Of|On|Over|Through|To|Under|With|Without)\b"
)
"""Beginnings that a function's docstring must not have: its first word is a verb."""


def files() -> list[Path]:
    """The files to read, as paths relative to the clone."""
    found = []
    for place in PLACES:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if file.is_file() and file.suffix in SUFFIXES and name not in HISTORY and "__pycache__" not in name:
                found.append(file.relative_to(ROOT))
    return found


def words_of(file: Path) -> str:
    """The words for people in a file: of Python its comments and texts, of others everything."""
    content = (ROOT / file).read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.sub(r"[\s#]+", " ", content)
    tokens = tokenize.generate_tokens(io.StringIO(content).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    words = " ".join(token.string.strip("frb\"'# ") for token in tokens if token.type in kinds)
    return re.sub(r"\s+", " ", words)


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Line and docstring of each function in a Python file."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node.lineno, text


FILES = files()


@pytest.mark.parametrize(("pattern", "example"), PATTERNS.items())
def test_each_pattern_finds_its_example(pattern: str, example: str) -> None:
    assert re.search(pattern, example, re.IGNORECASE)


def test_files_are_found() -> None:
    names = {file.as_posix() for file in FILES}
    assert {"bigtx/utils/errors.py", "bigtx/data/raw/files.py", "bigtx/model/loss.py"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.as_posix())
def test_the_words_are_plain(file: Path) -> None:
    words = words_of(file)
    found = [
        f"{pattern}: ...{words[max(0, match.start() - 50) : match.end() + 50]}..."
        for pattern in PATTERNS
        for match in re.finditer(pattern, words, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix == ".py"], ids=lambda file: file.as_posix())
def test_docstrings_of_functions_begin_with_a_verb(file: Path) -> None:
    found = [f"{file}:{line}: {text.splitlines()[0]}" for line, text in docstrings(file) if FIRST_WORDS.match(text)]
    assert not found, "\n".join(found)
