"""Files and folders that are complete or missing, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bigtx.utils.errors import ConfigError, LaunchError

SEAL = "sha256"
"""The key of an object's hash of itself."""
NOT_A_FILE = "not a file; write what it gives into a file first"


def no_file(path: Path | str) -> str | None:
    """Return what is at a path where neither a file nor a folder is, in words; None where one of them is, or where
    nothing is.
    """
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
        OSError: it cannot be opened, or is not a file.
    """
    if kind := no_file(path):
        raise OSError(errno.EINVAL, f"it is {kind}, {NOT_A_FILE}", str(path))
    return open(path, "rb", buffering)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader, also after a crash or a full disk, sees the old content or the new content, never
    a part.

    Args:
        data: text is written as UTF-8.

    Raises:
        OSError: the content could not be made durable; `path` has the old content, or already the new content.
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
    """Write readable JSON as `write_atomic` does; a NaN is an error, because other readers refuse it."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path | str) -> dict[str, Any]:
    """Return the object that a JSON file holds; an empty one where the file is missing, damaged or holds something
    else.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a value's canonical JSON: sorted keys, no white space, ASCII alone."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path | str, content: dict[str, Any]) -> None:
    """Write an object as `write_json` does, with its own hash under the key `sha256`, which replaces an earlier one."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    write_json(path, rest | {SEAL: json_hash(rest)})


def unsealed(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `write_sealed` was given; None where the hash is not that of the content, or there is none."""
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
        # Some network filesystems refuse to, with errors of their own; their renames are durable by themselves.
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def refuse_filled(folder: Path) -> None:
    """Refuse a folder that is not empty, before the work starts.

    Raises:
        ConfigError: the folder has content, or is a file.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"{folder} exists already and is not an empty folder; name another one")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, next to the final one, which it becomes at the end; after an error or a kill there is no
    final folder.

    What an earlier attempt left behind is removed.

    Raises:
        ConfigError: the name is in use already.
        LaunchError: it cannot be written.
    """
    refuse_filled(folder)
    # Resolved, because "." and names ending in ".." have no name to add to.
    partial = folder.resolve().with_name(f".{folder.resolve().name}.unfinished")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        for inner, _, _ in os.walk(partial):
            fsync_dir(inner)
        os.rename(partial, folder.resolve())
        fsync_dir(partial.parent)
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
