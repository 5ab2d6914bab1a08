from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from bigtx.track.console import Console, shorten
from bigtx.utils.units import clock

FIGURES = {"train/loss": 3.21456, "perf/tokens_per_second": 45123.0, "perf/mfu": 0.3124, "perf/memory_gib": 12.34}

_END_OF_TEXT = "\x1c"


class Terminal:
    """A pseudo terminal and what it shows."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream: TextIO = open(slave, "w", encoding="utf-8")  # noqa: SIM115

    def text(self) -> str:
        """All that was written so far; the kernel may hand it over in several pieces, hence the mark at the end."""
        self.stream.write(_END_OF_TEXT)
        self.stream.flush()
        data = b""
        while not data.endswith(_END_OF_TEXT.encode()):
            data += os.read(self._master, 65536)
        return data.decode().removesuffix(_END_OF_TEXT)

    def screen(self) -> list[str]:
        """The lines as a person sees them, for the two controls that are used: return, and erase to the end."""
        lines = [""]
        for part in re.split(r"(\r\x1b\[K|\r\n)", self.text()):
            if part == "\r\x1b[K":
                lines[-1] = ""
            elif part == "\r\n":
                lines.append("")
            else:
                lines[-1] += part
        return lines

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("bigtx.track.console._SECONDS_BETWEEN_DRAWINGS", 0.0)
    terminal = Terminal(columns=120)
    yield terminal
    terminal.close()


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    console = Console(stream, total_steps=200)
    console.progress(10, 1_200_000, FIGURES)
    console.message("samples\nfollow")
    console.progress(20, 2_400_000, FIGURES)
    console.close()
    first, *middle, last = stream.getvalue().splitlines()
    assert first == "step 10/200  5.0%  1.20M tokens  loss 3.2146  45.1k tok/s  MFU 31.2%  12.3 GiB"
    assert middle == ["samples", "follow"]
    assert last.startswith("step 20/200  10.0%") and last.endswith("left")


def test_the_bar_is_redrawn_and_messages_stand_above(terminal: Terminal) -> None:
    console = Console(terminal.stream, total_steps=200)
    console.progress(10, 1000, FIGURES)
    console.message("a message")
    console.progress(100, 2000, {"train/loss": 2.5})
    console.close()
    above, bar, after = terminal.screen()
    assert (above, after) == ("a message", "")
    assert bar.startswith("━━━━━━━━━━━━────────────") and "100/200" in bar and "loss 2.5000" in bar and "left" in bar


def test_the_bar_is_there_before_the_first_step(terminal: Terminal) -> None:
    console = Console(terminal.stream, total_steps=200)
    console.begin(100)
    assert terminal.screen() == ["━━━━━━━━━━━━──────────── 100/200"]
    console.message("a message")
    console.progress(101, 2000, {"train/loss": 2.5})
    console.close()
    above, bar, after = terminal.screen()
    assert (above, after) == ("a message", "") and "101/200  loss 2.5000" in bar and "left" not in bar


def test_nothing_is_said_before_the_first_step_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    Console(stream, total_steps=200).begin(0)
    assert stream.getvalue() == ""


def test_a_narrow_terminal_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(columns=30)
    Console(terminal.stream, total_steps=200).progress(10, 1000, FIGURES)
    text = terminal.text()
    assert len(text) < 30 and "10/200" in text and "loss" in text
    terminal.close()


class Notebook(io.StringIO):
    """A terminal that is no file, as in some editors."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_without_a_width_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = []
    for columns in (0, 80):
        terminal = Terminal(columns=columns)
        Console(terminal.stream, total_steps=200).progress(10, 1000, FIGURES)
        shown.append(terminal.text())
        terminal.close()
    notebook = Notebook()
    Console(notebook, total_steps=200).progress(10, 1000, FIGURES)
    assert shown[0] == shown[1] == notebook.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_bar_and_the_time_left_are_seen_on_every_usual_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("bigtx.track.console._SECONDS_BETWEEN_DRAWINGS", 0.0)
    terminal = Terminal(columns=columns)
    console = Console(terminal.stream, total_steps=200_000)
    for step in (99_000, 100_000):
        console.progress(step, 1000, FIGURES)
    bar = terminal.screen()[-1]
    width = sum(bar.count(sign) for sign in "━─")
    assert width >= 8 and bar.count("━") == width // 2 and len(bar) < columns
    assert "100000/200000" in bar and "loss 3.2146" in bar and bar.endswith("left")
    terminal.close()


def now_is(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    monkeypatch.setattr("bigtx.track.console.time.monotonic", lambda: now)


def test_the_time_left_is_by_the_speed_of_the_latest_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step takes 1000 s, the others 2 s each."""
    stream = io.StringIO()
    console = Console(stream, total_steps=200)
    for step in range(1, 41):
        now_is(monkeypatch, 1000.0 + 2 * (step - 1) if step > 1 else 0.0)
        console.progress(step, step, {})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/200  0.5%  1 tokens"
    assert lines[1].endswith(f"  {clock(1002 * 198)} left") and lines[29].endswith(f"  {clock(1058 / 29 * 170)} left")
    assert lines[39].endswith("  5:20 left")  # 160 steps.


def test_nothing_is_left_at_the_end_or_known_without_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console, endless = Console(stream, total_steps=20), Console(stream, total_steps=0)
    for step, now in ((10, 0.0), (20, 5.0), (21, 6.0)):
        now_is(monkeypatch, now)
        console.progress(step, step, {})
        endless.progress(step, step, {})
    lines = stream.getvalue().splitlines()
    assert [line.split("  ", 1)[1] for line in lines[2::2]] == [
        "100.0%  20 tokens  0:00 left",
        "105.0%  21 tokens  0:00 left",
    ]
    assert lines[1::2] == ["step 10  10 tokens", "step 20  20 tokens", "step 21  21 tokens"]


def test_a_bar_is_drawn_ten_times_a_second_at_most_and_at_the_end(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TERM", "xterm")
    console = Console(terminal.stream, total_steps=9)
    for step, now in ((1, 10.0), (2, 10.05), (3, 10.099), (4, 10.11), (5, 10.15), (9, 10.16)):
        now_is(monkeypatch, now)
        console.progress(step, step, {})
    assert re.findall(r"(\d)/9", terminal.text()) == ["1", "4", "9"]


def test_samples_cannot_command_the_terminal() -> None:
    stream = io.StringIO()
    Console(stream, total_steps=0).message("\x1b[2Jgone\x07\r\u202e é")
    assert stream.getvalue() == "\\x1b[2Jgone\\x07\\r\\u202e é\n"


def test_a_broken_stream_is_left_alone() -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115
    console = Console(stream, total_steps=10)
    for step in range(3):
        console.progress(step, step, {})
        console.message("text")
    console.close()


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (999, "999"), (45123, "45.1k"), (1.2e6, "1.20M"), (3e12, "3.00T")]
)
def test_shorten(number: float, text: str) -> None:
    assert shorten(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (3731, "1:02:11"), (3 * 86400 + 4.2 * 3600, "3d 04:12")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
