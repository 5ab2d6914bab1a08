"""Messages about run folders and files that cannot be used as they are, and about their copies in W&B."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from advice.cases_again import COPY, Step, again_in, damage, restore
from advice.cases_copies import FIFTH, copied_in, edit
from advice.cases_data import PREPARE
from advice.desk import Attempt, Cases, Desk, Outcome, call
from advice.shelf import TEXTS

from bigtx.commands import doctor, wandb
from bigtx.config.schema import TrackConfig
from bigtx.engine.checkpoint import MergedCheckpoint
from bigtx.track import Tracker
from bigtx.track.jsonl import JsonLines, append_missing
from bigtx.track.wandb_run import WandbRun

CASES = Cases()
again = functools.partial(again_in, CASES)

# Folders.


def read_only(name: str) -> None:
    Path(name).mkdir(exist_ok=True)
    Path(name).chmod(0o500)


def writable(desk: Desk) -> None:
    Path("mine").chmod(0o700)


def checked(folder: str) -> Step:
    """What `bigtx doctor FOLDER` says of the folder."""

    def check(desk: Desk) -> Outcome:
        with desk.as_user():
            (found,) = doctor._disk(Path(folder))
        return Outcome(found.status == "failed", found.text)

    return check


again(
    "a_folder_for_runs_that_is_read_only",
    "cannot be written; ",
    "name another folder",
    checked("mine"),
    checked("."),
    before=lambda desk: read_only("mine"),
)


def records(folder: str) -> Step:
    """Opening a run's records in a folder."""

    def write(desk: Desk) -> Outcome:
        def work() -> None:
            with desk.as_user():
                JsonLines(Path(folder) / "metrics.jsonl", warn=str).close()

        return call(work)

    return write


for name, advice, step, fix in (
    ("records_in_a_folder_to_be_made_writable", "make the folder and its files writable", records("mine"), writable),
    ("records_in_another_folder", "name another run_dir", records("."), None),
):
    again(
        name,
        " cannot be written: Permission denied; ",
        "=" + advice,
        records("mine"),
        step,
        before=lambda desk: read_only("mine"),
        fix=fix,
    )


def fill(desk: Desk, is_full: bool = True) -> None:
    """Fill the disk, or free space on it."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    desk.patch.setattr("bigtx.track.jsonl.os.pwrite", fail if is_full else PWRITE)


PWRITE = os.pwrite
again(
    "lines_of_a_checkpoint_on_a_full_disk",
    "metrics.jsonl lacks 1 line, which a checkpoint holds: ",
    "Free space on its disk, and resume the run again",
    lambda desk: call(lambda: append_missing(Path("metrics.jsonl"), [{"step": 1, "time": 1.0}])),
    before=fill,
    fix=lambda desk: fill(desk, is_full=False),
)
again(
    "a_name_that_no_file_can_have",
    " is too long for a file; ",
    "write a shorter one",
    f"{PREPARE} output={'a' * 300}",
    f"{PREPARE} output=a",
    before=lambda desk: (desk.take("tokenizer"), desk.write("texts/a.txt", TEXTS[0])),
)

# Runs.


def tracker(folder: str) -> Tracker:
    """The records of a run without W&B."""
    facts: dict[str, Any] = {"run_config": {}, "environment": {}, "rank": 0, "total_steps": 3, "better": {}}
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Tracker(folder, TrackConfig(wandb="off"), **facts)


def recorded(folder: str) -> None:
    """A run of three steps that W&B has not seen."""
    run = tracker(folder)
    for step in (1, 2, 3):
        run.log(step, step, {"train/loss": 1.0})
    run.close("finished")


def trained(folder: str, *, is_deleted: bool) -> Step:
    """A run whose folder may be deleted meanwhile."""

    def train(desk: Desk) -> Outcome:
        run = tracker(folder)
        if is_deleted:
            shutil.rmtree(folder)
        said = call(lambda: run.log(1, 1, {"train/loss": 1.0}))
        run.close("failed")
        return said

    return train


again(
    "a_run_folder_that_is_deleted",
    " was deleted while the run trained (step 1), so the run has ended; ",
    "start it again with a run_dir that nothing deletes",
    trained("mine", is_deleted=True),
    trained("mine", is_deleted=False),
)
again(
    "a_folder_without_jobs",
    "is not a run, and no job is queued for it; ",
    "name a run's folder",
    "bigtx slurm status empty",
    "bigtx slurm status decoder",
    before=lambda desk: (desk.take("decoder"), Path("empty").mkdir()),
)
SECRET = "hf_" + "a1B2" * 9


def batch(given: str, desk: Desk) -> Outcome:
    script = desk.run(f"bigtx slurm render evaluate decoder {given}")
    assert SECRET not in script.text
    return script


again(
    "a_secret_in_a_job",
    " looks like a secret, which the batch script and SLURM's list of jobs would show; ",
    "pass it as an environment variable",
    functools.partial(batch, f"data={SECRET}"),
    functools.partial(batch, ""),
    fix=lambda desk: desk.patch.setenv("HF_TOKEN", SECRET),
)


def preferences(desk: Desk) -> None:
    """A run of DPO, whose base is changed later."""
    desk.take("answers")
    path = Path("answers/config.yaml")
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"task": "preference", "base": "decoder"}))
    base = {"checkpoint": str(Path(FIFTH).resolve()), "manifest_sha256": MergedCheckpoint(Path(FIFTH)).manifest_sha256}
    desk.write("answers/base.json", json.dumps(base))
    desk.lines("in.jsonl", {"prompt": "red", "chosen": "apple", "rejected": "stone"})
    edit(FIFTH, state={"tokens": 1})


copied_in(
    CASES,
    "a_base_that_has_changed",
    " is not the base that ",
    "restore that base from a copy",
    "decoder",
    preferences,
    "bigtx evaluate answers wandb=off data=in.jsonl",
)

# W&B.


def without_server(desk: Desk) -> None:
    """W&B takes what it is sent."""
    desk.patch.setattr(wandb, "require_server", lambda: None)
    desk.patch.setattr(wandb, "_copy", lambda folder, *_: wandb.Result(str(folder), "sent", "id", sent=3))


for name, advice, right in (
    ("a_folder_without_a_run", "name the run_dir of a training", "runs/mine"),
    ("a_folder_of_folders_without_a_run", "a folder that contains such folders", "runs"),
):
    again(
        name,
        " is not a run: it has no wandb_task.json; ",
        "=" + advice,
        "bigtx wandb sync empty --dry-run",
        f"bigtx wandb sync {right} --dry-run",
        before=lambda desk: (Path("empty").mkdir(), recorded("runs/mine")),
    )


def sent(desk: Desk) -> Outcome:
    with desk.as_user():
        return desk.run("bigtx wandb sync mine")


again(
    "a_run_to_send_that_is_read_only",
    "wandb cannot be written: Permission denied; ",
    "make the run folder and its files writable",
    sent,
    before=lambda desk: (without_server(desk), recorded("mine"), read_only("mine")),
    fix=writable,
)
again(
    "a_run_to_send_whose_task_is_damaged",
    "wandb_task.json is damaged; ",
    COPY,
    sent,
    before=lambda desk: (without_server(desk), recorded("mine"), damage("mine/wandb_task.json")(desk)),
    fix=restore,
)
again(
    "a_run_to_send_that_is_trained_further",
    "wandb_task.json is damaged; ",
    "train the run further, which writes it again",
    sent,
    before=lambda desk: (without_server(desk), recorded("mine"), damage("mine/wandb_task.json")(desk)),
    fix=lambda desk: recorded("mine"),
)


def followed(report: str, *, is_closed: bool) -> Callable[[Desk], Outcome]:
    """What a training says of a process for W&B that prints a report and a reason, and ends."""
    code = f"import sys; sys.stdin.readline(); print({report!r}); print('no memory', file=sys.stderr)"

    def follow(desk: Desk) -> Outcome:
        start, said = subprocess.Popen, list[str]()
        with desk.patch.context() as patch:
            patch.setattr(
                subprocess, "Popen", lambda _, **options: start([sys.executable, "-S", "-c", code], **options)
            )
            run = WandbRun(desk.folder / "mine", {"mode": "online"}, said.append, lambda *_, **facts: None)
        while not is_closed and not said:
            run.poll()
            time.sleep(0.01)
        run.close("finished")
        return Outcome(False, "\n".join(said))

    return follow


def why(desk: Desk) -> Outcome:
    """The log that the message names."""
    log = desk.folder / "mine/logs/wandb.log"
    return Outcome(log.read_text() != "no memory\n", "")


def send_later(desk: Desk) -> None:
    without_server(desk)
    recorded("mine")


ENDED = followed("", is_closed=False)
FAILED = followed('{"error": "CommError"}', is_closed=True)
ERROR = "W&B failed (CommError); the last data may be missing there; see "
for name, shown, step in (
    ("a_process_for_wandb_that_ended", "its process ended; see ", ENDED),
    ("a_failure_of_wandb_at_the_end", ERROR, FAILED),
):
    again(name, shown, r"(?:; see )(\S+wandb\.log)", step, why, before=send_later)


@CASES.case(ERROR, r"To send it: (bigtx wandb sync \S+)$")
def what_wandb_lacks_at_the_end(desk: Desk) -> Attempt:
    send_later(desk)
    return lambda words: FAILED(desk)
