"""This process's place among those of a run, as the launcher wrote it into the environment. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What asks a run to stop; SIGHUP is the end of its terminal or of the connection to it."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those of `STOP_SIGNALS` that this process listens to: a SIGHUP that is ignored at the start, as `nohup` and
    `disown -h` have it, stays ignored."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignores_hangup)


def rank() -> int:
    """This process's rank over all nodes; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its own node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share_cores() -> None:
    """Let OpenMP's threads sleep soon when they wait; call it before torch is imported.

    By default they spin for milliseconds, and where other programs want the same cores, that takes most of the time:
    on two busy cores, passes of a small network were 4 to 14 times slower. What the environment says goes first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # About 20 microseconds.


def launcher_name() -> str:
    """Who started this process: deepspeed, torchrun, another launcher that set RANK, or plain python."""
    if "RANK" not in os.environ:
        return "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # Set by deepspeed/launcher/launch.py and by no other launcher.
    if "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
        return "deepspeed"
    return "a launcher that set RANK and WORLD_SIZE"


def start_of(pid: int) -> str | None:
    """When a process of this host started: the boot's id and clock ticks since then; None if it is gone.

    With it an id names a process for good: ids are used again.
    """
    try:
        # The name in parentheses may hold anything; what follows it are fields 3 (state) and on of proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let requests to stop end the process on the spot, for C++ code that waits and hears of no Python handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
