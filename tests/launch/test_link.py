"""Supervisors of several machines, as processes of this one: what one meets, all know."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import ROOT, all_pids, environment, free_port, rank_pids, wait_for

from bigtx.launch import consistency, link
from bigtx.launch.link import meet
from bigtx.launch.world import World
from bigtx.utils.errors import LaunchError

PROGRAM = Path(__file__).with_name("program.py")


class Machines:
    """Commands that take themselves for machines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.commands: list[subprocess.Popen[str]] = []

    def start(self, *works: list[str]) -> list[subprocess.Popen[str]]:
        """Start a command for each machine, with the works of its ranks; wait until those that have to are ready."""
        for node, own in enumerate(works):
            command = [sys.executable, str(PROGRAM), str(self.folder), *own]
            variables = environment(PYTHONPATH=str(ROOT), NODE=f"{node}/{len(works)}:{self.port}")
            self.commands.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=variables,
                    start_new_session=True,
                )
            )
        ranks = [work for own in works for work in own]
        waiting = [rank for rank, work in enumerate(ranks) if work in ("obey", "hang")]
        wait_for(lambda: all((self.folder / f"ready-{rank}").exists() for rank in waiting), self.commands[0])
        return self.commands

    def ends(self) -> list[tuple[int, str, str]]:
        """Every command's status and what it printed, once no process is left."""
        ends = []
        for command in self.commands:
            out, err = command.communicate(timeout=60)
            ends.append((command.returncode, out, err))
        assert all_pids(self.folder) == []
        return ends

    def ranks_of(self, node: int) -> list[int]:
        return [pid for pid in rank_pids(self.folder) if os.getsid(pid) == self.commands[node].pid]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    for pid in all_pids(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["supervisor", "rank"])
def test_a_request_on_one_machine_stops_all(machines: Machines, victim: str) -> None:
    commands = machines.start(["obey", "obey"], ["obey", "obey"], ["obey", "obey"])
    os.kill(commands[1].pid if victim == "supervisor" else machines.ranks_of(1)[1], signal.SIGUSR1)
    ends = machines.ends()
    assert [status for status, _, _ in ends] == [75, 75, 75]
    assert "".join(err for _, _, err in ends) == "" and ends[0][1].startswith("saved on SIG")


def test_the_rank_that_failed_first_on_any_machine_is_explained_once(machines: Machines) -> None:
    machines.start(["lose", "lose"], ["hang", "hang"], ["obey", "raise:no such thing"])
    (first, out, err), *others = machines.ends()
    assert (first, out) == (1, "") and [status for status, _, _ in others] == [1, 1]
    assert err.startswith("rank 5 on ") and "failed after step 7: RuntimeError: no such thing\n" in err
    assert [text for _, _, text in others] == ["", ""]


def test_a_killed_rank_of_the_first_machine_is_explained(machines: Machines) -> None:
    machines.start(["obey", "hang"], ["hang", "lose"])
    os.kill(machines.ranks_of(0)[1], signal.SIGKILL)
    ends = machines.ends()
    assert [status for status, _, _ in ends] == [137, 137]
    assert ends[0][2].startswith("LaunchError: rank 1 on ") and "SIGKILL" in ends[0][2] and ends[1][2] == ""


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_supervisor_is_killed_all_ranks_are_asked_to_stop(machines: Machines, victim: int) -> None:
    commands = machines.start(["obey"], ["obey"], ["obey"])
    commands[victim].kill()
    ends = machines.ends()
    assert [status for status, _, _ in ends] == [-9 if node == victim else 137 for node in range(3)]
    said = "".join(err for _, _, err in ends)
    assert f"(node {victim}) was killed, or the machine is gone" in said and "Traceback" not in said


def test_machines_that_start_other_numbers_of_ranks_are_refused(machines: Machines) -> None:
    machines.start(["end:0", "end:0"], ["end:0"])
    for status, out, err in machines.ends():
        assert (status, out) == (2, "") and "2 on each of 2 machines" in err and "1 on each of 2 machines" in err


def world(node: int, port: int, *, address: str = "127.0.0.1", num_nodes: int = 2) -> World:
    return World(1, num_nodes, node, address, port)


def test_a_machine_that_does_not_come_is_named() -> None:
    port = free_port()
    with pytest.raises(
        LaunchError, match=rf"only 1 of 2 machines connected to 127.0.0.1:{port + 1} .* missing: node 1"
    ):
        meet(world(0, port), seconds=0.3)


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_first_machine_that_is_not_reached_is_named(address: str) -> None:
    port = free_port()
    with pytest.raises(LaunchError, match=rf"does not reach the first machine at {re.escape(address)}:{port + 1}: .+"):
        meet(world(1, port, address=address), seconds=0.3)


def test_a_stranger_on_the_port_is_no_first_machine() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)) as stranger:
        threading.Thread(target=lambda: stranger.accept()[0].close(), daemon=True).start()
        with pytest.raises(LaunchError, match=rf"127.0.0.1:{port + 1} answers, but is not the first machine"):
            meet(world(1, port), seconds=5)


def test_a_port_that_is_taken_is_named() -> None:
    port = free_port()
    with socket.create_server(("", port + 1)), pytest.raises(LaunchError, match=f"cannot meet at 127.0.0.1:{port + 1}"):
        meet(world(0, port))


class Meeting:
    """Supervisors of several machines that meet, each in a thread of this process."""

    def __init__(self, *facts: dict[str, str], folder: Path | None = None) -> None:
        port, count = free_port(), len(facts)
        self.errors: list[LaunchError | None] = [None] * count
        threads = [
            threading.Thread(target=self._meet, args=(world(node, port, num_nodes=count), own, folder))
            for node, own in enumerate(facts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _meet(self, place: World, facts: dict[str, str], folder: Path | None) -> None:
        try:
            found = meet(place, facts, folder, seconds=10)
            assert found is not None
            found.close()
        except LaunchError as error:
            self.errors[place.node] = error

    def problem(self) -> str:
        """What all of them were told."""
        said = {str(error) for error in self.errors}
        assert len(said) == 1 and None not in self.errors
        return said.pop()


def test_machines_that_are_alike_meet(tmp_path: Path) -> None:
    facts = {"torch": "2.13.0", "commit": "abc"}
    assert Meeting(facts, facts, facts, folder=tmp_path / "runs" / "new").errors == [None] * 3
    assert list(tmp_path.iterdir()) == []


def test_another_commit_on_one_machine_is_refused_on_all() -> None:
    facts = {"torch": "2.13.0", "commit": "abc"}
    host = socket.gethostname()
    problem = Meeting(facts, facts, facts | {"commit": "def"}).problem()
    assert f"commit is def on {host} (node 2) and abc on {host} (node 0), {host} (node 1)." in problem


def test_a_machine_that_sees_another_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "sees", lambda path: threading.current_thread().name != "blind" and path.exists())
    monkeypatch.setattr(link, "host_name", lambda: "n1")
    real = link._join

    def join(place: World, *rest: Any) -> link.Link:
        threading.current_thread().name = "blind" if place.node == 2 else "seeing"
        return real(place, *rest)

    monkeypatch.setattr(link, "_join", join)
    meeting = Meeting({}, {}, {}, folder=tmp_path)
    assert f"in {tmp_path} is missing on n1 (node 2): " in meeting.problem()
    error = meeting.errors[0]
    assert error and error.broken_hosts == ("n1",) and list(tmp_path.iterdir()) == []


def test_a_machine_that_hangs_while_it_looks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(consistency, "SEEN_SECONDS", 0.2)
    monkeypatch.setattr(link, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(consistency, "sees", lambda path: over.wait(30))
    port = free_port()

    def hang() -> None:
        with pytest.raises(LaunchError):
            meet(world(1, port), {}, tmp_path)

    other = threading.Thread(target=hang)
    other.start()
    with pytest.raises(LaunchError, match=r"no answer from .+ \(node 1\)"):
        meet(world(0, port), {}, tmp_path, seconds=10)
    over.set()
    other.join()


def test_a_wrong_clock_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Clock:
        monotonic, sleep = time.monotonic, time.sleep

        @staticmethod
        def time() -> float:
            return time.time() + 3600 * (threading.current_thread().name == "late")

    monkeypatch.setattr(link, "time", Clock)
    port = free_port()
    other = threading.Thread(target=lambda: meet(world(1, port), {}), name="late")
    other.start()
    meet(world(0, port), {}, seconds=10)
    other.join()
    said = capsys.readouterr().out
    assert said.startswith("warning: the clock differs from that of") and "(node 1) by +3,600 s" in said


def test_machines_that_are_missing_are_named_by_the_launcher() -> None:
    place = World(1, 3, 0, "127.0.0.1", free_port(), "srun", ("a", "b", "c"))
    with pytest.raises(LaunchError, match=r"missing: b \(node 1\), c \(node 2\)") as caught:
        meet(place, seconds=0.2)
    assert caught.value.broken_hosts == ("b", "c")


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 5000 + b"\n",
        b'{"node": "1"}\n',
        b'{"node": true, "facts": {}}\n',
        b'{"node": 1, "num_nodes": 2, "num_local": 1, "facts": [7]}\n',
        b'{"node": 1, "num_nodes": "' + 5000 * b"a" + b'", "num_local": 1, "facts": {}}\n',
    ],
)
def test_another_program_at_the_port_is_not_admitted(said: bytes) -> None:
    ours, theirs = connected()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        peers: dict[int, Any] = {}
        link._admit(World(1, 2, 0, "127.0.0.1", 1), ours, peers)
        assert peers == {}


def test_a_machine_speaks_only_for_itself() -> None:
    ours, theirs = connected()
    with ours, theirs:
        first = link.Link(0, {}, [link._Peer(1, "a", ours)])
        theirs.sendall(b'{"node": 2, "request": 15}\n{"request": 15}\n')
        theirs.shutdown(socket.SHUT_WR)
        received = [message["node"] for message in first.receive()]
        assert received == [1, 1]


def connected() -> tuple[socket.socket, socket.socket]:
    """The two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


def test_the_longest_wait_is_less_than_a_minute() -> None:
    assert link.MEET_SECONDS + 5 < 60
