"""The table of the last full drill, in docs/reliability.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- drill: begin -->", "<!-- drill: end -->"
LONGEST = 160


def rows(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of results."""
    lines = ["| # | fault | must happen | seen | s to the end | steps repeated |", "|---|---|---|---|---|---|"]
    for result in sorted(results, key=lambda result: (result["number"], result["variant"])):
        seen = "" if result["verdict"] == "as expected" else f"**{result['verdict']}**: "
        fault = result["text"] + (f" ({result['variant']})" if result["variant"] else "")
        figures = ["" if result[key] is None else str(result[key]) for key in ("detected", "lost")]
        cells = [str(result["number"]), fault, result["expected"], seen + _short(result["seen"]), *figures]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines


def write_page(page: Path, report: dict[str, Any], matrix: dict[str, Any] | None) -> None:
    """Write the results between the marks of a page.

    Args:
        report: of a drill of all faults: date, commit, machine and results.
        matrix: of a drill with `--matrix`, if there is one.
    """
    lines = [_about(report), "", *rows(report["results"])]
    if matrix:
        lines += ["", f"For each ZeRO stage in bf16 and fp32. {_about(matrix)}", "", *_matrix_rows(matrix["results"])]
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


def _about(report: dict[str, Any]) -> str:
    verdicts = [result["verdict"] for result in report["results"]]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(sorted(verdicts)))
    minutes = report["seconds"] / 60
    return f"{report['date']}, commit {report['commit']}, {report['machine']}, {minutes:.0f} minutes: {counts}."


def _matrix_rows(results: Sequence[dict[str, Any]]) -> list[str]:
    variants = sorted({result["variant"] for result in results})
    names = [variant.replace("engine.zero_stage=", "ZeRO ").replace("engine.precision=", "") for variant in variants]
    lines = [f"| fault | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for number in sorted({result["number"] for result in results}):
        of_fault = {result["variant"]: result for result in results if result["number"] == number}
        text = next(iter(of_fault.values()))["text"]
        marks = [
            {"as expected": "yes", "not as expected": "**no**"}.get(of_fault[variant]["verdict"], "-")
            if variant in of_fault
            else "-"
            for variant in variants
        ]
        lines.append(f"| {number} {text} | {' | '.join(marks)} |")
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def read_report(path: Path) -> dict[str, Any] | None:
    """Return a saved report; None without one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
