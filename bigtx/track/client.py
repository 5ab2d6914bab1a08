"""Use W&B's client: choose online or offline, start a run there, copy a run folder's lines into it, and end it.

The follower of a training (`follower.py`) and `bigtx wandb sync` copy a run with the same function, `copy_run`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigtx.track.copier import Copier, log_model
from bigtx.track.jsonl import Record
from bigtx.track.wandb_run import answers
from bigtx.utils.locks import try_lock
from bigtx.utils.processes import children

if TYPE_CHECKING:
    from wandb import Run


PROBE_SECONDS = 2.5
UPLOAD_SECONDS = 30
_NO_KEY = "no API key (see `wandb login`)"
AS_REQUESTED = "as requested"

Mode = Literal["online", "offline"]


def prepare_environment() -> None:
    """Set the variables of W&B's client. Call this before it is imported."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Before its first table W&B sends a request to the server, and waits this many seconds for the answer.
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", "5")
    os.environ.pop("WANDB_SERVICE", None)


@contextlib.contextmanager
def reserve(folder: Path) -> Iterator[bool]:
    """Reserve a run folder for the process that sends it to W&B. Yield False where another process is sending it."""
    (folder / "wandb").mkdir(exist_ok=True)
    with (folder / "wandb" / ".online.lock").open("w") as file:
        yield try_lock(file.fileno()) is not False


@dataclass(frozen=True)
class End:
    """How a start of a run ended.

    Attributes:
        status: finished, stopped or failed; "" while it runs, or where it was killed.
        is_complete: whether a resume adds nothing to the last line of metrics. A run that was stopped or killed when a
            measurement was due adds it there.
    """

    status: str
    is_complete: bool = True


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
        return "offline", AS_REQUESTED, host
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


def copy_run(
    run: Run, folder: Path, first_step: int, better: dict[str, str], ended: Callable[[], End | None]
) -> Copier:
    """Copy the lines of a run folder into a W&B run until the run has ended, and finish the W&B run.

    Errors of W&B are passed on.

    Args:
        run: the run in W&B.
        folder: the run folder.
        first_step: the first step that W&B does not have.
        better: as for `Tracker`.
        ended: returns how the run ended, or None while it continues. It may wait a little.

    Returns:
        The copier, which knows how much was copied.
    """
    copier = Copier(run, folder, first_step, better)
    while (end := ended()) is None:
        copier.copy()
    copier.copy(is_final=end.is_complete)
    is_finished = end.status == "finished"
    if end.status in ("stopped", ""):
        run.mark_preempting()  # Else W&B would show it as crashed until the next start.
    if is_finished and copier.model:
        log_model(run, copier.model)
    run.finish(exit_code=0 if is_finished else 1)
    return copier


def discard_wandb() -> None:
    """Reset W&B to its state before the first use."""
    kill_children()
    # After a failure of its process, W&B asks Python to exit.
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def kill_children() -> None:
    """Kill the processes that this one has started."""
    for child in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


_MAGIC = b":W&B"
_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_CHUNK_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_log(path: Path) -> Iterator[bytes]:
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
        for text in read_log(path):
            record = Record.FromString(text)
            if record.WhichOneof("record_type") == "history":
                highest = max(highest, record.history.step.num)
    return highest
