"""Take turns at building an extension that several ranks, runs or machines need.

torch builds an extension (an operator of DeepSpeed that a setting asks for) at its first use, into its own folder under
TORCH_EXTENSIONS_DIR. A file `lock` there means that a process is building, and all others wait until the file is gone.
The file does not name the process. It stays after a kill, and every later start would wait without an end. So bigtx
also holds the operating system's lock on that file, which ends with the process. Programs that use only torch's file
see ours, and bigtx sees theirs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from torch.utils import file_baton

from bigtx.utils.locks import is_at, is_local, open_or_make, try_lock
from bigtx.utils.log import say

QUIET_SECONDS = 600.0
"""No machine builds in a folder of a network file system in which nothing was written for this long: each file of an
operator is compiled within a few minutes."""
POLL_SECONDS = 0.5
SAY_SECONDS = 5.0


class Turn:
    """The permission to build an extension. It replaces torch's `FileBaton`."""

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        """Remember the place of the file.

        Args:
            lock_file_path: `lock` in the extension's folder. torch's other arguments concern its own way to wait.
        """
        self.path = Path(lock_file_path)
        self._descriptor = -1

    def try_acquire(self) -> bool:
        """Wait for a turn. Returns False where another process has built the extension in the meantime."""
        begin, said, has_waited = time.monotonic(), False, False
        while True:
            try:
                # A process that has waited makes no file: if it is gone, the extension is built.
                descriptor, is_new = (os.open(self.path, os.O_RDWR), False) if has_waited else open_or_make(self.path)
            except FileNotFoundError:
                return False
            # A file without the system's lock may be another program's, so `_stays` checks it for a moment.
            is_free = try_lock(descriptor) is not False
            if is_free and is_at(self.path, descriptor) and (is_new or _stays(self.path, descriptor)):
                self._descriptor = descriptor
                return True
            os.close(descriptor)
            if not said and time.monotonic() - begin > SAY_SECONDS:
                said = True
                say(f"waiting for another process that builds {self.path.parent.name}; it has {self.path}")
            time.sleep(POLL_SECONDS)
            has_waited = True

    def wait(self) -> None:
        """Do nothing: `try_acquire` has waited."""

    def release(self) -> None:
        """Remove the file, which shows the others that the extension is built."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self._descriptor)


def take_turns() -> None:
    """Have torch use `Turn` when it builds an extension."""
    file_baton.FileBaton = Turn  # type: ignore[assignment,misc]
    if builder := sys.modules.get("torch.utils.cpp_extension"):
        builder.FileBaton = Turn  # type: ignore[attr-defined]


def is_left_over(path: Path, descriptor: int) -> bool:
    """Return whether no process builds although there is a `lock`. No process holds the system's lock on the file.

    torch keeps its file open while it builds. On a local disk, a file that no process has open is left over. On a
    network file system another machine may build, so the time of its last write decides.

    Args:
        path: the file `lock`.
        descriptor: this process's descriptor of the file.
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
    """Return whether a file is left over and is not removed soon. torch closes it a moment before it removes it."""
    if not is_left_over(path, descriptor):
        return False
    time.sleep(POLL_SECONDS)
    return is_at(path, descriptor)


def _is_open_elsewhere(descriptor: int) -> bool:
    """Return whether another process of this machine, among those that may be inspected, has the file open."""
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


def leave_out_unused() -> None:
    """Keep DeepSpeed from preparing unused parts. Call this before DeepSpeed starts its process groups."""
    import deepspeed
    from deepspeed.runtime import bf16_optimizer, compiler

    # Every ZeRO engine imports DeepSpeed's Muon to check the type of its optimizer, and three of its functions are
    # compiled where they are defined. That imports all of torch's compiler, so here they are imported as plain
    # functions. bigtx has another Muon; see optimizers.py.
    compile_before = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        compiler.compile = compile_before
    # DeepSpeed would try a compiler for each of its operators, although it uses only one: an all-reduce by shared
    # memory for inference. That one needs a compiler at the first start, and leaves 67 MB in /dev/shm for each rank of
    # each run, until the machine has no memory left. Operators that a setting asks for, such as those of offloading,
    # are not affected.
    deepspeed.ops.__compatible_ops__ = {}
    # It would report its memory twice for each parameter group, of which there is one for each bucket. Each report also
    # collects garbage.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
