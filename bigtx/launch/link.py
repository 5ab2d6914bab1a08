"""The connection between the supervisors of a run on several machines.

    node 1 ──┐
    node 2 ──┼──▶ node 0, which passes on what one of them says to the others
    node 3 ──┘

They meet before any rank is started: machines that do not find each other, that have other code, packages or settings
than the rest, or do not see the run's folder, end here with an error that says so. From then on each says what the
others must know (see `supervisor.py`), and notices when another one is gone: at once where its process ended, within
some 20 seconds where its machine did.
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

from bigtx.launch import shared
from bigtx.launch.alike import named, why_different, why_wrong_clock
from bigtx.launch.world import World
from bigtx.utils.errors import LaunchError
from bigtx.utils.hardware import host_name
from bigtx.utils.log import say

MEET_SECONDS = 50.0
"""How long the machines wait for each other."""
ANSWER_SECONDS = 5.0
"""How long a machine may take to answer beyond what it was asked to wait for."""
KEEPALIVE_SECONDS, KEEPALIVE_PROBES = 5, 3
"""A machine that answers nothing for so long, so many times, is gone."""
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
    """One supervisor's connections.

    Attributes:
        node: this machine's place.
        hosts: the machines' names, by their place.
    """

    node: int
    hosts: dict[int, str]
    _peers: list[_Peer] = field(default_factory=list)

    def signal_arrivals(self) -> None:
        """Have the kernel send this process SIGIO whenever something arrives."""
        for peer in self._peers:
            peer.connection.setblocking(False)
            fcntl.fcntl(peer.connection, fcntl.F_SETOWN, os.getpid())
            flags = fcntl.fcntl(peer.connection, fcntl.F_GETFL)
            fcntl.fcntl(peer.connection, fcntl.F_SETFL, flags | os.O_ASYNC)

    def send(self, **message: Any) -> None:
        """Tell all other machines something."""
        self._pass_on(message | {"node": self.node})

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived, each with the `node` that said it; `{"gone": True}` of one whose connection ended."""
        messages: list[dict[str, Any]] = []
        for peer in [peer for peer in self._peers if peer.is_open]:
            arrived = _read(peer)
            if not peer.is_open:
                arrived.append({"node": peer.node, "gone": True})
            for message in arrived:
                self._pass_on(message, but=peer)
            messages += arrived
        return messages

    def close(self) -> None:
        """End all connections."""
        for peer in self._peers:
            peer.connection.close()
            peer.is_open = False

    def _pass_on(self, message: dict[str, Any], but: _Peer | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in self._peers:
            if peer is not but and peer.is_open:
                with contextlib.suppress(OSError):  # The end of the connection is noticed when it is read.
                    peer.connection.sendall(line)


def meet(
    world: World,
    facts: Mapping[str, str] | None = None,
    folder: Path | None = None,
    seconds: float = MEET_SECONDS,
) -> Link | None:
    """Connect the supervisors of all machines, and see that the machines can work on one run.

    Args:
        facts: what must be equal on all of them; see `alike`.
        folder: that all must see. It need not exist.

    Returns:
        None where there is one machine only.

    Raises:
        LaunchError: they do not find each other in time, do not start the same numbers of ranks, are not alike, or do
            not see the same folder. It names the machines that the others could do without.
    """
    if world.num_nodes == 1:
        return None
    deadline = time.monotonic() + seconds
    if world.node > 0:
        return _join(world, facts or {}, deadline)
    peers = _gather(world, deadline)
    hosts = {0: host_name()} | {node: peer.host for node, peer in peers.items()}
    if problem := why_different(hosts, {0: facts or {}} | {node: peer.facts for node, peer in peers.items()}):
        raise _tell(peers, LaunchError(problem))
    _look(peers, hosts, folder)
    link = Link(0, hosts, list(peers.values()))
    link.send(hosts=hosts)
    return link


def _gather(world: World, deadline: float) -> dict[int, _Peer]:
    """On the first machine: wait for the others. Returns them by their places."""
    peers: dict[int, _Peer] = {}
    with _listen(world) as listener:
        while len(peers) < world.num_nodes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise _tell(peers, _too_few(world, peers)) from None
            _take(world, connection, peers)
    return dict(sorted(peers.items()))


def _look(peers: dict[int, _Peer], hosts: dict[int, str], folder: Path | None) -> None:
    """On the first machine: ask the others for their clocks, and whether they see what is written here.

    Raises:
        LaunchError: some do not see it, or do not answer.
    """
    with shared.file_for_all(folder) if folder else contextlib.nullcontext() as path:
        asked = time.time()
        Link(0, {}, list(peers.values())).send(look=None if path is None else str(path))
        answers = _answers(peers, ("clock", "sees"), time.monotonic() + shared.SEEN_SECONDS + ANSWER_SECONDS)
    silent = [node for node in peers if "sees" not in answers[node]]
    blind = [node for node in peers if answers[node].get("sees") is False]
    if blind:
        place = path.parent if path else folder
        problem = (
            f"a file that {hosts[0]} (node 0) wrote in {place} is missing on {named(hosts, blind)}: the machines do "
            "not see the same folder. Mount the file system there, or choose a run_dir that all of them see"
        )
        raise _tell(peers, LaunchError(problem, [hosts[node] for node in blind + silent]))
    if silent:
        problem = (
            f"no answer from {named(hosts, silent)}, which had come to the others: its file system hangs, or bigtx was "
            "ended or stopped there"
        )
        raise _tell(peers, LaunchError(problem, [hosts[node] for node in silent]))
    # Half of the way there and back is behind a clock when it is read.
    offsets = {node: each["clock"] - (asked + each["clock at"]) / 2 for node, each in answers.items()}
    if warning := why_wrong_clock(hosts, offsets):
        say(f"warning: {warning}")


def _answers(peers: dict[int, _Peer], names: tuple[str, ...], deadline: float) -> dict[int, dict[str, Any]]:
    """What each machine says by these names, and under `NAME at` when it arrived; without those that say nothing."""
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


def _take(world: World, connection: socket.socket, peers: dict[int, _Peer]) -> None:
    """Take a machine's first words.

    Raises:
        LaunchError: they contradict what is started here; all that have come are told.
    """
    peer = _Peer(-1, "?", connection)
    hello = _first_message(peer, ANSWER_SECONDS)
    if not hello or not isinstance(hello.get("node"), int):
        connection.close()  # Not one of ours: something that looks at ports.
        return
    peer.node, peer.host, peer.facts = hello["node"], str(hello.get("host")), dict(hello.get("facts") or {})
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
    raise _tell(peers | {-1: peer}, LaunchError(problem))


def _join(world: World, facts: Mapping[str, str], deadline: float) -> Link:
    """On any other machine: go to the first one, and answer what it asks."""
    peer = _Peer(0, world.address, _connect(world, deadline))
    link = Link(world.node, {}, [peer])
    hello = {"num_nodes": world.num_nodes, "num_local": world.num_local}
    link.send(**hello, host=host_name(), facts=dict(facts))
    answer = _first_message(peer, max(1.0, deadline - time.monotonic()) + ANSWER_SECONDS)
    if answer and "look" in answer:
        link.send(clock=time.time())
        link.send(sees=answer["look"] is None or shared.sees(Path(answer["look"])))
        answer = _first_message(peer, shared.SEEN_SECONDS + 2 * ANSWER_SECONDS)
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
        f"only {world.num_nodes - len(missing)} of {world.num_nodes} machines came to {_place(world)} within "
        f"{MEET_SECONDS:.0f} s; missing: {named(hosts, missing)}. Look at what bigtx says there",
        list(hosts.values()),
    )


def _tell(peers: Mapping[int, _Peer], error: LaunchError) -> LaunchError:
    """Tell the machines that have come why the run does not begin."""
    link = Link(0, {}, list(peers.values()))
    link.send(problem=str(error), broken_hosts=error.broken_hosts)
    link.close()
    return error


def _first_message(peer: _Peer, seconds: float) -> dict[str, Any] | None:
    """The first message of a connection; None without one in time."""
    _kept_alive(peer.connection).settimeout(seconds)
    while peer.is_open:
        if messages := _read(peer):
            return messages[0]
    return None


def _read(peer: _Peer) -> list[dict[str, Any]]:
    """The messages that have arrived; marks the peer as gone at its connection's end, or when it sends none of ours."""
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
        messages = [message for line in lines if isinstance(message := json.loads(line), dict)]
    except ValueError:
        is_over = True
    peer.is_open = not is_over and len(peer.received) <= LARGEST_MESSAGE
    return messages


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Have the kernel notice when the machine at the other end is gone."""
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
