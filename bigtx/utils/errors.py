"""The errors that a user can cause, and how they end a command.

Each is one paragraph that says what is wrong, where, and what to do. A command that raises one prints it
once (rank 0 only) and ends with status 2 and no traceback. What only bigtx itself can cause is an
assertion.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator

from bigtx.utils import log, terminal

EXIT_OUTPUT_LOST = 1
EXIT_FAILED = 1
"""The exit status of a run that lost a rank: the user made no mistake, and the same command resumes."""
EXIT_SOME_FAILED = 1
"""The exit status of a command that could not use some of its records."""
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
"""The exit status of a run that saved and stopped on request: run the same command again (sysexits' EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130


class BigtxError(Exception):
    """A fault that the user can fix; the message says what is wrong, where, and what to do.

    Attributes:
        reported: it has been printed already, by this rank or another.
        exit_status: the exit status of the command that it ends.
    """

    reported = False
    exit_status = EXIT_USER_ERROR

    def __init__(self, message: str = "") -> None:
        super().__init__(terminal.shortened(message))


class ConfigError(BigtxError):
    """A configuration that cannot be run."""


class DataError(BigtxError):
    """Input text, shards or a manifest that cannot be used."""


class CheckpointError(BigtxError):
    """A checkpoint or run folder that cannot be used."""


class LaunchError(BigtxError):
    """Processes, devices or a cluster that are not as the run needs them.

    Attributes:
        broken_hosts: machines that the run could be started without, if there are such.
    """

    def __init__(self, text: str = "", broken_hosts: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.broken_hosts = tuple(broken_hosts)


def require(package: str, message: str, kind: type[BigtxError] = LaunchError) -> None:
    """Raise an error of a kind with the message, unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise kind(message)


def say_from_any_rank(error: BigtxError) -> None:
    """Print an error, on any rank, and note that it is printed."""
    log.say_error(f"{type(error).__name__}: {error}", any_rank=True)
    error.reported = True


@contextlib.contextmanager
def writes(place: object, advice: str = "") -> Iterator[None]:
    """Report an error of the system as a place that cannot be written.

    Args:
        place: a file or a folder, or the setting that names it.
        advice: the end of the sentence.

    Raises:
        LaunchError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        inner = f" ({error.filename})" if error.filename and str(error.filename) not in str(place) else ""
        raise LaunchError(f"{place} cannot be written: {error.strerror or error}{inner}{advice}") from error


def exit_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn a command's `main` into one that reports a `BigtxError` as a paragraph.

    Returns:
        A function that returns the exit status: what `main` returned, that of a `BigtxError` (2), 130 after Ctrl-C, 1
        where standard output could not take all that was written. Any other exception is a defect of bigtx and keeps
        its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        terminal.prepare()
        status = 0
        try:
            status = _status_of(lambda: main(*args, **kwargs))
            lost = _flush_output()
            return status or lost
        except BrokenPipeError:
            # The reader of our output has closed it (`bigtx ... | head`): this is not an error.
            _drop_output()
            return status
        except OSError as error:
            if error is not terminal.lost():
                raise
            return _say_lost(error)

    return wrapped


def _status_of(main: Callable[[], int | None]) -> int:
    """Return what a command returns, and print the user's errors; also of one that answered `--help` by
    SystemExit.
    """
    try:
        return main() or 0
    except BigtxError as error:
        if not error.reported:
            log.say_error(f"{type(error).__name__}: {error}")
        return error.exit_status
    except OSError as error:
        # What only a name of the user's can cause, wherever it is used first.
        if error.errno != errno.ENAMETOOLONG:
            raise
        log.say_error(
            f"ConfigError: the name {str(error.filename)[:80]!r}... is too long for a file; write a shorter one"
        )
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as end:
        if end.code:
            raise
        return 0


def _flush_output() -> int:
    """Write what is still buffered. Return the exit status."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        return _say_lost(error)
    lost = terminal.lost()
    return _say_lost(lost) if lost else 0


def _say_lost(error: OSError) -> int:
    log.say_error(f"standard output cannot be written: {error.strerror}; what is missing there is lost")
    _drop_output()
    return EXIT_OUTPUT_LOST


def _drop_output() -> None:
    """Redirect standard output to the null device: Python writes to it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
