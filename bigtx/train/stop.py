"""Requests to stop: before the first step a signal ends the run, later the ranks agree on a step."""

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
    """A request to stop while there is nothing to save; its code is the exit status."""


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into an `EarlyStop`, and after `defer` into a flag that the loop reads.

    A file may ask as well, while the loop runs: see `watch`.

    Only the first one does anything: launchers send several.

    Attributes:
        signal: the first one received, or None.
        came_early: whether it came before `defer`.
    """

    def __init__(self, announce: Callable[[bool], None]) -> None:
        """Listen to signals.

        Args:
            announce: called at once when the first request comes, with whether it came early: the sender of the signal
                may not wait for the end.
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
        """Return whether any request came."""
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
        """Let later signals only set the flag."""
        self._is_deferred = True

    def watch(self, file: Path) -> None:
        """Take a file as SIGTERM once it is there; looked for when `requested` is asked, at most once a second."""
        self._file = file

    def forget_file(self) -> None:
        """Delete the file that was watched, if it is there: the request is answered."""
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
