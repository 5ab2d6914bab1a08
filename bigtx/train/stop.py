"""Requests to stop: before the first step a signal ends the run, later the ranks agree on a step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from bigtx.utils.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from bigtx.utils.processes import stop_signals


class EarlyStop(SystemExit):
    """A request to stop while there is nothing to save; its code is the exit status."""


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into an `EarlyStop`, and after `defer` into a flag that the loop reads.

    Only the first one does anything: launchers send several.

    Attributes:
        signal: the first one received, or None.
        came_early: whether it came before `defer`.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        """Args:
        tell: called at once when the first request comes: whoever sent the signal may not wait for the end.
        """
        self.signal: signal.Signals | None = None
        self.came_early = False
        self._tell = tell
        self._is_deferred = False
        for number in stop_signals():
            signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """Whether any signal came."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, else the status that asks for a requeue."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_REQUEUE

    def defer(self) -> None:
        """From now on signals only set the flag."""
        self._is_deferred = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            self.came_early = not self._is_deferred
            self._tell()
            if self.came_early:
                raise EarlyStop(self.exit_status)
