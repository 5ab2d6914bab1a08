"""One line for the progress of a long job: redrawn on a terminal, printed at intervals elsewhere."""

from __future__ import annotations

import time

from bigtx.utils.log import console, say
from bigtx.utils.terminal import obeys

_SECONDS_BETWEEN_DRAWINGS = 0.2
_SECONDS_BETWEEN_LINES = 10.0
_BAR_WIDTH = 20


class ProgressLine:
    """A line of text that is replaced by the next one."""

    def __init__(self) -> None:
        self._is_terminal = obeys(console())
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


def clock(seconds: float) -> str:
    """Return a time as people read it: 0:07, 12:34, 3:25:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
