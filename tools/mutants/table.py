"""Write the results of a mutation run as a table in docs/testing.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
REASONS = Path(__file__).with_name("reasons.yaml")
"""The reasons why mutants are equivalent, by their ids."""


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results of a run, without errors."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [result for result in found if result["status"] != "error"]


def reasons() -> dict[str, str]:
    """Return the reasons why mutants are equivalent, by their ids."""
    return yaml.safe_load(REASONS.read_text(encoding="utf-8")) or {}


def shares(results: Sequence[dict[str, Any]], packages: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Return for each package its name and the numbers of mutants: not equivalent, detected of these, equivalent."""
    equivalent = reasons()
    rows = []
    for name in packages:
        of_package = [result for result in results if result["package"] == name]
        harmless = [each for each in of_package if each["status"] == "survived" and each["id"] in equivalent]
        noticed = sum(each["status"] == "noticed" for each in of_package)
        rows.append((name, len(of_package) - len(harmless), noticed, len(harmless)))
    return rows


def print_shares(path: Path, packages: Sequence[str]) -> None:
    """Print the share of the mutants that was detected."""
    for name, total, noticed, _ in shares(read_results(path), packages):
        if total:
            print(f"{name:18}{noticed:4} of {total:4}  {100 * noticed / total:5.1f} %")


def write_table(root: Path, path: Path, packages: Sequence[str]) -> None:
    """Write the shares and the surviving mutants to docs/testing.md, between two marks."""
    results = read_results(path)
    rows = shares(results, packages)
    total, noticed, harmless = sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows)
    lines = [f"Of commit {path.stem}:", ""]
    lines += ["| package | mutants | detected | share | equivalent |", "|---|---|---|---|---|"]
    for name, of_package, found, equivalent in [*rows, ("**all**", total, noticed, harmless)]:
        share = f"{100 * found / of_package:.0f} %" if of_package else "-"
        lines.append(f"| {name} | {of_package} | {found} | {share} | {equivalent} |")
    known = reasons()
    survivors = [result for result in results if result["status"] == "survived" and result["id"] not in known]
    if survivors:
        lines += ["", "Not detected:", "", "| mutant | where | before | after |", "|---|---|---|---|"]
        for result in sorted(survivors, key=lambda result: (result["path"], result["line"])):
            where = f"{result['path'].removeprefix('bigtx/')} {result['function']}"
            lines.append(f"| {result['id']} | {where} | {_cell(result['before'])} | {_cell(result['after'])} |")
    page = root / "docs" / "testing.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


def _cell(code: str) -> str:
    text = " ".join(code.split()).replace("|", "\\|")
    return f"`{text if len(text) <= 80 else text[:77] + '...'}`"
