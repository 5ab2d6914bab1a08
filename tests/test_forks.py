"""Forks for commands of bigtx behave as new interpreters do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from doors import environment, wait_for

PROGRAM = """
import json, os, signal, sys, tempfile, time
facts = {"arguments": sys.argv[1:], "folder": os.getcwd(), "value": os.environ.get("VALUE"), "name": __name__}
command = open("/proc/self/cmdline").read().strip("\\0").split("\\0")
facts |= {"session": os.getsid(0) == os.getpid(), "command": command, "temporary": tempfile.gettempdir()}
facts |= {"files": sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "imported": "torch" in sys.modules}
facts |= {"parts": "bigtx.pretraining.run" in sys.modules, "named": "bigtx.pretrain" in sys.modules}
print(json.dumps(facts), flush=True)
print("a problem", file=sys.stderr)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    print("ready", flush=True)
    time.sleep(600)
sys.exit(int(sys.stdin.read() or 0))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(forks, "ROOT", tmp_path)
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def call(program: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    return forks.run([sys.executable, str(program), *arguments], capture_output=True, text=True, **options)


def test_a_fork_is_like_a_new_interpreter(program: Path, tmp_path: Path) -> None:
    own = environment(VALUE="given", TMPDIR=str(tmp_path))
    done = call(program, "a b", "", cwd=tmp_path, env=own, input="3", start_new_session=True)
    facts = json.loads(done.stdout)
    assert facts.pop("imported") and facts.pop("parts"), "a fork of the process that has imported torch and bigtx"
    assert facts == {
        "arguments": ["a b", ""],
        "folder": str(tmp_path),
        "value": "given",
        "name": "__main__",
        "session": True,
        "command": [sys.executable, str(program), "a b"],
        "files": [0, 1, 2],
        "temporary": str(tmp_path),
        "named": False,
    }
    assert done.stderr == "a problem\n" and done.returncode == 3


def test_two_forks_share_nothing(program: Path) -> None:
    first, second = (call(program, "x", env=environment(VALUE=value), input=value) for value in ("1", "0"))
    assert (first.returncode, second.returncode) == (1, 0)
    assert '"value": "1"' in first.stdout and '"value": "0"' in second.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGINT, -2)])
def test_signals_and_statuses(program: Path, number: int, status: int) -> None:
    process = forks.start(
        [sys.executable, str(program), "wait"],
        stdout=-1,
        stderr=-1,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    assert process.stdout
    wait_for(lambda: "ready" in process.stdout.readline(), process)
    assert process.poll() is None
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == process.poll() == status
    assert errors.startswith("a problem")


@pytest.mark.parametrize("change", [{"PYTHONPATH": "/elsewhere"}, {"LD_PRELOAD": ""}, {"OMP_NUM_THREADS": "2"}])
def test_what_a_new_interpreter_reads_starts_one(program: Path, change: dict[str, str]) -> None:
    assert '"imported": false' in call(program, "x", env=environment(**change)).stdout


def test_a_command_that_takes_too_long_is_killed(program: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        call(program, "wait", env=environment(), timeout=0.5)
