"""A training on a terminal, as a person sees it: the bar, the last lines, and Ctrl-C with the ^C that is echoed."""

from __future__ import annotations

from pathlib import Path

import pytest
from doors import TINY
from terminals import Screen, Terminal

pytestmark = pytest.mark.dist
CTRL_C = "\x03"


def arguments(corpus: Path, run_dir: Path, *changes: str) -> list[str]:
    """Of a tiny run of one rank."""
    settings = [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", "track.wandb=off", *changes]
    return ["pretrain", *settings, "--ranks", "1"]


def lines_of(text: str, columns: int) -> list[str]:
    """What stands on the screen in the end: a bar that was too long would stand there twice."""
    assert "Traceback" not in text and "launch" not in text, text
    return Screen(columns).show(text)


def is_bar(line: str) -> bool:
    return line.startswith(("━", "─", "#", "-"))


def test_a_run_to_its_end(corpus: Path, tmp_path: Path) -> None:
    terminal = Terminal(*arguments(corpus, tmp_path / "run", "train.max_steps=6"), columns=120, kind="xterm")
    said = terminal.all()
    assert terminal.process.wait(timeout=60) == 0
    lines = lines_of(said, 120)
    assert "\r\x1b[K" in said, "no bar was drawn"
    assert [line for line in lines if is_bar(line)] == [lines[-4]] and " 6/6 " in lines[-4]
    assert lines[-3].startswith("finished: 6 steps") and lines[-2].startswith("next: bigtx generate ")
    assert lines[-1] == ""


def test_ctrl_c_twice_in_a_run(corpus: Path, tmp_path: Path) -> None:
    given = arguments(corpus, tmp_path / "run", "train.max_steps=100000", "validation.every=2 steps")
    terminal = Terminal(*given, columns=80, kind="xterm")
    said = terminal.until("validation at step 2")
    terminal.type(CTRL_C * 2)
    said += terminal.seen + terminal.all()
    assert terminal.process.wait(timeout=60) == 130
    assert "^C" in said, "the terminal echoes it"
    lines = lines_of(said, 80)
    after = lines[next(place for place, line in enumerate(lines) if line.startswith("stopping: ")) :]
    assert [line for line in after if line.startswith("stopping: ")] == [
        "stopping: a checkpoint is saved after this step"
    ]
    assert [line for line in lines if is_bar(line)] == [lines[-3]]
    assert lines[-2].startswith("stopped at step ") and lines[-2].endswith("resumes from it") and lines[-1] == ""
    assert not [line for line in lines if "^C" in line], lines


def test_ctrl_c_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    terminal = Terminal(*arguments(corpus, tmp_path / "run", "train.max_steps=100000"), columns=80, kind="xterm")
    said = terminal.until("run folder")
    terminal.type(CTRL_C)
    said += terminal.seen + terminal.all()
    assert terminal.process.wait(timeout=60) == 130
    assert lines_of(said, 80)[-2:] == ["stopped before the first step; nothing to save", ""]
