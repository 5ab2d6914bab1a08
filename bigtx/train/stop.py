"""Requests to stop: before the first step a signal ends the run; after that, the ranks agree on a step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from bigtx.utils.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from bigtx.utils.processes import stop_signals

STOP_FILE = "STOP"
"""A file of this name in the run folder asks the run to stop, as SIGTERM does."""
SECONDS_BETWEEN_LOOKS = 1.0


class EarlyStop(SystemExit):
    """A request to stop before there is anything to save; its code is the exit status."""


class StopRequest:
    """A handler that turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into an `EarlyStop`, and after `defer` into a flag.

    While the loop runs, a file may request a stop too: see `watch`. Only the first request has an effect, because
    launchers send several.

    Attributes:
        signal: the first signal received, or None.
        came_early: whether the signal came before `defer`.
    """

    def __init__(self, announce: Callable[[bool], None]) -> None:
        """Install the signal handlers.

        Args:
            announce: called at once at the first request, with whether it came early: the sender of the signal may not
                wait for the end.
        """
        self.signal: signal.Signals | None = None
        self.came_early = False
        self._announce = announce
        self._is_deferred = False
        self._file: Path | None = None
        self._next_look = 0.0
        for number in stop_signals():
            signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """Return whether a stop was requested."""
        if self._file and self.signal is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            if self._file.exists():
                self._receive(signal.SIGTERM, None)
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """Return 130 after Ctrl-C, else the status that asks for a requeue."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_REQUEUE

    def defer(self) -> None:
        """Make later signals only set the flag."""
        self._is_deferred = True

    def watch(self, file: Path) -> None:
        """Treat a file as SIGTERM once it exists. `requested` checks for it at most once a second."""
        self._file = file

    def forget_file(self) -> None:
        """Delete the watched file, if it exists, since the request is answered."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            self.came_early = not self._is_deferred
            self._announce(self.came_early)
            if self.came_early:
                raise EarlyStop(self.exit_status)
