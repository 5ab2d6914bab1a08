"""A bounded folder of verified pieces of remote files, shared by all processes of a machine.

    <folder>/blocks/<split>/<part>/<block>   whole files, renamed into place
    <folder>/partial/                        what is being written
    <folder>/locks/                          who fetches what, and who counts
    <folder>/total                           bytes of all of these, those being written included
    <folder>/tokenizers/                     small, and not bounded (corpus/splits.py)

A file's time of change says when it was last used; those that were not used for longest make room. A file that a
process has mapped stays readable there after it was removed.
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
"""Share of the cache that is cleared at once, so that it is counted seldom."""
_STALE_SECONDS = 3600.0
"""Age at which a file that is being written belongs to a process that was killed."""


class DamagedError(Exception):
    """What was fetched is not what was written, twice."""


class Cache:
    """Gives pieces by name, from its folder or by fetching them.

    Args:
        folder: made when it is needed; a leading ~ is the home folder. It should be on a disk of this machine.
        max_bytes: of all files together. Other processes may have other bounds on the same folder; each keeps its own.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER, max_bytes: int = DEFAULT_SIZE) -> None:
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._warned = False

    def get(self, name: str, fetch: Callable[[], bytes], is_good: Callable[[Content], bool]) -> Content:
        """Return a piece, verified.

        Args:
            name: its path in the folder; what it names never changes.
            fetch: brings it from where it is kept.
            is_good: whether bytes are the piece's.

        Returns:
            The piece, mapped from the cache, or as bytes where the cache cannot keep it.

        Raises:
            DamagedError: it was fetched twice, and damaged each time.
        """
        assert re.fullmatch(r"[\w-]+(/[\w.-]+)+", name) and ".." not in name
        path = self.folder / "blocks" / name
        content = self._find(path, is_good)
        if content is not None:
            return content
        # One process fetches what all of this machine need.
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
        """Return a file's content; one that is damaged is removed."""
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
        """Keep a piece if there is room for it; a cache that cannot be written is told once, and done without."""
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
                    f"warning: {self.folder} cannot keep remote data ({error.strerror}), which is fetched anew each "
                    "time; give data.cache_dir another place or data.cache_size another bound"
                )

    def _make_room(self, num_bytes: int) -> None:
        """Count so many bytes as used, and remove what was not used for longest if they are too many."""
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
        """Remove the oldest files until the others are within the bound; returns their bytes."""
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
        """Hold one of the cache's locks; where there can be none, go on: files are whole or absent anyway."""
        try:
            folder = self.folder / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield
            return
        with alone(descriptor):
            yield
