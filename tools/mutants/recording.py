"""Record which tests run which lines of bigtx, with a pytest plugin, and read the records.

The lines of a fixture count for every test that uses the fixture. Each context, a test or a fixture, has a file of
lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic as now  # Tests replace time.monotonic by clocks of their own.
from typing import Any

import hook
import pytest

FOLDER = "BIGTX_MUTANTS_RECORDS"
"""The variable with the folder of the records, for the plugin."""


class Contexts:
    """The pytest plugin. It records nested contexts, and the time of each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[str] = []
        self._index = folder / "index.jsonl"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Record a test."""
        self._enter(item.nodeid)
        try:
            return (yield)
        finally:
            self._leave()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Record a fixture separately from the test that is the first to use it."""
        key = _key(fixturedef)
        start = now()
        self._enter(key)
        try:
            return (yield)
        finally:
            self._leave()
            self._write({"fixture": key, "seconds": now() - start})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Write how a test ended."""
        report: Any = yield
        if call.when == "call" or report.outcome != "passed":
            known = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - private
            fixtures = [_key(found[-1]) for found in known.values() if found]
            facts = {"test": item.nodeid, "seconds": call.duration, "fixtures": fixtures, "outcome": report.outcome}
            self._write(facts)
        return report

    def _enter(self, name: str) -> None:
        self._open.append(name)
        hook.recorder.switch(str(self._folder / f"{digest(name)}.lines"))
        hook.recorder.start()

    def _leave(self) -> None:
        self._open.pop()
        if self._open:
            hook.recorder.switch(str(self._folder / f"{digest(self._open[-1])}.lines"))
        else:
            hook.recorder.stop()

    def _write(self, facts: dict[str, Any]) -> None:
        with open(self._index, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def digest(text: str) -> str:
    """Return a short name for a file."""
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def _key(fixturedef: Any) -> str:
    return f"{fixturedef.baseid}::fixture::{fixturedef.argname}"


if FOLDER in os.environ:
    contexts = Contexts(Path(os.environ[FOLDER]))
    """pytest takes a module's functions as hooks, so the plugin registers this itself."""

    def pytest_configure(config: pytest.Config) -> None:
        """Register the plugin."""
        config.pluginmanager.register(contexts)


@dataclass
class Test:
    """A test that passes without a mutant."""

    name: str
    seconds: float
    fixtures: tuple[str, ...]

    @property
    def file(self) -> str:
        """Return the test's file."""
        return self.name.partition("::")[0]


@dataclass
class Map:
    """Tests by the lines that they run.

    Attributes:
        tests: the tests by their names.
        fixtures: the seconds of each fixture.
        lines: a file of bigtx, relative to the root -> a line -> names of tests.
    """

    tests: dict[str, Test] = field(default_factory=dict)
    fixtures: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))

    def of_lines(self, path: str, first: int, last: int) -> set[str]:
        """Return the names of the tests that run one of some lines."""
        of_file = self.lines.get(path, {})
        return set().union(*(of_file.get(line, ()) for line in range(first, last + 1)))

    def of_file(self, path: str) -> set[str]:
        """Return the names of the tests that run any line of a file."""
        return set().union(*self.lines.get(path, {}).values())

    def choose(self, names: set[str], path: str, budget: float) -> tuple[list[str], float, int]:
        """Choose the tests that are nearest to a file and take the least time.

        Args:
            names: the tests to choose from.
            path: the file.
            budget: the most seconds in all.

        Returns:
            The names in the order to run them, the seconds that they take, and the number of tests left out.
        """
        near = {path.split("/")[-2], path.split("/")[-1].removesuffix(".py")}

        def cost(name: str) -> float:
            test = self.tests[name]
            seconds = test.seconds + sum(self.fixtures.get(key, 0.0) for key in test.fixtures)
            words = set(test.file.removesuffix(".py").replace("test_", "").split("/"))
            return seconds if near & words else 3 * seconds + 1

        chosen: list[str] = []
        made: set[str] = set()
        total = 0.0
        for name in sorted(names, key=lambda name: (cost(name), name)):
            test = self.tests[name]
            more = test.seconds + sum(self.fixtures.get(key, 0.0) for key in test.fixtures if key not in made)
            if chosen and total + more > budget:
                continue
            total += more
            made.update(test.fixtures)
            chosen.append(name)
        return chosen, total, len(names) - len(chosen)


def read_map(root: Path, folder: Path) -> Map:
    """Read the records in a folder."""
    result = Map()
    users: dict[str, set[str]] = defaultdict(set)
    bad = set()
    for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines():
        facts = json.loads(line)
        if "fixture" in facts:
            key = facts["fixture"]
            result.fixtures[key] = max(facts["seconds"], result.fixtures.get(key, 0.0))
            continue
        if facts["outcome"] != "passed":
            bad.add(facts["test"])
        result.tests[facts["test"]] = Test(facts["test"], facts["seconds"], tuple(facts["fixtures"]))
    for name in bad:
        result.tests.pop(name, None)
    for name, test in result.tests.items():
        for context in (name, *test.fixtures):
            users[context].add(name)
    for context, names in users.items():
        path = folder / f"{digest(context)}.lines"
        if not path.exists():
            continue
        for line in set(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            file, _, number = line.rpartition(":")
            if number.isdigit() and file.startswith(f"{root}/"):
                result.lines[file[len(str(root)) + 1 :]][int(number)] |= names
    return result
