"""The places of corpora and shards, a path of this machine or a URL; and the cache of verified pieces of remote files.

A URL delivers bytes, which the caller verifies. Names and passwords come from ~/.netrc, the environment or a provider's
own files; never from a config or a manifest. The cache is a bounded folder, shared by all processes of a machine:

    <folder>/blocks/<split>/<part>/<block>   whole files, renamed into place
    <folder>/partial/                        files that are being written
    <folder>/locks/                          locks for fetching and for counting
    <folder>/total                           bytes of all files, including those that are being written
    <folder>/tokenizers/                     small, and not bounded (corpus/blocks.py)

A file's modification time is the time of its last use; the least recently used files are removed first. A file that a
process has mapped remains readable there after it was removed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from bigtx.utils.errors import DataError
from bigtx.utils.files import is_url, open_file, url_problem
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


def map_file(path: Path | str) -> mmap.mmap:
    """Map a file into memory, to read it.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


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
            content = map_file(path)
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
                    "time; make it writable, or set data.cache_dir to another folder, or data.cache_size to another "
                    "limit"
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


TRIES_AT_START = 4
"""Attempts to open a file at the start of a run: about three seconds, so that a wrong name is reported soon."""
TRIES = 9
"""Attempts to read data during a run: about a minute and a half."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


@dataclass(frozen=True)
class RemotePath:
    """A file or folder by its URL; `/` and `str` work as for a local `Path`.

    Args:
        url: a URL with one of the protocols that bigtx reads.
        cache: the cache for parts of it on this machine.

    Raises:
        DataError: the protocol is not supported, or the URL has credentials.
    """

    url: str
    cache: Cache = field(default_factory=Cache, repr=False, compare=False)

    def __post_init__(self) -> None:
        if problem := url_problem(self.url):
            raise DataError(f"{self.url} {problem}.")

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.cache)

    def __str__(self) -> str:
        return self.url

    def read_bytes(
        self,
        start: int | None = None,
        end: int | None = None,
        *,
        tries: int = TRIES_AT_START,
        given_up: threading.Event | None = None,
    ) -> bytes:
        """Return the file's bytes, or those from start to end (exclusive).

        Args:
            tries: the number of attempts after temporary failures, with pauses between them that double.
            given_up: no attempt follows after it is set.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it cannot be read, or has no such range; the message names the URL.
        """
        from bigtx.data.storage.access import read_range
        from bigtx.data.storage.remote import retried

        longest = (min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS) for number in range(tries - 1))
        # Many processes fail at the same moment, and should not retry at the same moment.
        waits = [random.uniform(0.5, 1.0) * seconds for seconds in longest]
        pause = (given_up or threading.Event()).wait
        with self._named_in_errors():
            return retried(lambda: read_range(self.url, start, end), self.url, waits, math.inf, pause)

    def size(self) -> int:
        """Return the file's size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: the server cannot be reached, or does not report the size.
        """
        from bigtx.data.storage.access import stat

        with self._named_in_errors():
            return stat(self.url)[0]

    @contextlib.contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(f"{self.url} cannot be read: {error}.") from error

    def is_file(self) -> bool:
        """Return whether there is such a file."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True


Place = Path | RemotePath
"""The place of a corpus, a split or a file."""


def as_place(place: str | Path | RemotePath, cache: Cache | None = None) -> Place:
    """Return a path or URL as an object that `/` and `str` work on.

    Raises:
        DataError: bigtx does not read the URL.
    """
    if isinstance(place, RemotePath):
        return place
    return RemotePath(str(place).rstrip("/"), cache or Cache()) if is_url(str(place)) else Path(place)


def open_stream(place: Place) -> BinaryIO:
    """Return a stream of a file, from its start to its end.

    Raises:
        OSError: it cannot be read; reading raises it too.
    """
    if isinstance(place, RemotePath):
        from bigtx.data.storage.access import InputFile, open_binary, stat

        size, version = stat(place.url)
        return open_binary(InputFile(place.url, size, version=version))
    return open_file(place)
