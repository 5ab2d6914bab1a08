"""Turns at building an extension, where several ranks, runs or machines want the same one.

torch builds an extension (an operator of DeepSpeed that a setting asks for) at its first use, into a folder of its own
under TORCH_EXTENSIONS_DIR. A file `lock` there means that somebody builds; all others wait until it is gone. It says
not who made it, so after a kill it stays, and every later start waits for ever. Ours holds the operating system's lock
on that file, which ends with its process. Others that use torch alone still see the file, and we see theirs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from torch.utils import file_baton

from bigtx.utils.locks import is_local, open_or_make, try_lock
from bigtx.utils.log import say

QUIET_SECONDS = 600.0
"""A folder of a network file system in which nothing was written for so long is one that no machine builds in: each
file of an operator is compiled within a few minutes."""
POLL_SECONDS = 0.5
SAY_SECONDS = 5.0


class Turn:
    """What torch asks who may build, in place of its own `FileBaton`."""

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        """Args:
        lock_file_path: `lock` in the extension's folder; torch's other arguments say how its own waits.
        """
        self.path = Path(lock_file_path)
        self._descriptor = -1

    def try_acquire(self) -> bool:
        """Wait for a turn. Returns False where another process has built the extension in the meantime."""
        begin, said = time.monotonic(), False
        while True:
            try:
                descriptor, is_new = open_or_make(self.path)
            except FileNotFoundError:
                return False
            # Whoever finds the file without its lock looks at it for a moment.
            is_free = try_lock(descriptor) is not False
            if is_free and _is_same(descriptor, self.path) and (is_new or _stays(self.path, descriptor)):
                self._descriptor = descriptor
                return True
            os.close(descriptor)
            if not said and time.monotonic() - begin > SAY_SECONDS:
                said = True
                say(f"waiting for another process that builds {self.path.parent.name}; it has {self.path}")
            time.sleep(POLL_SECONDS)
            if not self.path.exists():
                return False

    def wait(self) -> None:
        """Do nothing: `try_acquire` has waited."""

    def release(self) -> None:
        """Let the others see that the extension is there."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self._descriptor)


def take_turns() -> None:
    """Have torch build its extensions in turns of ours."""
    file_baton.FileBaton = Turn  # type: ignore[assignment,misc]
    if builder := sys.modules.get("torch.utils.cpp_extension"):
        builder.FileBaton = Turn  # type: ignore[attr-defined]


def is_left_over(path: Path, descriptor: int) -> bool:
    """Whether nobody builds who made a `lock` that no process holds the system's lock of.

    torch keeps its file open while it builds. On a disk of this machine, nobody who has it open is nobody at all; of a
    network file system, other machines are judged by what they have written.

    Args:
        descriptor: this process's own, open on the file.
    """
    if _is_open_elsewhere(descriptor):
        return False
    if is_local(path):
        return True
    newest = 0.0
    for file in (path, *path.parent.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, file.stat().st_mtime)
    return time.time() - newest > QUIET_SECONDS


def _stays(path: Path, descriptor: int) -> bool:
    """Whether a file is left over and stays: torch closes it a moment before it removes it."""
    if not is_left_over(path, descriptor):
        return False
    time.sleep(POLL_SECONDS)
    return _is_same(descriptor, path)


def _is_open_elsewhere(descriptor: int) -> bool:
    """Whether another process of this machine has the file open, as far as it may be looked at."""
    own, mine = os.fstat(descriptor), Path(f"/proc/{os.getpid()}")
    for process in Path("/proc").glob("[0-9]*"):
        if process == mine:
            continue
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.path.samestat(link.stat(), own):
                        return True
    return False


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
