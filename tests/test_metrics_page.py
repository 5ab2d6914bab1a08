"""docs/metrics.md lists every metric that the code logs, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigtx
from bigtx.track.copier import best_of

PACKAGE = Path(bigtx.__file__).parent
PAGE = PACKAGE.parent / "docs" / "metrics.md"
GROUPS = ("train/", "perf/", "experts/", "validation/")
NO_METRICS = {"validation/samples", "validation/predictions", "train/tokens"}
"""Tables of W&B, and its name for what metrics.jsonl calls `tokens`."""


def listed(heading: str) -> list[tuple[str, str]]:
    """Names and which direction is better, of a section's table."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [(row[0].strip(" `"), row[-1].strip()) for row in rows]


def literal(node: ast.expr) -> str | None:
    """A text of the source, with a capital X in place of what is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)  # type: ignore[misc]
    return None


def keys(tree: ast.AST) -> Iterator[str]:
    """The keys of all dictionaries, as they are written and as they are assigned to."""
    for node in ast.walk(tree):
        nodes: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            nodes = list(node.keys)
        elif isinstance(node, ast.DictComp):
            nodes = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            nodes = [node.slice]
        yield from (text for found in nodes if found is not None and (text := literal(found)))


def of_tasks() -> set[str]:
    """What the `metrics` of all tasks give."""
    return {
        key
        for path in PACKAGE.rglob("tasks/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "metrics"
        for key in keys(node)
    }


def pattern(name: str) -> str:
    """A listed name with X for its words in capitals."""
    return re.sub(r"\b[A-Z]+\b|(?<=_)[A-Z]+\b", "X", name)


def test_names_of_runs() -> None:
    logged = {
        key
        for path in PACKAGE.rglob("*.py")
        for key in keys(ast.parse(path.read_text(encoding="utf-8")))
        if key.startswith(GROUPS) and key not in NO_METRICS
    }
    page = {pattern(name) for heading in ("Training", "Validation of pretraining") for name, _ in listed(heading)}
    assert "train/loss" in logged and "validation/X/loss" in logged
    # The two names of fine-tuning's own metrics, which have a table of their own.
    assert logged == page | {"validation/X", "validation/best_X"}


def test_names_of_tasks() -> None:
    assert of_tasks() == {name for name, _ in listed("Validation of fine-tuning")}


@pytest.mark.parametrize("heading", ["Training", "Validation of pretraining", "Validation of fine-tuning"])
def test_summaries_keep_the_better_value(heading: str) -> None:
    for name, better in listed(heading):
        expected = {"lower": "min", "higher": "max", "": ""}[better]
        assert best_of(name if "/" in name else f"validation/{name}") == expected, name
