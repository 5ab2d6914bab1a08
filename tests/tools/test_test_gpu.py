"""`make test-gpu` where there is no GPU, and where torch cannot use the one there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "test_gpu")]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "No CUDA GPU on this machine: nothing was run.\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_cannot_use_is_a_failure(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Example'\n")
    program.chmod(0o755)
    done = run(f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "cannot use it through torch" in done.stderr
