"""Which launchers a rank watches, and what the kernel is asked, without processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from doors import ROOT, free_port

from bigtx.launch import link, world
from bigtx.utils import processes
from bigtx.utils.errors import LaunchError


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
    monkeypatch.setattr(world, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert world._is_launcher(5) is expected and not world._is_launcher(6)


def test_only_an_unbroken_line_of_launchers_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    above = {50: 40, 40: 30, 30: 20, 20: 1}
    monkeypatch.setattr(world, "parent_of", above.__getitem__)
    monkeypatch.setattr(world, "_is_launcher", lambda pid: pid in (40, 30))
    assert world._launchers_above(50) == [40, 30] and world._launchers_above(30) == []
    monkeypatch.setattr(world, "_is_launcher", lambda pid: True)
    assert world._launchers_above(50) == [40, 30, 20]


@pytest.mark.parametrize("then", [None, "another process"])
def test_a_rank_asks_itself_to_stop_when_a_launcher_is_gone(monkeypatch: pytest.MonkeyPatch, then: str | None) -> None:
    starts, killed = iter(["a", "b", "a", "b", "a", then]), list[tuple[int, int]]()
    monkeypatch.setattr(world, "start_of", lambda pid: next(starts))
    monkeypatch.setattr(world, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    world._watch({5: "a", 6: "b"})
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
    monkeypatch.setattr(processes, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert processes.out_of_memory_kills() == expected


def test_processes_of_another_session_are_no_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    below = {os.getpid(): [2, 3], 2: [4], 3: [5], 4: [], 5: []}
    sessions = {0: 1, 2: 1, 3: 7, 4: 1, 5: 1}
    monkeypatch.setattr(processes, "children", below.__getitem__)
    monkeypatch.setattr(os, "getsid", sessions.__getitem__)
    assert sorted(processes.descendants()) == [2, 4]


@pytest.mark.parametrize(("launchers", "watched"), [([], []), ([7, 8], [{7: "start of 7", 8: "start of 8"}])])
def test_launchers_are_watched_by_a_thread_that_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, launchers: list[int], watched: list[dict[int, str]]
) -> None:
    started: list[dict[int, str]] = []

    def thread(target: object, args: tuple[dict[int, str]], daemon: bool) -> SimpleNamespace:
        assert target is world._watch and daemon
        return SimpleNamespace(start=lambda: started.append(args[0]))

    monkeypatch.setattr(world.threading, "Thread", thread)
    monkeypatch.setattr(world, "_launchers_above", lambda pid: launchers if pid == os.getpid() else [])
    monkeypatch.setattr(world, "start_of", lambda pid: f"start of {pid}")
    world.watch_launchers()
    assert started == watched


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_rank_whose_parent_is_gone_already_is_asked_to_stop_at_once(
    monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    asked: list[tuple[int, int]] = []
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(processes, "_prctl", lambda option, value: asked.append((option, value)))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    processes.end_with_parent(signal.SIGTERM, 1 if is_gone else os.getppid())
    assert asked == [(1, signal.SIGTERM)]  # PR_SET_PDEATHSIG, prctl(2).
    assert killed == ([(os.getpid(), signal.SIGTERM)] if is_gone else [])


def test_a_machine_without_power_is_noticed_within_20_seconds() -> None:
    with socket.socket() as made:
        link._kept_alive(made)
        tcp = [
            made.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) for name in ("KEEPIDLE", "KEEPINTVL")
        ]
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1 and tcp == [5, 5]
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


ARRIVAL = """
import signal, socket
from bigtx.launch.link import Link, _Peer
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
own, other = socket.socketpair()
link = Link(0, {}, [_Peer(1, "host", own)])
link.signal_arrivals()
other.sendall(b'{"failed": true, "node": 1}\\n')
assert signal.sigtimedwait({signal.SIGIO}, 60) is not None
assert link.receive() == [{"failed": True, "node": 1}]
"""


def test_what_arrives_wakes_the_supervisor() -> None:
    """A process of its own, because the signal would end this one in any thread that does not block it."""
    done = subprocess.run([sys.executable, "-c", ARRIVAL], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def meet_as(*places: int, num_nodes: int) -> list[link.Link | BaseException | None]:
    """What meeting gives each of some machines, in threads of this process."""
    from launch.test_link import world

    port, found = free_port(), list[link.Link | BaseException | None]([None] * len(places))

    def one(number: int, node: int) -> None:
        try:
            found[number] = link.meet(world(node, port, num_nodes=num_nodes), seconds=20)
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=given) for given in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_machines_that_have_met_know_each_other_and_hear_each_other() -> None:
    found = meet_as(0, 2, 1, num_nodes=3)
    first, third, second = (one for one in found if isinstance(one, link.Link))
    assert [one.node for one in (first, second, third)] == [0, 1, 2]
    assert first.hosts == second.hosts == third.hosts == dict.fromkeys(range(3), socket.gethostname())
    for peer in first._peers + second._peers + third._peers:
        peer.connection.setblocking(False)
    second.send(failed=True)
    message = {"failed": True, "node": 1}
    assert heard(first) == [message] and heard(third) == [message]
    for one in (first, second, third):
        one.close()


def heard(one: link.Link) -> list[dict[str, object]]:
    """The first messages that arrive."""
    while not (messages := one.receive()):
        time.sleep(0.01)
    return messages


def test_two_machines_of_one_place_are_refused() -> None:
    first, second, third = meet_as(0, 1, 1, num_nodes=3)
    for error in (first, second, third):
        assert isinstance(error, LaunchError)
        assert "have the same place in this run; start bigtx once on each machine" in str(error)
    for one in meet_as(0, 1, num_nodes=2):
        assert isinstance(one, link.Link)
        one.close()


def test_one_machine_meets_nobody() -> None:
    assert meet_as(0, num_nodes=1) == [None]
