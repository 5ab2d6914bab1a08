"""`bigtx wandb sync`: send what W&B does not have of runs, from their folders.

The lines are read from the run's JSON files and sent from the step at which W&B's history ends, by the same function as
in a training's follower. So a run may be sent repeatedly, also while it trains offline, and each step is there once.
(`wandb sync` begins with the first step each time, and W&B adds the steps as new ones.)
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigtx.track.jsonl import EVENTS, RECORD_FILES, TASK_FILE, Record, is_stamped, read_records
from bigtx.track.wandb_run import make_run_id, read_or_make_run_id, read_run_id
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import BigtxError, CheckpointError, ConfigError, LaunchError, writes
from bigtx.utils.files import read_object, unsealed, write_json, write_sealed
from bigtx.utils.locks import LOCK_NAME, refuse_if_held
from bigtx.utils.log import said_aside, say, say_error, say_json
from bigtx.utils.shell import command

if TYPE_CHECKING:
    from bigtx.track.client import End

SENT = Path("wandb", "sent.json")
"""The record of the last time that a run was sent: the W&B id, its last step there, and its files' sizes."""


@dataclass
class Result:
    """What happened to one run.

    Attributes:
        run: the run folder.
        status: sent, live (its own training sends it), planned (a dry run) or failed.
        wandb_run_id: its id in W&B; "" where it gets one when it is sent.
        url: its page in W&B.
        sent: the number of steps that W&B did not have.
        last_step: the last step that W&B has; in a dry run, that it had when the run was last sent; -1 for none.
        waiting: the number of steps that are not sent yet: in a dry run all that would be sent, else the last step, if
            the run may add to it.
        damaged: the number of lines of the run's files that are damaged and were skipped.
        error: why it failed.
    """

    run: str
    status: str
    wandb_run_id: str = ""
    url: str = ""
    sent: int = 0
    last_step: int = -1
    waiting: int = 0
    damaged: int = 0
    error: str = ""


def sync_command(argv: Sequence[str]) -> int:
    """Send runs to W&B, each step once.

    Raises:
        BigtxError: no run could be found, or W&B cannot be reached.
    """
    parser = Arguments(
        "wandb sync",
        "Send to W&B what it does not have of runs: after a training without a network, without a key or "
        "without W&B, and where W&B failed. Each step is sent once, also if the command is repeated.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run, or a folder with runs in it")
    parser.add_argument("--new", action="store_true", help="send all of it to a new W&B run")
    parser.add_argument("--changed", action="store_true", help="skip runs without new lines since they were last sent")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent; contact no server")
    options = parser.parse_args(argv)
    folders = [folder for place in options.runs for folder in find_runs(Path(place))]
    if options.changed:
        folders = [folder for folder in folders if read_object(folder / SENT).get("sizes") != _sizes(folder)]
    results = []
    with said_aside(options.json):
        if folders and not options.dry_run:
            require_server()
        for folder in folders:
            result = plan(folder) if options.dry_run else try_to_send(folder, is_new=options.new)
            results.append(result)
            if not options.json and not result.error:
                say(describe(result))
    if options.json:
        say_json([dataclasses.asdict(result) for result in results])
    return BigtxError.exit_status if any(result.error for result in results) else 0


def find_runs(place: Path) -> list[Path]:
    """Return the run at a place, or the runs up to two levels below it.

    Raises:
        ConfigError: there is no run.
    """
    found = [file.parent for pattern in ("", "*/", "*/*/") for file in sorted(place.glob(f"{pattern}{TASK_FILE}"))]
    if (place / TASK_FILE).is_file():
        return found[:1]
    if not found:
        what = f"is not a run: it has no {TASK_FILE}" if place.is_dir() else "is not a folder"
        raise ConfigError(f"{place} {what}; name the run_dir of a training, or a folder that contains such folders")
    return found


def require_server() -> None:
    """Check that W&B can be reached, with a key.

    Raises:
        LaunchError: it cannot.
    """
    from bigtx.track.client import AS_REQUESTED, choose_mode, prepare_environment

    os.environ.setdefault("WANDB_SILENT", "true")  # This command prints what matters.
    prepare_environment()
    mode, why, host = choose_mode("online")
    if mode == "online":
        return
    if why == AS_REQUESTED:
        advice = "unset WANDB_MODE, which says so"
    elif "key" in why:
        advice = f"run `wandb login --host {host}`, or set WANDB_API_KEY"
    else:
        advice = "run the command again on a machine with a network; WANDB_BASE_URL names a server of your own"
    raise LaunchError(f"nothing was sent: W&B is offline ({why}); {advice}")


def plan(folder: Path) -> Result:
    """Return what is known of a run without a server."""
    from bigtx.track.copier import Tail

    sent = read_object(folder / SENT)
    is_known = sent.get("wandb_run_id") == read_run_id(folder) and isinstance(sent.get("last_step"), int)
    last = sent["last_step"] if is_known else -1
    metrics = Tail(folder / "metrics.jsonl", is_stamped)
    waiting = sum(record["step"] > last for record in metrics.read())
    return Result(
        str(folder), "planned", read_run_id(folder), last_step=last, waiting=waiting, damaged=metrics.num_damaged
    )


def try_to_send(folder: Path, *, is_new: bool) -> Result:
    """Send a run, and print why that failed if it does: the other runs are still sent."""
    try:
        return send(folder.resolve(), is_new=is_new)
    except BigtxError as error:
        say_error(f"{type(error).__name__}: {error}")
        return Result(str(folder), "failed", read_run_id(folder), error=str(error))


def send(folder: Path, *, is_new: bool) -> Result:
    """Copy a run's new lines to W&B.

    Args:
        folder: the run folder.
        is_new: whether to make a new W&B run.

    Raises:
        CheckpointError: the folder is damaged.
        LaunchError: W&B refuses the run, or the folder cannot be written.
    """
    from bigtx.track.client import reserve

    task, end = _read_task(folder), _end_of(folder)
    with writes(folder / "wandb", "; make the run folder and its files writable"), reserve(folder) as is_free:
        if not is_free:
            return Result(str(folder), "live", read_run_id(folder))
        before = _sizes(folder)
        # A copy that has not trained since has the lines of the original, so it may use the original's id.
        own = make_run_id(folder) if is_new else read_run_id(folder) or read_or_make_run_id(folder).id
        task["init"]["id"] = own
        write_sealed(folder / TASK_FILE, task)  # A second record of the id, for the case that its file is damaged.
        result = _copy(folder, task, end)
        sent = {"wandb_run_id": result.wandb_run_id, "last_step": result.last_step, "sizes": before}
        write_json(folder / SENT, sent)
        for segment in folder.glob("wandb/offline-run-*/*.wandb"):
            segment.with_suffix(".wandb.synced").touch()  # So that `wandb sync` skips it.
        return result


def _copy(folder: Path, task: Record, end: End) -> Result:
    """Copy the lines of a folder that is reserved.

    Raises:
        LaunchError: W&B refuses the run.
    """
    import wandb

    from bigtx.track.client import copy_run, discard_wandb, start_run
    from bigtx.track.copier import link_base

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            # The stop button of W&B's page has the effect of `touch RUN/STOP`.
            own = {"pid": os.getpid(), "init": task["init"] | {"dir": scratch}}
            run = start_run(task | own, "online", (folder / "STOP").touch)
            if task["base"]:
                link_base(run, task["base"], is_online=True)
            copier = copy_run(run, folder, run.starting_step, task["better"], lambda: end)
            wandb.teardown()
        except Exception as error:
            discard_wandb()
            raise _refusal(folder, error) from error
        except BaseException:
            discard_wandb()
            raise
    return Result(
        run=str(folder),
        status="sent",
        wandb_run_id=run.id,
        url=run.url or "",
        sent=copier.num_sent,
        last_step=copier.last_step,
        waiting=int(not end.is_complete),
        damaged=copier.num_damaged,
    )


def _refusal(folder: Path, error: Exception) -> LaunchError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "deleted" in reason:
        again = command("bigtx", "wandb", "sync", folder, "--new")
        advice = f"its run was deleted there; to send it as a new one: {again}"
    else:
        advice = "what W&B already has is not sent twice, so run the command again"
    return LaunchError(f"W&B did not accept {folder} ({reason}); {advice}")


def _read_task(folder: Path) -> Record:
    """Return what the run's last start wrote for W&B.

    Raises:
        CheckpointError: it is damaged.
    """
    task = unsealed(read_object(folder / TASK_FILE))
    if task is None:
        raise CheckpointError(
            f"{folder / TASK_FILE} is damaged; restore it from a copy, or train the run further, which writes it again"
        )
    return task


def _sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files whose lines are sent, in bytes."""
    return {name: (folder / name).stat().st_size for name in RECORD_FILES if (folder / name).is_file()}


def _end_of(folder: Path) -> End:
    """Return how the run's last start ended, from its events and its lock."""
    from bigtx.track.client import End

    # Reports about W&B may follow the end of a start.
    events = [event for event in read_records(folder / EVENTS) if event.get("kind") in ("start", "end")]
    last = events[-1] if events else {}
    if last.get("kind") == "end" and not _is_held(folder):
        return End(str(last.get("status")), is_complete=not last.get("owes_validation"))
    return End("", is_complete=False) if _is_held(folder) else End("failed")


def _is_held(folder: Path) -> bool:
    """Return whether a process holds the run folder, or may hold it on another host."""
    try:
        refuse_if_held(folder)
    except LaunchError:
        return True
    host = read_object(folder / LOCK_NAME).get("host")
    return host is not None and host != socket.gethostname()


def describe(result: Result) -> str:
    """Return a result as a line."""
    if result.status == "live":
        return f"{result.run}: a process is sending it to W&B already"
    place = result.url or f"W&B run {result.wandb_run_id or '(new)'}"
    if result.status == "planned":
        before = f"up to step {result.last_step}" if result.last_step >= 0 else "nothing"
        return f"{result.run}: {place}; {before} was sent by this command before; {result.waiting} steps follow"
    sent = f"{result.sent} steps sent, up to step {result.last_step}" if result.sent else "W&B has every step already"
    later = f"; {result.waiting} step follows when the run adds to it or ends" if result.waiting else ""
    damaged = f"; {result.damaged} damaged lines of its files were skipped" if result.damaged else ""
    return f"{result.run}: {sent}{later}{damaged}; {place}"
