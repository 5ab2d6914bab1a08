"""A bounded folder of verified pieces of remote files, shared by all processes of a machine.

    <folder>/blocks/<split>/<part>/<block>   whole files, renamed into place
    <folder>/partial/                        files that are being written
    <folder>/locks/                          locks for fetching and for counting
    <folder>/total                           bytes of all files, including those that are being written
    <folder>/tokenizers/                     small, and not bounded (corpus/splits.py)

A file's modification time is the time of its last use; the least recently used files are removed first. A file that a
process has mapped remains readable there after it was removed.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from bigtx.utils.locks import alone
from bigtx.utils.log import say

Content = bytes | mmap.mmap

DEFAULT_FOLDER, DEFAULT_SIZE = "~/.cache/bigtx", 20 << 30
_NUM_LOCKS = 256
_ROOM = 0.1
"""Share of the cache that is cleared at once, so that counts are rare."""
_STALE_SECONDS = 3600.0
"""Age from which a partial file is assumed to belong to a process that was killed."""


class DamagedError(Exception):
    """A piece that was fetched twice, and was damaged each time."""


class Cache:
    """A cache that returns pieces by name, from its folder or by fetching them.

    Args:
        folder: created when needed; a leading ~ is the home folder. It should be on a disk of this machine.
        max_bytes: the limit for all files together. Other processes may use other limits for the same folder.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER, max_bytes: int = DEFAULT_SIZE) -> None:
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._warned = False

    def get(self, name: str, fetch: Callable[[], bytes], is_good: Callable[[Content], bool]) -> Content:
        """Return a piece, verified.

        Args:
            name: its path in the folder; the content of a name never changes.
            fetch: the function that fetches it.
            is_good: the function that checks whether bytes are the piece's.

        Returns:
            The piece, mapped from the cache, or as bytes if the cache cannot keep it.

        Raises:
            DamagedError: it was fetched twice, and was damaged each time.
        """
        assert re.fullmatch(r"[\w-]+(/[\w.-]+)+", name) and ".." not in name
        path = self.folder / "blocks" / name
        content = self._find(path, is_good)
        if content is not None:
            return content
        # One process fetches for all processes of this machine.
        with self._lock(f"{xxhash.xxh3_64_intdigest(name.encode()) % _NUM_LOCKS:02x}"):
            content = self._find(path, is_good)
            if content is not None:
                return content
            for _ in range(2):
                fetched = fetch()
                if is_good(fetched):
                    break
            else:
                raise DamagedError
            self._store(path, fetched)
        return self._find(path, is_good) or fetched

    def _find(self, path: Path, is_good: Callable[[Content], bool]) -> Content | None:
        """Return a file's content; remove a damaged one."""
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return None
        if not is_good(content):
            content.close()
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def _store(self, path: Path, content: bytes) -> None:
        """Keep a piece if there is space for it; report once that a cache cannot be written."""
        if len(content) > self.max_bytes:
            return
        partial = self.folder / "partial" / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            if not self._warned:
                self._warned = True
                say(
                    f"warning: {self.folder} cannot keep remote data ({error.strerror}), which is fetched again each "
                    "time; set data.cache_dir to another folder or data.cache_size to another limit"
                )

    def _make_room(self, num_bytes: int) -> None:
        """Count so many bytes as used, and remove the least recently used files if there are too many."""
        with self._lock("total"):
            record = self.folder / "total"
            try:
                total = int(record.read_text())
            except (OSError, ValueError):
                total = self._sweep(self.max_bytes)
            if total + num_bytes > self.max_bytes:
                total = self._sweep(min(self.max_bytes - num_bytes, int((1 - _ROOM) * self.max_bytes)))
            record.write_text(str(total + num_bytes))

    def _sweep(self, max_bytes: int) -> int:
        """Remove the oldest files until the others are within the limit; return the remaining bytes."""
        now = time.time()
        files: list[tuple[float, int, str]] = []
        total = 0
        writing = str(self.folder / "partial")
        for folder, _, names in itertools.chain(os.walk(self.folder / "blocks"), os.walk(writing)):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                total += status.st_size
                if folder != writing:
                    files.append((status.st_mtime, status.st_size, path))
                elif now - status.st_mtime > _STALE_SECONDS:
                    files.append((0.0, status.st_size, path))
        for changed, size, path in sorted(files):
            if total <= max_bytes and changed > 0:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
        return total

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold one of the cache's locks; continue without one if locks do not work: files are complete or missing in
        any case.
        """
        try:
            folder = self.folder / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield
            return
        with alone(descriptor):
            yield
