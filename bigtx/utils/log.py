"""Two places for the output of a run: the screen, for bigtx's own messages only, and the rank's log file, for
everything.

    say(), console()  ──────────────▶ the screen (and the log)
    deepspeed, torch, wandb, warnings,
    print(), C code on fd 1 and 2 ──▶ <run>/logs/rank-00000.log
    errors that end the process ────▶ both

Secrets that Python code writes there are hidden (see `secrets`); what C code writes is not read.

Before `setup` nothing is redirected and `say` is a print.

A rank that has a supervisor reports its failure, and leaves the screen to the supervisor: where all ranks fail
because one did, only one is shown.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from bigtx.utils import terminal
from bigtx.utils.processes import rank
from bigtx.utils.secrets import scrub_text

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NOISY = ("DeepSpeed", "torch", "wandb", "py.warnings")


class Stream(io.TextIOWrapper):
    """A text stream without secrets, whose reader or disk may disappear: text that cannot be written is dropped."""

    def write(self, text: str, /) -> int:
        """Write through at once, or drop the text."""
        with contextlib.suppress(OSError):
            super().write(scrub_text(text))
        return len(text)

    def flush(self) -> None:
        """Do nothing: no text is buffered, so nothing can fail here."""
        with contextlib.suppress(OSError):
            super().flush()


@dataclass
class _Redirection:
    """The changes of `setup`, for `restore`."""

    screen: Stream
    errors: Stream
    log: Stream
    handler: logging.Handler
    saved_stdout: TextIO
    saved_stderr: TextIO


_active: _Redirection | None = None
_supervisor: int | None = None
"""The pipe to this rank's supervisor."""


def report_to(descriptor: int) -> None:
    """Report failures to a supervisor after this call."""
    global _supervisor
    _supervisor = descriptor


def report(**facts: Any) -> bool:
    """Report facts about this rank's end to the supervisor; return whether there is a supervisor.

    Args:
        facts: `error`, the error in words; `said`, that the user has seen it; `lost`, that another rank's end is the
            cause; `step`, after which it happened; `stopped`, that a request to stop was answered; `log`, this
            rank's log file.
    """
    if _supervisor is None:
        return False
    if "error" in facts:
        # A supervisor reads the pipe when the rank has ended: what is written must fit into it.
        facts["error"] = terminal.shortened(scrub_text(facts["error"]))
    with contextlib.suppress(OSError):
        os.write(_supervisor, json.dumps(facts).encode() + b"\n")
    return True


def setup(run_dir: Path | str, rank: int) -> Path:
    """Send everything but our own words from the screen to this rank's log file, appending to it.

    Done once per process, before any library that prints is imported; child processes inherit it.

    Returns:
        The log file's path.

    Raises:
        OSError: it cannot be written.
    """
    global _active
    assert _active is None, "log.setup was called twice"
    path = Path(run_dir) / "logs" / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = _stream(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    sys.stdout.flush()
    sys.stderr.flush()
    screen, errors = _stream(os.dup(1), sys.stdout.encoding), _stream(os.dup(2), sys.stderr.encoding)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter(FORMAT))
    _active = _Redirection(screen, errors, log, handler, sys.stdout, sys.stderr)
    sys.stdout = sys.stderr = log
    _route_loggers(handler)
    sys.excepthook = _report_exception
    threading.excepthook = _report_thread_exception
    # A crash in C code: its Python stack goes to the screen, or to a file that a supervisor reads: no code that
    # copies it can run then.
    faulthandler.enable((log if report(log=str(path.absolute())) else errors).fileno())
    return path


def restore() -> None:
    """Undo `setup`, for a process that continues after its run."""
    global _active
    if _active is None:
        return
    active, _active = _active, None
    faulthandler.disable()
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
    logging.getLogger().removeHandler(active.handler)
    logging.captureWarnings(False)
    sys.stdout, sys.stderr = active.saved_stdout, active.saved_stderr
    os.dup2(active.screen.fileno(), 1)
    os.dup2(active.errors.fileno(), 2)
    for stream in (active.screen, active.errors, active.log):
        stream.close()


def console() -> TextIO:
    """Return the true standard output, for what needs a terminal: `console().isatty()`."""
    return _active.screen if _active else sys.stdout


def say(text: str = "") -> None:
    """Show a line on the screen (rank 0 only) unless that is closed, and keep it in the log."""
    if rank() == 0 and not terminal.is_closed(console()):
        print(text, file=console(), flush=True)
    if _active:
        print(text, file=_active.log)


def say_stopped(text: str) -> None:
    """Show a line as `say` does, in the place of the ^C that a terminal has echoed."""
    if rank() == 0 and terminal.obeys(console()):
        print(terminal.ERASE_LINE, end="", file=console())
    say(text)


def say_json(value: Any) -> None:
    """Show a result as JSON, in ASCII, so that it is valid in every encoding (rank 0 only)."""
    say(json.dumps(value, indent=2))


def say_result(as_json: bool, facts: Callable[[], Any], lines: Callable[[], Iterable[str]]) -> None:
    """Show a result as JSON or as lines of text; only what is shown is computed."""
    if as_json:
        say_json(facts())
    else:
        for line in lines():
            say(line)


@contextlib.contextmanager
def said_aside(aside: bool) -> Iterator[None]:
    """Send what is said meanwhile to standard error, if asked, so that standard output has only the JSON."""
    with contextlib.redirect_stdout(sys.stderr) if aside else contextlib.nullcontext():
        yield


def say_error(text: str, *, any_rank: bool = False) -> None:
    """Show why this process ends: on the true standard error (rank 0 only, or any rank), and in the log.
    Secrets in it are hidden.
    """
    text = scrub_text(text)
    if any_rank or rank() == 0:
        print(text, file=_active.errors if _active else sys.stderr, flush=True)
        report(said=True)
    else:
        report(error=text)
    if _active:
        print(text, file=_active.log)


def _stream(descriptor: int, encoding: str = "utf-8") -> Stream:
    raw = open(descriptor, "wb", buffering=0)  # noqa: SIM115 - closed by restore()
    return Stream(raw, encoding=encoding or "utf-8", errors="backslashreplace", write_through=True)


def _route_loggers(handler: logging.Handler) -> None:
    """Install one handler at the root. Handlers that libraries install themselves write to the log as well, by their
    streams.
    """
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in NOISY:
        logger = logging.getLogger(name)
        # Installed before `setup`, they hold the old streams, and would write each line a second time.
        logger.handlers.clear()
        logger.propagate = True


def _report_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    assert _active is not None
    lines = traceback.format_exception(kind, error, trace)
    # A supervisor shows the end of one rank's log.
    is_shown_later = report(error=lines[-1].strip())
    _print_traceback(f"rank {rank()}: ", lines, (_active.log,) if is_shown_later else (_active.errors, _active.log))


def _report_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit or arguments.exc_value is None:
        return
    assert _active is not None
    name = arguments.thread.name if arguments.thread else "?"
    lines = traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
    _print_traceback(f"rank {rank()}, thread {name}: ", lines, (_active.errors, _active.log))


def _print_traceback(who: str, lines: list[str], streams: Iterable[TextIO]) -> None:
    for stream in streams:
        print(who + "".join(lines), end="", file=stream)


_SECONDS_BETWEEN_DRAWINGS = 0.2
_SECONDS_BETWEEN_LINES = 10.0
_BAR_WIDTH = 20


class ProgressLine:
    """A line of text that is replaced by the next one."""

    def __init__(self) -> None:
        self._is_terminal = terminal.obeys(console())
        self._shown_at = time.monotonic()
        self._width = 0

    def show(self, text: str, share: float | None = None) -> None:
        """Show the text if the last one is old enough; on a terminal with a bar for the completed share."""
        now = time.monotonic()
        if now - self._shown_at < (_SECONDS_BETWEEN_DRAWINGS if self._is_terminal else _SECONDS_BETWEEN_LINES):
            return
        self._shown_at = now
        if not self._is_terminal:
            say(text)
            return
        text = text if share is None else f"{_bar(share)} {text}"
        print(f"\r{text:<{self._width}}", end="", file=console(), flush=True)
        self._width = len(text)

    def clear(self) -> None:
        """Clear the terminal's line for the next output."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=console(), flush=True)
            self._width = 0


def _bar(share: float) -> str:
    done = round(_BAR_WIDTH * min(1.0, share))
    return "█" * done + "░" * (_BAR_WIDTH - done)
