"""The connection between the supervisors of a run on several machines.

    node 1 ──┐
    node 2 ──┼──▶ node 0, which passes on what one of them says to the others
    node 3 ──┘

They meet before any rank is started: machines that do not find each other, or that disagree about the run, end here
with an error that says so. From then on each says what the others must know (see `supervisor.py`), and notices when
another one is gone: at once where its process ended, within some 20 seconds where its machine did.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from bigtx.launch.world import World
from bigtx.utils.errors import LaunchError

MEET_SECONDS = 50.0
"""How long the machines wait for each other."""
KEEPALIVE_SECONDS, KEEPALIVE_PROBES = 5, 3
"""A machine that answers nothing for so long, so many times, is gone."""
LARGEST_MESSAGE = 65_536
_RETRY_SECONDS = 0.25


@dataclass
class _Peer:
    """A connected supervisor."""

    node: int
    host: str
    connection: socket.socket
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


def meet(world: World, seconds: float = MEET_SECONDS) -> Link | None:
    """Connect the supervisors of all machines.

    Returns:
        None where there is one machine only.

    Raises:
        LaunchError: they do not find each other in time, or do not start the same numbers of ranks.
    """
    if world.num_nodes == 1:
        return None
    deadline = time.monotonic() + seconds
    return _gather(world, deadline) if world.node == 0 else _join(world, deadline)


def _gather(world: World, deadline: float) -> Link:
    """On the first machine: wait for the others."""
    peers: dict[int, _Peer] = {}
    with _listen(world) as listener:
        while len(peers) < world.num_nodes - 1:
            missing = sorted(set(range(1, world.num_nodes)) - peers.keys())
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise _tell(peers, _too_few(world, missing)) from None
            _take(world, connection, peers)
    link = Link(0, {0: socket.gethostname()} | {node: peer.host for node, peer in peers.items()}, list(peers.values()))
    link.send(hosts=link.hosts)
    return link


def _take(world: World, connection: socket.socket, peers: dict[int, _Peer]) -> None:
    """Take a machine's first words.

    Raises:
        LaunchError: they contradict what is started here; all that have come are told.
    """
    peer = _Peer(-1, "?", connection)
    hello = _first_message(peer, 5.0)
    if not hello or not isinstance(hello.get("node"), int):
        connection.close()  # Not one of ours: something that looks at ports.
        return
    peer.node, peer.host = hello["node"], str(hello.get("host"))
    own = {"num_nodes": world.num_nodes, "num_local": world.num_local}
    others = {name: hello.get(name) for name in own}
    known = peers.get(peer.node)
    if known is None and 0 < peer.node < world.num_nodes and own == others:
        peers[peer.node] = peer
        return
    who = f"{peer.host} (node {peer.node})"
    if own != others:
        problem = (
            f"the machines of this run start different ranks: {socket.gethostname()} (node 0) {_ranks(own)}, {who} "
            f"{_ranks(others)}; give each the same number of GPUs, or name one for all with --ranks"
        )
    else:
        taken = known.host if known else socket.gethostname()
        problem = f"{who} and {taken} have the same place in this run; start bigtx once on each machine"
    raise _tell(peers | {-1: peer}, LaunchError(problem))


def _join(world: World, deadline: float) -> Link:
    """On any other machine: go to the first one."""
    peer = _Peer(0, world.address, _connect(world, deadline))
    hello = {"node": world.node, "num_nodes": world.num_nodes, "num_local": world.num_local}
    link = Link(world.node, {}, [peer])
    link.send(**hello, host=socket.gethostname())
    answer = _first_message(peer, max(1.0, deadline - time.monotonic()) + 5.0)
    if answer and "problem" in answer:
        raise LaunchError(answer["problem"])
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
                    f"{socket.gethostname()} (node {world.node}) does not reach the first machine at {_place(world)}: "
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


def _too_few(world: World, missing: list[int]) -> LaunchError:
    return LaunchError(
        f"only {world.num_nodes - len(missing)} of {world.num_nodes} machines came to {_place(world)} within "
        f"{MEET_SECONDS:.0f} s; missing: node {', '.join(map(str, missing))}. Look at what bigtx says there"
    )


def _tell(peers: dict[int, _Peer], error: LaunchError) -> LaunchError:
    """Tell the machines that have come why the run does not begin."""
    link = Link(0, {}, list(peers.values()))
    link.send(problem=str(error))
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
