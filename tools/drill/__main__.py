"""Try what bigtx promises when things go wrong: each fault with real processes, real files and real signals.

    python tools/drill                      all faults
    python tools/drill 1 4 kill-rank        these, by number or name
    python tools/drill --list
    python tools/drill --fast               those that CI tries
    python tools/drill --matrix             some, for ZeRO 0 to 3 in bf16 and fp32
    python tools/drill --table              write the last full results into docs/reliability.md

The exit status is 1 if something was not as expected. Results are kept in .drill/.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.pop(0)  # This folder, which is a package.
sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("tools", "tests"))

from surroundings import prepare_process

from drill import checkpoints, corpus, folders, numbers, processes, resumes, tracking
from drill.catalogue import FAULTS, Fault, Result, attempt
from drill.page import read_report, rows, write_page
from drill.scene import Scene, Stage

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (processes, checkpoints, resumes, numbers, corpus, folders, tracking)
"""The modules whose import adds their faults to the list."""
STORE = ROOT / ".drill"
MATRIX = [
    (f"engine.zero_stage={stage}", f"engine.precision={precision}")
    for stage, precision in itertools.product(range(4), ("bf16", "fp32"))
]


def options(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="drill", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("faults", nargs="*", metavar="FAULT", help="numbers or names; default: all")
    add("--list", action="store_true", help="list the faults")
    add("--fast", action="store_true", help="only those that CI tries")
    add("--matrix", action="store_true", help="for ZeRO 0 to 3 in bf16 and fp32, those for which it matters")
    add("--jobs", type=int, default=1, help="how many at the same time (default 1: times are more exact)")
    add("--json", action="store_true", help="print the results as JSON")
    add("--quiet", action="store_true", help="print only what is not as expected")
    add("--table", action="store_true", help="write the table of docs/reliability.md from the last full results")
    return parser.parse_args(words)


def choose(given: argparse.Namespace) -> list[Fault]:
    """Return the faults to try, by number."""
    by_name = {fault.name: fault for fault in FAULTS.values()} | {str(number): FAULTS[number] for number in FAULTS}
    if unknown := [word for word in given.faults if word not in by_name]:
        raise SystemExit(f"drill: no fault {', '.join(unknown)}; see --list")
    chosen = [by_name[word] for word in given.faults] or list(FAULTS.values())
    chosen = [fault for fault in chosen if fault.is_fast or not given.fast]
    chosen = [fault for fault in chosen if fault.has_matrix or not given.matrix]
    return sorted({fault.number: fault for fault in chosen}.values(), key=lambda fault: fault.number)


def try_all(chosen: Sequence[Fault], given: argparse.Namespace) -> Iterator[Result]:
    """Try faults, and yield the results in the order of the faults."""
    variants: list[tuple[str, ...]] = list(MATRIX) if given.matrix else [()]
    with tempfile.TemporaryDirectory(prefix="bigtx-drill-", ignore_cleanup_errors=True) as folder:
        stage = Stage(Path(folder))
        with ThreadPoolExecutor(given.jobs) as pool:
            yield from pool.map(
                lambda pair: attempt(pair[0], Scene(stage, changes=pair[1], is_fast=given.fast)),
                itertools.product(chosen, variants),
            )


def report_of(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Return what is kept of a drill."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[2]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{cores} cores, mean load {load:.1f}",
        "seconds": round(seconds, 1),
        "results": [dataclasses.asdict(result) for result in results],
    }


def show(result: Result) -> None:
    """Print a result."""
    name = f"{result.name}{' ' + result.variant if result.variant else ''}"
    figures = "" if result.detected is None else f"  ended after {result.detected} s"
    figures += "" if result.lost is None else f"  steps repeated: {result.lost}"
    print(f"{result.number:3} {name:24} {result.verdict:16}{result.seconds:6.1f} s{figures}", flush=True)
    if result.verdict != "as expected":
        print(f"      fault: {result.text}\n      must happen: {result.expected}")
    print(f"      seen: {result.seen.strip()}", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    given = options(sys.argv[1:] if words is None else words)
    prepare_process()
    if given.list:
        for number in sorted(FAULTS):
            fault = FAULTS[number]
            marks = "fast" * fault.is_fast + " matrix" * fault.has_matrix
            print(f"{number:3} {fault.name:20} {marks:12} {fault.text}\n{'':25}-> {fault.expected}")
        return 0
    if given.table:
        report = read_report(STORE / "all.json")
        if not report:
            raise SystemExit("drill: there are no results of a full drill; run: python tools/drill")
        write_page(ROOT / "docs" / "reliability.md", report, read_report(STORE / "matrix.json"))
        return 0
    started, results = time.monotonic(), []
    for result in try_all(choose(given), given):
        results.append(result)
        if not given.json and not (given.quiet and result.verdict != "not as expected"):
            show(result)
    report = report_of(results, time.monotonic() - started)
    if given.json:
        print(json.dumps(report, indent=2))
    elif not given.quiet:
        print("\n".join(["", *rows(report["results"])]))
    if not given.faults and not given.fast:
        STORE.mkdir(exist_ok=True)
        (STORE / f"{'matrix' if given.matrix else 'all'}.json").write_text(json.dumps(report, indent=1))
    return int(any(result.verdict == "not as expected" for result in results))


if __name__ == "__main__":
    sys.exit(main())
