"""Commands on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path

import forks
from doors import ROOT, environment


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 80, kind: str = "dumb") -> None:
        self.main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        modes = termios.tcgetattr(other)
        modes[3] |= termios.NOFLSH  # Otherwise the kernel drops output that is not yet read when Ctrl-C is typed.
        termios.tcsetattr(other, termios.TCSANOW, modes)
        own = environment(PYTHONPATH=str(ROOT), TERM=kind)
        for name in ("COLUMNS", "LINES"):  # They would go before the terminal's own size.
            own.pop(name, None)
        self.process = forks.start(
            [sys.executable, "-m", "bigtx", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            on_terminal=True,
            env=own,
        )
        os.close(other)
        self.seen = ""

    def until(self, words: str) -> str:
        """Read on until these words have come since the last call; returns all that has."""
        end = time.monotonic() + 300
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            try:
                part = os.read(self.main, 4096)
            except OSError:  # The other side is closed.
                raise AssertionError(f"{words!r} never came: {self.seen!r}") from None
            self.seen += part.decode("utf-8", "replace")
        before, found, self.seen = self.seen.partition(words)
        return before + found

    def until_it_waits(self) -> None:
        """Wait until the command waits for keys.

        Python notices a signal between readline's prompt and this wait only at the next key.
        """
        stat, end = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + 300
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end
            time.sleep(0.01)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.main, text.encode())

    def end(self) -> int:
        """Read to the end of the command; returns its status."""
        self.all()
        return self.process.wait(timeout=60)

    def all(self) -> str:
        """All that comes to the end of the command."""
        parts = []
        while True:
            try:
                part = os.read(self.main, 4096)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
        os.close(self.main)
        return b"".join(parts).decode("utf-8", "replace")


class Screen:
    """What a terminal shows of what was written to it.

    Attributes:
        lines: all that have begun; one that is too long goes on in the next.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.lines = columns, [""]
        self._column = 0

    def show(self, text: str) -> list[str]:
        """Write; returns all lines, without the spaces at their ends."""
        for part in re.findall(r"\x1b\[K|.", text, re.DOTALL):
            if part == "\r":
                self._column = 0
            elif part == "\n":
                self.lines.append("")
            elif part == "\x1b[K":
                self.lines[-1] = self.lines[-1][: self._column]
            else:
                self._put(part)
        return [line.rstrip() for line in self.lines]

    def _put(self, sign: str) -> None:
        if self._column == self.columns:
            self.lines.append("")
            self._column = 0
        line = self.lines[-1].ljust(self._column)
        self.lines[-1] = line[: self._column] + sign + line[self._column + 1 :]
        self._column += 1
