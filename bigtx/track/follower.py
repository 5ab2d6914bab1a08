"""The process that copies a run's JSON lines into W&B (`python -m bigtx.track.follower`, started by wandb_run.py).

It leaves the training's process tree at once: launchers kill that whole tree at a Ctrl-C, W&B's own process included,
while the training still saves. It reads one JSON line from its standard input (what to do), then follows metrics.jsonl,
samples.jsonl, predictions.jsonl and events.jsonl until a second line says how the run ended, or until the training
process is gone. To its standard output it writes JSON lines, what became of W&B; the end of that pipe is the end of
this process. It goes on where W&B's own history ends, so that no step is given twice and none is missed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
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
from typing import TYPE_CHECKING, Literal

from bigtx.track.artifacts import link_base, log_model
from bigtx.track.copier import Copier
from bigtx.track.jsonl import Record, parse_line
from bigtx.track.wandb_host import answers
from bigtx.track.wandb_log import last_step
from bigtx.utils.files import write_atomic
from bigtx.utils.processes import start_of

if TYPE_CHECKING:
    from wandb import Run

PROBE_SECONDS = 2.5
POLL_SECONDS = 0.5
LOCK_SECONDS = 60.0
UPLOAD_SECONDS = 30
MAX_STARTS = 3
# Longest life after the training said how it ended.
LIFE_SECONDS = UPLOAD_SECONDS + 10.0
# Longest life after the training process went away without a word: nothing of a killed run may linger.
ORPHAN_SECONDS = 4.0

TASK_FILE = "task.json"
"""What the run was begun with, beside W&B's own files: `bigtx.track.sync` begins the same run elsewhere."""

_NO_KEY = "no API key (see `wandb login`)"

Mode = Literal["online", "offline"]


class Parent:
    """The training process, as seen from here: lines on standard input, and whether it lives."""

    def __init__(self) -> None:
        """To be made by a child of that process."""
        self.pid = os.getppid()
        self._start = start_of(self.pid)
        self._text = b""
        self._is_closed = False

    def read(self, timeout: float) -> Record | None:
        """The next line, or None after `timeout` seconds without one, or when none can come any more."""
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
        """Whether the process died. Its end of the pipe alone does not tell: its children may hold it open too."""
        return self._is_closed or start_of(self.pid) != self._start


class Ending:
    """How the run ended, once that is known; from then on this process has only so long to live."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self.status = ""

    def is_known(self, timeout: float) -> bool:
        """Wait for it up to `timeout` seconds."""
        if not self.status:
            line = self._parent.read(timeout)
            if line is not None:
                self.status = line["status"]
                _end_by_force_after(LIFE_SECONDS)
            elif self._parent.is_gone:
                self.status = "failed"
                _end_by_force_after(ORPHAN_SECONDS)
        return bool(self.status)


def choose_mode(requested: str) -> tuple[Mode, str, str]:
    """How W&B can run here, asking nobody and waiting a few seconds at most.

    Args:
        requested: "auto", "online" or "offline".

    Returns:
        "online" or "offline"; why it is offline, or ""; the server's address.
    """
    import wandb

    settings = wandb.setup().settings
    host = settings.base_url
    if requested == "offline" or os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "offline", "as asked for", host
    if not _may_have_key(settings.api_key):
        return "offline", _NO_KEY, host
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    # Before logging in, which waits much longer for a host that is not there.
    if not answers(host, timeout=PROBE_SECONDS, proxies={scheme: url for scheme, url in proxies.items() if url}):
        return "offline", f"{host} does not answer", host
    problem = _login_problem()
    return ("offline", problem, host) if problem else ("online", "", host)


def _may_have_key(key_in_settings: str | None) -> bool:
    names = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    files = (os.environ.get("NETRC", "~/.netrc"), "~/_netrc")
    return bool(key_in_settings or any(map(os.environ.get, names)) or any(Path(f).expanduser().exists() for f in files))


# Once: later calls in one process do nothing and say no.
@functools.cache
def _login_problem() -> str:
    import wandb

    try:
        return "" if wandb.login(prompt=False, verify=False) else _NO_KEY
    except Exception as error:
        return f"the API key cannot be used: {error}"


def start_run(task: Record, mode: Mode, stop: Callable[[], None]) -> Run:
    """Begin or resume the W&B run. Raises whatever W&B raises.

    Args:
        stop: what the stop button of W&B's page does.
    """
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_save_requirements=False,
        x_disable_meta=True,
        x_stats_pid=task["pid"],
        init_timeout=20,
        x_graphql_timeout_seconds=30,
        finish_timeout=UPLOAD_SECONDS,
        x_service_wait=20,
        x_transaction_log_flush_interval=1,
        stop_fn=stop,
    )
    run = wandb.init(mode=mode, resume="allow", allow_val_change=True, settings=settings, **task["init"])
    run.define_metric("train/tokens")
    run.define_metric("*", step_metric="train/tokens")
    return run


def follow(task: Record, ending: Ending, report: Callable[[Record], None]) -> None:
    """Copy until the run ends. Raises whatever W&B raises."""
    import wandb

    folder = Path(task["init"]["dir"])
    mode, why, host = choose_mode(task["mode"])

    def stop() -> None:
        """Ask the training to save and end, as Ctrl-C does."""
        os.kill(task["pid"], signal.SIGINT)

    try:
        run = start_run(task, mode, stop)
    except Exception as error:
        if mode == "offline":
            raise
        # A run of the same id can begin anew only after W&B's own process has ended.
        _discard_wandb()
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
    if first_step > task["resumed_step"] + 1:
        run.summary["replayed_steps"] = f"{task['resumed_step'] + 1}-{first_step - 1}"
    if task["base"]:
        report(link_base(run, task["base"], is_online=mode == "online"))
    copier = Copier(run, folder, first_step, task["better"])
    is_over = False
    while not is_over:
        is_over = ending.is_known(POLL_SECONDS)
        copier.copy()
    if ending.status == "stopped":
        run.mark_preempting()
    if ending.status == "finished" and copier.model:
        log_model(run, copier.model)
    run.finish(exit_code=0 if ending.status == "finished" else 1)
    wandb.teardown()


def main() -> int:
    """The process."""
    # Signals to the whole group or job are for the training; this process ends after it.
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
    # It may have died before this process could look.
    parent.pid = task["pid"]

    def report(facts: Record) -> None:
        # The training may have ended meanwhile.
        with contextlib.suppress(OSError):
            reports.write(json.dumps(facts) + "\n")

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Before its first table W&B asks the server for leave, and waits this many seconds for the answer.
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", "5")
    os.environ.pop("WANDB_SERVICE", None)
    ending = Ending(parent)
    with _one_at_a_time(Path(task["init"]["dir"]) / "wandb"):
        with contextlib.suppress(OSError):
            write_atomic(Path(task["init"]["dir"]) / "wandb" / TASK_FILE, json.dumps(task, indent=1))
        for _ in range(MAX_STARTS):
            try:
                follow(task, ending, report)
            except Exception as error:
                traceback.print_exc()
                report({"error": f"{type(error).__name__}: {error}"})
                _discard_wandb()
            else:
                return 0
    return 1


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the follower of the run's last life may keep a little longer."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield


def _discard_wandb() -> None:
    """Leave W&B as before its first use, whatever state it is in."""
    _kill_children()
    # Where its process ended badly, W&B asks Python to exit.
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _kill_children() -> None:
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def _end_by_force_after(seconds: float) -> None:
    """End this process and W&B's own if they are still there then."""

    def end() -> None:
        _kill_children()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit: W&B's exit hooks wait without limit for a process of its own that may be dead or stuck.
    os._exit(status)
