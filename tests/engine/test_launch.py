"""`bigtx-finetune` on a machine that shows two devices: it starts the launcher, and hands on requests and statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from doors import ROOT, environment, last_step, rank_pids, read_lines, wait_for
from finetunes import RHYTHM, labelled, write_jsonl

pytestmark = pytest.mark.dist
# What a machine with two devices says; the ranks themselves find none and compute on the CPU.
PROGRAM = """
import sys, torch
import bigtx.engine.launch as launch
from bigtx.finetune import main
torch.cuda.device_count = lambda: 2
launch.LAUNCHER += ["--num_accelerators", "2"]
sys.exit(main())
"""


@contextmanager
def running(run_dir: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own; nothing of it is left behind."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *RHYTHM, f"run_dir={run_dir}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    try:
        yield process
    finally:
        process.kill()
        for pid in of_run(run_dir):
            os.kill(pid, signal.SIGKILL)


def of_run(run_dir: Path) -> list[int]:
    """All processes whose command line names the run folder, launchers too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"run_dir={run_dir}".encode() in command.split(b"\0"):
                found.append(int(entry.name))
    return found


def wait_until_none(run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    while of_run(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_run(run_dir) == []


@pytest.fixture
def arguments(decoder_base: Path, tmp_path: Path) -> list[str]:
    records = write_jsonl(tmp_path / "records.jsonl", labelled(64))
    return [
        f"base={decoder_base}",
        f"data.train=[{records}]",
        "train.max_steps=100000",
        "validation.every=100000 steps",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_request_to_stop_reaches_the_ranks(arguments: list[str], tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir, *arguments) as process:
        wait_for(lambda: last_step(run_dir) >= 3, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 75, out + err
        assert "deepspeed, 2 ranks" in out and "stopped at step" in out and "Traceback" not in out + err
        wait_until_none(run_dir)
    assert [event["status"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "end"] == ["stopped"]
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_an_error_of_the_user_is_told_once_and_is_the_status(arguments: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir, *arguments, "data.fields.label=nothing") as process:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, out + err
        assert (out + err).count("DataError: ") == 1 and "data.fields.label" in out + err
        wait_until_none(run_dir)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(arguments: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir, *arguments) as process:
        wait_for(lambda: last_step(run_dir) >= 3, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130, out + err
        assert "stopped at step" in out and "Traceback" not in out + err
        wait_until_none(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the command", "runner", "launch", "a rank"])
def test_a_killed_part_leaves_nothing_behind(arguments: list[str], tmp_path: Path, victim: str) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir, *arguments, "train.checkpoint_every=5 steps") as process:
        wait_for(lambda: last_step(run_dir) >= 6, process)
        pid = {"the command": process.pid, "a rank": rank_pids(run_dir)[-1]}.get(victim)
        pid = pid or next(pid for pid in of_run(run_dir) if f"launcher.{victim}" in command_of(pid))
        os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
        assert process.returncode != 0
        wait_until_none(run_dir)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
