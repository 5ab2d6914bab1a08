"""Copy a run's JSON lines into W&B, in the process `python -m bigtx.track.follower` that wandb_run.py starts.

The process leaves the training's process tree at once: at a Ctrl-C launchers kill that whole tree, with W&B's process
in it, while the training still saves. The process reads a JSON line with its task from standard input. Then it follows
metrics.jsonl, samples.jsonl, predictions.jsonl and events.jsonl until a second line says how the run ended, or until
the training process is gone. It writes reports about W&B as JSON lines to standard output; that pipe closes when the
process ends. It continues where W&B's own history ends, so that each step is copied once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bigtx.track.client import (
    UPLOAD_SECONDS,
    End,
    choose_mode,
    copy_run,
    discard_wandb,
    kill_children,
    last_step,
    prepare_environment,
    reserve,
    start_run,
)
from bigtx.track.copier import link_base
from bigtx.track.jsonl import Record, parse_line
from bigtx.utils.files import inode_of
from bigtx.utils.locks import try_lock
from bigtx.utils.processes import start_of

POLL_SECONDS = 0.5
LOCK_SECONDS = 60.0
MAX_STARTS = 3
FINISH_SECONDS = UPLOAD_SECONDS + 10.0
"""How long this process may take to end after the training has reported how it ended."""
ORPHAN_SECONDS = 4.0
"""How long this process may take to end after the training was killed: no process of a killed run may remain."""


class Parent:
    """The training process: its lines on standard input, and whether it is running."""

    def __init__(self) -> None:
        """Identify the parent; call this in a child of the training process."""
        self.pid = os.getppid()
        self._start = start_of(self.pid)
        self._text = b""
        self._is_closed = False

    def read(self, timeout: float) -> Record | None:
        """Return the next line; None after `timeout` seconds without one, or when no further line can arrive."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._text:
            if self.is_gone or not select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            chunk = os.read(0, 65536)
            self._is_closed = not chunk
            self._text += chunk
        line, _, self._text = self._text.partition(b"\n")
        return parse_line(line + b"\n")

    @property
    def is_gone(self) -> bool:
        """Return whether the process has ended. The pipe is not enough: its children may keep it open."""
        return self._is_closed or start_of(self.pid) != self._start


class Ending:
    """The end of the run. Once it is known, this process ends within a limited time."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._end: End | None = None

    def wait(self) -> End | None:
        """Return the end of the run; None if it is not known after `POLL_SECONDS`."""
        if self._end is None:
            line = self._parent.read(POLL_SECONDS)
            if line is not None:
                self._end = End(**line)
                _end_by_force_after(FINISH_SECONDS)
            elif self._parent.is_gone:
                self._end = End("failed", is_complete=False)
                _end_by_force_after(ORPHAN_SECONDS)
        return self._end


class MovedError(Exception):
    """The run folder was moved or deleted: W&B would make another folder at its old place."""


def follow(task: Record, folder: Path, inode: Any, ending: Ending, report: Callable[[Record], None]) -> None:
    """Copy until the run ends. Errors of W&B are passed on.

    Raises:
        MovedError: the run folder was moved or deleted; after the run has ended, unless W&B has not started yet.
    """
    import wandb

    def wait() -> End | None:
        end = ending.wait()
        while (is_moved := inode_of(folder) != inode) and end is None:
            end = ending.wait()
        if is_moved:
            raise MovedError
        return end

    if inode_of(folder) != inode:
        raise MovedError
    mode, why, host = choose_mode(task["mode"])

    def stop() -> None:
        """Ask the training to save a checkpoint and end, as Ctrl-C does."""
        os.kill(task["pid"], signal.SIGINT)

    with contextlib.ExitStack() as stack:
        if mode == "online" and not stack.enter_context(reserve(folder)):
            mode, why = "offline", "`bigtx wandb sync` is sending this run"
        try:
            run = start_run(task, mode, stop)
        except Exception as error:
            if mode == "offline":
                raise
            # A run with the same id can start again only after W&B's own process has ended.
            discard_wandb()
            stack.close()
            mode, why = "offline", f"{host} refused the run ({error})"
            run = start_run(task, mode, stop)
        first_step = run.starting_step if mode == "online" else last_step(folder, run.id) + 1
        report(
            {
                "mode": mode,
                "why": why,
                "host": host,
                "url": run.url if mode == "online" else "",
                "folder": str(Path(run.dir).parent),
                "first_step": first_step,
            }
        )
        resumed_step = task.pop("resumed_step", None)  # After a failure of W&B, it does not start from a checkpoint.
        if resumed_step is not None and first_step > resumed_step + 1:
            run.summary["replayed_steps"] = f"{resumed_step + 1}-{first_step - 1}"
            report({"event": "wandb_replayed_steps", "first": resumed_step + 1, "last": first_step - 1})
        if task["base"]:
            report(link_base(run, task["base"], is_online=mode == "online"))
        copy_run(run, folder, first_step, task["better"], wait)
        wandb.teardown()


def main() -> int:
    """Run the follower. Returns its exit status."""
    # Signals to the whole group or job are for the training, and this process must end after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = Parent()
    if os.fork():
        os._exit(0)
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    task = parent.read(timeout=60.0)
    if task is None:
        return 1
    # The parent may have ended before this process read its id.
    parent.pid = task["pid"]

    def report(facts: Record) -> None:
        # The training may have ended in the meantime.
        with contextlib.suppress(OSError):
            reports.write(json.dumps(facts) + "\n")

    prepare_environment()
    ending = Ending(parent)
    folder = Path(task["init"]["dir"])
    inode = inode_of(folder)
    with _one_at_a_time(folder / "wandb"):
        for _ in range(MAX_STARTS):
            try:
                follow(task, folder, inode, ending, report)
            except MovedError:
                discard_wandb()
                break
            except Exception as error:
                traceback.print_exc()
                report({"error": f"{type(error).__name__}: {error}"})
                discard_wandb()
            else:
                return 0
    return 1


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; wait for the follower of the run's previous start to release it."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline and try_lock(file.fileno()) is False:
            time.sleep(0.1)
        yield


def _end_by_force_after(seconds: float) -> None:
    """Kill this process and W&B's own if they are still running after this time."""

    def end() -> None:
        kill_children()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # sys.exit would call W&B's exit hooks, which wait without limit for W&B's own process, even if it hangs.
    os._exit(status)
