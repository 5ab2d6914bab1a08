"""Locks that keep two processes from using one folder or one file at a time.

A `FolderLock` is two things in one file, `run.lock`: an operating system's lock (flock) on the open file, held for the
duration of the run, and a record that says which process holds it. The kernel frees the lock when the process ends,
for any reason, and all containers of a machine share the kernel. So the lock decides, and the record is for messages.
The record decides only where the file system has no locks, or has locks that no other host sees.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtx.utils.errors import LaunchError
from bigtx.utils.files import json_value
from bigtx.utils.processes import slurm_place, start_of

LOCK_NAME = "run.lock"
LOCK_PATIENCE_SECONDS = 2.0
MOUNTS = Path("/proc/self/mountinfo")
LOCAL_FILE_SYSTEMS = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
"""File systems of one machine: every process that can hold a lock there shares its kernel."""
_held: set[int] = set()
"""Descriptors of the folders that this process holds."""


class FolderLock:
    """A lock that keeps a second run out of a folder, until this process ends or calls `release`.

    The file remains after a process is killed, and the next process takes it over. On a network file system whose locks
    other hosts do not see, the file of another host is used again only if SLURM has restarted the same job since then.
    """

    def __init__(self, folder: Path | str) -> None:
        """Take the lock, `run.lock` in an existing folder.

        Raises:
            LaunchError: a live process holds it, or one that cannot be judged from here; the message names it.
            OSError: the folder cannot be written.
        """
        self.path = Path(folder) / LOCK_NAME
        self._owner = _this_process()
        self._descriptor = -1
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while (refusal := self._take()) is not None:
            # Another process may only be checking the lock, may be about to write the file, or may be releasing it.
            if time.monotonic() > deadline:
                raise refusal
            time.sleep(0.05)

    def release(self) -> None:
        """Give the lock back; a file that is no longer ours, or that was deleted, is left alone."""
        if self._descriptor < 0:
            return
        if _read(self._descriptor) == self._owner and is_at(self.path, self._descriptor):
            with contextlib.suppress(OSError):
                self.path.unlink()
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self) -> LaunchError | None:
        """Become the holder; return why that is not possible yet.

        Raises:
            LaunchError: waiting would not help.
        """
        try:
            descriptor, is_new = open_or_make(self.path)
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise
            return _nameless(self.path)  # Its holder has just released it.
        try:
            is_free, holder = try_lock(descriptor), _read(descriptor)
            if not is_at(self.path, descriptor):
                return _nameless(self.path)  # Its holder has just released it.
            if is_free is False:
                if _lives_here(holder):
                    raise _in_use(self.path.parent, holder)
                return _in_use(self.path.parent, holder)
            if not is_new:
                if is_free is None and not holder:
                    return _nameless(self.path)
                self._refuse_if_alive(holder, has_lock=is_free is True)
            _write_owner(descriptor, self._owner)
            self._descriptor = descriptor
            _held.add(descriptor)
            return None
        finally:
            if self._descriptor != descriptor:
                os.close(descriptor)

    def _refuse_if_alive(self, holder: dict[str, Any], *, has_lock: bool) -> None:
        """Check the holder that the file names, with the lock held or on a file system without locks."""
        same_job = holder.get("slurm_job") is not None and holder.get("slurm_job") == self._owner["slurm_job"]
        if same_job and holder.get("slurm_restart") != self._owner["slurm_restart"]:
            return
        same_kernel = _boot(holder) is not None and _boot(holder) == _boot(self._owner)
        same_host = holder.get("host") == self._owner["host"]
        if has_lock and (not holder or same_kernel or same_host or _is_seen_by_all_hosts(self.path)):
            return
        if not same_kernel and not same_host:
            raise LaunchError(
                f"{self.path.parent} is in use by {_who(holder)}. Other hosts do not see the locks of its file system, "
                f"so from this host bigtx cannot check whether it still runs; if it does not, delete {self.path}"
            )
        if same_kernel and holder.get("pid_namespace") != self._owner["pid_namespace"]:
            raise LaunchError(
                f"{self.path.parent} is in use by {_who(holder)}, of another container. Its file system has no locks, "
                f"so from here bigtx cannot check whether it still runs; if it does not, delete {self.path}"
            )
        if _lives_here(holder):
            raise _in_use(self.path.parent, holder)


def refuse_if_held(folder: Path | str) -> None:
    """Check a folder's lock without taking it, to refuse early what `FolderLock` would refuse later.

    Raises:
        LaunchError: a live process holds it. Only `FolderLock` judges holders that cannot be seen from here.
    """
    try:
        descriptor = os.open(Path(folder) / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        is_free, holder = try_lock(descriptor, fcntl.LOCK_SH), _read(descriptor)
    finally:
        os.close(descriptor)
    if is_free is False or (is_free is None and _lives_here(holder)):
        raise _in_use(Path(folder), holder)


@contextlib.contextmanager
def alone(descriptor: int) -> Iterator[None]:
    """Lock an open file against this host's other processes, where there are locks, and close it at the end."""
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Take an open file's lock without waiting; False if another process has it, None where the file system has no
    locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_local(path: Path) -> bool:
    """Return whether a path is on a disk of this machine, so that all holders of locks there share its kernel."""
    return _mount_of(path)[0] in LOCAL_FILE_SYSTEMS


def open_or_make(path: Path) -> tuple[int, bool]:
    """Return the file, and whether it was created now. Its creation is exclusive even where there are no locks."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is still the one at its path: not deleted, and not replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _let_go_of_folders() -> None:
    """Close the locks in a forked child, which shares them with its parent and would hold them after the parent was
    killed.
    """
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_of_folders)


def _in_use(folder: Path, holder: dict[str, Any]) -> LaunchError:
    return LaunchError(f"{folder} is in use by {_who(holder)}; wait for it, stop it, or use another folder")


def _nameless(path: Path) -> LaunchError:
    return LaunchError(f"{path} does not say which process holds it; if no run uses the folder, delete that file")


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on host {holder.get('host')} (since {holder.get('since')})"


def _read(descriptor: int) -> dict[str, Any]:
    """Return the record of the holder; empty if no record names a process."""
    try:
        holder = json_value(os.pread(descriptor, 65536, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}


def _lives_here(holder: dict[str, Any]) -> bool:
    """Return whether a process of this host and this process' own view of process ids is the holder."""
    if not holder or holder.get("host") != socket.gethostname():
        return False
    return holder.get("pid_namespace") == _pid_namespace() and start_of(holder["pid"]) == holder.get("process_start")


def _boot(holder: dict[str, Any]) -> str | None:
    """Return the kernel's boot that a holder belongs to, if that is known."""
    start = holder.get("process_start")
    return start.partition("/")[0] if isinstance(start, str) else None


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_seen_by_all_hosts(path: Path) -> bool:
    """Return whether a lock on a file excludes all hosts that see the file; False where that is not known."""
    kind, options = _mount_of(path)
    if kind in ("nfs", "nfs4"):
        return "nolock" not in options and not {"local_lock=all", "local_lock=flock"} & options
    if kind == "lustre":
        return "flock" in options
    return kind == "ceph" or is_local(path)


def _mount_of(path: Path) -> tuple[str, set[str]]:
    """Return the type and options of the file system that holds a path; ("", set()) if that is not known."""
    place, longest, found = os.path.realpath(path), 0, ("", set[str]())
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text().splitlines():
            # Fields of proc(5): ... mount-point mount-options ... - type source super-options
            mount, _, system = line.partition(" - ")
            point = mount.split()[4].encode().decode("unicode_escape")  # A space is written \040.
            if len(point) >= longest and (place == point or place.startswith(point.rstrip("/") + "/")):
                kind, _, options = system.split(" ", 2)
                longest, found = len(point), (kind, set(options.split(",")))
    return found


def _write_owner(descriptor: int, owner: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    os.fsync(descriptor)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_namespace": _pid_namespace(),
        "process_start": start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    } | slurm_place()
