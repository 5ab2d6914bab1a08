"""Send offline runs to W&B from a machine with a network: `python -m bigtx.track.sync FOLDER ...`.

slurm/wandb-sync.sh calls it repeatedly.

The lines of a run are read from its JSON files, as by the follower, and are sent from where W&B's history ends. So a
run can be sent repeatedly while it trains, and each step is there once. `wandb sync` begins with the first step each
time, and W&B adds the steps as new ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigtx.track.copier import Copier, link_base, log_model
from bigtx.track.follower import TASK_FILE, choose_mode, start_run
from bigtx.track.jsonl import Record, parse_line
from bigtx.utils.files import write_atomic
from bigtx.utils.locks import try_lock

FILES = ("metrics.jsonl", "samples.jsonl", "predictions.jsonl", "events.jsonl")
SENT = "sent.json"
"""The file with the sizes of `FILES` when they were last sent, next to W&B's own files."""


def run_folders(places: Sequence[str]) -> Iterator[Path]:
    """Yield the run folders with W&B's files among these places, and up to two levels below them."""
    for place in places:
        for pattern in ("", "*/", "*/*/"):
            yield from (task.parent.parent for task in sorted(Path(place).glob(f"{pattern}wandb/{TASK_FILE}")))


def sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files whose lines are sent, in bytes."""
    return {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}


def has_news(folder: Path) -> bool:
    """Return whether the run has written lines since it was last sent."""
    try:
        return json.loads((folder / "wandb" / SENT).read_text(encoding="utf-8")) != sizes(folder)
    except (OSError, ValueError):
        return True


def send(folder: Path) -> int:
    """Copy a run's new lines to W&B. Errors of W&B are passed on.

    Returns:
        The first step that was new there.
    """
    import wandb

    folder = folder.resolve()
    task: Record = json.loads((folder / "wandb" / TASK_FILE).read_text(encoding="utf-8"))
    before, status = sizes(folder), _status(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        init = {**task["init"], "dir": scratch}
        # The stop button of W&B's page has the effect of `touch RUN/STOP`.
        run = start_run({**task, "pid": os.getpid(), "init": init}, "online", (folder / "STOP").touch)
        first_step: int = run.starting_step
        if task["base"]:
            link_base(run, task["base"], is_online=True)
        copier = Copier(run, folder, first_step, task["better"])
        copier.copy()
        if status == "finished" and copier.model:
            log_model(run, copier.model)
        if status != "finished":
            run.mark_preempting()  # Else W&B would show it as crashed until the next time.
        run.finish(exit_code=0 if status == "finished" else 1)
        wandb.teardown()
    for segment in folder.glob("wandb/offline-run-*/*.wandb"):
        segment.with_suffix(".wandb.synced").touch()  # So that `wandb sync` skips it.
    write_atomic(folder / "wandb" / SENT, json.dumps(before))
    return first_step


def _status(folder: Path) -> str:
    """Return how the run's last start ended; "" while the run continues."""
    try:
        lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return ""
    # Reports about W&B may follow the end of a start.
    for event in map(parse_line, reversed(lines)):
        if event and event.get("kind") in ("start", "end"):
            return str(event.get("status", ""))
    return ""


@contextlib.contextmanager
def _try_to_reserve(folder: Path) -> Iterator[bool]:
    """Reserve a run for this process. Yields False where another process is sending it."""
    with (folder / "wandb" / ".sync.lock").open("w") as file:
        yield try_lock(file.fileno()) is not False


def main(places: Sequence[str]) -> int:
    """Send all runs that have new lines.

    Returns:
        0; 1 where W&B does not answer or refused a run, and the next call tries again.
    """
    waiting = [folder for folder in run_folders(places) if has_news(folder)]
    if not waiting:
        return 0
    mode, why, _ = choose_mode("auto")
    if mode != "online":
        print(f"{len(waiting)} run(s) are waiting: {why}", flush=True)
        return 1
    status = 0
    for folder in waiting:
        with _try_to_reserve(folder) as free:
            if not free:
                continue
            try:
                print(f"{folder}: sent, beginning with step {send(folder)}", flush=True)
            except Exception as error:
                print(f"{folder}: W&B refused it ({type(error).__name__}: {error})", flush=True)
                status = 1
    return status


if __name__ == "__main__":
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    result = main(sys.argv[1:])
    sys.stdout.flush()
    # sys.exit would call W&B's exit hooks, which wait without limit for W&B's own process, even if it hangs.
    os._exit(result)
