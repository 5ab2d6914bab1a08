"""The places of corpora and shards: a path of this machine, or a URL of a server or bucket.

A URL delivers bytes, which the caller verifies. Names and passwords come from ~/.netrc, the
environment or a provider's own files; never from a config or a manifest.
"""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path
from typing import BinaryIO

from bigtx.data.storage import access
from bigtx.data.storage.cache import Cache
from bigtx.data.storage.remote import TransientError, told_if_silent
from bigtx.utils.errors import DataError
from bigtx.utils.files import open_file
from bigtx.utils.paths import is_url, url_problem

TRIES_AT_START = 4
"""Attempts to open a file at the start of a run: about three seconds, so that a wrong name is reported soon."""
TRIES = 9
"""Attempts to read data during a run: about a minute and a half."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


class RemotePath:
    """A file or folder by its URL; `/` and `str` work as for a local `Path`.

    Args:
        url: a URL with one of the protocols that bigtx reads.
        cache: the cache for parts of it on this machine.

    Raises:
        DataError: the protocol is not supported, or the URL has credentials.
    """

    def __init__(self, url: str, cache: Cache | None = None) -> None:
        problem = url_problem(url)
        if problem:
            raise DataError(f"{url} {problem}.")
        self.url = url.rstrip("/")
        self.cache = cache or Cache()

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.cache)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

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

        with told_if_silent(self.url, tries):
            return self._tried(start, end, tries, given_up or threading.Event())

    def _tried(self, start: int | None, end: int | None, tries: int, given_up: threading.Event) -> bytes:
        for attempt in itertools.count(1):
            try:
                return access.read_range(self.url, start, end)
            except FileNotFoundError:
                raise
            except TransientError as error:
                if attempt == tries or given_up.is_set():
                    raise DataError(f"{self.url} cannot be read: {error}.") from error
            except OSError as error:
                raise DataError(f"{self.url} cannot be read: {error}.") from error
            longest = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
            # Many processes fail at the same moment, and should not retry at the same moment.
            given_up.wait(random.uniform(0.5, 1.0) * longest)
        raise AssertionError("the loop ends by return or error only")

    def size(self) -> int:
        """Return the file's size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: the server cannot be reached, or does not report the size.
        """
        try:
            return access.stat(self.url)[0]
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
    return RemotePath(str(place), cache) if is_url(str(place)) else Path(place)


def open_stream(place: Place) -> BinaryIO:
    """Return a stream of a file, from its start to its end.

    Raises:
        OSError: it cannot be read; reading raises it too.
    """
    if isinstance(place, RemotePath):
        size, version = access.stat(place.url)
        return access.open_binary(access.InputFile(place.url, size, version=version))
    return open_file(place)
