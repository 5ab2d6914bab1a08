"""Files on other machines: the common part of all protocols."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from bigtx.utils.errors import DataError
from bigtx.utils.files import is_url, url_problem
from bigtx.utils.log import say
from bigtx.utils.secrets import HIDDEN, scrub_text

BACK_OFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""The waits before a request is retried; each byte that arrives resets them."""
LONGEST_SECONDS = 120.0
"""The time after which a request is not retried."""
SAY_AFTER_SECONDS = 5.0
"""The time after which a place that does not respond is reported."""

_reported: set[str] = set()

Result = TypeVar("Result")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class TransientError(OSError):
    """A temporary failure of a request: a lost connection, a busy server."""


def scheme_of(path: str) -> str:
    """Return the scheme of a URL, in lower case; "" for a local path."""
    match = _SCHEME.match(path)
    return match[1].lower() if match else ""


def check_scheme(path: str) -> None:
    """Refuse a place that is not a local path or a supported URL: a command, a protocol inside another, a password.

    Raises:
        DataError: it is something else.
    """
    problem = url_problem(path) if is_url(path) or "://" in path else None
    if problem:
        raise DataError(f"input.paths: {scrub_text(shown(path))} {problem}.")


def shown(path: str) -> str:
    """Return a path for logs and messages: a URL without user, password and the values of its query."""
    scheme = scheme_of(path)
    if not scheme:
        return path
    address, _, query = path.partition("#")[0].partition("?") if scheme in ("http", "https") else (path, "", "")
    host, slash, rest = address[len(scheme) + 3 :].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{rest}{f'?{HIDDEN}' if query else ''}"


def name_of(path: str) -> str:
    """Return the path part, which has a file's suffix: a URL without its query."""
    return path.partition("#")[0].partition("?")[0] if scheme_of(path) in ("http", "https") else path


def without_secrets(said: str, path: str) -> str:
    """Return a library's message about a remote file, without secrets."""
    return scrub_text(said.replace(path, shown(path)))


def retried(
    call: Callable[[], Result],
    path: str,
    waits: Sequence[float] | None = None,
    longest: float = LONGEST_SECONDS,
    pause: Callable[[float], object] | None = None,
) -> Result:
    """Return the result of the call, with a retry after each wait. A path that is waited for is reported if it takes
    long, once for each path.

    Args:
        path: the requested path.
        waits: seconds; None: BACK_OFF_SECONDS.
        longest: the seconds after which there is no retry.
        pause: the function that waits, and returns whether to give up; None: sleep.

    Raises:
        TransientError: the last attempt failed.
    """
    waits = BACK_OFF_SECONDS if waits is None else waits
    end = time.monotonic() + longest

    def report() -> None:
        if path not in _reported:
            _reported.add(path)
            say(
                f"waiting for {scrub_text(shown(path))}, which has not responded for {SAY_AFTER_SECONDS:g} s; "
                f"it is given up after {len(waits) + 1} tries"
            )

    timer = threading.Timer(SAY_AFTER_SECONDS, report)
    timer.daemon = True
    timer.start()
    try:
        for seconds in waits:
            try:
                return call()
            except TransientError:
                if time.monotonic() + seconds > end or (pause or time.sleep)(seconds):
                    raise
        return call()
    finally:
        timer.cancel()


class RefusedError(OSError):
    """A failure of a request that a retry does not fix."""


class RemoteFile(io.RawIOBase):
    """A remote file of known size, read at its position; it is wrapped into an `io.BufferedReader` for use.

    After a lost connection, reading continues at the same byte.

    Attributes:
        chunk_bytes: the bytes to request at once.
    """

    chunk_bytes = 1 << 20

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0

    def fetch(self, buffer: memoryview) -> int:
        """Put the next bytes at `position` into the buffer, which ends within the file.

        Returns:
            The number of bytes; 0 if the file has no more.

        Raises:
            TransientError: a retry may help.
            OSError: a retry does not help.
        """
        raise NotImplementedError

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fetch with retries.

        Raises:
            OSError: the file cannot be reached, or has fewer bytes than it should.
        """
        wanted = memoryview(buffer)[: max(0, self.size - self.position)]
        if not wanted:
            return 0

        def fetch() -> int:
            if count := self.fetch(wanted):
                return count
            raise TransientError(f"it ends early, after {self.position:,} of {self.size:,} bytes")

        count = retried(fetch, self.path)
        self.position += count
        return count

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; bytes are fetched only when they are read."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position
