"""Starting a command on all devices of this machine.

    bigtx-finetune ──▶ deepspeed launcher ──▶ launch.py ──▶ rank 0, rank 1, ...
         │                                                     ▲
         └───────────── requests to stop (SIGTERM, ...) ───────┘

DeepSpeed's launcher must not hear of a request to stop: the outer process would end and leave the ranks behind, the
inner one gives them 30 seconds, which a large save may exceed. So they run in a session of their own, which Ctrl-C in a
terminal does not reach, and a request goes to the ranks, who save and end; the launcher then ends with their status.
Should this process itself be killed, the ranks notice, save and end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bigtx.utils.processes import start_of, stop_signals

LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]
EXIT_LOST = 1
"""Where the launcher ended well while ranks lived on: it was killed."""
GRACE_SECONDS = 60.0
"""How long ranks may live on after their launcher, to save."""
STARTED_BY = "BIGTX_STARTED_BY"
"""The environment variable that tells ranks who started them: the process, and when that began."""


def launch_on_all_devices(module: str, arguments: Sequence[str]) -> int | None:
    """Start the DeepSpeed launcher for a module where this machine has several accelerators and nobody has done so.

    Returns:
        The exit status of the ranks, or None: this process is to do the work itself.
    """
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        if STARTED_BY in os.environ:
            threading.Thread(target=_stop_when_gone, args=os.environ[STARTED_BY].split(" ", 1), daemon=True).start()
        return None
    if torch.cuda.device_count() < 2:
        return None
    command = [*LAUNCHER, "--master_port", str(_free_port()), "--module", module, *arguments]
    return _Launch(command).wait()


class _Launch:
    """The launcher and the ranks below it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._asked: list[int] = []
        # Before the launcher is there, so that no request is lost.
        for number in stop_signals():
            signal.signal(number, lambda received, frame: self._asked.append(received))
        own = {STARTED_BY: f"{os.getpid()} {start_of(os.getpid())}"}
        self._launcher = subprocess.Popen(command, start_new_session=True, env={**os.environ, **own})
        self._ranks: dict[int, str | None] = {}
        self._told: set[int] = set()

    def wait(self) -> int:
        """Hand requests on until the launcher has ended, and let no rank outlive it."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._launcher.wait(timeout=0.2)
                break
            self._find_ranks()
            if self._asked:
                self._hand_on(self._asked[0])
        alive = self._living()
        if not alive and self._asked and not self._ranks:
            return 128 + self._asked[0]
        if not alive:
            return 128 - status if status < 0 else status
        self._end(alive)
        return status if status > 0 else EXIT_LOST

    def _find_ranks(self) -> None:
        """Those that the launcher has started: the first processes below it that know their rank."""
        for pid in _children_with_rank(self._launcher.pid):
            self._ranks.setdefault(pid, start_of(pid))

    def _hand_on(self, number: int) -> None:
        """Ask each rank once to stop."""
        for pid in self._living():
            if pid not in self._told:
                self._told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        if not self._ranks:
            # Nothing has begun: there is nothing to save.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGKILL)

    def _living(self) -> list[int]:
        return [pid for pid, start in self._ranks.items() if start is not None and start_of(pid) == start]

    def _end(self, ranks: list[int]) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + GRACE_SECONDS
            while (ranks := self._living()) and time.monotonic() < deadline:
                time.sleep(0.1)


def _stop_when_gone(pid: str, start: str) -> None:
    """Ask this rank to stop once the process that started all of them is gone."""
    while start_of(int(pid)) == start:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _children_with_rank(pid: int) -> list[int]:
    """The processes below one whose environment names a rank, without those below them."""
    found = []
    for child in _children(pid):
        found += [child] if _knows_its_rank(child) else _children_with_rank(child)
    return found


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    return []


def _knows_its_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any(entry.startswith(b"RANK=") for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
