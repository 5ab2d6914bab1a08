"""What a rank does when the launcher that started it is killed.

The launchers of DeepSpeed and torchrun leave their ranks behind when they are killed, and some signals kill them that a
rank would take as a request to stop. So each rank watches the launchers above it: when one of them is gone, it takes
that as SIGTERM, and all ranks save a checkpoint and end.
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
"""What the command line of a launcher holds."""
SECONDS_BETWEEN_LOOKS = 0.5


def watch_launchers() -> None:
    """Send this process SIGTERM once a launcher above it is gone, from a thread of its own."""
    launchers = {pid: start_of(pid) for pid in _launchers_above(os.getpid())}
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), daemon=True).start()


def _watch(launchers: dict[int, str | None]) -> None:
    while all(start is not None and start_of(pid) == start for pid, start in launchers.items()):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def _launchers_above(pid: int) -> list[int]:
    """The unbroken line of launchers that leads down to a process."""
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
