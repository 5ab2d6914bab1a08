"""What a supervisor makes of what it knows, without processes: whose end counts, what is said, and when it acts."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from bigtx.launch import supervisor
from bigtx.launch.explain import _last_lines, _last_step, _signal_name, read_facts
from bigtx.launch.link import LARGEST_MESSAGE, Link, _Peer
from bigtx.launch.supervisor import _End, _Rank
from bigtx.launch.watchdog import Watchdog
from bigtx.launch.world import World
from bigtx.utils import log, processes

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


class Machine(supervisor._Supervisor):
    """A supervisor whose ranks ended as a test says, in a time of its own."""

    def __init__(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[int | None], **facts: Any
    ) -> None:
        self._run_dir, self._link = run_dir, None
        self._ends, self._gone, self._first_failed, self._killed = {}, set(), [], set()
        self._request = self._deadline = self._asks_at = None
        self._memory_kills, self._verdict = 0, None
        self._watchdog = Watchdog(max(1, len(statuses)), math.inf, run_dir)
        self._ranks = [_Rank(number, 1000 + number, -1, status) for number, status in enumerate(statuses)]
        for number, known in facts.items():
            self._ranks[int(number.removeprefix("rank"))].facts = known
        self.now = 100.0
        self.killed: list[tuple[int, int]] = []
        self.said: list[str] = []
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "kill", lambda pid, number: self.killed.append((pid, number)))
        monkeypatch.setattr(log, "say_error", self.said.append)
        monkeypatch.setattr(log, "say_stopped", self.said.append)
        monkeypatch.setattr(processes, "out_of_memory_kills", lambda: 0)
        for rank in self._ranks:
            self._watchdog.watch(rank.number, rank.pid)
        for rank in self._ranks:
            if rank.status is not None:
                self._handle_end(rank)


def test_a_ranks_place_among_all_machines() -> None:
    assert World(4, 3, 2, "first", 500).environment(1, 777) == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "first",
        "MASTER_PORT": "777",
    }
    assert World(4, 3, 2, "first", 500).link_port == 501


@pytest.mark.parametrize(
    ("statuses", "facts", "request_", "expected"),
    [
        ([0, 0], {}, None, 0),
        ([75, 75], {}, TERM, 75),
        ([130, 130], {}, INT, 130),
        ([75, 130], {}, None, 130),
        ([-15, -15], {}, INT, 130),
        ([-15, 75], {}, TERM, 75),
        ([1, 0], {}, None, 1),
        ([0, 3], {}, None, 3),
        ([-9, 1], {"rank1": {"lost": True}}, None, 137),
        ([1, -9], {"rank0": {"lost": True}}, None, 137),
        ([1, 2], {"rank0": {"lost": True}}, None, 2),
        ([1, 1], {"rank0": {"lost": True}, "rank1": {"lost": True}}, None, 1),
        ([-11, 75], {}, TERM, 139),
    ],
)
def test_the_status_is_that_of_the_first_failure_that_no_other_caused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[int], facts: Any, request_: Any, expected: int
) -> None:
    machine = Machine(tmp_path, monkeypatch, statuses, **facts)
    machine._request = request_
    assert machine._conclude() == expected
    assert len(machine.said) == (expected not in (0, 75, 130)) + (expected in (75, 130))


@pytest.mark.parametrize(
    ("is_answered", "words"), [(True, []), (False, ["stopped before the first step; nothing to save"])]
)
def test_a_rank_that_does_not_listen_yet_has_its_stop_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_answered: bool, words: list[str]
) -> None:
    machine = Machine(tmp_path, monkeypatch, [75, 75], rank0={"stopped": is_answered})
    assert machine._conclude() == 75 and machine.said == words


def test_of_several_machines_only_the_first_tells_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, [75])
    machine._ranks[0].number = 8
    assert machine._conclude() == 75 and machine.said == []


@pytest.mark.parametrize("status", [0, 75, 130, -TERM, -INT, -signal.SIGHUP, -signal.SIGUSR1])
def test_what_a_request_does_to_a_rank_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    machine = Machine(tmp_path, monkeypatch, [status, None])
    assert machine._first_failed == [] and machine._deadline is None
    # The others are asked a second later, unless they have agreed.
    assert machine._asks_at == (None if status == 0 else 101.0)
    machine.now = 100.9
    machine._act_in_time()
    assert machine.killed == []
    machine.now = 101.0
    machine._act_in_time()
    machine._act_in_time()
    assert machine.killed == ([] if status == 0 else [(1001, TERM)])


@pytest.mark.parametrize("status", [1, 2, -KILL, -signal.SIGSEGV])
def test_after_a_failure_the_others_have_some_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    machine = Machine(tmp_path, monkeypatch, [None, status, None])
    assert machine._patience() == supervisor.FAREWELL_SECONDS
    machine.now += supervisor.FAREWELL_SECONDS - 0.5
    machine._fail()  # A second one gives no more time.
    assert machine._patience() == 0.5
    machine._act_in_time()
    assert machine.killed == []
    machine.now += 0.5
    machine._act_in_time()
    assert machine.killed == [(1000, KILL), (1002, KILL)]
    # What they end by is our doing.
    for number in (0, 2):
        machine._ranks[number].status = -KILL
        machine._handle_end(machine._ranks[number])
    assert [rank.number for rank in machine._first_failed] == [1] and machine._running() == []


def test_ranks_are_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, [None, 0, None])
    assert machine._patience() == 3600.0
    machine._ask(signal.SIGUSR1)
    machine._ask(TERM)
    assert machine.killed == [(1000, signal.SIGUSR1), (1002, signal.SIGUSR1)]


def explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, **facts: Any) -> list[str]:
    machine = Machine(tmp_path, monkeypatch, [0, status], rank1=facts)
    assert machine._conclude() in (status, 128 - status)
    (text,) = machine.said
    return text.split("\n")


def test_a_failure_is_said_with_its_step_and_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"rank 1 on {socket.gethostname()}"
    assert explained(tmp_path, monkeypatch, 3) == [f"{where} failed before the first step: it ended with status 3"]
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "rank-00001.log"
    path.write_text("".join(f"line {number}\n" for number in range(25)))
    lines = explained(tmp_path, monkeypatch, 1, step=1200, error="ValueError: no")
    assert lines == [
        f"{where} failed after step 1,200: ValueError: no",
        f"The last lines of {path}:",
        *(f"  line {number}" for number in range(5, 25)),
        "No checkpoint was saved: the same command starts at the first step.",
    ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8}\n{"st')
    assert explained(tmp_path, monkeypatch, -KILL)[0] == f"LaunchError: {where} was ended after step 8 by SIGKILL"


def test_a_rank_that_was_killed_for_want_of_memory_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, ends in ((-KILL, "SIGKILL, because this machine's memory ran out"), (-signal.SIGSEGV, "SIGSEGV")):
        machine = Machine(tmp_path, monkeypatch, [0, status])
        monkeypatch.setattr(processes, "out_of_memory_kills", lambda: 1)
        machine._conclude()
        assert machine.said[0].endswith(f"by {ends}")


def test_an_error_that_the_user_has_seen_is_not_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, [2, 2], rank1={"said": True})
    assert machine._conclude() == 2 and machine.said == []


class Told:
    """A link that keeps what is sent, and brings what a test says."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.hosts = {0: "a", 1: "b", 2: "c"}
        self.sent: list[dict[str, Any]] = []
        self.messages = list(messages)

    def send(self, **message: Any) -> None:
        self.sent.append(message)

    def receive(self) -> list[dict[str, Any]]:
        messages, self.messages = self.messages, []
        return messages


def linked(machine: Machine, *messages: dict[str, Any]) -> Told:
    link = Told(*messages)
    machine._link = link  # type: ignore[assignment]
    return link


def test_other_machines_requests_and_failures_are_taken_and_own_ones_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, [None])
    link = linked(machine, {"node": 1, "request": int(signal.SIGUSR1)}, {"node": 2, "failed": True})
    machine._receive()
    assert machine.killed == [(1000, signal.SIGUSR1)] and machine._deadline == 100.0 + supervisor.FAREWELL_SECONDS
    assert link.sent == [{"request": signal.SIGUSR1}, {"failed": True, "waited": False}]


def test_a_machine_that_is_gone_without_a_word_is_a_failure_and_one_that_has_ended_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, [None])
    end = {"node": 1, "end": {"status": 0, "text": "", "lost": False, "said": False}}
    linked(machine, end, {"node": 1, "gone": True}, {"node": 2, "gone": True})
    machine._receive()
    assert machine._ends[1] == _End(0) and machine._gone == {2} and machine.killed == [(1000, TERM)]
    assert machine._ends[2].status == 137
    assert machine._ends[2].text == "LaunchError: bigtx on c (node 2) was killed, or the machine is gone"


@pytest.mark.parametrize(
    ("own", "others", "status", "said"),
    [
        (_End(0), {}, 0, []),
        (_End(1, "own"), {1: _End(1, "other")}, 1, ["own"]),
        (_End(1, "own", lost=True), {1: _End(3, "other")}, 3, ["other"]),
        (_End(1, "own", lost=True), {1: _End(1, "other", lost=True)}, 1, ["own"]),
        (_End(1, "own"), {1: _End(1, "other", said=True)}, 1, []),
        (_End(1, "own"), {0: _End(1, "first")}, 1, []),  # It explains the failure.
        (_End(1, "own"), {0: _End(75)}, 1, ["own"]),
        (_End(75), {1: _End(137, "other")}, 137, ["other"]),
    ],
)
def test_one_machine_explains_the_failure_that_no_other_caused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: _End,
    others: dict[int, _End],
    status: int,
    said: list[str],
) -> None:
    machine = Machine(tmp_path, monkeypatch, [])
    machine._ends = others
    link = linked(machine)
    link.hosts = {node: "x" for node in range(len(others) + 1)}
    monkeypatch.setattr(machine, "_own_end", lambda: own)
    assert machine._conclude() == status and machine.said == said
    assert [message["end"]["status"] for message in link.sent] == [own.status]


def test_after_a_failure_the_accounts_of_all_machines_are_waited_for_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, [])
    link = linked(machine)
    waited: list[float] = []

    def wait(numbers: set[int], seconds: float) -> None:
        assert numbers == {signal.SIGIO}
        waited.append(seconds)
        machine.now += 4.0
        if len(waited) == 1:
            link.messages = [{"node": 1, "end": {"status": 5, "text": "other", "lost": False, "said": False}}]

    monkeypatch.setattr(signal, "sigtimedwait", wait)
    ends = machine._confer(link, _End(1, "own", lost=True))  # type: ignore[arg-type]
    total = supervisor.CONFER_SECONDS
    assert waited == [total - 4.0 * number for number in range(len(waited))] and 4.0 * len(waited) >= total
    assert ends == [_End(1, "own", lost=True), _End(5, "other")]
    waited.clear()
    assert machine._confer(link, _End(0)) == [_End(0), _End(5, "other")] and waited == []  # type: ignore[arg-type]


def test_facts_of_a_rank_add_up_and_half_a_line_costs_itself_alone() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"step": 7, "lost": true}\n{"error": "E", "step": 8}\n{"ste')
    os.close(writing)
    assert read_facts(reading) == {"step": 8, "lost": True, "error": "E"}


def test_the_last_step_and_the_last_lines(tmp_path: Path) -> None:
    assert _last_step(tmp_path) == 0 and _last_lines(tmp_path / "no.log") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 9}\n[]\n{"x": 1}\nno\n')
    assert _last_step(tmp_path) == 9
    (tmp_path / "short.log").write_bytes(b"a\n\xff\n")
    assert _last_lines(tmp_path / "short.log") == ["a", "\ufffd"]
    assert _signal_name(9) == "SIGKILL" and _signal_name(999) == "signal 999"


def links(count: int) -> tuple[Link, list[socket.socket]]:
    """The first machine's link to others, and the others' ends."""
    pairs = [socket.socketpair() for _ in range(count)]
    peers = [_Peer(node, f"host{node}", own) for node, (own, _) in enumerate(pairs, start=1)]
    for own, other in pairs:
        own.setblocking(False)
        other.settimeout(5)
    return Link(0, {}, peers), [other for _, other in pairs]


def test_messages_reach_all_others_with_their_sender(tmp_path: Path) -> None:
    link, (first, second) = links(2)
    link.send(failed=True)
    for end in (first, second):
        assert json.loads(end.recv(1000)) == {"failed": True, "node": 0}
    first.sendall(b'{"request": 10, "node": 1}\n{"fai')
    assert link.receive() == [{"request": 10, "node": 1}]
    assert json.loads(second.recv(1000)) == {"request": 10, "node": 1}
    first.sendall(b'led": true, "node": 1}\n')
    assert link.receive() == [{"failed": True, "node": 1}]
    second.recv(1000)
    first.setblocking(False)
    with pytest.raises(BlockingIOError):  # Nobody hears himself.
        first.recv(1000)
    first.close()
    assert link.receive() == [{"node": 1, "gone": True}]
    assert json.loads(second.recv(1000)) == {"node": 1, "gone": True}
    assert link.receive() == []
    link.close()
    assert second.recv(1000) == b""


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\n", b"x" * (LARGEST_MESSAGE + 1)])
def test_a_connection_that_speaks_otherwise_is_over(words: bytes) -> None:
    link, (first,) = links(1)
    sender = threading.Thread(target=first.sendall, args=(words,))  # More than a socket's buffer may hold.
    sender.start()
    found: list[dict[str, Any]] = []
    while not found:
        found = link.receive()
    sender.join()
    assert found == [{"node": 1, "gone": True}]


def test_words_before_the_end_of_a_connection_are_heard() -> None:
    link, (first,) = links(1)
    first.sendall(b'{"failed": true, "node": 1}\n')
    first.close()
    assert link.receive() == [{"failed": True, "node": 1}, {"node": 1, "gone": True}]
