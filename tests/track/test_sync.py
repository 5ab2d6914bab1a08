"""Offline runs brought to W&B while they train: `wandb sync` gives all steps again each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_wandb import GUARD_SECONDS, KEY, dead_url, read_jsonl, run_program, steps
from wandb_double import WandbDouble

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def settings(folder: Path, url: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    own |= {"PATH": path, "HOME": str(folder.parent), "PYTHONPATH": str(ROOT)}
    return own | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}


def bring(folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    return forks.run(
        [sys.executable, "-m", "bigtx.track.sync", str(folder.parent)],
        env=settings(folder, url),
        capture_output=True,
        text=True,
        timeout=GUARD_SECONDS,
    )


def offline_run(folder: Path, last_step: int) -> dict[str, bytes]:
    """A run without a network, and its files as it has written them."""
    folder.parent.mkdir()
    run_program(folder, last_step=last_step)
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def go_back(folder: Path, whole: dict[str, bytes], step: int) -> None:
    """Leave of the run's files what was there at a step."""
    for name, text in whole.items():
        lines = [line for line in text.splitlines(keepends=True) if json.loads(line)["step"] <= step]
        lines = [line for line in lines if json.loads(line).get("kind") != "end"]
        (folder / name).write_bytes(b"".join(lines))


def test_a_run_is_brought_as_it_grows_and_no_step_twice(folder: Path) -> None:
    whole = offline_run(folder, 12)
    with WandbDouble() as server:
        for step in (5, 9):
            go_back(folder, whole, step)
            assert bring(folder, server.url).returncode == 0
            (run,) = server.runs.values()
            assert steps(run.history) == list(range(1, step + 1))
        # Nothing is new.
        assert bring(folder, server.url).stdout == ""
        # No network: it waits for the next round.
        for name, text in whole.items():
            (folder / name).write_bytes(text)
        refused = bring(folder, dead_url())
        assert refused.returncode == 1 and "1 run(s) are waiting" in refused.stdout
        assert "Traceback" not in refused.stderr
        assert bring(folder, server.url).returncode == 0
    assert list(folder.glob("wandb/offline-run-*/*.wandb.synced")), "`wandb sync` passes over it"
    (run_id,) = server.runs
    assert run_id == (folder / "wandb_run_id").read_text().strip()
    assert steps(run.history) == [line["step"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert run.exit_codes == [1, 1, 0]
    assert run.config["model"]["value"] == {"hidden_size": 8}
    assert KEY.encode() not in (folder / "wandb" / "task.json").read_bytes()


@pytest.mark.slow
def test_the_loop_goes_on_until_it_is_asked_to_end(folder: Path) -> None:
    whole = offline_run(folder, 6)
    with WandbDouble() as server:
        go_back(folder, whole, 3)
        loop = subprocess.Popen(
            [str(ROOT / "slurm" / "wandb-sync.sh"), str(folder.parent)],
            env=settings(folder, server.url) | {"BIGTX_SYNC_SECONDS": "0.1"},
        )

        def wait_for_steps(last: int) -> None:
            deadline = time.monotonic() + GUARD_SECONDS
            while time.monotonic() < deadline:
                runs: list[Any] = list(server.runs.values())
                if runs and steps(runs[0].history) == list(range(1, last + 1)):
                    return
                time.sleep(0.05)
            raise AssertionError([steps(run.history) for run in server.runs.values()])

        try:
            wait_for_steps(3)
            for name, text in whole.items():
                (folder / name).write_bytes(text)
            wait_for_steps(6)
            loop.send_signal(signal.SIGTERM)
            assert loop.wait(GUARD_SECONDS) == 0
        finally:
            loop.kill()
