"""docs/metrics.md lists every metric that the code logs, and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bigtx
from bigtx.config.schema.tasks import Better
from bigtx.finetuning.tasks import RECORD_TASKS, task_type
from bigtx.pretraining.validation import BETTER, Validation

PACKAGE = Path(bigtx.__file__).parent
PAGE = PACKAGE.parent / "docs" / "metrics.md"
GROUPS = ("train/", "perf/", "experts/", "checkpoint/", "validation/")
NO_METRICS = {"validation/samples", "validation/predictions", "train/tokens"}
"""Tables of W&B, and its name for what metrics.jsonl calls `tokens`."""


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in line] for line in lines]


def listed(heading: str) -> dict[str, Better]:
    """Names and which direction is better, of a section's table."""
    return {row[0]: row[-1] or "neither" for row in rows(heading)}  # type: ignore[misc]


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


def given_by(function: Callable[..., Any]) -> set[str]:
    """The keys of what a function gives, without their groups."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {key.rpartition("/")[2] for key in keys(tree)}


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
    page = {
        pattern(name)
        for heading in ("Training", "Checkpoints", "Validation of pretraining")
        for name in listed(heading)
    }
    assert "train/loss" in logged and "validation/X/loss" in logged
    # The two names of fine-tuning's own metrics, which have a table of their own.
    assert logged == page | {"validation/X", "validation/best_X"}


@pytest.mark.parametrize("name", RECORD_TASKS)
def test_every_metric_of_a_task_says_which_values_are_better(name: str) -> None:
    task = task_type(name)
    of_page = {
        row[0]: row[-1] or "neither" for row in rows("Validation of fine-tuning") if name in row[1] or row[1] == "all"
    }
    assert given_by(task.metrics) == set(task.better)
    # A text has no answer that could be right to the letter.
    assert of_page == {key: better for key, better in task.better.items() if (name, key) != ("distill", "exact_match")}
    assert task.better[task.metric] != "neither"


def test_every_metric_of_pretraining_says_which_values_are_better() -> None:
    of_page = {name.rpartition("/")[2]: better for name, better in listed("Validation of pretraining").items()}
    assert given_by(Validation._measure) == set(BETTER) and of_page == BETTER


def test_metrics_of_steps_have_a_direction_where_those_of_validation_have_one() -> None:
    for name, better in listed("Training").items():
        assert BETTER.get(name.rpartition("/")[2], "neither") == better, name
        assert all(task_type(task).better.get(name.rpartition("/")[2], "neither") == better for task in RECORD_TASKS)
