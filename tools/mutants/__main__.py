"""Test mutants: small changes of meaning in the core of bigtx, one at a time, each of which a test should detect.

    make mutants                          40 mutants, evenly over the packages
    make mutants MUTANTS='--count 600'    600 mutants
    make mutants MUTANTS='--package finetuning/tasks --count 50'

First the tests run once, to record the lines of each test; later only changed test files are run for that. Then each
mutant is tried with the nearest of the tests that run its line, in a fork of a process that has imported torch. The
sample depends only on the commit. Results are lines of JSON in .mutants/; `--table` writes the table in
docs/testing.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import forks
import hook
import recording
import settings
import trial
from nearest import nearest_files
from operators import Mutant, mutants_of
from table import print_shares, write_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STORE = ROOT / ".mutants"
PACKAGES: dict[str, list[str]] = {
    "data/stream": ["bigtx/data/stream/*.py"],
    "data/corpus": ["bigtx/data/corpus/*.py"],
    "data/prepare": ["bigtx/data/prepare/*.py"],
    "tokenizer": ["bigtx/tokenizer/*.py"],
    "model": ["bigtx/model/*.py"],
    "engine": ["bigtx/engine/*.py"],
    "train": ["bigtx/train/*.py"],
    "pretraining": ["bigtx/pretraining/*.py"],
    "finetuning": ["bigtx/finetuning/*.py"],
    "finetuning/tasks": ["bigtx/finetuning/tasks/*.py"],
    "interop": ["bigtx/interop/*.py", "bigtx/interop/families/*.py"],
    "config": ["bigtx/config/*.py", "bigtx/config/schema/*.py"],
    "track": ["bigtx/track/*.py"],
    "utils": ["bigtx/utils/secrets.py", "bigtx/utils/files.py"],
}
"""The files to mutate, by package."""
MARKERS = "not slow and not gpu and not slurm"
BUDGET = 60.0
"""Seconds of tests for each mutant."""
MIN_LIMIT = 600.0
"""The least seconds after which a trial counts as hanging: the machine may be busy with other work."""


def options(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="mutants", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--count", type=int, default=40, help="how many mutants, evenly over the packages (default 40)")
    add("--all", action="store_true", help="all mutants")
    add("--package", action="append", choices=sorted(PACKAGES), help="only mutants of this package; repeatable")
    add("--seed", help="choose the sample by this seed instead of the commit")
    add("--id", action="append", help="only this mutant; repeatable")
    add("--settings", nargs="*", metavar="KEY", help="test instead whether a test fails if a setting has no effect")
    add("--resume", action="store_true", help="keep the results of this commit, and try only missing mutants")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="number of mutants at the same time")
    add("--budget", type=float, default=BUDGET, help=f"seconds of tests for each mutant (default {BUDGET:g})")
    add("--tests", nargs="*", default=["tests"], help="tests whose lines are recorded (default: all)")
    add("--quick", action="store_true", help="record no lines; use the test files whose imports are nearest")
    add("--json", action="store_true", help="print each result as a line of JSON")
    add("--table", action="store_true", help="write the table of docs/testing.md from the results")
    return parser.parse_args(words)


def install_hook() -> None:
    """Have every Python process of this environment load the hook. It has no effect unless the variable is set."""
    path = Path(sysconfig.get_path("purelib")) / "bigtx_mutants.pth"
    code = (
        f"import os, sys; f = os.environ.get('{hook.FOLDER}'); "
        "f and sys.path.append(f); f and __import__('hook').install()\n"
    )
    if not path.exists() or path.read_text() != code:
        path.write_text(code)
    os.environ[hook.FOLDER] = str(HERE)


def record(places: Sequence[str], jobs: int) -> recording.Map:
    """Record the lines that the tests run, of test files that are new or changed."""
    folder = STORE / "lines"
    folder.mkdir(parents=True, exist_ok=True)
    known_path = folder / "files.json"
    known: dict[str, str] = json.loads(known_path.read_text()) if known_path.exists() else {}
    files = sorted(
        str(path.relative_to(ROOT))
        for place in places
        for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("test_*.py"))
    )
    digests = {name: hashlib.sha1((ROOT / name).read_bytes()).hexdigest() for name in files}
    stale = [name for name in files if known.get(name) != digests[name]]
    if stale:
        print(f"recording the lines that the tests of {len(stale)} files run", file=sys.stderr)
        for name in stale:
            _forget(folder, name)
        environment = os.environ | {recording.FOLDER: str(folder), "PYTHONPATH": str(HERE)}
        words = ["-n", str(jobs), "--dist", "loadfile", "-p", "recording", "-p", "no:cacheprovider", "-m", MARKERS]
        command = [sys.executable, "-m", "pytest", *words, *stale]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
        known_path.write_text(json.dumps(known | {name: digests[name] for name in stale}, indent=1))
    return recording.read_map(ROOT, folder)


def _forget(folder: Path, name: str) -> None:
    index = folder / "index.jsonl"
    lines = index.read_text(encoding="utf-8").splitlines() if index.exists() else []
    kept = []
    for line in lines:
        facts = json.loads(line)
        if (context := facts.get("test", "")).startswith(f"{name}::"):
            (folder / f"{recording.digest(context)}.lines").unlink(missing_ok=True)
        else:
            kept.append(line + "\n")
    index.write_text("".join(kept), encoding="utf-8")


def choose(arguments: argparse.Namespace, commit: str) -> list[Mutant]:
    """Return the mutants to try: the same number from each package, at different lines where possible."""
    names = arguments.package or list(PACKAGES)
    found = {name: _of_package(name) for name in names}
    if arguments.id:
        return [mutant for of_one in found.values() for mutant in of_one if mutant.id in arguments.id]
    count = sum(map(len, found.values())) if arguments.all else arguments.count
    chosen: list[Mutant] = []
    for place, name in enumerate(names):
        generator = random.Random(f"{arguments.seed or commit} {name}")
        mutants = generator.sample(found[name], len(found[name]))
        share = len(mutants) if arguments.all else count * (place + 1) // len(names) - count * place // len(names)
        lines: set[tuple[str, int]] = set()
        first, later = list[Mutant](), list[Mutant]()
        for mutant in mutants:
            key = (mutant.path, mutant.lines[0])
            (later if key in lines else first).append(mutant)
            lines.add(key)
        usable = (mutant for mutant in first + later if mutant.compiles((ROOT / mutant.path).read_bytes()))
        chosen += [mutant for mutant, _ in zip(usable, range(share), strict=False)]
    # Shuffled, so that a run that is ended early has mutants of all packages.
    random.Random(commit).shuffle(chosen)
    return chosen


def _of_package(name: str) -> list[Mutant]:
    paths = sorted(path for pattern in PACKAGES[name] for path in ROOT.glob(pattern))
    return [mutant for path in paths for mutant in mutants_of(str(path.relative_to(ROOT)), path.read_bytes())]


def package_of(path: str) -> str:
    """Return the package of a file."""
    return next(name for name, patterns in PACKAGES.items() if any(Path(path).match(pattern) for pattern in patterns))


@dataclass(frozen=True)
class Plan:
    """A mutant, its tests, the seconds that they take, and the number of tests that are left out for lack of time."""

    mutant: Mutant
    tests: list[str]
    seconds: float
    left_out: int


def plan(mutant: Mutant, known: recording.Map, budget: float) -> Plan:
    """Choose the tests of a mutant. For a line that runs only at import, all tests that use the file are candidates."""
    names = known.of_lines(mutant.path, *mutant.lines) or known.of_file(mutant.path)
    return Plan(mutant, *known.choose(names, mutant.path, budget))


def plans_of_settings(keys: Sequence[str], budget: float) -> Iterator[Plan]:
    """Yield a plan for each setting, with the test that tests/settings.yaml names.

    Args:
        keys: the settings; all if there are none.
        budget: the seconds of tests for each.
    """
    named = settings.read_registry(ROOT)
    source = (ROOT / settings.SCHEMA).read_bytes()
    for key, (owner, name) in settings.known_settings(ROOT).items():
        if key in named and (not keys or key in keys):
            yield Plan(settings.mutant_of(key, owner, name, source), [named[key]], budget, 0)


def run_all(plans: Iterable[Plan], jobs: int) -> Iterator[dict[str, Any]]:
    """Run the plans. Yields each result when it is known."""
    trial.warm_up()
    waiting, running = list(plans), list[trial.Trial]()
    while waiting or running:
        if waiting and len(running) < jobs:
            next_one = waiting.pop(0)
            if not next_one.tests:
                facts = {"status": "survived", "tests": 0, "left_out": next_one.left_out, "seconds": 0.0}
                yield _facts(next_one.mutant) | facts
                continue
            source = (ROOT / next_one.mutant.path).read_bytes()
            running.append(
                trial.begin(
                    next_one.mutant,
                    source,
                    next_one.tests,
                    limit=max(MIN_LIMIT, 10 * next_one.seconds),
                    budget=2 * next_one.seconds + 10,
                    markers=MARKERS,
                    left_out=next_one.left_out,
                )
            )
            continue
        for one in list(running):
            if (result := trial.end(one)) is not None:
                running.remove(one)
                yield _facts(one.mutant) | result
        time.sleep(0.05)


def _facts(mutant: Mutant) -> dict[str, Any]:
    names = ("id", "path", "function", "operator", "before", "after")
    facts: dict[str, Any] = {name: getattr(mutant, name) for name in names}
    return facts | {"line": mutant.lines[0], "package": package_of(mutant.path)}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    if words is None and sys.argv[-1] != forks.PADDING:
        os.execv(sys.executable, [sys.executable, *sys.argv, forks.PADDING])
    arguments = options(sys.argv[1:-1] if words is None else words)
    os.chdir(ROOT)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    STORE.mkdir(exist_ok=True)
    results = STORE / f"{'settings-' if arguments.settings is not None else ''}{commit[:12]}.jsonl"
    if arguments.table:
        write_table(ROOT, results, list(PACKAGES))
        return 0
    if not arguments.resume:
        results.unlink(missing_ok=True)
    done = {json.loads(line)["id"] for line in results.read_text().splitlines()} if results.exists() else set()
    of_settings = arguments.settings is not None
    mutants = [] if of_settings else [mutant for mutant in choose(arguments, commit) if mutant.id not in done]
    install_hook()
    if of_settings:
        plans = [each for each in plans_of_settings(arguments.settings, arguments.budget) if each.mutant.id not in done]
    elif arguments.quick:
        plans = [Plan(each, nearest_files(ROOT, each.path), arguments.budget, 0) for each in mutants]
    else:
        known = record(arguments.tests, arguments.jobs)
        plans = [plan(mutant, known, arguments.budget) for mutant in mutants]
    for number, result in enumerate(run_all(plans, arguments.jobs), 1):
        # Not left open: forks of this process close all files, and must not close one again when they end.
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        _print(result, number, len(plans), as_json=arguments.json)
    if not arguments.json:
        print_shares(results, list(PACKAGES))
    return 0


def _print(result: dict[str, Any], number: int, total: int, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result), flush=True)
        return
    is_setting = result["operator"] == "setting"
    place = result["function"] if is_setting else f"{result['id']} {result['path']}:{result['line']}"
    print(f"{number}/{total} {result['status']:9}{result['seconds']:6.1f} s  {place}", flush=True)
    if result["status"] != "noticed" and not is_setting:
        print(f"    {result['operator']}: {result['before']}\n    -> {result['after']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
