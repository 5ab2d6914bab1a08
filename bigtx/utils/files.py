"""Files that are whole or absent, their hashes, and the lock that keeps two runs out of one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from bigtx.utils.errors import LaunchError
from bigtx.utils.processes import start_of

LOCK_NAME = "run.lock"
SEAL = "sha256"
"""The key of an object's hash of itself."""
LOCK_PATIENCE_SECONDS = 2.0
NOT_A_FILE = "not a file; write what it gives into a file first"


def no_file(path: Path | str) -> str | None:
    """What is at a path where neither a file nor a folder is, in words; None where one is, or nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), None)


def open_file(path: Path | str, buffering: int = -1) -> BinaryIO:
    """Open a file to read its bytes. A pipe is refused: it may wait for a writer forever, and gives its bytes once.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    if kind := no_file(path):
        raise OSError(errno.EINVAL, f"it is {kind}, {NOT_A_FILE}", str(path))
    return open(path, "rb", buffering)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader, also after a crash or a full disk, sees the old content or the new, never a part.

    Args:
        data: text is written as UTF-8.

    Raises:
        OSError: the content could not be made durable; `path` has the old one, or already the new.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(partial, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    fsync_dir(path.parent)


def write_json(path: Path | str, value: Any) -> None:
    """`write_atomic` of readable JSON; a NaN is an error, because other readers refuse it."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """The SHA-256, in hexadecimal, of a value's canonical JSON: sorted keys, no white space, ASCII alone."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path | str, content: dict[str, Any]) -> None:
    """`write_json` of an object, with the hash of itself under the key `sha256`, whatever was there before."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    write_json(path, rest | {SEAL: json_hash(rest)})


def unsealed(content: dict[str, Any]) -> dict[str, Any] | None:
    """What `write_sealed` was given; None where the hash is not that of the content, or there is none."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return rest if content.get(SEAL) == json_hash(rest) else None


def fsync_dir(path: Path | str) -> None:
    """Make the names in a folder durable: a rename may otherwise be lost with the power.

    Raises:
        OSError: they could not be written.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems refuse to, in words of their own; their renames are durable by themselves.
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


class FolderLock:
    """Keeps a second run out of a folder, by a file that says who is in it.

    The file outlives a killed process. It is taken over when its process is known to be gone: on this host by process
    id and start time (ids are used again), on another one when SLURM has restarted the same job since.
    """

    def __init__(self, folder: Path | str) -> None:
        """Take the lock, `run.lock` in an existing folder.

        Raises:
            LaunchError: a live process, or one on another host, holds it; the message names it and the file.
            OSError: the folder cannot be written.
        """
        self.path = Path(folder) / LOCK_NAME
        self._owner = _this_process()
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while not (self._create() or self._take_over()):
            # The file was empty or vanished: its creator is about to write into it, or its holder just left.
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{self.path} says of no process that it holds it; if no run uses the folder, delete that file"
                )
            time.sleep(0.05)

    def release(self) -> None:
        """Give the lock back; one that has been given back, or that somebody deleted, is left alone."""
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.path.read_text()) == self._owner:
                self.path.unlink()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with alone(descriptor):
                _write_owner(descriptor, self._owner)
        except OSError:
            self.path.unlink()
            raise
        return True

    def _take_over(self) -> bool:
        """Become the holder in place of one that is gone; False when there is none to judge yet."""
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            return False
        with alone(descriptor):
            try:
                still_there = os.path.samestat(os.fstat(descriptor), os.stat(self.path))
                holder = json.loads(os.pread(descriptor, 65536, 0))
            except (FileNotFoundError, ValueError):
                return False
            if not still_there or not isinstance(holder, dict):
                return False
            self._refuse_if_alive(holder)
            _write_owner(descriptor, self._owner)
            return True

    def _refuse_if_alive(self, holder: dict[str, Any]) -> None:
        same_job = holder.get("slurm_job") is not None and holder.get("slurm_job") == self._owner["slurm_job"]
        if same_job and holder.get("slurm_restart") != self._owner["slurm_restart"]:
            return
        if holder.get("host") != self._owner["host"]:
            raise LaunchError(
                f"{self.path.parent} is in use by {_who(holder)}. From this host nobody can tell whether it still "
                f"runs; if it does not, delete {self.path}"
            )
        if _lives_here(holder):
            raise _in_use(self.path.parent, holder)


def refuse_if_held(folder: Path | str) -> None:
    """Look at a folder's lock without taking it, to refuse early what `FolderLock` would refuse later.

    Raises:
        LaunchError: a live process of this host holds it. Only `FolderLock` judges holders on other hosts.
    """
    try:
        holder = json.loads((Path(folder) / LOCK_NAME).read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(holder, dict) and holder.get("host") == socket.gethostname() and _lives_here(holder):
        raise _in_use(Path(folder), holder)


def _in_use(folder: Path, holder: dict[str, Any]) -> LaunchError:
    return LaunchError(f"{folder} is in use by {_who(holder)}; wait for it, stop it, or choose another run_dir")


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on host {holder.get('host')} (since {holder.get('since')})"


def _lives_here(holder: dict[str, Any]) -> bool:
    return start_of(int(holder.get("pid", 0))) == holder.get("process_start")


@contextlib.contextmanager
def alone(descriptor: int) -> Iterator[None]:
    """Hold an open file alone among this host's processes, where there are locks, and close it at the end."""
    try:
        # Where a network filesystem has none, O_EXCL still guards all but two take-overs of a folder at one instant.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_owner(descriptor: int, owner: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    os.fsync(descriptor)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }
