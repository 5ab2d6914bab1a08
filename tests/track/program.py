"""A small training program for the tests of tracking: one JSON argument says what it does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from bigtx.config.schema import TrackConfig
from bigtx.track import Tracker


def kill_core(folder: Path, number: int) -> None:
    """Send a signal to W&B's own process, the child of a follower."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-2:] == ["bigtx.track.follower", str(folder)]:
                (core,) = (child for child in process.children() if child.name().startswith("wandb-core"))
                core.send_signal(number)
                return
    raise AssertionError("no follower")


def fill_disk(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def mode_of(tracker: Tracker) -> str:
    return tracker._wandb.mode if tracker._wandb else "off"


def wait_for_mode(tracker: Tracker) -> None:
    while not mode_of(tracker):
        time.sleep(0.05)
        tracker.progress(0, 0, {})


def main() -> None:
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"]).resolve()
    folder.mkdir(exist_ok=True)
    first = options.get("resumed_step", 0)
    tracker = Tracker(
        folder,
        TrackConfig(wandb=options.get("wandb", "auto"), tags=["a tag"], group="a group"),
        run_config={"model": {"hidden_size": 8}, **options.get("config", {})},
        environment={"python": "3"},
        rank=0,
        total_steps=options["last_step"],
        better={"loss": "lower"},
        resumed_step=first,
        job_type=options.get("job_type", "pretrain"),
        base=options.get("base"),
        stream=sys.stdout,
    )
    if first:
        tracker.event(first, "resume")
    for step in range(first + 1, options["last_step"] + 1):
        if step == options.get("wait_at"):
            wait_for_mode(tracker)
        if step == options.get("kill_core_at"):
            assert not psutil.Process().children(recursive=True), "the follower is a descendant"
            kill_core(folder, signal.SIGKILL)
        if step == options.get("stop_core_at"):
            kill_core(folder, signal.SIGSTOP)
        if step == options.get("fill_at"):
            fill_disk(folder)
        if step == options.get("hush_at"):
            Path(options["hush_file"]).touch()
        time.sleep(options.get("step_seconds", 0.0))
        tracker.log(step, step * 100, {"train/loss": 1 / step, "train/grad_norm": 0.1 + 0.2})
        tracker.progress(step, step * 100, {"train/loss": 1 / step})
        if step % 5 == 0:
            tracker.log(step, step * 100, {"validation/books/loss": 2 / step})
            rows = [{"prompt": "def ", "completion": "f(x):\n  é"}, {"prompt": "a", "completion": str(step)}]
            tracker.samples(step, step * 100, rows)
            if options.get("predict"):
                prediction = {"label": "joy", "probabilities": {"joy": 0.75, "woe": 0.25}}
                row = {"record": "a.jsonl, line 1", "input": "A text.", "answer": "woe", **prediction}
                tracker.predictions(step, step * 100, [row])
    if options.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if options.get("model"):
        tracker.model(options["last_step"], Path(options["model"]), "the-manifest-hash")
    started = time.monotonic()
    tracker.close(options.get("status", "finished"))
    print(f"CLOSED {mode_of(tracker)} {time.monotonic() - started:.3f}")


if __name__ == "__main__":
    main()
