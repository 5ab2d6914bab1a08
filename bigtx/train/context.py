"""The context of a run of either kind, from the first log line to the last.

A run may be started many times; each start finds in the run folder where the previous start ended. Before the first
step a signal ends the run; after that, the ranks agree on a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Generic, Literal, NoReturn, Self, TypeVar

from bigtx.config.schema import RunConfig
from bigtx.train.run_folder import check_folder
from bigtx.utils import heartbeat, log, processes
from bigtx.utils.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    BigtxError,
    LaunchError,
    say_from_any_rank,
    writes,
)
from bigtx.utils.hardware import host_name
from bigtx.utils.heartbeat import STACKS, Phase, Vigil
from bigtx.utils.processes import stop_signals
from bigtx.utils.units import counted, format_names, parse_duration

if TYPE_CHECKING:
    from bigtx.engine.ranks import Ranks
    from bigtx.track.tracker import Tracker
    from bigtx.train.state import RunState


STOP_FILE = "STOP"
"""A file of this name in the run folder asks the run to stop, as SIGTERM does."""
SECONDS_BETWEEN_LOOKS = 1.0


class EarlyStop(SystemExit):
    """A request to stop before there is anything to save; its code is the exit status."""


class StopRequest:
    """A handler that turns SIGTERM, SIGINT, SIGUSR1 and SIGHUP into an `EarlyStop`, and after `defer` into a flag.

    While the loop runs, a file may request a stop too: see `watch`. Only the first request has an effect, because
    launchers send several.

    Attributes:
        signal: the first signal received, or None.
        came_early: whether the signal came before `defer`.
    """

    def __init__(self, announce: Callable[[bool], None]) -> None:
        """Install the signal handlers.

        Args:
            announce: called at once at the first request, with whether it came early: the sender of the signal may not
                wait for the end.
        """
        self.signal: signal.Signals | None = None
        self.came_early = False
        self._announce = announce
        self._is_first = threading.Lock()
        self._is_deferred = False
        self._file: Path | None = None
        self._next_look = 0.0
        for number in stop_signals():
            signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """Return whether a stop was requested."""
        if self._file and self.signal is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            if self._file.exists():
                self._receive(signal.SIGTERM, None)
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """Return 130 after Ctrl-C, else the status that asks for a requeue."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_REQUEUE

    def defer(self) -> None:
        """Make later signals only set the flag."""
        self._is_deferred = True

    def watch(self, file: Path) -> None:
        """Treat a file as SIGTERM once it exists. `requested` checks for it at most once a second."""
        self._file = file

    def forget_file(self) -> None:
        """Delete the watched file, if it exists, since the request is answered."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Taken in one step: a second signal may come at each line of this handler.
        if self._is_first.acquire(blocking=False):
            self.signal = signal.Signals(number)
            self.came_early = not self._is_deferred
            self._announce(self.came_early)
            if self.came_early:
                raise EarlyStop(self.exit_status)


class StartUp:
    """The seconds that each phase of a start takes, from the command to the end of the first step.

    Attributes:
        seconds: by phase, in order. The first is `command`: the config, the checks and the start of the ranks.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.seconds = {"command": round(processes.age_of_command(), 2)}

    def end(self, phase: str) -> None:
        """End a phase; the next one starts."""
        now = time.monotonic()
        self.seconds[phase] = round(now - self._since, 2)
        self._since = now


Config = TypeVar("Config", bound=RunConfig)

LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|NCCL (communicator was aborted|error)")
"""What torch.distributed's backends report when another process is gone."""
SILENT_RANK = re.compile(
    r"Timed out waiting|Application timeout|Operation timed out!|wait timeout after|collective operation timeout"
)
"""What the backends report when another process has not answered in time."""


class RunContext(Generic[Config]):
    """The log, the run folder, the ranks, the tracker, requests to stop, and the handling of errors.

    Attributes:
        config: the checked config of the user; for a dry run with a temporary folder and without W&B.
        files: the files that the config was read from.
        folder: the run folder.
        dry_run: whether to make one step and keep no file.
        ranks: all processes of the run, once `join_ranks` was called.
        stop: the user's or the scheduler's request to stop.
        state: the progress of the run, once it is known.
        status: how this start of the run ended, for events.jsonl and W&B.
        start_up: the seconds of each phase up to the first step.
        resources: what is closed on exit, in reverse order.
        damaged: why checkpoints were refused.
    """

    ranks: Ranks
    stop: StopRequest

    def __init__(self, config: Config, *, dry_run: bool = False, files: Iterable[Path] = ()) -> None:
        self.config, self.dry_run, self.files = config, dry_run, list(files)
        self.folder = Path(config.run_dir)
        self.state: RunState | None = None
        self.status: Literal["finished", "stopped", "failed"] = "failed"
        self.resources = ExitStack()
        self.damaged: list[str] = []
        self.start_up = StartUp()
        self._has_ranks = False
        self._training_tracker: Tracker | None = None

    def __enter__(self) -> Self:
        """Start the log and the handling of requests to stop.

        Raises:
            LaunchError: the run folder cannot be written.
            BigtxError: see `check_folder`.
        """
        if self.dry_run:
            self.folder = Path(tempfile.mkdtemp(prefix="bigtx-dry-run-"))
            track = dataclasses.replace(self.config.track, wandb="off")
            self.config = dataclasses.replace(self.config, run_dir=str(self.folder), track=track)
        with writes(f"run_dir={self.config.run_dir!r}", "; name another folder"):
            if not self.dry_run and not processes.is_supervised():
                check_folder(self.config, self.files)
            log.setup(self.folder, processes.rank())
        launcher, nodes = processes.launcher_name(), processes.num_nodes()
        where = f" on {nodes} machines" if nodes > 1 else ""
        started = f", started by {launcher}" if launcher else ""
        log.say(f"bigtx: {counted(processes.world_size(), 'rank')}{where}{started}; run folder {self.folder}")
        self.stop = StopRequest(self._answer_request)
        return self

    def join_ranks(self) -> Ranks:
        """Connect to the other ranks.

        Raises:
            LaunchError: see `Ranks`.
        """
        from bigtx.engine.ranks import Ranks

        self.start_up.end("imports")
        timeout = parse_duration(self.config.engine.timeout).value
        self.ranks = Ranks(timeout_seconds=timeout)
        self._has_ranks = True
        if not processes.is_supervised():
            heartbeat.offer_stacks(2)  # The log.
            self.resources.callback(heartbeat.watch_self(timeout, self._end_stuck))
        self.start_up.end("ranks")
        for note in self.ranks.notes_on_devices():
            log.say(note)
        return self.ranks

    def as_given(self, config: Config) -> Config:
        """Return a completed config with the micro batch size that the user gave, which another number of ranks may
        use."""
        return dataclasses.replace(config, train=self.config.train)

    def note_damaged(self, text: str) -> None:
        """Report a checkpoint that is refused, now and in the run's events."""
        log.say(f"warning: {text}")
        self.damaged.append(text)

    @contextmanager
    def training(self, tracker: Tracker) -> Iterator[None]:
        """Answer requests to stop with a checkpoint, and announce it through the tracker."""
        self.stop.defer()
        if self.ranks.rank == 0:
            self.stop.watch(self.folder / STOP_FILE)
        self._training_tracker = tracker
        yield
        self._training_tracker = None

    def _answer_request(self, came_early: bool) -> None:
        """Print at once that the run stops: the current step may take long."""
        if came_early:
            log.report(stopped=True)
            log.say_stopped("stopped before the first step; nothing to save")
        elif self._training_tracker:
            self._training_tracker.message("stopping: a checkpoint is saved after this step")

    def __exit__(self, _: object, error: BaseException | None, *others: object) -> None:
        """Close what was opened. The first rank with an error of the user prints it."""
        self.stop.defer()
        if self.stop.came_early:
            self.status = "stopped"
        self.resources.close()
        if error is not None:
            self._explain(error)
        elif self._has_ranks:
            self.ranks.barrier()  # Leaving first would look like a failure to the others.
            self.ranks.close()
        # The log explains other errors.
        if self.dry_run and (error is None or isinstance(error, BigtxError | EarlyStop)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _explain(self, error: BaseException) -> None:
        """Print why this start of the run ended, once for all ranks; other errors keep their traceback."""
        if self.state is not None:
            log.report(step=self.state.step)
        if self.stop.came_early:
            if not isinstance(error, EarlyStop):  # This rank noticed another rank's end before its own request.
                raise EarlyStop(self.stop.exit_status) from error
        elif self._has_ranks and isinstance(error, RuntimeError) and SILENT_RANK.search(str(error)):
            self._explain_silence(error)
        elif self._has_ranks and isinstance(error, RuntimeError) and LOST_RANK.search(str(error)):
            lost = LaunchError(
                "lost the connection to another rank, which has ended; its last messages are above or in "
                f"{self.folder / 'logs'}. The same command resumes from the last checkpoint"
            )
            lost.exit_status = EXIT_FAILED
            if log.report(lost=True, error=str(lost)):
                lost.reported = True  # The supervisor knows which rank ended, and prints it.
            else:
                self._print_once(lost)
            raise lost from error
        elif isinstance(error, BigtxError) and self._has_ranks:
            self._print_once(error)

    def _explain_silence(self, error: RuntimeError) -> NoReturn:
        """Raise an error that names the ranks that did not answer in time; each other rank logs its stack.

        A supervisor knows more about them, and prints it.
        """
        from bigtx.launch.explain import how_to_resume

        logging.getLogger(__name__).error("this rank waited for another until engine.timeout", exc_info=error)
        stacks, step = self.folder / STACKS, heartbeat.own_heart().step
        heartbeat.write_stacks(stacks, self.ranks.rank, traceback.format_exc())
        heartbeat.beat(Phase.TIMED_OUT)
        what = f"did not answer within engine.timeout={self.config.engine.timeout}"
        lost = LaunchError(f"another rank {what}")
        if not log.report(lost=True, error=str(lost)) and (silent := self.ranks.silent()) is not None:
            who = format_names(self.ranks.describe(silent)) if silent else "a rank, or the network,"
            lost = LaunchError(
                f"{who} {what}, {f'in step {step:,}' if step else 'before the first step'}: it is stopped, hangs or is "
                f"too slow; {stacks} shows where each of the others waited for it. {how_to_resume(self.folder)}"
            )
            say_from_any_rank(lost)
            self.ranks.end_silent(silent, stacks)
        lost.exit_status, lost.reported = EXIT_FAILED, True
        raise lost from error

    def _end_stuck(self, vigil: Vigil, stack: str) -> None:
        """Print that this rank hangs, write its stacks, and end the process. A thread calls it."""
        from bigtx.launch.explain import how_to_resume
        from bigtx.launch.watchdog import Sight, describe

        path = heartbeat.write_stacks(self.folder / STACKS, self.ranks.rank)
        place = heartbeat.place_in(stack, vigil.beat.phase)
        on_gpu = heartbeat.waits_for_gpu(stack)
        sight = Sight(self.ranks.rank, vigil.beat, vigil.still, place=place, is_stuck=True, is_on_gpu=on_gpu)
        culprits = [] if on_gpu else [sight]
        text = describe(culprits, [sight], host_name(), parse_duration(self.config.engine.timeout).value)
        if self.ranks.is_first_to_fail():
            say_from_any_rank(LaunchError(f"{text}\nThe stacks are in {path}.\n{how_to_resume(self.folder)}"))
        os._exit(EXIT_FAILED)

    def _print_once(self, error: BigtxError) -> None:
        if self.ranks.is_first_to_fail():
            say_from_any_rank(error)
        error.reported = True
