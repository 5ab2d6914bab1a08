"""Beats, and how long a rank has not moved."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from bigtx.utils import heartbeat
from bigtx.utils.heartbeat import Beat, Heart, Phase, Vigil

STACKS = """Thread 0x00007f (most recent call first):
  File "/x/bigtx/data/storage/remote.py", line 12 in fetch
  File "/x/bigtx/data/stream/loader.py", line 230 in _run

Current thread 0x00007e (most recent call first):
  File "/x/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/x/torch/distributed/distributed_c10d.py", line 3011 in all_reduce
  File "/x/bigtx/engine/ranks.py", line 117 in sum
  File "/x/bigtx/train/loop.py", line 130 in train

Thread 0x00007d (most recent call first):
  File "/x/threading.py", line 300 in wait
"""


def test_a_beat_is_read_from_the_board_of_another_process() -> None:
    board = heartbeat.new_board(3)
    if not (pid := os.fork()):
        heart = Heart(board, 1)
        heart.beat(Phase.DATA, 7)
        heart.beat(None, None)
        heart.beat(Phase.FORWARD, None)
        os._exit(0)
    os.waitpid(pid, 0)
    assert heartbeat.read_beat(board, 1) == Beat(7, Phase.FORWARD, 3, 1, 2)
    assert heartbeat.read_beat(board, 0) == heartbeat.read_beat(board, 2) == Beat(0, Phase.STARTING, 0, 0, 0)


def test_phases_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    heart = Heart(bytearray(64), 0)
    for phase, seconds in (
        (Phase.DATA, 2.0),
        (Phase.FORWARD, 3.0),
        (Phase.DATA, 5.0),
        (None, 1.0),
        (Phase.ENDING, 0.0),
    ):
        heart.beat(phase, None)
        now[0] += seconds
    assert heart.seconds[Phase.DATA] == 8.0 and heart.seconds[Phase.FORWARD] == 3.0
    assert heart.entries[Phase.DATA] == 2 and heart.entries[Phase.FORWARD] == 1


def vigil(phase: Phase, *places: str, begun: int = 2, count: int = 5) -> Vigil:
    """A rank that has made no beat since it was first seen, and was found at these places, one each second."""
    made = Vigil()
    made.note(Beat(4, phase, count, begun), 1.0)
    for place in places:
        made.note(Beat(4, phase, count, begun), 1.0)
        made.note_place(place, 1.0)
    return made


@pytest.mark.parametrize(
    ("phase", "places", "begun", "is_stuck"),
    [
        (Phase.FORWARD, "aaaaaaaa", 2, True),
        (Phase.FORWARD, "aaaaaaa", 2, False),  # 7 seconds of 8.
        (Phase.FORWARD, "bcdeaaaa", 2, True),
        (Phase.FORWARD, "bcdefaaa", 2, True),
        (Phase.FORWARD, "bcdefgaa", 2, False),  # It has moved 1 second ago.
        (Phase.FORWARD, "abababab", 2, False),  # It works.
        (Phase.FORWARD, "aaaaaaaa", 1, False),  # The first step may compile.
        (Phase.DATA, "aaaaaaaa", 1, True),
        (Phase.DATA, "abababab", 2, True),
        (Phase.SAVING, "aaaaaaaa", 2, True),
        (Phase.VALIDATION, "aaaaaaaa", 2, True),
        (Phase.LOGGING, "aaaaaaaa", 2, True),
        (Phase.STARTING, "aaaaaaaa", 0, False),
        (Phase.AGREEING, "aaaaaaaa", 2, False),
        (Phase.ENDING, "aaaaaaaa", 2, False),
    ],
)
def test_a_rank_hangs_without_a_beat_and_at_one_place(phase: Phase, places: str, begun: int, is_stuck: bool) -> None:
    seen = vigil(phase, *places, begun=begun)
    assert seen.still == len(places) and seen.is_stuck(8.0) == is_stuck


def test_a_beat_ends_the_suspicion() -> None:
    seen = vigil(Phase.FORWARD, *"aaaaaaaa")
    assert seen.needs_place(8.0) and seen.is_stuck(8.0)
    seen.note(Beat(4, Phase.FORWARD, 6, 2), 1.0)
    assert (seen.still, seen.same) == (0.0, 0.0) and not seen.needs_place(8.0)
    for _ in range(3):
        seen.note(Beat(4, Phase.FORWARD, 6, 2), 1.0)
    assert not seen.needs_place(8.0)
    seen.note(Beat(4, Phase.FORWARD, 6, 2), 1.0)
    assert seen.needs_place(8.0)


def test_what_stacks_show() -> None:
    assert heartbeat.collective_in(STACKS) == "all_reduce"
    assert heartbeat.collective_in(STACKS.replace("distributed_c10d", "other")) == ""
    own = '  File "/x/heartbeat.py", line 1 in wait_for_ranks\n  File "/x/optimizers.py", line 2 in _finish\n'
    assert heartbeat.collective_in(own) == "a collective"
    deep = STACKS.replace("  File", '  File "/x/hook.py", line 1 in hook\n' * 4 + "  File", 4)
    assert heartbeat.collective_in(deep) == ""
    assert heartbeat.main_thread(STACKS).splitlines()[1].endswith("in wrapper")
    alone = "\n".join(STACKS.splitlines()[5:9])  # As this process sees its own main thread.
    assert heartbeat.place_in(alone, Phase.FORWARD) == "distributed/c10d_logger.py:81 in wrapper"
    assert heartbeat.main_thread("") == "" and heartbeat.place_in("", Phase.DATA) == ""
    assert heartbeat.place_in(STACKS, Phase.FORWARD) == "distributed/c10d_logger.py:81 in wrapper"
    assert heartbeat.place_in(STACKS, Phase.DATA) == "storage/remote.py:12 in fetch"


def test_stacks_show_a_wait_for_a_gpu() -> None:
    """By the functions of torch and DeepSpeed, as they are installed; not by those of other threads."""
    waits = (torch.cuda.Event.synchronize, torch.cuda.Stream.synchronize, torch.cuda.synchronize)
    for function in (*waits, is_invalid_grad_norm, DeepSpeedZeroOptimizer.has_overflow):
        code = inspect.unwrap(function).__code__
        frame = f'  File "{code.co_filename}", line 1 in {code.co_name}\n'
        stack = f'{frame}  File "/x/bigtx/engine/optimizers.py", line 2 in __float__\n'
        assert heartbeat.waits_for_gpu(stack) and not heartbeat.collective_in(stack)
        assert not heartbeat.waits_for_gpu(f"Thread 0x01 (most recent call first):\n{stack}\n{STACKS}")
    assert not heartbeat.waits_for_gpu(STACKS) and not heartbeat.waits_for_gpu("")


def test_a_process_that_is_not_watched_from_outside_reports_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart = Heart(bytearray(64), 0)
    monkeypatch.setattr(heartbeat, "_heart", heart)
    reported: list[tuple[Vigil, str]] = []
    found = threading.Event()

    def report(seen: Vigil, stack: str) -> None:
        reported.append((seen, stack))
        found.set()

    end = heartbeat.watch_self(0.4, report)
    for _ in range(2):
        heartbeat.beat(Phase.DATA, 3)
    assert found.wait(30)  # This thread waits, as for data.
    end()
    assert reported[0][0].beat == Beat(3, Phase.DATA, 2, 2, 2)
    assert "in test_a_process_that_is_not_watched_from_outside_reports_itself" in reported[0][1]
    written = heartbeat.write_stacks(tmp_path / "logs", 4, "RuntimeError: x")
    assert written == tmp_path / "logs" / "rank-00004.txt" and written.read_text().startswith("RuntimeError: x\n")
    assert "test_heartbeat.py" in written.read_text()
    (tmp_path / "file").touch()
    assert heartbeat.write_stacks(tmp_path / "file", 0) is None


def test_a_stopped_process_is_seen_from_outside() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert heartbeat.state_of(process.pid) == "T"
    assert "State:\tT (stopped)" in heartbeat.kernel_stack_of(process.pid)
    process.kill()
    process.wait()
    assert heartbeat.state_of(process.pid) == "" == heartbeat.kernel_stack_of(process.pid)
