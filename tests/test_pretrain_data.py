"""Phases and skipped windows through the door that users take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doors import TINY, pretrain

pytestmark = pytest.mark.dist


def test_windows_are_recorded_and_those_behind_cannot_change(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [
        *TINY,
        f"run_dir={run_dir}",
        f"data.sources.a.path={corpus}",
        f"data.sources.b.path={corpus}",
        "data.phases.late.start=1k",
        "data.phases.late.weights.a=0",
        "validation.max_sequences=0",
    ]
    done = pretrain(*arguments, "train.max_steps=3", "data.skip=[4-8, 20-60]")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((run_dir / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert manifest["state"]["sequences"] == 3 * 8 + 4 + 40
    assert manifest["state"]["tokens"] == 3 * 8 * 64
    assert manifest["state"]["skipped_sequences"] == ["4-8", "20-60"]

    refused = pretrain(
        *arguments, "train.max_steps=5", "data.skip=[20-60]", "allow_changes=[train.max_steps, data.skip]"
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "the run is at sequence 68 and has skipped [4-8, 20-60]" in refused.stderr
