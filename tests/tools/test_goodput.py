"""The goodput benchmark: where it says that the seconds went."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def test_every_second_is_accounted_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_goodput", BENCH / "goodput.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_goodput", module)
    spec.loader.exec_module(module)
    # Killed after step 4; the checkpoint of step 2 is used, so steps 3 and 4 are made again.
    first = {step: 0.5 for step in (1, 2, 3, 4)}
    second = {1: 0.5, 2: 0.5, 3: 0.6, 4: 0.4, 5: 0.5, 6: 0.5}
    starts = [{"command": 1.0, "engine": 2.0, "first_step": 0.5}, {"command": 1.0, "engine": 3.0, "first_step": 1.5}]
    report = module.account([first, second], starts, wall=20.0)
    assert (report["productive"], report["goodput"], report["steps"], report["kills"]) == (3.0, 0.15, 6, 1)
    assert report["resume"] == [3.5, 5.5] and report["step"] == 0.5
    assert report["seconds"] == {
        "start: command": 2.0,
        "start: engine": 5.0,
        "start: first_step": 1.0,
        "steps made again": 1.0,
        "checkpoints, ends and the rest": 8.0,
    }
    assert report["productive"] + sum(report["seconds"].values()) == report["wall"]
    shown = module.table(report | {"every": 4, "save_every": 2, "cores": 2, "load": [0.1, 0.2]})
    assert "goodput 15.0%" in shown and "| steps made again | 1.0 | 5.0% |" in shown
