"""A new folder that is complete or missing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bigtx.utils.errors import ConfigError, LaunchError
from bigtx.utils.files import fsync_dir


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
