"""The fault drill's own arithmetic: what it compares, counts and writes. The faults themselves are tried by `make test`
and `make drill`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from drill import checkpoints, corpus, folders, numbers, processes, resumes, tracking
from drill.catalogue import FAULTS, Fault, NotPossible, Result, Unexpected, attempt
from drill.page import BEGIN, END, rows, write_page
from drill.scene import differences

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (processes, checkpoints, resumes, numbers, corpus, folders, tracking)


def test_all_faults_are_in_the_list() -> None:
    assert sorted(FAULTS) == list(range(1, 52))
    assert len({fault.name for fault in FAULTS.values()}) == len(FAULTS)
    assert all(fault.text and fault.expected and not fault.name.isdigit() for fault in FAULTS.values())
    assert {1, 2, 3, 4, 5, 6, 24, 25} <= {number for number, fault in FAULTS.items() if fault.has_matrix}
    assert {1, 2, 4, 9, 18, 22, 36, 37, 49} <= {number for number, fault in FAULTS.items() if fault.is_fast}
    listed = subprocess.run([sys.executable, ROOT / "tools/drill", "--list"], capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stdout.count("-> ") == len(FAULTS), listed.stderr
    unknown = subprocess.run([sys.executable, ROOT / "tools/drill", "99"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "no fault 99" in unknown.stderr


def write_run(folder: Path, *, losses: list[float], state: dict[str, Any] | None = None, sha256: str = "a") -> Path:
    checkpoint = folder / "checkpoints" / f"step-{len(losses):08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "README.bigtx").touch()
    lines = [{"step": step, "tokens": 8 * step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"sequences": 8, "tokens": 16, "skipped_sequences": [], "skipped_steps": 0}
    facts = {"step": len(losses), "seed": 1, "data": "d", "tokenizer": "t", "num_updates": 2}
    files = {"rank-00000.safetensors": {"size": 1, "sha256": sha256}}
    manifest = facts | {"state": counts | (state or {}), "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_difference_in_the_last_bit_is_a_loss(tmp_path: Path) -> None:
    unbroken = write_run(tmp_path / "unbroken", losses=[2.0, 1.0])
    assert differences(write_run(tmp_path / "same", losses=[2.0, 1.0]), unbroken) == []
    nearly = write_run(tmp_path / "nearly", losses=[2.0, math.nextafter(1.0, 2.0)])
    (found,) = differences(nearly, unbroken)
    assert "other losses in 1 steps, first in 2" in found
    assert differences(nearly, unbroken, tolerance=1e-6) == []
    far = write_run(tmp_path / "far", losses=[2.0, 1.1])
    assert differences(far, unbroken, tolerance=0.01) and not differences(far, unbroken, tolerance=0.2)
    assert differences(write_run(tmp_path / "nan", losses=[2.0, math.nan]), unbroken, tolerance=100.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": [2.0]}, "other steps or tokens"),
        ({"losses": [2.0, 1.0], "state": {"sequences": 9}}, "other sequences: 9, not 8"),
        ({"losses": [2.0, 1.0], "state": {"best_step": 1}}, "other state"),
        ({"losses": [2.0, 1.0], "sha256": "b"}, "other parameters or optimizer states"),
    ],
)
def test_each_kind_of_loss_is_found(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    unbroken = write_run(tmp_path / "unbroken", losses=[2.0, 1.0])
    assert any(said in found for found in differences(write_run(tmp_path / "run", **changes), unbroken))


class Stage:
    """As much of a scene as `attempt` uses."""

    variant, detected, lost = "", 1.5, 3

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, "as expected"),
        (Unexpected("the run hangs"), "not as expected"),
        (AssertionError("never happened"), "not as expected"),
        (KeyError("a defect of the drill"), "not as expected"),
        (NotPossible("no mounts here"), "not possible"),
    ],
)
def test_what_a_fault_raises_is_its_result(error: Exception | None, verdict: str) -> None:
    def act(scene: Any) -> str:
        if error:
            raise error
        return "nothing lost"

    scene: Any = Stage()
    result = attempt(Fault(1, "kill", "A kill", "nothing is lost", act, True, True), scene)
    assert (result.verdict, result.detected, result.lost) == (verdict, 1.5, 3) and scene.is_closed
    assert (str(error.args[0]) if error else "nothing lost") in result.seen


def a_result(number: int, **changes: Any) -> dict[str, Any]:
    result = Result(number, "kill", "A kill", "nothing is lost", "", "as expected", "nothing lost", 1.5, None, 9.0)
    return vars(result) | changes


def test_the_table_replaces_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    failed = a_result(2, verdict="not as expected", seen="a | hangs\n" * 99)
    report = {"date": "2026-11-30", "commit": "abc", "machine": "2 cores", "seconds": 120.0}
    variants = [f"engine.zero_stage={stage} engine.precision=bf16" for stage in (0, 1)]
    matrix = report | {"results": [a_result(1, variant=variants[0]), failed | {"number": 1, "variant": variants[1]}]}
    write_page(page, report | {"results": [failed, a_result(1)]}, matrix)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "2026-11-30, commit abc, 2 cores, 2 minutes: 1 as expected, 1 not as expected." in lines
    assert [line[:4] for line in rows([failed, a_result(1)])[2:]] == ["| 1 ", "| 2 "]
    assert all(line.count("|") == 7 for line in rows([failed, a_result(1)]))
    assert "| fault | ZeRO 0 bf16 | ZeRO 1 bf16 |" in lines and "| 1 A kill | yes | **no** |" in lines
