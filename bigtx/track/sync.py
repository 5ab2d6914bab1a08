"""Bring offline runs to W&B from a machine with a network: `python -m bigtx.track.sync FOLDER ...`.

slurm/wandb-sync.sh calls it again and again.

A run is read from its JSON lines, as by the follower, and goes on where W&B's history of it ends. So it may be brought
again and again while it trains, and no step is there twice: `wandb sync` begins with the first step each time, and W&B
takes the steps as new ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigtx.track.artifacts import link_base, log_model
from bigtx.track.copier import Copier
from bigtx.track.follower import TASK_FILE, choose_mode, start_run
from bigtx.track.jsonl import Record, parse_line
from bigtx.utils.files import write_atomic
from bigtx.utils.locks import try_lock

FILES = ("metrics.jsonl", "samples.jsonl", "predictions.jsonl", "events.jsonl")
SENT = "sent.json"
"""Sizes of the files when they were last brought, beside W&B's own files."""


def run_folders(places: Sequence[str]) -> Iterator[Path]:
    """The run folders among these and in them, up to two folders below, that W&B has followed."""
    for place in places:
        for pattern in ("", "*/", "*/*/"):
            yield from (task.parent.parent for task in sorted(Path(place).glob(f"{pattern}wandb/{TASK_FILE}")))


def sizes(folder: Path) -> dict[str, int]:
    """Of the files that W&B is given."""
    return {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}


def has_news(folder: Path) -> bool:
    """Whether the run has written anything since it was last brought."""
    try:
        return json.loads((folder / "wandb" / SENT).read_text(encoding="utf-8")) != sizes(folder)
    except (OSError, ValueError):
        return True


def bring(folder: Path) -> int:
    """Copy a run's new lines to W&B. Raises whatever W&B raises.

    Returns:
        The first step that was new there.
    """
    import wandb

    folder = folder.resolve()
    task: Record = json.loads((folder / "wandb" / TASK_FILE).read_text(encoding="utf-8"))
    before, status = sizes(folder), _status(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        init = {**task["init"], "dir": scratch}
        # A button pressed there leaves what `touch RUN/STOP` leaves.
        run = start_run({**task, "pid": os.getpid(), "init": init}, "online", (folder / "STOP").touch)
        first_step: int = run.starting_step
        if task["base"]:
            link_base(run, task["base"], is_online=True)
        copier = Copier(run, folder, first_step, task["better"])
        copier.copy()
        if status == "finished" and copier.model:
            log_model(run, copier.model)
        if status != "finished":
            run.mark_preempting()  # Else it would be "crashed" there until it is brought again.
        run.finish(exit_code=0 if status == "finished" else 1)
        wandb.teardown()
    for segment in folder.glob("wandb/offline-run-*/*.wandb"):
        segment.with_suffix(".wandb.synced").touch()  # `wandb sync` passes over it now.
    write_atomic(folder / "wandb" / SENT, json.dumps(before))
    return first_step


def _status(folder: Path) -> str:
    """How the run's last life ended; "" while it goes on."""
    try:
        lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return ""
    last = parse_line(lines[-1]) if lines else None
    return str(last["status"]) if last and last["kind"] == "end" else ""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process brings the run now."""
    with (folder / "wandb" / ".sync.lock").open("w") as file:
        yield try_lock(file.fileno()) is not False


def main(places: Sequence[str]) -> int:
    """Bring all runs that have news.

    Returns:
        0; 1 where W&B does not answer or did not take a run: the next call tries again.
    """
    waiting = [folder for folder in run_folders(places) if has_news(folder)]
    if not waiting:
        return 0
    mode, why, _ = choose_mode("auto")
    if mode != "online":
        print(f"{len(waiting)} run(s) wait: {why}", flush=True)
        return 1
    status = 0
    for folder in waiting:
        with _alone(folder) as free:
            if not free:
                continue
            try:
                print(f"{folder}: brought from step {bring(folder)} on", flush=True)
            except Exception as error:
                print(f"{folder}: W&B did not take it ({type(error).__name__}: {error})", flush=True)
                status = 1
    return status


if __name__ == "__main__":
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    result = main(sys.argv[1:])
    sys.stdout.flush()
    # Not sys.exit: W&B's exit hooks wait without limit for a process of its own that may be dead or stuck.
    os._exit(result)
