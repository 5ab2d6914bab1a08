"""The heartbeat of this process: what it is doing, written to memory that a watchdog reads.

A beat has a number and no time. The watchdog measures by its own clock how long the number has not changed, so that
neither a changed clock nor a suspended machine looks like a rank that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import re
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from bigtx.utils.processes import STACKS_SIGNAL

STACKS = Path("logs", "stacks")
"""The folder of the ranks' stacks in the run folder."""
_RECORD = struct.Struct("=qqqqq")


class Phase(IntEnum):
    """What a rank is doing. The marks of all ranks follow each other in the same order."""

    def __new__(cls, number: int, words: str = "") -> Phase:
        """Make a phase; `words` say in messages what the rank is doing."""
        phase = int.__new__(cls, number)
        phase._value_, phase.words = number, words
        return phase

    words: str

    STARTING = 0, "in the start of the run"
    DATA = 1, "waiting for data"
    AGREEING = 2, "waiting for the other ranks"
    FORWARD = 3, "in the forward pass"
    BACKWARD = 4, "in the backward pass and the reduction of gradients"
    UPDATE = 5, "in the reduction of gradients and the optimizer"
    LOGGING = 6, "writing metrics"
    VALIDATION = 7, "in a validation"
    SAVING = 8, "saving a checkpoint"
    ENDING = 9, "in the end of the run"
    TIMED_OUT = 10, "waiting for another rank until the time-out"


JUDGED = frozenset(Phase) - {Phase.STARTING, Phase.AGREEING, Phase.ENDING, Phase.TIMED_OUT}
"""Phases in which a rank can be seen to hang without another rank that waits for it. In the others it may do one thing
for long, such as a build or a download, or it waits for other ranks itself."""


@dataclass(frozen=True, order=True)
class Beat:
    """The last beat of a rank.

    Attributes:
        step: the optimizer step that it is making; 0 before the first one.
        phase: what it is doing.
        count: beats so far.
        begun: steps begun in this start of the run.
        marks: phases begun so far, which are the same on all ranks; between them the numbers of beats may differ.
    """

    step: int
    phase: Phase
    count: int
    begun: int = 0
    marks: int = 0

    @property
    def is_judged(self) -> bool:
        """Return whether the rank can be seen to hang by itself: the first step may take long, as it compiles."""
        return self.phase in JUDGED and (self.phase == Phase.DATA or self.begun > 1)


Board = mmap.mmap | bytearray


def new_board(num_ranks: int) -> Board:
    """Return memory for the beats of this machine's ranks, which processes that are forked later share."""
    return mmap.mmap(-1, num_ranks * _RECORD.size)


def read_beat(board: Board, place: int) -> Beat:
    """Return a rank's last beat."""
    step, phase, *counts = _RECORD.unpack_from(board, place * _RECORD.size)
    return Beat(step, Phase(phase), *counts)


class Heart:
    """The beats of one rank.

    Attributes:
        step: the optimizer step that this rank is making.
        seconds: the time spent in each phase.
        entries: how often each phase began.
    """

    def __init__(self, board: Board, place: int) -> None:
        self.board, self.place = board, place
        self.seconds, self.entries = [0.0] * len(Phase), [0] * len(Phase)
        self.step, self._phase = 0, Phase.STARTING
        self._count, self._begun, self._marks = 0, 0, 0
        self._since = time.monotonic()

    def beat(self, phase: Phase | None, step: int | None) -> None:
        """Write that this rank makes progress; see `beat`."""
        self._count += 1
        if step is not None:
            self.step = step
            self._begun += 1
        if phase is not None:
            now = time.monotonic()
            self.seconds[self._phase] += now - self._since
            self.entries[phase] += 1
            self._phase, self._since = phase, now
            self._marks += 1
        record = (self.step, self._phase, self._count, self._begun, self._marks)
        _RECORD.pack_into(self.board, self.place * _RECORD.size, *record)


_heart = Heart(bytearray(_RECORD.size), 0)


def beat(phase: Phase | None = None, step: int | None = None) -> None:
    """Note that this rank makes progress; it takes one to two microseconds. Call it from the main thread.

    Args:
        phase: what begins now; None continues the phase.
        step: the optimizer step that begins now.
    """
    _heart.beat(phase, step)


def own_heart() -> Heart:
    """Return the beats of this process."""
    return _heart


def beat_on(board: Board, place: int, stacks: int) -> None:
    """Write later beats to a board, and the stacks of all threads to a file on `STACKS_SIGNAL`.

    Args:
        place: this rank's place on the board.
        stacks: the file's descriptor.
    """
    global _heart
    _heart = Heart(board, place)
    offer_stacks(stacks)


def offer_stacks(descriptor: int) -> None:
    """Write the stacks of all threads to a file on `STACKS_SIGNAL`; also where C code holds Python's lock."""
    faulthandler.register(STACKS_SIGNAL, file=descriptor, all_threads=True)


@dataclass
class Vigil:
    """How long a rank has not moved.

    Attributes:
        beat: its last beat.
        still: seconds without a beat.
        same: seconds in which its main thread was found at the same place each time.
    """

    beat: Beat = field(default_factory=lambda: Beat(0, Phase.STARTING, -1))
    still: float = 0.0
    same: float = 0.0
    _place: str | None = field(default=None, repr=False)

    def note(self, beat: Beat, seconds: float) -> None:
        """Note the beat that is on the board, so many seconds after the last call."""
        if beat.count == self.beat.count:
            self.still += seconds
        else:
            self.still, self.same, self._place = 0.0, 0.0, None
        self.beat = beat

    def note_place(self, place: str, seconds: float) -> None:
        """Note where the main thread is, so many seconds after the last call."""
        self.same = self.same + seconds if place == self._place else 0.0
        self._place = place

    def needs_place(self, timeout: float) -> bool:
        """Return whether it is time to look where the main thread is."""
        return self.still >= timeout / 2 and self.beat.is_judged

    def is_stuck(self, timeout: float) -> bool:
        """Return whether the rank hangs: without a beat for the time-out, and at one place for a quarter of it.

        A compilation or a long validation moves on in between. Data that do not come within the time-out are enough.
        """
        is_still = self.still >= timeout and self.beat.is_judged
        return is_still and (self.beat.phase == Phase.DATA or self.same >= timeout / 4)


def interval_of(timeout: float) -> float:
    """Return the seconds between two looks of a watchdog."""
    return min(1.0, timeout / 10)


_FRAME = re.compile(r'^  File "(.+)", line (\S+) in (.+)$', re.MULTILINE)
_THREADS = re.compile(r"\n\s*\n")
_COLLECTIVES = re.compile(r"torch/distributed/distributed_c10d\.py$")
_SYNCHRONIZE = re.compile(r"torch/cuda/(__init__|streams)\.py$")
_READS_OF_DEEPSPEED = frozenset({"is_invalid_grad_norm", "has_overflow"})
"""Functions of DeepSpeed that read a value from the device without a function of torch in Python."""
_NEAREST = 4
"""How many frames from the innermost one a function that waits may be."""


def main_thread(stacks: str) -> str:
    """Return the part of faulthandler's text about the thread that handled the signal, or the last part."""
    parts = [part for part in _THREADS.split(stacks.strip("\n")) if part.strip()]
    return next((part for part in parts if part.lstrip().startswith("Current thread")), parts[-1] if parts else "")


def collective_in(stacks: str) -> str:
    """Return the collective in which a thread waits, by the name of torch's function where it is known; "" if none
    does.
    """
    for thread in _THREADS.split(stacks):
        for path, _, function in _FRAME.findall(thread)[:_NEAREST]:
            if _COLLECTIVES.search(path):
                return str(function)
            if function == wait_for_ranks.__name__:
                return "a collective"
    return ""


def waits_for_gpu(stacks: str) -> bool:
    """Return whether the main thread waits for its GPU. Its own kernel may hang, or a collective that waits for another
    rank's GPU: the host cannot distinguish them.
    """
    return any(
        function in _READS_OF_DEEPSPEED or (function == "synchronize" and _SYNCHRONIZE.search(path))
        for path, _, function in _FRAME.findall(main_thread(stacks))[:_NEAREST]
    )


def wait_for_ranks(work: Any) -> None:
    """Wait for a collective that was begun with `async_op=True`. Stacks then show that the rank waits for others."""
    work.wait()


def place_in(stacks: str, phase: Phase) -> str:
    """Return where a rank is, as `FILE:LINE in FUNCTION`; of one that waits for data, where its reading thread is."""
    threads = _THREADS.split(stacks)
    reading = [thread for thread in threads if "stream/loader.py" in thread and " in _run" in thread]
    thread = reading[0] if phase == Phase.DATA and reading else main_thread(stacks)
    found = _FRAME.search(thread)
    return f"{'/'.join(Path(found[1]).parts[-2:])}:{found[2]} in {found[3]}" if found else ""


def write_stacks(folder: Path, rank: int, text: str = "") -> Path | None:
    """Write the stacks of all threads of this process to `rank-00000.txt` in a folder.

    Args:
        text: what comes first, such as the traceback of an error.

    Returns:
        The file; None if it cannot be written.
    """
    path = folder / f"rank-{rank:05d}.txt"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            stream.write(text + "\n" * bool(text))
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        return path
    return None


def written_bytes(pid: int | str) -> str:
    """Return how much a process has written so far, for comparison."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/io").read_text().partition("wchar:")[2].partition("\n")[0]
    return ""


def state_of(pid: int) -> str:
    """Return the state of a process as one letter of proc(5), such as T for a stopped one; "" if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].strip("ZX")
    return ""


def kernel_stack_of(pid: int) -> str:
    """Return what the kernel shows about a process from outside: its state, and where it waits."""
    text = ""
    for name in ("status", "wchan", "syscall", "stack"):
        with contextlib.suppress(OSError):
            text += f"/proc/{pid}/{name}:\n{Path(f'/proc/{pid}/{name}').read_text().rstrip()}\n\n"
    return text


def watch_self(timeout: float, report: Callable[[Vigil, str], None]) -> Callable[[], None]:
    """Start a thread that finds this process hanging by itself, for a rank that has no supervisor.

    Args:
        timeout: `engine.timeout` in seconds.
        report: called once with how long, and the main thread's stack; it ends the process.

    Returns:
        A function that ends the thread.
    """
    ended = threading.Event()

    def watch() -> None:
        vigil, interval = Vigil(), interval_of(timeout)
        last = time.monotonic()
        while not ended.wait(interval):
            now = time.monotonic()
            passed, last = min(now - last, 2 * interval), now
            vigil.note(read_beat(_heart.board, _heart.place), passed)
            if not vigil.needs_place(timeout):
                continue
            stack = _own_main_stack()
            vigil.note_place(stack + written_bytes("self") * (vigil.beat.phase == Phase.SAVING), passed)
            if vigil.is_stuck(timeout) and not collective_in(stack):
                report(vigil, stack)
                return

    threading.Thread(target=watch, name="bigtx-watchdog", daemon=True).start()
    return ended.set


def _own_main_stack() -> str:
    """Return the main thread's stack in faulthandler's form."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
        frame = frame.f_back
    return "\n".join(lines)
