"""Which launchers a rank watches, and what the kernel is asked, without processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bigtx.launch import linux, parents


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (b"/usr/bin/python\0/usr/bin/deepspeed\0train.py", True),
        (b"python\0-m\0torch.distributed.run\0x", True),
        (b"python\0-u\0-m\0deepspeed.launcher.launch", True),
        (b"python\0a\0b\0c\0runs/deepspeed", False),
        (b"bash\0-l", False),
    ],
)
def test_a_launcher_is_known_by_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: bytes, expected: bool
) -> None:
    (tmp_path / "proc" / "5").mkdir(parents=True)
    (tmp_path / "proc" / "5" / "cmdline").write_bytes(command)
    monkeypatch.setattr(parents, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert parents._is_launcher(5) is expected and not parents._is_launcher(6)


def test_only_an_unbroken_line_of_launchers_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    above = {50: 40, 40: 30, 30: 20, 20: 1}
    monkeypatch.setattr(parents, "parent_of", above.__getitem__)
    monkeypatch.setattr(parents, "_is_launcher", lambda pid: pid in (40, 30))
    assert parents._launchers_above(50) == [40, 30] and parents._launchers_above(30) == []
    monkeypatch.setattr(parents, "_is_launcher", lambda pid: True)
    assert parents._launchers_above(50) == [40, 30, 20]


@pytest.mark.parametrize("then", [None, "another process"])
def test_a_rank_asks_itself_to_stop_when_a_launcher_is_gone(monkeypatch: pytest.MonkeyPatch, then: str | None) -> None:
    starts, killed = iter(["a", "b", "a", "b", "a", then]), list[tuple[int, int]]()
    monkeypatch.setattr(parents, "start_of", lambda pid: next(starts))
    monkeypatch.setattr(parents, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    parents._watch({5: "a", 6: "b"})
    assert killed == [(os.getpid(), signal.SIGTERM)] and next(starts, "all") == "all"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/memory.events": "low 0\noom 3\noom_kill 2\n", "proc/vmstat": "oom_kill 9\n"}, 2),
        ({"proc/vmstat": "nr_free 1\noom_kill 9\n"}, 9),
        ({"sys/fs/cgroup/memory.events": "oom_kill many\n", "proc/vmstat": "oom_kill 4\n"}, 4),
        ({}, 0),
    ],
)
def test_kills_for_want_of_memory_are_counted_where_the_kernel_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(linux, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert linux.out_of_memory_kills() == expected


def test_processes_of_another_session_are_no_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    below = {os.getpid(): [2, 3], 2: [4], 3: [5], 4: [], 5: []}
    sessions = {0: 1, 2: 1, 3: 7, 4: 1, 5: 1}
    monkeypatch.setattr(linux, "_children", below.__getitem__)
    monkeypatch.setattr(os, "getsid", sessions.__getitem__)
    assert sorted(linux.descendants()) == [2, 4]
