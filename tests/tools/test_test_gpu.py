"""`make test-gpu`: without a GPU, with one that torch cannot use, and on a CPU as a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu import causes, plan, table
from test_gpu.command import Check
from test_gpu.plan import Phase

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, path: str = "/usr/bin:/bin", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "test_gpu"), *words]
    return subprocess.run(command, env={"PATH": path, **variables}, capture_output=True, text=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done = run(path=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "No CUDA GPU on this machine: nothing was run.\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_cannot_use_is_a_failure(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Example'\n")
    program.chmod(0o755)
    done = run(path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "cannot use it through torch" in done.stderr


def test_a_dry_run_of_the_light_phases_passes(tmp_path: Path) -> None:
    phases = ["environment", "kernels", "save", "resume"]
    done = run("--dry-run", "--only", ",".join(phases), OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path / "gpu-check.jsonl")
    assert [line["phase"] for line in found if line.get("status") == "passed"] == phases
    assert {"versions", "reached", "causal 2x4x2x64x16", "new key lengths"} <= {line.get("label") for line in found}
    assert (tmp_path / "gpu-check.log").is_file()
    assert "kernels, causal 2x4x2x64x16: ms (default " in done.stdout and "cudnn refused: " in done.stdout


@pytest.mark.slow
def test_a_dry_run_of_everything_passes(tmp_path: Path) -> None:
    output = tmp_path / "found.jsonl"
    done = run("--dry-run", f"output={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(output)
    assert {line["phase"] for line in found if line.get("status") == "passed"} == {phase.name for phase in plan.PHASES}
    (resumed,) = (line for line in found if line.get("label") == "resume")
    assert resumed["is_equal"]


def test_an_unknown_phase_is_refused() -> None:
    done = run("--only", "kernels,kernel")
    assert done.returncode == 2 and "no phase is named kernel;" in done.stderr
    done = run("--only", "kernels", "-k", "parity")
    assert done.returncode == 2 and "without the phase tests" in done.stderr


PROGRAM = """#!/bin/sh
echo of $2
case $2 in
    fails) exit 3 ;;
    hangs) sleep 600 & wait ;;
esac
"""


def check(tmp_path: Path, seconds: float) -> Check:
    """A check whose phases are a shell script."""
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    output, deadline = tmp_path / "found.jsonl", time.monotonic() + seconds
    return Check(str(program), dict(os.environ), output, tmp_path, deadline, is_dry=False, pytest_words=[])


def test_no_phase_stops_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = [Phase(name, "", seconds, "") for name, seconds in (("fails", 30), ("hangs", 0.5), ("passes", 30))]
    assert not check(tmp_path, 60).run(phases)
    found = read(tmp_path / "found.jsonl")
    assert [(line["phase"], line["status"]) for line in found] == [
        ("fails", "failed"),
        ("hangs", "ended after 0 s"),
        ("passes", "passed"),
    ]
    assert "of fails" in capsys.readouterr().err and found[0]["error"] == "of fails"


def test_without_time_a_phase_is_skipped(tmp_path: Path) -> None:
    assert not check(tmp_path, plan.LEAST_SECONDS - 1).run([Phase("passes", "", 30, "")])
    assert [line["status"] for line in read(tmp_path / "found.jsonl")] == ["skipped"]


def test_the_table_compares_what_is_reached_with_what_is_wanted() -> None:
    speed = {"phase": "training", "tokens_per_second": 5e5, "step_ms": 100.0, "peak_gib": 20.0, "recomputed": "none"}
    lines: list[dict[str, Any]] = [
        {"began": "2026-01-01", "dry_run": False},
        speed | {"label": "decoder-7b", "mfu": 0.9},
        {"began": "2026-01-02", "dry_run": False},
        speed | {"label": "decoder-125m", "mfu": 0.46},
        speed | {"label": "decoder-125m", "mfu": 0.46, "busy": 0.97, "shares": {"products": 0.5, "fused": 0.2}},
        {"phase": "training", "case": "decoder-125m", "status": "passed", "seconds": 9.8, "error": ""},
        speed | {"label": "decoder-350m", "mfu": 0.4},
        {"phase": "training", "case": "decoder-350m", "status": "failed", "seconds": 9.8, "error": "x"},
        {"phase": "save", "label": "save", "at": 1.0, "gib": 4.0},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"phase": "resu'
    shown = "\n".join(table.lines_of(text))
    assert "decoder-7b" not in shown and "save, save: gib 4.0" in shown
    rows = {row.split()[0]: " ".join(row.split()) for row in shown.splitlines() if row.startswith("decoder-")}
    assert rows["decoder-125m"] == "decoder-125m 46.0% 45% reached 500,000 100.0 20.0 97% none products 50%, fused 20%"
    assert rows["decoder-350m"] == "decoder-350m 40.0% 52% below 500,000 100.0 20.0 none"


def test_the_time_of_kernels() -> None:
    assert causes.union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
        "ncclDevKernel_ReduceScatter": "communication",
        "triton_red_fused_add_mul_5": "fused",
        "void at::native::multi_tensor_apply_kernel": "update",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel": "other",
    }
    assert {name: causes.kind_of(name) for name in names} == names
