"""The connection between the supervisors of a run on several machines.

    node 1 ──┐
    node 2 ──┼──▶ node 0, which forwards the messages of each node to the others
    node 3 ──┘

The supervisors connect before any rank starts. The run ends here with an error if a machine is missing, if it has other
code, packages or settings than the rest, or if it does not see the run's folder. After that, each supervisor sends the
others its events (see `supervisor.py`). It notices when another supervisor is gone: at once where its process ended,
within about 20 seconds where its machine failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtx.launch import consistency
from bigtx.launch.consistency import named, why_different, why_wrong_clock
from bigtx.launch.world import World
from bigtx.utils.errors import LaunchError
from bigtx.utils.files import json_value
from bigtx.utils.hardware import host_name
from bigtx.utils.log import say

MEET_SECONDS = 50.0
"""How long the machines wait for each other at the start."""
ANSWER_SECONDS = 5.0
"""How long a machine may take to answer, in addition to the time that the request itself needs."""
KEEPALIVE_SECONDS, KEEPALIVE_PROBES = 5, 3
"""The interval of TCP's probes, and how many a machine may leave unanswered before it counts as gone."""
LONGEST_HOST_NAME = 255
"""The limit of the domain name system."""
LARGEST_MESSAGE = 1 << 20
_RETRY_SECONDS = 0.25


@dataclass
class _Peer:
    """A connected supervisor."""

    node: int
    host: str
    connection: socket.socket
    facts: dict[str, str] = field(default_factory=dict)
    received: bytes = b""
    is_open: bool = True


@dataclass
class Link:
    """The connections of one supervisor.

    Attributes:
        node: this machine's number.
        hosts: the machines' names, by their numbers.
    """

    node: int
    hosts: dict[int, str]
    _peers: list[_Peer] = field(default_factory=list)

    def signal_arrivals(self) -> None:
        """Have the kernel send this process SIGIO when a message arrives."""
        for peer in self._peers:
            peer.connection.setblocking(False)
            fcntl.fcntl(peer.connection, fcntl.F_SETOWN, os.getpid())
            flags = fcntl.fcntl(peer.connection, fcntl.F_GETFL)
            fcntl.fcntl(peer.connection, fcntl.F_SETFL, flags | os.O_ASYNC)

    def send(self, **message: Any) -> None:
        """Send a message to all other machines."""
        self._forward(message | {"node": self.node})

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived, and forward them.

        Returns:
            Each message has the `node` that sent it; a connection that ended gives `{"gone": True}`.
        """
        messages: list[dict[str, Any]] = []
        for peer in [peer for peer in self._peers if peer.is_open]:
            arrived = _read(peer)
            if not peer.is_open:
                arrived.append({"node": peer.node, "gone": True})
            for message in arrived:
                if self.node == 0:
                    message["node"] = peer.node  # Only the first machine forwards messages of others.
                self._forward(message, source=peer)
            messages += [message for message in arrived if isinstance(message.get("node"), int)]
        return messages

    def close(self) -> None:
        """End all connections."""
        for peer in self._peers:
            peer.connection.close()
            peer.is_open = False

    def _forward(self, message: dict[str, Any], source: _Peer | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in self._peers:
            if peer is not source and peer.is_open:
                with contextlib.suppress(OSError):  # The end of the connection is noticed when it is read.
                    peer.connection.sendall(line)


def meet(
    world: World,
    facts: Mapping[str, str] | None = None,
    folder: Path | None = None,
    seconds: float = MEET_SECONDS,
) -> Link | None:
    """Connect the supervisors of all machines, and check that the machines can work on one run.

    Args:
        world: the machines and ranks of the run.
        facts: what must be equal on all machines; see `consistency`.
        folder: a folder that all machines must see. It need not exist.
        seconds: how long the machines wait for each other.

    Returns:
        The connections; None where there is only one machine.

    Raises:
        LaunchError: the machines do not find each other in time, do not start the same numbers of ranks, differ, or do
            not see the same folder. It names the machines to exclude, if excluding them helps.
    """
    if world.num_nodes == 1:
        return None
    deadline = time.monotonic() + seconds
    if world.node > 0:
        return _join(world, facts or {}, deadline)
    peers = _gather(world, deadline)
    hosts = {0: host_name()} | {node: peer.host for node, peer in peers.items()}
    if problem := why_different(hosts, {0: facts or {}} | {node: peer.facts for node, peer in peers.items()}):
        raise _reported(peers, LaunchError(problem))
    _check_clocks_and_folder(peers, hosts, folder)
    link = Link(0, hosts, list(peers.values()))
    link.send(hosts=hosts)
    return link


def _gather(world: World, deadline: float) -> dict[int, _Peer]:
    """Wait on the first machine for the others. Returns them by their numbers."""
    peers: dict[int, _Peer] = {}
    with _listen(world) as listener:
        while len(peers) < world.num_nodes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise _reported(peers, _too_few(world, peers)) from None
            _admit(world, connection, peers)
    return dict(sorted(peers.items()))


def _check_clocks_and_folder(peers: dict[int, _Peer], hosts: dict[int, str], folder: Path | None) -> None:
    """Ask the other machines for their clocks, and whether they see a file that the first machine writes.

    Raises:
        LaunchError: some do not see the file, or do not answer.
    """
    with consistency.file_for_all(folder) if folder else contextlib.nullcontext() as path:
        asked = time.time()
        Link(0, {}, list(peers.values())).send(look=None if path is None else str(path))
        answers = _answers(peers, ("clock", "sees"), time.monotonic() + consistency.SEEN_SECONDS + ANSWER_SECONDS)
    silent = [node for node in peers if "sees" not in answers[node]]
    blind = [node for node in peers if answers[node].get("sees") is False]
    if blind:
        place = path.parent if path else folder
        problem = (
            f"a file that {hosts[0]} (node 0) wrote in {place} is missing on {named(hosts, blind)}: the machines do "
            "not see the same folder. Mount the file system there, or choose a run_dir that all of them see"
        )
        raise _reported(peers, LaunchError(problem, [hosts[node] for node in blind + silent]))
    if silent:
        problem = (
            f"no answer from {named(hosts, silent)}, which had connected before: its file system hangs, or bigtx was "
            "ended or stopped there"
        )
        raise _reported(peers, LaunchError(problem, [hosts[node] for node in silent]))
    # A clock is read half-way between the request and the arrival of the answer.
    offsets = {node: each["clock"] - (asked + each["clock at"]) / 2 for node, each in answers.items()}
    if warning := why_wrong_clock(hosts, offsets):
        say(f"warning: {warning}")


def _answers(peers: dict[int, _Peer], names: tuple[str, ...], deadline: float) -> dict[int, dict[str, Any]]:
    """Return what each machine answers under these names, and when it arrived as `NAME at`.

    A machine that does not answer in time has an empty dictionary.
    """
    answers: dict[int, dict[str, Any]] = {node: {} for node in peers}
    with selectors.DefaultSelector() as selector:
        for each in peers.values():
            selector.register(each.connection, selectors.EVENT_READ, each)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                peer: _Peer = key.data
                for message in _read(peer):
                    answers[peer.node] |= message | {f"{name} at": time.time() for name in message}
                if not peer.is_open or all(name in answers[peer.node] for name in names):
                    selector.unregister(peer.connection)
    return answers


def _admit(world: World, connection: socket.socket, peers: dict[int, _Peer]) -> None:
    """Add a machine that connects, by its first message.

    Raises:
        LaunchError: the message contradicts what is started here; all connected machines receive the error.
    """
    peer = _Peer(-1, "?", connection)
    hello = _first_message(peer, ANSWER_SECONDS) or {}
    numbers = ("node", "num_nodes", "num_local")
    is_hello = isinstance(hello.get("facts"), dict) and all(type(hello.get(name)) is int for name in numbers)
    if not is_hello:
        connection.close()  # Another program, such as a port scanner.
        return
    peer.node, peer.host, peer.facts = (
        hello["node"],
        str(hello.get("host"))[:LONGEST_HOST_NAME],
        {name: str(value) for name, value in hello["facts"].items()},
    )
    own = {"num_nodes": world.num_nodes, "num_local": world.num_local}
    others = {name: hello.get(name) for name in own}
    known = peers.get(peer.node)
    if known is None and 0 < peer.node < world.num_nodes and own == others:
        peers[peer.node] = peer
        return
    who = f"{peer.host} (node {peer.node})"
    if own != others:
        problem = (
            f"the machines of this run start different ranks: {host_name()} (node 0) {_ranks(own)}, {who} "
            f"{_ranks(others)}; give each the same number of GPUs, or name one for all with --ranks"
        )
    else:
        taken = known.host if known else host_name()
        problem = f"{who} and {taken} have the same place in this run; start bigtx once on each machine"
    raise _reported(peers | {-1: peer}, LaunchError(problem))


def _join(world: World, facts: Mapping[str, str], deadline: float) -> Link:
    """Connect to the first machine from another one, and answer its requests."""
    peer = _Peer(0, world.address, _connect(world, deadline))
    link = Link(world.node, {}, [peer])
    hello = {"num_nodes": world.num_nodes, "num_local": world.num_local}
    link.send(**hello, host=host_name(), facts=dict(facts))
    answer = _first_message(peer, max(1.0, deadline - time.monotonic()) + ANSWER_SECONDS)
    if answer and "look" in answer:
        link.send(clock=time.time())
        link.send(sees=answer["look"] is None or consistency.sees(Path(answer["look"])))
        answer = _first_message(peer, consistency.SEEN_SECONDS + 2 * ANSWER_SECONDS)
    if answer and "problem" in answer:
        raise LaunchError(answer["problem"], answer.get("broken_hosts", ()))
    if not answer or "hosts" not in answer:
        raise LaunchError(
            f"{_place(world)} answers, but is not the first machine of this run: MASTER_ADDR and MASTER_PORT must name "
            "the machine with rank 0 and a port that is free on it, the same on all machines"
        )
    link.hosts = {int(node): str(host) for node, host in answer["hosts"].items()}
    return link


def _connect(world: World, deadline: float) -> socket.socket:
    while True:
        try:
            left = max(0.1, min(5.0, deadline - time.monotonic()))
            return _kept_alive(socket.create_connection((world.address, world.link_port), timeout=left))
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS >= deadline:
                raise LaunchError(
                    f"{host_name()} (node {world.node}) does not reach the first machine at {_place(world)}: "
                    f"{error.strerror or error}. Look there for why bigtx did not start, or name another address with "
                    "MASTER_ADDR and another port with MASTER_PORT, the same on all machines"
                ) from error
        time.sleep(_RETRY_SECONDS)


def _listen(world: World) -> socket.socket:
    try:
        return socket.create_server(("", world.link_port), backlog=world.num_nodes)
    except OSError as error:
        raise LaunchError(
            f"the machines cannot meet at {_place(world)}: {error.strerror}; name another port with MASTER_PORT, the "
            "same on all machines"
        ) from error


def _too_few(world: World, peers: Mapping[int, _Peer]) -> LaunchError:
    missing = sorted(set(range(1, world.num_nodes)) - peers.keys())
    hosts = {node: world.hosts[node] for node in missing if node < len(world.hosts)}
    return LaunchError(
        f"only {world.num_nodes - len(missing)} of {world.num_nodes} machines connected to {_place(world)} within "
        f"{MEET_SECONDS:.0f} s; missing: {named(hosts, missing)}. Read the messages of bigtx there",
        list(hosts.values()),
    )


def _reported(peers: Mapping[int, _Peer], error: LaunchError) -> LaunchError:
    """Send the connected machines the reason why the run does not start, close the connections, return the error."""
    link = Link(0, {}, list(peers.values()))
    link.send(problem=str(error), broken_hosts=error.broken_hosts)
    link.close()
    return error


def _first_message(peer: _Peer, seconds: float) -> dict[str, Any] | None:
    """Return the first message of a connection; None without one in time."""
    _kept_alive(peer.connection).settimeout(seconds)
    while peer.is_open:
        if messages := _read(peer):
            return messages[0]
    return None


def _read(peer: _Peer) -> list[dict[str, Any]]:
    """Return the messages that have arrived.

    Marks the peer as closed where its connection ended, or where it sends something else than messages.
    """
    try:
        while data := peer.connection.recv(LARGEST_MESSAGE):
            peer.received += data
            if peer.connection.gettimeout() != 0.0 and b"\n" in data:
                break
        is_over = not data
    except BlockingIOError:
        is_over = False
    except OSError:
        is_over = True
    *lines, peer.received = peer.received.split(b"\n")
    messages = []
    try:
        messages = [message for line in lines if isinstance(message := json_value(line), dict)]
    except ValueError:
        is_over = True
    peer.is_open = not is_over and len(peer.received) <= LARGEST_MESSAGE
    return messages


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Have the kernel notice when the machine at the other end is gone. Returns the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", 1000 * KEEPALIVE_SECONDS * (KEEPALIVE_PROBES + 1)),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _ranks(numbers: dict[str, Any]) -> str:
    return f"{numbers['num_local']} on each of {numbers['num_nodes']} machines"


def _place(world: World) -> str:
    return f"{world.address}:{world.link_port}"
