"""The benchmark of starts: what it sees on the screen of a training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "bench" / "start.py"
SCREEN = """
from bigtx.track.console import Console
import sys
print("bigtx: python, 1 rank; run folder there")
console = Console(sys.stdout, total_steps=1)
console.begin(0)
console.progress(1, 100, {"train/loss": 2.5} if "run_dir=good" in sys.argv else {})
console.close()
"""


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_start", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_moment_is_seen_in_its_order(bench: ModuleType, tmp_path: Path) -> None:
    seen = bench.start([sys.executable, "-c", SCREEN], tmp_path, Path("good"))
    assert list(seen) == ["first line", "bar", "first step", "processor"]
    assert 0 < seen["first line"] <= seen["bar"] <= seen["first step"] and seen["processor"] > 0
    report = {"cores": 2, "load": [0.1, 0.2], "rounds": 1}
    shown = bench.table(report | {"seconds": {way: {mark: [seen[mark]] for mark in seen} for way in ("one", "two")}})
    assert shown.splitlines()[-1].startswith("| two | ") and shown.count("(1.00)") == 8


def test_a_moment_that_never_comes_is_an_error(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"showed:\n.*bigtx: python"):
        bench.start([sys.executable, "-c", SCREEN], tmp_path, Path("bad"))
