"""Mutation testing: which changes are made, that they keep their names, and that a trial tells a test from none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "mutants"
sys.path.insert(0, str(TOOL))
import operators  # noqa: E402

sys.path.remove(str(TOOL))


def changes(code: str) -> set[tuple[str, str, str]]:
    source = textwrap.dedent(code).encode()
    found = operators.mutants_of("a.py", source)
    assert all(mutant.apply(source) != source for mutant in found)
    assert len({mutant.id for mutant in found}) == len(found)
    return {(mutant.operator, mutant.before, mutant.after) for mutant in found}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = a < b", {("comparison", "a < b", "(a <= b)")}),
        ("x = a is not b", {("comparison", "a is not b", "(a is b)")}),
        (
            "x = a and b",
            {("dropped term", "a and b", "b"), ("dropped term", "a and b", "a"), ("and/or", "a and b", "(a or b)")},
        ),
        ("x = not a", {("dropped not", "not a", "bool(a)")}),
        ("x = -a", {("dropped minus", "-a", "a")}),
        (
            "x = a + b",
            {("arithmetic", "a + b", "(a - b)"), ("dropped term", "a + b", "a"), ("dropped term", "a + b", "b")},
        ),
        ("x = 'a' + b", set()),
        ("x = 3", {("constant", "3", "4")}),
        ("x = 1", {("constant", "1", "2"), ("constant", "1", "0")}),
        ("x = True", {("constant", "True", "False")}),
        ("x = 0.5", {("constant", "0.5", "1.5")}),
        ("x = a[:n]", {("slice end", ":n", ":n - 1")}),
        ("x = a[n:]", {("slice start", "n:", "n + 1:")}),
        ("x = a if b else c", {("swapped branches", "a if b else c", "(c if b else a)")}),
        ("x = [a for a in b if c]", {("dropped filter", "c", "True")}),
        ("x = max(a)", {("neighbour", "max(a)", "min(a)")}),
        ("x = a.mean()", {("neighbour", "a.mean()", "a.sum()")}),
        ("x = f(a, b)", {("swapped arguments", "f(a, b)", "f(b, a)")}),
        ("x = isinstance(a, b)", set()),
        ("x = f(a, key=b)", {("dropped keyword", "f(a, key=b)", "f(a)")}),
        ("f(a)", {("removed call", "f(a)", "pass")}),
        ("x += a", {("removed assignment", "x += a", "pass")}),
        ("x.y = a", {("removed assignment", "x.y = a", "pass")}),
        ("if a: pass", {("negated condition", "a", "(not a)")}),
        ("raise KeyError(f'{a + 1}')", {("removed raise", "raise KeyError(f'{a + 1}')", "pass")}),
        ("for a in b: continue", {("continue/break", "continue", "break")}),
        ("def f(): return a, b", {("swapped results", "return a, b", "return (b, a)")}),
        ("def f(a=2): pass", {("constant", "2", "3")}),
    ],
)
def test_operators(code: str, expected: set[tuple[str, str, str]]) -> None:
    assert changes(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        '"""A docstring."""',
        "__all__ = ['a']",
        "WAIT_SECONDS = 3",
        "x: int",
        "assert a < b, 'why'",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    x = 1",
        "print(a + 1)",
        "log.warning('%s', a + 1)",
        "x = f'{a + 1}'",
        "x = open(a, encoding=1)",
        "class A:\n    def __repr__(self): return a + 1",
    ],
)
def test_what_is_for_people_or_of_no_consequence_stays(code: str) -> None:
    assert not changes(code)


def test_a_change_keeps_its_id_when_lines_move() -> None:
    code = b"def f(a):\n    return a < 3\n"
    moved = b"import os\n\n\ndef g():\n    pass\n\n\n" + code
    ids = [{mutant.id for mutant in operators.mutants_of("a.py", source)} for source in (code, moved)]
    assert ids[0] == ids[1] and len(ids[0]) == 2
    twice = operators.mutants_of("a.py", b"def f(a):\n    return a < b or a < b\n")
    assert len({mutant.id for mutant in twice}) == len(twice)


def test_characters_of_several_bytes_before_a_change() -> None:
    source = "x = 'é', a < b".encode()
    (mutant,) = [each for each in operators.mutants_of("a.py", source) if each.operator == "comparison"]
    assert mutant.apply(source).decode() == "x = 'é', (a <= b)"


HELD = "def held(a):\n    return a < 3\n\n\ndef loose(a):\n    return a < 3\n"
IN_ANOTHER_PROCESS = "import sys\n\n\ndef main():\n    sys.exit(len(sys.argv) > 2)\n"
TESTS = """
import subprocess, sys
from bigtx.utils.files import held, loose

def test_held():
    assert held(2) and not held(3) and not held(4)

def test_loose():
    loose(3)

def test_main():
    code = "from bigtx.utils.secrets import main; main()"
    assert [subprocess.run([sys.executable, "-c", code, *words]).returncode for words in ([], "a", "ab")] == [0, 0, 1]
"""


AT_IMPORT = """
from bigtx.utils.files import EARLY, held

assert EARLY == 5

def test_held():
    assert not held(4)
"""


@pytest.mark.slow
def test_a_trial_tells_what_is_held_from_what_is_not(tmp_path: Path) -> None:
    files = {
        "bigtx/__init__.py": "",
        "bigtx/utils/__init__.py": "",
        "bigtx/utils/files.py": f"EARLY = 5\n{HELD}",
        "bigtx/utils/secrets.py": IN_ANOTHER_PROCESS,
        "tests/test_utils.py": TESTS,
        "tests/test_import.py": AT_IMPORT,
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow', 'gpu', 'slurm']\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(TOOL, tmp_path / "tools" / "mutants")
    shutil.copy(TOOL.parents[1] / "tests" / "forks.py", tmp_path / "tests")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)

    def mutants(*words: str) -> list[dict[str, Any]]:
        command = [sys.executable, "tools/mutants", "--package=utils", "--count=50", "--json", *words]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    found = {(each["function"], each["after"]): each for each in mutants()}
    assert {key: each["status"] for key, each in found.items()} == {
        ("", "6"): "noticed",
        ("held", "(a <= 3)"): "noticed",
        ("held", "4"): "noticed",
        ("loose", "(a <= 3)"): "survived",
        ("loose", "4"): "survived",
        ("main", "(len(sys.argv) >= 2)"): "noticed",
        ("main", "3"): "noticed",
        ("main", "pass"): "noticed",
    }
    assert found["held", "4"]["by"] == "tests/test_utils.py::test_held"
    assert found["main", "3"]["by"] == "tests/test_utils.py::test_main"
    assert not mutants("--resume")
