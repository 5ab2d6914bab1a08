"""Supervise the ranks of this machine.

    bigtx pretrain ──fork──▶ rank 0, rank 1, ...
         │                      ▲        │
         ├── requests to stop ──┘        │  what failed, at which step
         ◀───────── a pipe for each ─────┘

The supervisor has checked the config and forks the ranks, which need not import Python's modules or read the config
again. It then waits until all have ended:

- A request to stop (SIGTERM, SIGINT, SIGUSR1, SIGHUP) goes to every rank once. The ranks save a checkpoint and end.
- A rank that ends on request causes a request to all others: SIGTERM to one rank stops the run.
- When a rank fails, the others have a few seconds to end. Then they are killed, including those that hang. The
  supervisor reports the rank that failed first, with the end of its log.
- A rank that hangs is found by its heartbeats (see `watchdog.py`). All ranks are killed, and it is reported.
- When the supervisor is killed, the kernel sends the ranks SIGTERM. They save a checkpoint and end.
- On several machines the supervisors forward requests to stop and failures to each other. The first machine's
  supervisor reports the rank that failed first. When one supervisor is gone, the others ask their ranks to stop.
- Processes that a rank has started and left running are ended too, except daemons: W&B's process may still write for
  some seconds.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtx.launch.consistency import facts_of_machine, facts_of_settings
from bigtx.launch.explain import explain_end, how_to_resume, read_facts
from bigtx.launch.link import Link, meet
from bigtx.launch.watchdog import Verdict, Watchdog
from bigtx.launch.world import World
from bigtx.utils import log, processes
from bigtx.utils.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE
from bigtx.utils.heartbeat import STACKS, Beat
from bigtx.utils.processes import hold_free_port, stop_signals
from bigtx.utils.units import parse_duration

FAREWELL_SECONDS = 4.0
"""How long the other ranks may take to end after one has failed; they cannot save a checkpoint without it."""
AGREE_SECONDS = 1.0
"""How long the other ranks may take to end by themselves after one has ended on request."""
ORPHAN_SECONDS = 3.0
"""How long processes that ranks left running may take to end."""
CONFER_SECONDS = 2 * FAREWELL_SECONDS + ORPHAN_SECONDS
"""How long the machines wait for each other's report of a failure."""


@dataclass
class _Rank:
    """A rank that was started.

    Attributes:
        pipe: the pipe through which it reports a failure.
        status: the exit status, or minus the signal that ended it, as `Popen.returncode`; None while it runs.
        facts: what it reported before its end.
        beat: its last heartbeat before its end.
    """

    number: int
    pid: int
    pipe: int
    status: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    beat: Beat | None = None


@dataclass
class _End:
    """How one machine's part of the run ended.

    Attributes:
        status: the exit status of its command.
        text: the message that explains a failure.
        lost: whether the end of another rank was the cause.
        said: whether the user has seen a message about the cause.
        progress: of ranks that hang, the phases that they have begun; of several machines, the fewest are the cause.
    """

    status: int
    text: str = ""
    lost: bool = False
    said: bool = False
    progress: int = 0

    @property
    def has_failed(self) -> bool:
        """Return whether it neither finished nor stopped on request."""
        return self.status not in (0, EXIT_REQUEUE, EXIT_INTERRUPTED)


def start_ranks(world: World, run_dir: Path, settings: Mapping[str, Any] | None = None) -> int | None:
    """Start this machine's ranks, and wait for them.

    Call this while the process has only one thread.

    Args:
        world: the ranks to start.
        run_dir: the folder where the ranks write their logs. All machines must see the same folder.
        settings: the settings of the run, which must be equal on all machines, as the code and the packages must.

    Returns:
        The exit status of the command in the calling process; None in each rank, which has its number in the
        environment and then does the work.

    Raises:
        LaunchError: the machines do not find each other, or differ; see `meet`.
    """
    facts = facts_of_machine() | facts_of_settings(settings or {}) if world.num_nodes > 1 else {}
    timeout = parse_duration(settings["engine"]["timeout"]).value if settings else math.inf
    supervisor = _Supervisor(run_dir, meet(world, facts, run_dir), Watchdog(world.num_local, timeout, run_dir))
    with hold_free_port() as held:
        port = world.port or held.getsockname()[1]
        for local_rank in range(world.num_local):
            if supervisor.fork(world.environment(local_rank, port), world.launcher):
                return None
        return supervisor.wait()


class _Supervisor:
    """A parent of ranks, which it forks and waits for."""

    def __init__(self, run_dir: Path, link: Link | None, watchdog: Watchdog) -> None:
        self._run_dir, self._link, self._watchdog = run_dir, link, watchdog
        self._verdict: Verdict | None = None
        self._ends: dict[int, _End] = {}
        self._gone: set[int] = set()
        self._ranks: list[_Rank] = []
        self._first_failed: list[_Rank] = []
        self._request: signal.Signals | None = None
        self._deadline: float | None = None
        self._asks_at: float | None = None
        self._killed: set[int] = set()
        self._memory_kills = processes.out_of_memory_kills()
        processes.adopt_orphans()
        self._watched = {signal.SIGCHLD, signal.SIGIO, *stop_signals()}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # If it were ignored, the exit status would be lost.
        # These signals stay pending until `wait` takes them, so none is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._watched)
        if link:
            link.signal_arrivals()

    def fork(self, environment: dict[str, str], launcher: str | None) -> bool:
        """Start a rank. Returns whether this process is the rank."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        if pid := os.fork():
            os.close(writing)
            self._ranks.append(_Rank(int(environment["RANK"]), pid, reading))
            self._watchdog.watch(int(environment["RANK"]), pid)
            return False
        for descriptor in (reading, *(other.pipe for other in self._ranks)):
            os.close(descriptor)
        if self._link:
            self._link.close()
        os.environ.update(environment)
        self._watchdog.adopt_self(len(self._ranks))
        processes.set_supervised(launcher)
        processes.set_name(f"bigtx rank {environment['RANK']}")
        log.report_to(writing)
        processes.end_with_parent(signal.SIGTERM, parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._watched)
        return True

    def wait(self) -> int:
        """Wait until all ranks have ended. Returns the exit status of the command."""
        self._receive()  # Messages that arrived before SIGIO was requested.
        while self._running():
            received = signal.sigtimedwait(self._watched, self._patience())
            if received is None:
                self._act_in_time()
            elif received.si_signo == signal.SIGCHLD:
                self._reap()
            elif received.si_signo == signal.SIGIO:
                self._receive()
            else:
                self._ask(signal.Signals(received.si_signo))
        self._end_orphans()
        for rank in self._ranks:
            rank.facts = read_facts(rank.pipe)
        return self._conclude()

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.status is None]

    def _patience(self) -> float:
        times = [at for at in (self._deadline, self._asks_at) if at is not None]
        left = min(times) - time.monotonic() if times else self._watchdog.interval
        return max(0.0, left if self._deadline is not None else min(left, self._watchdog.interval))

    def _act_in_time(self) -> None:
        """Do the delayed actions whose time has come."""
        now = time.monotonic()
        if self._asks_at is not None and now >= self._asks_at:
            self._asks_at = None
            self._ask(signal.SIGTERM)
        if self._deadline is not None and now >= self._deadline:
            self._kill()
        if self._deadline is None and (verdict := self._watchdog.look()):
            self._abort(verdict)

    def _ask(self, number: signal.Signals) -> None:
        """Ask all ranks to stop, on all machines, once."""
        if self._request is not None:
            return
        self._request = number
        if self._link:
            self._link.send(request=number)
        for rank in self._running():
            os.kill(rank.pid, number)

    def _fail(self, *, waited: bool = False) -> None:
        """Give all ranks a few seconds to end, on all machines.

        Args:
            waited: whether a rank has waited for another until the time-out.
        """
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + FAREWELL_SECONDS
        if self._link:
            self._link.send(failed=True, waited=waited)
        if waited:
            self._abort(self._watchdog.explain())

    def _abort(self, verdict: Verdict) -> None:
        """End all ranks at once, because some hang."""
        self._verdict = verdict
        self._fail()
        self._kill()

    def _receive(self) -> None:
        """Act on the messages of other machines."""
        for message in self._link.receive() if self._link else ():
            node = message["node"]
            if "request" in message:
                self._ask(signal.Signals(message["request"]))
            elif "failed" in message:
                self._fail(waited=bool(message.get("waited")))
            elif "end" in message:
                self._ends[node] = _End(**message["end"])
            elif "gone" in message and node not in self._ends:
                self._lose(node)

    def _lose(self, node: int) -> None:
        """Record that a machine's supervisor ended without a message, and ask all ranks to stop."""
        assert self._link is not None
        host = self._link.hosts.get(node, "?")
        text = f"LaunchError: bigtx on {host} (node {node}) was killed, or the machine is gone"
        self._gone.add(node)
        self._ends[node] = _End(128 + signal.SIGKILL, text)
        self._ask(signal.SIGTERM)

    def _reap(self) -> None:
        """Record every process that has ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for rank in self._ranks:
                    if rank.pid == ended[0]:
                        rank.status = os.waitstatus_to_exitcode(ended[1])
                        self._handle_end(rank)

    def _handle_end(self, rank: _Rank) -> None:
        """Ask the other ranks to stop, or give them a few seconds, where the end of a rank requires it."""
        rank.beat = self._watchdog.end(rank.number)
        if self._has_failed(rank):
            self._first_failed.append(rank)
            self._fail(waited=self._watchdog.has_waited(rank.number, rank.status))
        elif rank.status != 0 and self._request is None and self._asks_at is None:
            # The ranks have agreed on a stop, unless it came before they could.
            self._asks_at = time.monotonic() + AGREE_SECONDS

    def _has_failed(self, rank: _Rank) -> bool:
        """Return whether a rank failed, or was killed by another process than this supervisor."""
        if rank.status in (0, EXIT_REQUEUE, EXIT_INTERRUPTED) or rank.pid in self._killed:
            return False
        # Before a rank handles requests, or while it waits for others to start, a request ends it at once.
        return -(rank.status or 0) not in stop_signals()

    def _kill(self) -> None:
        """Kill the ranks that are still running after their time is up."""
        for rank in self._running():
            self._killed.add(rank.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        self._deadline = time.monotonic() + FAREWELL_SECONDS

    def _end_orphans(self) -> None:
        """End the processes that the ranks have left running."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = processes.descendants()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + ORPHAN_SECONDS
            while left and time.monotonic() < deadline:
                time.sleep(0.05)
                self._reap()
                left = processes.descendants()

    def _conclude(self) -> int:
        """Report a failure that no rank has reported. Returns the exit status of the command."""
        own = self._own_end()
        ends = [own] if self._link is None else self._confer(self._link, own)
        failed = [end for end in ends if end.has_failed]
        if not failed:
            return own.status
        # Ranks that lost another one fail because of it, and may be noticed first.
        cause = min(failed, key=lambda end: (end.lost, end.progress))
        first = self._ends.get(0)
        first_reports = first is not None and first.has_failed and 0 not in self._gone
        if not any(end.said for end in ends) and not first_reports:
            log.say_error(cause.text)
        return cause.status

    def _own_end(self) -> _End:
        """Return how this machine's ranks ended."""
        if self._verdict:
            where = f"The stacks of the ranks are in {self._run_dir / STACKS}."
            text = f"LaunchError: {self._verdict.text}\n{where}\n{how_to_resume(self._run_dir)}"
            return _End(EXIT_FAILED, text, lost=not self._verdict.culprits, progress=self._verdict.progress)
        if not self._first_failed:
            statuses = [rank.status or 0 for rank in self._ranks]
            if not any(statuses):
                return _End(0)
            # A rank that does not handle requests yet prints nothing.
            if statuses[0] and self._ranks[0].number == 0 and not self._ranks[0].facts.get("stopped"):
                log.say_stopped("stopped before the first step; nothing to save")
            is_interrupt = self._request == signal.SIGINT or EXIT_INTERRUPTED in statuses
            return _End(EXIT_INTERRUPTED if is_interrupt else EXIT_REQUEUE)
        cause = next((rank for rank in self._first_failed if not rank.facts.get("lost")), self._first_failed[0])
        status = cause.status or 0
        return _End(
            status if status > 0 else 128 - status,
            explain_end(cause.number, status, cause.facts, self._run_dir, cause.beat, self._memory_kills),
            lost=bool(cause.facts.get("lost")),
            said=any(rank.facts.get("said") for rank in self._ranks),
        )

    def _confer(self, link: Link, own: _End) -> list[_End]:
        """Send the other machines this one's end; after a failure, wait for theirs. Returns all known ends."""
        link.send(end=asdict(own))
        deadline = time.monotonic() + CONFER_SECONDS
        is_failure = own.has_failed or self._deadline is not None
        while is_failure and len(self._ends) < len(link.hosts) - 1 and (left := deadline - time.monotonic()) > 0:
            signal.sigtimedwait({signal.SIGIO}, left)
            self._receive()
        return [own, *self._ends.values()]
