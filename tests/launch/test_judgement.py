"""Which ranks hang, by what is known of all of them, and what is said of it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bigtx.launch import watchdog
from bigtx.launch.watchdog import Sight, Watchdog, describe, judge
from bigtx.utils import heartbeat
from bigtx.utils.heartbeat import Beat, Phase


def sight(
    rank: int,
    marks: int = 40,
    *,
    phase: Phase = Phase.FORWARD,
    still: float = 0.0,
    state: str = "S",
    collective: str = "",
    stuck: bool = False,
    on_gpu: bool = False,
) -> Sight:
    return Sight(
        rank,
        Beat(9, phase, 200 - rank, 9, marks),
        still,
        state,
        collective,
        "model/layers.py:7 in forward",
        stuck,
        on_gpu,
    )


WAITING = [sight(0, collective="all_reduce", still=70), sight(2, collective="barrier", still=70)]


@pytest.mark.parametrize(
    ("sights", "waited", "culprits"),
    [
        ([sight(0), sight(1)], False, None),
        ([sight(0, still=59, state="T"), sight(1)], False, None),
        ([sight(0, still=60, state="T"), sight(1)], False, [0]),
        ([sight(0, still=10, state="T"), sight(1, phase=Phase.TIMED_OUT, state="")], True, [0]),
        (WAITING, False, None),  # The time-out of the collectives decides.
        ([*WAITING, sight(1, 38, stuck=True, still=60)], False, [1]),
        ([*WAITING, sight(1, 40, stuck=True, still=60)], False, [1]),
        ([*WAITING, sight(1, 38, still=30)], True, [1]),  # It works, and is too slow.
        (WAITING, True, []),
        # All wait for their GPUs at the same place: a kernel of any of them, or the network.
        ([sight(0, stuck=True, still=60, on_gpu=True), sight(1, still=59, on_gpu=True)], False, []),
        ([sight(0, stuck=True, still=60, on_gpu=True)], False, []),
        # One is not in a wait for its GPU, or is behind.
        ([sight(0, stuck=True, still=60, on_gpu=True), sight(1, still=20)], False, [1]),
        ([sight(0, stuck=True, still=60, on_gpu=True), sight(1, 38, still=20, on_gpu=True)], False, [1]),
        ([sight(0, 38, stuck=True, still=60, on_gpu=True), *WAITING[1:]], False, [0]),
        # On a GPU all wait for the device. The one that is behind is the cause.
        ([sight(0, 44, stuck=True, still=60), sight(1, 42, stuck=True, still=61), sight(2, 44)], False, [1]),
        ([sight(0, 44, stuck=True, still=60), sight(1, 44, stuck=True, still=61)], False, [0, 1]),
        # A rank that was ended by its time-out is behind nobody.
        ([sight(0, 40, state=""), sight(1, 41, phase=Phase.DATA)], True, [1]),
        ([sight(0, 40, collective="wait", stuck=True, still=99)], False, None),
    ],
)
def test_who_hangs(sights: list[Sight], waited: bool, culprits: list[int] | None) -> None:
    found = judge(sights, 60.0, waited=waited)
    assert (None if found is None else [each.rank for each in found]) == culprits


@pytest.mark.parametrize(
    ("culprit", "words"),
    [
        (sight(1, state="T"), "rank 1 on n7 is stopped in step 9, in the forward pass: no progress within 60 s"),
        (sight(1, state="D"), "blocked in the kernel (state D)"),
        (sight(1, phase=Phase.DATA), "waiting for data: no progress within 60 s (engine.timeout); its data do not"),
        (sight(1, stuck=True), "it is in a call at model/layers.py:7 in forward that does not return"),
        (sight(1), "and has not reached the collective in which the others wait"),
        (sight(1, stuck=True, on_gpu=True), "it waits for its GPU at model/layers.py:7 in forward: a kernel that does"),
    ],
)
def test_a_rank_that_hangs_is_described(culprit: Sight, words: str) -> None:
    lines = describe([culprit], [WAITING[0], culprit], "n7", 60.0).split("\n")
    assert words in lines[0] and lines[1:] == ["  rank 0 waited for it in all_reduce (in step 9)"]


def test_ranks_that_all_wait_are_described() -> None:
    lines = describe([], [*WAITING, sight(3, phase=Phase.TIMED_OUT)], "n7", 60.0).split("\n")
    assert lines[0].startswith("all ranks on n7 wait for each other or for another machine in step 9")
    assert lines[1:] == [
        "  rank 0 waited for it in all_reduce (in step 9)",
        "  rank 2 waited for it in barrier (in step 9)",
        "  rank 3 waited for it until the time-out (in step 9)",
    ]


def test_gpus_that_all_wait_are_described() -> None:
    stuck = [sight(rank, stuck=True, still=60, on_gpu=True) for rank in (0, 1)]
    lines = describe([], stuck, "n7", 60.0).split("\n")
    assert lines[0].startswith(
        "the GPUs of ranks 0, 1 on n7 do not finish their work in step 9 within 60 s (engine.timeout): a kernel"
    )
    assert lines[1:] == [
        f"  rank {rank} waited for its GPU at model/layers.py:7 in forward (in step 9)" for rank in (0, 1)
    ]
    assert describe([], stuck[:1], "n7", 60.0).startswith(
        "the GPU of rank 0 on n7 does not finish its work in step 9 within 60 s"
    )


class Machine:
    """A watchdog whose seconds pass as the test says, and processes that do what the test says."""

    def __init__(self, run_dir: Path, count: int, timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 20.0)
        self.watchdog = Watchdog(count, timeout, run_dir)
        self.pids: list[int] = []

    def start(self, act: Callable[[], None]) -> None:
        place = len(self.pids)
        ready = os.memfd_create("ready")
        pid = os.fork()
        if not pid:
            self.watchdog.adopt_self(place)
            act()
            os.write(ready, b"1")
            _wait_long()
        self.pids.append(pid)
        self.watchdog.watch(place, pid)
        while not os.fstat(ready).st_size:
            time.sleep(0.01)
        os.close(ready)

    def pass_(self, seconds: int) -> watchdog.Verdict | None:
        """Let the supervisor look each second."""
        verdict = None
        for _ in range(seconds):
            self.watchdog._last = time.monotonic() - 1.0
            verdict = verdict or self.watchdog.look()
            time.sleep(0.05)
        return verdict


def _wait_long() -> None:
    time.sleep(600)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path, 2, 10.0, monkeypatch)
    yield made
    for pid in made.pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def marks(*phases: Phase, steps: int = 2) -> Callable[[], None]:
    def act() -> None:
        for step in range(1, steps + 1):
            for phase in phases:
                heartbeat.beat(phase, step if phase == phases[0] else None)

    return act


def test_a_hung_process_is_found_and_its_stack_is_written(machine: Machine) -> None:
    machine.start(marks(Phase.DATA, Phase.FORWARD))
    machine.start(marks(Phase.DATA, Phase.FORWARD, Phase.AGREEING))
    assert machine.pass_(9) is None
    verdict = machine.pass_(2)
    assert verdict is not None and verdict.culprits == (0,) and verdict.progress == 4
    assert "in step 2, in the forward pass" in verdict.text and "in _wait_long" in verdict.text
    folder = machine.watchdog._run_dir / "logs" / "stacks"
    for rank in (0, 1):
        text = (folder / f"rank-{rank:05d}.txt").read_text()
        assert "in _wait_long" in text and "State:\tS (sleeping)" in text


def test_a_stopped_process_is_found_in_any_phase(machine: Machine) -> None:
    machine.start(marks(Phase.STARTING))
    machine.start(marks(Phase.STARTING))
    assert machine.pass_(5) is None
    os.kill(machine.pids[1], signal.SIGSTOP)
    os.waitid(os.P_PID, machine.pids[1], os.WSTOPPED | os.WNOWAIT)
    verdict = machine.pass_(6)
    assert verdict is not None and verdict.culprits == (1,) and "state T" in verdict.text
    text = (machine.watchdog._run_dir / "logs" / "stacks" / "rank-00001.txt").read_text()
    assert "State:\tT (stopped)" in text


def test_a_process_whose_supervisor_was_stopped_itself_is_not_accused(machine: Machine) -> None:
    machine.start(marks(Phase.DATA, Phase.FORWARD))
    machine.watchdog._last = time.monotonic() - 86_400.0
    assert machine.watchdog.look() is None
    machine.watchdog._last = time.monotonic() - 86_400.0
    assert machine.watchdog.look() is None


def test_a_rank_that_nccl_ended_has_waited(tmp_path: Path) -> None:
    dog = Watchdog(1, 60.0, tmp_path)
    dog.watch(0, 999_999_999)
    dog._ranks[0].vigil.still = 58.0
    assert dog.has_waited(0, -signal.SIGABRT) and not dog.has_waited(0, -signal.SIGKILL)
    dog._ranks[0].vigil.still = 3.0
    assert not dog.has_waited(0, -signal.SIGABRT)
    assert Watchdog(1, math.inf, tmp_path).interval == 3600.0 and dog.interval == 1.0


def test_stacks_are_not_requested_again_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the file would begin in the middle of the first answer, and look complete."""
    asked: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(number))
    watcher = Watchdog(1, 60.0, tmp_path)
    watcher.watch(0, os.getpid())
    (watched,) = watcher._ranks
    watcher._ask(watched)
    os.write(watched.stacks, b'Current thread 0x1 (most recent call first):\n  File "a.py", line 1 in compute\n')
    watcher._ask(watched)
    os.write(watched.stacks, b'  File "a.py", line 9 in <module>\n')
    assert len(asked) == 1 and "in compute" in watchdog._await(watched, 0.0)
    watcher._ask(watched)
    assert len(asked) == 2 and watchdog._await(watched, 0.0) == ""
