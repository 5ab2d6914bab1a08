"""Check that all machines see the same folder: the first one writes a file there, and the others look for it."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

SEEN_SECONDS = 10.0
"""How long a machine looks for the file: a network file system may show a new file only after some seconds."""
_RETRY_SECONDS = 0.1


@contextlib.contextmanager
def file_for_all(folder: Path) -> Iterator[Path | None]:
    """Create a file in a folder, or in the nearest existing one above it, until the context is closed.

    Its name is new, so no machine can have cached that the file is missing.

    Yields:
        The absolute path; None where the file cannot be written, which the run itself will report.
    """
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    path = folder / f".bigtx-start-{secrets.token_hex(8)}"
    try:
        path.touch(exist_ok=False)
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def sees(path: Path, seconds: float = SEEN_SECONDS) -> bool:
    """Return whether this machine sees a file that another one has just written, within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            # NFS asks the server again for a folder's contents when the folder is opened.
            os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
        if path.exists():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_RETRY_SECONDS)
