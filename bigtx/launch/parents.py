"""Stop a rank cleanly when the launcher that started it is killed.

When the launchers of DeepSpeed and torchrun are killed, their ranks keep running. Some signals kill a launcher that a
rank would handle as a request to stop. So each rank watches the launchers above it. When one of them is gone, the rank
sends itself SIGTERM, and all ranks save a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from bigtx.utils.processes import parent_of, start_of

LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed")
"""Words by which the command line of a launcher is recognized."""
SECONDS_BETWEEN_LOOKS = 0.5


def watch_launchers() -> None:
    """Start a thread that sends this process SIGTERM once a launcher above it is gone."""
    launchers = {pid: start_of(pid) for pid in _launchers_above(os.getpid())}
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), daemon=True).start()


def _watch(launchers: dict[int, str | None]) -> None:
    while all(start is not None and start_of(pid) == start for pid, start in launchers.items()):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def _launchers_above(pid: int) -> list[int]:
    """Return the launchers directly above a process: its parent, the parent's parent, and so on."""
    found: list[int] = []
    while (pid := parent_of(pid)) > 1 and _is_launcher(pid):
        found.append(pid)
    return found


def _is_launcher(pid: int) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # The program and the module that Python runs; what follows them are the run's own settings.
        return any(name in word for word in command[:4] for name in LAUNCHERS)
    return False
