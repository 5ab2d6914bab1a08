"""Copy a run's JSON lines into W&B, in the process `python -m bigtx.track.follower` that wandb_run.py starts.

The process leaves the training's process tree at once: at a Ctrl-C launchers kill that whole tree, with W&B's process
in it, while the training still saves. The process reads a JSON line with its task from standard input. Then it follows
metrics.jsonl, samples.jsonl, predictions.jsonl and events.jsonl until a second line says how the run ended, or until
the training process is gone. It writes reports about W&B as JSON lines to standard output; that pipe closes when the
process ends. It continues where W&B's own history ends, so that each step is copied once.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import select
import signal
import struct
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigtx.track.copier import Copier, link_base, log_model
from bigtx.track.jsonl import Record, parse_line
from bigtx.track.wandb_run import answers
from bigtx.utils.files import write_atomic
from bigtx.utils.processes import start_of

if TYPE_CHECKING:
    from wandb import Run


PROBE_SECONDS = 2.5
POLL_SECONDS = 0.5
LOCK_SECONDS = 60.0
UPLOAD_SECONDS = 30
MAX_STARTS = 3
FINISH_SECONDS = UPLOAD_SECONDS + 10.0
"""How long this process may take to end after the training has reported how it ended."""
ORPHAN_SECONDS = 4.0
"""How long this process may take to end after the training was killed: no process of a killed run may remain."""

TASK_FILE = "task.json"
"""The file with the follower's task, next to W&B's own files. `bigtx.track.sync` starts the same run from it."""

_NO_KEY = "no API key (see `wandb login`)"

Mode = Literal["online", "offline"]


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
        self.status = ""

    def is_known(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end of the run. Returns whether it is known."""
        if not self.status:
            line = self._parent.read(timeout)
            if line is not None:
                self.status = line["status"]
                _end_by_force_after(FINISH_SECONDS)
            elif self._parent.is_gone:
                self.status = "failed"
                _end_by_force_after(ORPHAN_SECONDS)
        return bool(self.status)


def choose_mode(requested: str) -> tuple[Mode, str, str]:
    """Return how W&B can run here, without a prompt and within a few seconds.

    Args:
        requested: "auto", "online" or "offline".

    Returns:
        The mode, "online" or "offline"; the reason if it is offline, else ""; the server's address.
    """
    import wandb

    settings = wandb.setup().settings
    host = settings.base_url
    if requested == "offline" or os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "offline", "as requested", host
    if not _may_have_key(settings.api_key):
        return "offline", _NO_KEY, host
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    # This comes before the login, which would wait much longer for a missing host.
    if not answers(host, timeout=PROBE_SECONDS, proxies={scheme: url for scheme, url in proxies.items() if url}):
        return "offline", f"{host} does not answer", host
    problem = _login_problem()
    return ("offline", problem, host) if problem else ("online", "", host)


def _may_have_key(key_in_settings: str | None) -> bool:
    names = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    files = (os.environ.get("NETRC", "~/.netrc"), "~/_netrc")
    return bool(key_in_settings or any(map(os.environ.get, names)) or any(Path(f).expanduser().exists() for f in files))


# Cached, because later logins in one process have no effect and return False.
@functools.cache
def _login_problem() -> str:
    import wandb

    try:
        return "" if wandb.login(prompt=False, verify=False) else _NO_KEY
    except Exception as error:
        return f"the API key cannot be used: {error}"


def start_run(task: Record, mode: Mode, stop: Callable[[], None]) -> Run:
    """Start or resume the W&B run. Errors of W&B are passed on.

    Args:
        task: the follower's task.
        mode: online or offline.
        stop: the function to call when the stop button of W&B's page is pressed.
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
    """Copy until the run ends. Errors of W&B are passed on."""
    import wandb

    folder = Path(task["init"]["dir"])
    mode, why, host = choose_mode(task["mode"])

    def stop() -> None:
        """Ask the training to save a checkpoint and end, as Ctrl-C does."""
        os.kill(task["pid"], signal.SIGINT)

    try:
        run = start_run(task, mode, stop)
    except Exception as error:
        if mode == "offline":
            raise
        # A run with the same id can start again only after W&B's own process has ended.
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

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Before its first table W&B sends a request to the server, and waits this many seconds for the answer.
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
    """Hold the folder's lock; wait for the follower of the run's previous start to release it."""
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
                break  # This file system has no locks.
        yield


def _discard_wandb() -> None:
    """Reset W&B to its state before the first use."""
    _kill_children()
    # After a failure of its process, W&B asks Python to exit.
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _kill_children() -> None:
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)


def _end_by_force_after(seconds: float) -> None:
    """Kill this process and W&B's own if they are still running after this time."""

    def end() -> None:
        _kill_children()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


_MAGIC = b":W&B"
_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the serialized records of a log, up to its end or to a record that a crash left incomplete."""
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        return
    position = _HEADER_BYTES
    record = b""
    while position + _CHUNK_HEADER.size <= len(data):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _CHUNK_HEADER.size:
            position += left_in_block
            continue
        checksum, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        payload = data[position + _CHUNK_HEADER.size : position + _CHUNK_HEADER.size + length]
        is_whole = len(payload) == length and zlib.crc32(payload, zlib.crc32(bytes([kind]))) == checksum
        if not is_whole or not _FULL <= kind <= _LAST:
            return
        position += _CHUNK_HEADER.size + length
        record = payload if kind in (_FULL, _FIRST) else record + payload
        if kind in (_FULL, _LAST):
            yield record


def last_step(folder: Path, run_id: str) -> int:
    """Return the highest step in all local logs of a run, or -1 without any step.

    Args:
        folder: the run folder, which contains `wandb/`.
        run_id: the id of the run in W&B.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    highest = -1
    for path in sorted(folder.glob(f"wandb/*run-*/run-{run_id}.wandb")):
        for text in read_records(path):
            record = Record.FromString(text)
            if record.WhichOneof("record_type") == "history":
                highest = max(highest, record.history.step.num)
    return highest


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # sys.exit would call W&B's exit hooks, which wait without limit for W&B's own process, even if it hangs.
    os._exit(status)
