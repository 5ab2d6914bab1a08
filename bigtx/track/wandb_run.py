"""Start the follower process from the training, and read its reports without waiting for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from bigtx.track.jsonl import TASK_FILE, Record, parse_line
from bigtx.utils.files import read_object, write_atomic
from bigtx.utils.secrets import scrub
from bigtx.utils.shell import command

RUN_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""The ids that W&B accepts."""
ID_FILE = "wandb_run_id"
PLACE_FILE = "wandb_run_place"
"""The file with the run folder's last path, its host, and its inode number. They show whether a folder is a copy."""
WAIT_SECONDS = 3.0
PROBE_SECONDS = 1.0
# An upload may take this long at the end of a run whose server answers. The data is on disk in any case.
UPLOAD_SECONDS = 30.0


class WandbRun:
    """A W&B run to which a separate process copies the run folder's JSON lines.

    No method raises an error of W&B, and only `close` waits for it: 3 s at most, or 30 s at most while a server that
    answers receives the last data.

    Attributes:
        mode: "online" or "offline"; "" until it is known; "off" after a permanent failure of W&B.
    """

    def __init__(self, folder: Path, task: Record, show: Callable[[str], None], note: Callable[..., None]) -> None:
        """Start the follower.

        Args:
            folder: the run folder.
            task: the follower's task: `mode`, `resumed_step`, and `init`, the arguments of `wandb.init`.
            show: prints a line for the user.
            note: records an event: `note(kind, **facts)`.
        """
        self.mode = ""
        self._folder = folder
        self._later = command("bigtx", "wandb", "sync", folder)
        self._task = {**task, "pid": os.getpid()}
        self._show = show
        self._note = note
        # The process that starts the follower and ends; its pipes are connected to the follower.
        self._starter: subprocess.Popen[bytes] | None = None
        self._has_ended = False
        self._text = b""
        self._error = ""
        self._host = ""
        self._shown = ""
        self._start()

    def poll(self) -> None:
        """Read the follower's reports."""
        if self._starter is None:
            return
        self._starter.poll()  # Removes the ended process from the table of processes.
        self._receive()
        self._handle_reports()
        if self._has_ended:
            self._close_pipes()
            self._give_up(self._error or f"its process ended; see {self._folder / 'logs' / 'wandb.log'}")

    def close(self, status: str, *, is_complete: bool = True) -> None:
        """Report to the follower how the run ended, and wait a few seconds until it has finished.

        Args:
            status, is_complete: see `bigtx.track.client.End`.
        """
        self.poll()
        if self._starter is None:
            return
        self._send({"status": status, "is_complete": is_complete})
        if not self._ends_within(WAIT_SECONDS):
            host_answers = self.mode == "online" and answers(self._host, timeout=PROBE_SECONDS)
            if not (host_answers and self._ends_within(UPLOAD_SECONDS)):
                self._show(f"W&B is still writing {self._folder / 'wandb'}, in the background")
        self._handle_reports()
        if self._error:
            self._show(
                f"warning: W&B failed ({' '.join(self._error.split())}); the last data may be missing there; see "
                f"{self._folder / 'logs' / 'wandb.log'}. To send it: {self._later}"
            )
        self._close_pipes()
        self._starter = None

    def _start(self) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
        try:
            with _log_file(self._folder / "logs" / "wandb.log") as log:
                self._starter = subprocess.Popen(
                    # The folder shows in a list of processes which run this one belongs to.
                    [sys.executable, "-P", "-m", "bigtx.track.follower", str(self._folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": search_path},
                    # Ctrl-C is for the training, which then reports its end to the follower.
                    start_new_session=True,
                )
        except OSError as error:
            self._give_up(str(error))
            return
        assert self._starter.stdout is not None
        os.set_blocking(self._starter.stdout.fileno(), False)
        self._send(self._task)

    def _give_up(self, reason: str) -> None:
        self._starter = None
        self.mode = "off"
        self._note("wandb_off", error=reason)
        self._show(
            f"warning: W&B is turned off for the rest of this run ({reason}); metrics.jsonl is still written. "
            f"To send it later: {self._later}"
        )

    def _handle(self, report: Record) -> None:
        report = scrub(report)
        if "error" in report:
            self._error = report["error"]
            self._note("wandb_error", error=self._error)
            return
        if "event" in report:
            self._note(**{"kind": report.pop("event"), **report})
            return
        self.mode, self._error = report["mode"], ""
        self._host = report["host"]
        self._note("wandb", **report)
        if self.mode == "online":
            text = f"W&B: {report['url']}"
        else:
            warning = "warning: " if self._task["mode"] == "online" else ""
            text = f"{warning}W&B offline, {report['why']}; later: {self._later}"
        if text != self._shown:  # W&B starts again when it was killed.
            self._shown = text
            self._show(text)

    def _receive(self) -> None:
        assert self._starter is not None and self._starter.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._starter.stdout.fileno(), 65536):
                self._text += chunk
            self._has_ended = True

    def _handle_reports(self) -> None:
        """Handle the reports that have arrived completely."""
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            if (report := parse_line(line + b"\n")) is not None:
                self._handle(report)

    def _send(self, record: Record) -> None:
        assert self._starter is not None and self._starter.stdin is not None
        with contextlib.suppress(OSError):
            self._starter.stdin.write(json.dumps(record).encode() + b"\n")
            self._starter.stdin.flush()

    def _ends_within(self, seconds: float) -> bool:
        assert self._starter is not None and self._starter.stdout is not None
        pipe = select.poll()
        pipe.register(self._starter.stdout, select.POLLIN)
        deadline = time.monotonic() + seconds
        while not self._has_ended and (left := deadline - time.monotonic()) > 0:
            pipe.poll(left * 1000)
            self._receive()
        return self._has_ended

    def _close_pipes(self) -> None:
        assert self._starter is not None
        self._starter.poll()
        for pipe in (self._starter.stdin, self._starter.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(frozen=True)
class RunId:
    """A run's W&B id, which all starts of the run folder share.

    Attributes:
        id: the id.
        original: the id of the run whose folder was copied; "" if this folder is not a copy.
        original_folder: the path of that run's folder.
    """

    id: str
    original: str = ""
    original_folder: str = ""


class _Place(NamedTuple):
    """The place of a run folder when it was last used; "" is unknown."""

    path: str
    host: str = ""
    number: str = ""


def read_or_make_run_id(folder: Path) -> RunId:
    """Return the id of a run folder. A folder that was moved keeps its id; a copy gets its own.

    On the machine of the original, a folder is a copy if the original still exists. On another machine the original
    cannot be seen. There a folder with the original's path, or with its inode number in a shared file system, counts as
    the original that was moved or restored; any other folder counts as a copy.
    """
    folder = folder.resolve()
    run_id, before = read_run_id(folder), _read_place(folder)
    now = _Place(str(folder), socket.gethostname(), str(folder.stat().st_ino))
    is_copy = bool(run_id) and (_is_copy_here(folder, run_id, before) or _is_copy_from_elsewhere(before, now))
    if not run_id or is_copy:
        made = make_run_id(folder)
    if before != now:
        write_atomic(folder / PLACE_FILE, "\n".join([*now, ""]))
    if is_copy:
        at = before.path if before.host == now.host or not before.host else f"{before.host}:{before.path}"
        return RunId(made, run_id, at)
    return RunId(run_id or made)


def read_run_id(folder: Path) -> str:
    """Return the id of a run folder; "" if it has none. Where the file is damaged, the last start has recorded it."""
    init = read_object(folder / TASK_FILE).get("init")
    recorded = str(init.get("id")) if isinstance(init, dict) else ""
    return next(filter(RUN_ID.fullmatch, (_read(folder / ID_FILE), recorded)), "")


def make_run_id(folder: Path) -> str:
    """Give a run folder a new id."""
    made = secrets.token_hex(6)
    write_atomic(folder / ID_FILE, f"{made}\n")
    return made


def _is_copy_here(folder: Path, run_id: str, before: _Place) -> bool:
    """Return whether the original exists here and has the same id."""
    original = Path(before.path or folder)
    return not _same_folder(original, folder) and read_run_id(original) == run_id


def _is_copy_from_elsewhere(before: _Place, now: _Place) -> bool:
    is_known = bool(before.host and before.number)
    return is_known and all(old != new for old, new in zip(before, now, strict=True))


def _read_place(folder: Path) -> _Place:
    lines = _read(folder / PLACE_FILE).splitlines()
    return _Place(*lines[:3]) if lines else _Place("")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return ""


def _same_folder(first: Path, second: Path) -> bool:
    # One folder may have several paths, because of containers or mounts.
    try:
        return first.samefile(second)
    except (OSError, ValueError):
        return False


def _log_file(path: Path) -> Any:
    try:
        path.parent.mkdir(exist_ok=True)
        return path.open("ab")
    except OSError:
        return open(os.devnull, "wb")


def answers(url: str, *, timeout: float, proxies: dict[str, str] | None = None) -> bool:
    """Return whether a server at `url` answers an HTTP request in time.

    An open port is not enough: firewalls and broken servers may accept connections without an answer.

    Args:
        url: the server's base URL.
        timeout: seconds for the whole check. Name servers that do not answer could take half a minute,
            independent of the connection's time-out.
        proxies: proxies by scheme, in addition to those of the environment; loopback addresses are used without one.
    """
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(_answers(url, timeout, proxies or {})), daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(found and found[0])


def _answers(url: str, timeout: float, proxies: dict[str, str]) -> bool:
    host = urlsplit(url).hostname or ""
    is_here = host == "localhost" or host.startswith("127.") or host == "::1"
    goes_direct = is_here or urllib.request.proxy_bypass(host)
    chosen = {} if goes_direct else {**urllib.request.getproxies(), **proxies}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(chosen))
    try:
        opener.open(f"{url.rstrip('/')}/healthz", timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # A server answers; W&B's client has its own settings for certificates.
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except (OSError, ValueError):
        return False
    return True
