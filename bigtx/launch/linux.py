"""Calls to the Linux kernel for related processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of prctl(2)."""


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Have the kernel send this process a signal when its parent ends.

    Args:
        number: the signal.
        parent: the process id that the parent must have now; the signal is sent at once where the parent is gone.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Make this process the parent of all processes below it whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[int]:
    """Return the processes below this one.

    Processes that began their own session, as daemons do, and their children are left out.
    """
    session = os.getsid(0)
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = [pid for pid in _children(waiting.pop()) if _session_of(pid) == session]
        found += below
        waiting += below
    return found


def set_name(name: str) -> None:
    """Name this process for ps and top; the kernel keeps 15 bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def out_of_memory_kills() -> int:
    """Count the processes that the kernel ended when memory ran out, in this container or since the machine started."""
    for path, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            lines = (line.split() for line in Path(path).read_text().splitlines())
            return next(int(words[1]) for words in lines if words[0] == key)
    return 0


def _session_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Another system, or another C library.
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
