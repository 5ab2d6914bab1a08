"""Show a run on the console: as a progress bar on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from bigtx.utils.terminal import ERASE_LINE, obeys, visible
from bigtx.utils.units import clock

_BAR_WIDTH, _LEAST_BAR_WIDTH = 24, 8
_SPARE_COLUMNS = 5
"""Free columns after the bar. A terminal may echo ^C there twice, which would break a full line in two."""
_SECONDS_BETWEEN_DRAWINGS = 0.1
_TAB = "\t"
# The speed is that of the last calls: the first steps (compilation, cold caches) do not represent the rest.
_SPEED_WINDOW = 30


class Console:
    """Output to a stream. After an error (a closed terminal, a full disk) nothing more is written to it."""

    def __init__(self, stream: TextIO, *, total_steps: int) -> None:
        """Start with nothing shown.

        Args:
            stream: a text stream; the bar is drawn if it is a terminal.
            total_steps: optimizer steps of the whole run; 0 if unknown.
        """
        self._stream = stream
        self._total_steps = total_steps
        self._is_terminal = obeys(stream)
        self._times: deque[tuple[float, int]] = deque(maxlen=_SPEED_WINDOW)
        self._bar = ""
        self._drawn_at = 0.0

    def message(self, text: str) -> None:
        """Print lines, on a terminal above the bar. Control characters are shown as escapes."""
        self._write(self._erase() + "".join(f"{visible(line, keep=_TAB)}\n" for line in text.split("\n")) + self._bar)

    def begin(self, step: int) -> None:
        """Show the bar before the next step, which may take long. Has no effect unless the stream is a terminal.

        Args:
            step: optimizer steps done, in an earlier start of the run or before it returned to a checkpoint.
        """
        self._times.clear()
        if self._is_terminal:
            erase, self._bar = self._erase(), self._fit(step, [])
            self._write(erase + self._bar)

    def progress(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        """Redraw the bar, or print one line.

        Args:
            step: optimizer steps done.
            tokens: input tokens seen.
            figures: metrics by name. train/loss, perf/tokens_per_second, perf/mfu (a fraction) and perf/memory_gib are
                shown.
        """
        now = time.monotonic()
        self._times.append((now, step))
        parts = [*_describe(figures), *self._describe_rest(step)]
        if not self._is_terminal:
            share = f"  {step / self._total_steps:.1%}" if self._total_steps else ""
            parts = [f"step {step}{self._of_total()}{share}", f"{shorten(tokens)} tokens", *parts]
            self._write("  ".join(parts) + "\n")
            return
        if now - self._drawn_at < _SECONDS_BETWEEN_DRAWINGS and step != self._total_steps:
            return
        self._drawn_at = now
        erase = self._erase()
        self._bar = self._fit(step, parts)
        self._write(erase + self._bar)

    def close(self) -> None:
        """Keep the last bar on the terminal, and begin a new line."""
        if self._bar:
            self._bar = ""
            self._write("\n")

    def _fit(self, step: int, parts: list[str]) -> str:
        """Return the bar's line, cut to the width of the terminal.

        The loss, a short bar and the remaining time have priority. The bar is widened by the columns that are left.
        """
        columns = self._columns() - _SPARE_COLUMNS
        lead = f"{step}{self._of_total()}"
        left = columns - len(lead)
        kept: set[int] = set()
        bar_width = 0
        for place in dict.fromkeys([0, len(parts) - 1, *range(len(parts))]):
            if 0 <= place < len(parts) and 2 + len(parts[place]) <= left:
                kept.add(place)
                left -= 2 + len(parts[place])
            if place == 0 and self._total_steps and left > _LEAST_BAR_WIDTH:
                bar_width, left = _LEAST_BAR_WIDTH, left - _LEAST_BAR_WIDTH - 1
        line = "  ".join([lead, *(part for place, part in enumerate(parts) if place in kept)])
        if bar_width:
            line = f"{self._draw_bar(step, min(_BAR_WIDTH, bar_width + left))} {line}"
        return line[:columns]

    def _draw_bar(self, step: int, width: int) -> str:
        full, empty = ("━", "─") if "utf" in (self._stream.encoding or "").lower() else ("#", "-")
        done = min(width, width * step // self._total_steps)
        return full * done + empty * (width - done)

    def _of_total(self) -> str:
        return f"/{self._total_steps}" if self._total_steps else ""

    def _describe_rest(self, step: int) -> list[str]:
        (first_time, first_step), (last_time, _) = self._times[0], self._times[-1]
        if step <= first_step or not self._total_steps:
            return []
        seconds = (last_time - first_time) / (step - first_step) * max(0, self._total_steps - step)
        return [f"{clock(seconds)} left"]

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _erase(self) -> str:
        return ERASE_LINE if self._bar else ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = open_nowhere()
            self._is_terminal = False


def shorten(number: float) -> str:
    """Return a count in three digits: 45.1k, 1.20M, 3.00B."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:#.3g}".rstrip(".") + suffix
    return f"{number:.4g}"


def _describe(figures: Mapping[str, float]) -> list[str]:
    shown = {
        "train/loss": lambda value: f"loss {value:.4f}",
        "perf/tokens_per_second": lambda value: f"{shorten(value)} tok/s",
        "perf/mfu": lambda value: f"MFU {value:.1%}",
        "perf/memory_gib": lambda value: f"{value:.1f} GiB",
    }
    return [describe(figures[name]) for name, describe in shown.items() if name in figures]


def open_nowhere() -> TextIO:
    """Return a stream that discards its text."""
    return open(os.devnull, "w", encoding="utf-8")
