"""Find ranks of this machine that hang, and say what the others wait for.

Each rank writes beats to shared memory (see `bigtx.utils.heartbeat`), which the supervisor compares about once a
second. A rank without a beat for half of `engine.timeout` is asked for its stacks, which cost it about a millisecond.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigtx.utils import heartbeat
from bigtx.utils.hardware import host_name
from bigtx.utils.heartbeat import STACKS, Beat, Phase, Vigil
from bigtx.utils.processes import STACKS_SIGNAL

ANSWER_SECONDS = 2.0
"""How long the ranks may take to write their stacks."""
LAST_LINES = ("in <module>", "in _run_module_as_main", "...")
"""Ends of the stack of a main thread, which is the last one; faulthandler writes dots after 100 frames."""
STOPPED, BLOCKED = "T", "D"


@dataclass(frozen=True)
class Sight:
    """What is known about a rank.

    Attributes:
        rank: its number.
        beat: its last beat.
        still: seconds without a beat.
        state: the state of its process by proc(5); "" after its end.
        collective: the collective in which it waits; "" without one.
        place: where its main thread is; "" where that is unknown.
        is_stuck: whether it hangs, judged by itself.
        is_on_gpu: whether its main thread waits for its GPU.
    """

    rank: int
    beat: Beat
    still: float = 0.0
    state: str = "S"
    collective: str = ""
    place: str = ""
    is_stuck: bool = False
    is_on_gpu: bool = False

    @property
    def waits(self) -> bool:
        """Return whether it waits for other ranks, or has waited for them until its end."""
        return bool(self.collective) or self.beat.phase == Phase.TIMED_OUT


@dataclass(frozen=True)
class Verdict:
    """Why a run is ended.

    Attributes:
        text: the message for the user, without the advice.
        culprits: the ranks that the others wait for; empty if all wait.
        progress: phases begun by the rank that has begun the fewest; of several machines the smallest number counts.
    """

    text: str
    culprits: tuple[int, ...]
    progress: int


def judge(sights: Sequence[Sight], timeout: float, *, waited: bool = False) -> list[Sight] | None:
    """Return the ranks that hang.

    Args:
        sights: the ranks of this machine.
        timeout: seconds of `engine.timeout`.
        waited: whether a rank has waited for the others until the time-out.

    Returns:
        None if no rank hangs; an empty list if all of them wait for others, or may do so on their GPUs.
    """
    stopped = [sight for sight in sights if sight.state == STOPPED]
    is_late = any(sight.still >= timeout for sight in stopped)
    if not (waited or is_late or any(sight.is_stuck and not sight.waits for sight in sights)):
        return None
    if stopped:
        return stopped
    left = [sight for sight in sights if sight.state and not sight.waits]
    # All ranks pass the same marks, so the one that has passed the fewest is the one that the others wait for.
    behind = [sight for sight in left if sight.beat.marks == min(other.beat.marks for other in left)]
    # Of ranks that have passed the same marks, those that wait for their GPUs may wait there for the others.
    on_host = [sight for sight in behind if not sight.is_on_gpu]
    are_alike = all(sight in behind for sight in sights if sight.state)
    return on_host or ([] if are_alike else behind)


def describe(culprits: Sequence[Sight], sights: Sequence[Sight], host: str, timeout: float) -> str:
    """Return in words what hangs, where and in which step, and what the other ranks do.

    Args:
        culprits: the result of `judge`.
        sights: the ranks of this machine.
        host: its name.
        timeout: seconds of `engine.timeout`.
    """
    limit = f"{timeout:,g} s (engine.timeout)"
    step = _step(max((sight.beat for sight in sights), default=Beat(0, Phase.STARTING, 0)))
    if not culprits and (waiting := [sight.rank for sight in sights if sight.is_on_gpu]):
        gpus, do, their = ("GPU of rank", "does", "its") if len(waiting) == 1 else ("GPUs of ranks", "do", "their")
        lines = [
            f"the {gpus} {', '.join(map(str, waiting))} on {host} {do} not finish {their} work {step} within {limit}: "
            "a kernel that does not end, or a collective that another rank or the network does not complete"
        ]
    elif not culprits:
        lines = [
            f"all ranks on {host} wait for each other or for another machine {step}, and have not got an answer "
            f"within {limit}: the network, or ranks that wait in different collectives"
        ]
    else:
        lines = [_describe_culprit(sight, host, limit) for sight in culprits]
    for sight in sights:
        if sight not in culprits:
            lines.append(f"  rank {sight.rank} {_waiting(sight)} ({_step(sight.beat)})")
    return "\n".join(lines)


def _describe_culprit(sight: Sight, host: str, limit: str) -> str:
    """Return a sentence about a rank that hangs."""
    place = f" at {sight.place}" if sight.place else ""
    verb = "hangs"
    if sight.state == STOPPED:
        verb, why = "is stopped", "its process has the state T, which SIGSTOP, Ctrl-Z or a debugger causes"
    elif sight.state == BLOCKED:
        why = "its process is blocked in the kernel (state D): a disk or a network file system does not answer"
    elif sight.beat.phase == Phase.DATA:
        why = f"its data do not arrive{place}"
    elif sight.is_on_gpu:
        why = f"it waits for its GPU{place}: a kernel that does not end, or a collective"
    elif sight.is_stuck:
        why = f"it is in a call{place} that does not return: a kernel, the device, a file or a lock"
    else:
        why = f"it is{place or ' somewhere'}, and has not reached the collective in which the others wait"
    doing = f"{_step(sight.beat)}, {sight.beat.phase.words}"
    return f"rank {sight.rank} on {host} {verb} {doing}: no progress within {limit}; {why}"


def _waiting(sight: Sight) -> str:
    if sight.beat.phase == Phase.TIMED_OUT:
        return "waited for it until the time-out"
    if sight.is_on_gpu:
        return f"waited for its GPU at {sight.place}"
    return f"waited for it in {sight.collective}" if sight.collective else f"was {sight.beat.phase.words}"


def _step(beat: Beat) -> str:
    return f"in step {beat.step:,}" if beat.step else "before the first step"


@dataclass
class _Watched:
    rank: int
    pid: int
    place: int
    stacks: int
    vigil: Vigil = field(default_factory=Vigil)
    has_ended: bool = False
    asked_at: float = -math.inf
    text: str = ""


class Watchdog:
    """The heartbeats of this machine's ranks."""

    def __init__(self, num_local: int, timeout: float, run_dir: Path) -> None:
        """Make the memory that the ranks share; call this before they are forked.

        Args:
            num_local: ranks of this machine.
            timeout: seconds of `engine.timeout`.
            run_dir: the run folder.
        """
        self._board = heartbeat.new_board(num_local)
        self._files = [os.memfd_create(f"stacks-{place}") for place in range(num_local)]
        for file in self._files:
            # Stacks that are written while the file is emptied must not leave a gap of zeros.
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
        self._timeout, self._run_dir = timeout, run_dir
        self._ranks: list[_Watched] = []
        self._last = time.monotonic()
        self.interval = heartbeat.interval_of(timeout) if timeout < math.inf else 3600.0

    def adopt_self(self, place: int) -> None:
        """Make this process the rank at a place: call this in the fork."""
        heartbeat.beat_on(self._board, place, self._files[place])

    def watch(self, rank: int, pid: int) -> None:
        """Watch the next rank; call this after the fork."""
        place = len(self._ranks)
        self._ranks.append(_Watched(rank, pid, place, self._files[place]))

    def end(self, rank: int) -> Beat:
        """Note that a rank has ended. Returns its last beat."""
        watched = self._find(rank)
        watched.has_ended = True
        watched.vigil.note(heartbeat.read_beat(self._board, watched.place), 0.0)
        return watched.vigil.beat

    def has_waited(self, rank: int, status: int | None) -> bool:
        """Return whether a rank that ended with this status has waited for others until the time-out.

        The thread of NCCL that notices the time-out aborts the process, so the rank itself cannot report it.
        """
        vigil = self._find(rank).vigil
        is_aborted = status == -signal.SIGABRT and vigil.still >= 0.9 * self._timeout
        return vigil.beat.phase == Phase.TIMED_OUT or is_aborted

    def look(self) -> Verdict | None:
        """Compare the beats, about once an interval. Returns a verdict if a rank hangs."""
        passed = time.monotonic() - self._last
        if passed < self.interval / 2:
            return None
        self._last += passed
        passed = min(passed, 2 * self.interval)  # This process may have been stopped itself.
        for watched in self._running():
            watched.vigil.note(heartbeat.read_beat(self._board, watched.place), passed)
            if watched.vigil.needs_place(self._timeout):
                watched.vigil.note_place(self._place_of(watched), passed)
                self._ask(watched)
        return self._conclude(waited=False) if any(map(self._is_suspect, self._running())) else None

    def explain(self) -> Verdict:
        """Return what a rank has waited for until the time-out."""
        verdict = self._conclude(waited=True)
        assert verdict is not None
        return verdict

    def _find(self, rank: int) -> _Watched:
        return next(watched for watched in self._ranks if watched.rank == rank)

    def _running(self) -> list[_Watched]:
        return [watched for watched in self._ranks if not watched.has_ended]

    def _is_suspect(self, watched: _Watched) -> bool:
        is_stopped = watched.vigil.still >= self._timeout and heartbeat.state_of(watched.pid) == STOPPED
        return is_stopped or (watched.vigil.is_stuck(self._timeout) and not heartbeat.collective_in(watched.text))

    def _place_of(self, watched: _Watched) -> str:
        """Return where the main thread was at the last look, by the stacks that were requested then."""
        watched.text = _read(watched.stacks)
        written = heartbeat.written_bytes(watched.pid) if watched.vigil.beat.phase == Phase.SAVING else ""
        return heartbeat.main_thread(watched.text) + written

    def _ask(self, watched: _Watched) -> None:
        """Request the stacks of a rank, which it writes once it runs, unless it may still be writing an answer."""
        is_recent = time.monotonic() - watched.asked_at < ANSWER_SECONDS
        if is_recent and not _is_complete(_read(watched.stacks)):
            return
        if heartbeat.state_of(watched.pid) not in ("", STOPPED):
            watched.asked_at = time.monotonic()
            os.ftruncate(watched.stacks, 0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(watched.pid, STACKS_SIGNAL)

    def _conclude(self, *, waited: bool) -> Verdict | None:
        """Collect the stacks of all ranks, and judge."""
        for watched in self._running():
            self._ask(watched)
        deadline = time.monotonic() + ANSWER_SECONDS
        for watched in self._running():
            watched.text = _await(watched, deadline) or watched.text
        sights = [self._sight(watched) for watched in self._ranks]
        culprits = judge(sights, self._timeout, waited=waited)
        if culprits is None:
            return None
        self._write_stacks()
        numbers = tuple(sight.rank for sight in culprits)
        progress = min((sight.beat.marks for sight in culprits or sights), default=0)
        return Verdict(describe(culprits, sights, host_name(), self._timeout), numbers, progress)

    def _sight(self, watched: _Watched) -> Sight:
        vigil, state = watched.vigil, "" if watched.has_ended else heartbeat.state_of(watched.pid)
        return Sight(
            watched.rank,
            heartbeat.read_beat(self._board, watched.place),
            vigil.still,
            state,
            heartbeat.collective_in(watched.text),
            heartbeat.place_in(watched.text, vigil.beat.phase),
            vigil.is_stuck(self._timeout),
            heartbeat.waits_for_gpu(watched.text),
        )

    def _write_stacks(self) -> None:
        """Write the stacks of the ranks that run to the run folder; those that have waited write their own."""
        folder = self._run_dir / STACKS
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            for watched in self._running():
                if heartbeat.read_beat(self._board, watched.place).phase == Phase.TIMED_OUT:
                    continue
                text = f"{watched.text}\n{heartbeat.kernel_stack_of(watched.pid)}"
                (folder / f"rank-{watched.rank:05d}.txt").write_text(text)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def _is_complete(stacks: str) -> bool:
    return stacks.rstrip().endswith(LAST_LINES)


def _await(watched: _Watched, deadline: float) -> str:
    """Return a rank's stacks once they are complete, or the part that is written at the deadline."""
    while not _is_complete(text := _read(watched.stacks)):
        if heartbeat.state_of(watched.pid) in ("", STOPPED) or time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    return text
