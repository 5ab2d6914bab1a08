"""Who builds an extension: real processes, with torch's own lock and with ours, and kill -9."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime import bf16_optimizer
from doors import TINY, pretrain
from torch.utils.file_baton import FileBaton

from bigtx.engine import builds
from bigtx.engine.builds import Turn

HOLD = """
import sys, time
from pathlib import Path
if sys.argv[2] == "ours":
    from bigtx.engine.builds import Turn as Baton
else:
    from torch.utils.file_baton import FileBaton as Baton
baton = Baton(sys.argv[1])
assert baton.try_acquire()
print("holds", flush=True)
sys.stdin.read()
baton.release()
"""
GUARD_SECONDS = 120


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(builds, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(builds, "SAY_SECONDS", 0.1)
    folder = tmp_path / "pin_memory"
    folder.mkdir()
    return folder / "lock"


def holder(lock: Path, whose: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock), whose], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


class Waiter(threading.Thread):
    """A second start, which wants the same extension."""

    def __init__(self, lock: Path) -> None:
        super().__init__(daemon=True)
        self.turn, self.builds = Turn(str(lock)), None
        self.start()

    def run(self) -> None:
        self.builds = self.turn.try_acquire()  # type: ignore[assignment]

    def answer(self) -> bool | None:
        self.join(GUARD_SECONDS)
        return self.builds


@pytest.mark.parametrize("whose", ["torch's", "ours"])
def test_the_lock_of_a_killed_build_is_taken_over(lock: Path, whose: str) -> None:
    process = holder(lock, whose)
    process.kill()
    process.wait()
    assert lock.exists()
    waiter = Waiter(lock)
    assert waiter.answer() is True
    waiter.turn.release()
    assert not lock.exists()


@pytest.mark.parametrize("whose", ["torch's", "ours"])
def test_a_build_that_goes_on_is_waited_for_and_used(
    lock: Path, whose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holder(lock, whose)
    waiter = Waiter(lock)
    shown, deadline = "", time.monotonic() + GUARD_SECONDS
    while "waiting for another process that builds pin_memory" not in shown and time.monotonic() < deadline:
        shown += capsys.readouterr().out
        time.sleep(0.02)
    assert str(lock) in shown and waiter.is_alive() and lock.exists()
    process.communicate("")
    assert waiter.answer() is False


@pytest.mark.parametrize("whose", ["torch's", "ours"])
def test_who_waits_builds_when_the_builder_is_killed(lock: Path, whose: str) -> None:
    process = holder(lock, whose)
    waiter = Waiter(lock)
    process.kill()
    process.wait()
    assert waiter.answer() is True
    waiter.turn.release()


def test_of_many_one_builds_at_a_time(lock: Path) -> None:
    lock.touch()  # Of a start that was killed yesterday.
    log = lock.parent / "log"
    program = (
        "import sys, time\nfrom bigtx.engine.builds import Turn\n"
        "turn, log = Turn(sys.argv[1]), open(sys.argv[2], 'a')\n"
        "if turn.try_acquire():\n"
        "    print('begin', file=log, flush=True); time.sleep(0.3); print('end', file=log, flush=True); turn.release()"
    )
    starts = [subprocess.Popen([sys.executable, "-c", program, str(lock), str(log)]) for _ in range(4)]
    assert [process.wait(GUARD_SECONDS) for process in starts] == [0] * 4
    lines = log.read_text().split()
    assert lines == ["begin", "end"] * (len(lines) // 2) and lines and not lock.exists()


def test_on_a_network_file_system_a_quiet_folder_is_nobodys(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "is_local", lambda path: False)
    lock.touch()
    with lock.open() as file:
        assert not builds.is_left_over(lock, file.fileno()), "another machine may build"
        old = time.time() - builds.QUIET_SECONDS - 10
        os.utime(lock, (old, old))
        assert builds.is_left_over(lock, file.fileno())
        (lock.parent / "part.o").touch()
        assert not builds.is_left_over(lock, file.fileno()), "another machine has just compiled a part"


def test_deepspeed_reports_no_memory_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its two reports for a group would collect garbage and print lines at the start."""
    monkeypatch.setattr(bf16_optimizer, "see_memory_usage", pytest.fail)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", deepspeed.ops.__compatible_ops__)
    builds.leave_out_unused()
    bf16_optimizer.see_memory_usage("before initializing group 1", force=True)


def test_torch_asks_us(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension, file_baton

    monkeypatch.setattr(file_baton, "FileBaton", FileBaton)
    monkeypatch.setattr(cpp_extension, "FileBaton", FileBaton)
    builds.take_turns()
    assert cpp_extension.FileBaton is Turn and file_baton.FileBaton is Turn


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_does_not_wait_for_a_lock_that_a_killed_one_left(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    lock = Path(_get_build_directory("pin_memory", verbose=False)) / "lock"
    lock.touch()
    settings = [
        *TINY,
        f"data.sources.a.path={corpus}",
        f"run_dir={tmp_path / 'run'}",
        "engine.offload_optimizer=cpu",
        "train.max_steps=2",
        "track.wandb=off",
    ]
    done = pretrain(*settings, ranks=2)
    assert done.returncode == 0, done.stderr
    assert list(lock.parent.glob("pin_memory*.so")) and not lock.exists()
