"""`bigtx wandb sync` against a server double: each step arrives once, whatever happened before."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_wandb import GUARD_SECONDS, KEY, dead_url, read_jsonl, run_program, steps
from wandb_double import WandbDouble

from bigtx.config.schema import TrackConfig
from bigtx.track import Tracker
from bigtx.track.wandb_run import make_run_id

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def settings(folder: Path, url: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    own |= {"PATH": path, "HOME": str(folder.parent), "PYTHONPATH": str(ROOT)}
    return own | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}


def start_sync(*words: str | Path, url: str, **changes: str) -> subprocess.Popen[str]:
    return forks.start(
        [sys.executable, "-m", "bigtx", "wandb", "sync", *map(str, words)],
        env=settings(Path(words[0]), url) | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sync(*words: str | Path, url: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """`bigtx wandb sync WORDS`, to its end."""
    process = start_sync(*words, url=url, **changes)
    out, err = process.communicate(timeout=GUARD_SECONDS)
    assert "Traceback" not in out + err, out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def offline_run(folder: Path, last_step: int) -> dict[str, bytes]:
    """The files of a run that W&B has not seen, and their contents."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {
        "run_config": {"model": {"hidden_size": 8}},
        "environment": {},
        "better": {"loss": "lower"},
    }
    tracker = Tracker(folder, TrackConfig(wandb="off"), **facts, rank=0, total_steps=last_step)
    for step in range(1, last_step + 1):
        tracker.log(step, step * 100, {"train/loss": 1 / step})
    tracker.close("finished")
    make_run_id(folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def go_back(folder: Path, whole: dict[str, bytes], step: int) -> None:
    """Leave of the run's files what was there at a step."""
    for name, text in whole.items():
        lines = [line for line in text.splitlines(keepends=True) if json.loads(line)["step"] <= step]
        lines = [line for line in lines if json.loads(line).get("kind") != "end"]
        (folder / name).write_bytes(b"".join(lines))


def test_a_run_is_sent_as_it_grows_and_no_step_twice(folder: Path) -> None:
    whole = offline_run(folder, 12)
    segment = folder / "wandb" / "offline-run-1" / "run-1.wandb"
    segment.parent.mkdir(parents=True)
    segment.touch()
    with WandbDouble() as server:
        for step in (5, 9):
            go_back(folder, whole, step)
            assert sync(folder.parent, "--changed", url=server.url).returncode == 0
            (run,) = server.runs.values()
            assert steps(run.history) == list(range(1, step + 1))
        assert sync(folder.parent, "--changed", url=server.url).stdout == ""
        for name, text in whole.items():
            (folder / name).write_bytes(text)
        (line,) = json.loads(sync(folder, "--json", "--dry-run", url=dead_url()).stdout)
        assert (line["status"], line["last_step"], line["waiting"]) == ("planned", 9, 3)
        (line,) = json.loads(sync(folder, "--json", url=server.url).stdout)
        assert (line["status"], line["sent"], line["last_step"], line["waiting"]) == ("sent", 3, 12, 0)
        again = sync(folder, url=server.url)
        assert "W&B has every step already" in again.stdout
    assert segment.with_suffix(".wandb.synced").exists(), "`wandb sync` skips it"
    (run_id,) = server.runs
    assert run_id == (folder / "wandb_run_id").read_text().strip() == line["wandb_run_id"]
    assert steps(run.history) == [line["step"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert run.exit_codes == [1, 1, 0, 0]
    assert run.config["model"]["value"] == {"hidden_size": 8}
    assert KEY.encode() not in (folder / "wandb_task.json").read_bytes()


def test_a_sync_that_is_killed_half_way(folder: Path) -> None:
    offline_run(folder, 40)
    with WandbDouble() as server:
        server.most_steps = 1
        process = start_sync(folder, url=server.url)
        deadline = time.monotonic() + GUARD_SECONDS
        while not server.silent and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        server.most_steps, server.silent = None, False
        assert sync(folder, url=server.url).returncode == 0
    (run,) = server.runs.values()
    assert steps(run.history) == list(range(1, 41)) and run.exit_codes[-1] == 0


def test_a_run_whose_wandb_failed_or_was_off(folder: Path, tmp_path: Path) -> None:
    """W&B cannot be imported during the training; another run turns W&B off. Both are sent in one command."""
    off = folder.parent / "off"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text("raise RuntimeError('broken on purpose')")
    folder.parent.mkdir()
    run_program(folder, last_step=20, step_seconds=0.1, env={"PYTHONPATH": f"{broken}:{ROOT}"})
    command = [sys.executable, str(ROOT / "tests/track/program.py")]
    options = json.dumps({"folder": str(off), "last_step": 7, "wandb": "off"})
    subprocess.run([*command, options], env=settings(folder, dead_url()), check=True, stdout=subprocess.DEVNULL)
    assert not (off / "wandb").exists()
    with WandbDouble() as server:
        done = sync(folder, off, "--json", url=server.url)
        assert done.returncode == 0, done.stderr
    sent = {Path(line["run"]): line for line in json.loads(done.stdout)}
    for path, last in ((folder, 20), (off, 7)):
        run_id = (path / "wandb_run_id").read_text().strip()
        assert sent[path]["wandb_run_id"] == run_id and sent[path]["sent"] == last
        assert steps(server.runs[run_id].history) == list(range(1, last + 1))


def test_what_the_command_refuses(folder: Path, tmp_path: Path) -> None:
    """Each in one paragraph, with status 2."""
    offline_run(folder, 3)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for place in (nothing, tmp_path / "gone"):
        done = sync(place, url=dead_url())
        assert done.returncode == 2 and done.stderr.startswith("ConfigError: ") and str(place) in done.stderr
    refused = {
        "does not answer": sync(folder, url=dead_url()),
        "wandb login": sync(folder, url=dead_url(), WANDB_API_KEY=""),
        "unset WANDB_MODE": sync(folder, url=dead_url(), WANDB_MODE="offline"),
    }
    for text, done in refused.items():
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
    with WandbDouble() as server:
        run_id = (folder / "wandb_run_id").read_text().strip()
        server.deleted.add(run_id)
        done = sync(folder, url=server.url)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--new" in done.stderr, done.stderr
        assert sync(folder, "--new", url=server.url).returncode == 0
        (new,) = server.runs
        assert new != run_id and new == (folder / "wandb_run_id").read_text().strip()
        (folder / "wandb_run_id").write_bytes(b"\xff\0")
        assert sync(folder, url=server.url).returncode == 0 and list(server.runs) == [new]
        (folder / "wandb_task.json").write_bytes(b"\xff\0")
        done = sync(folder, url=server.url)
        assert done.returncode == 2 and "wandb_task.json is damaged" in done.stderr


def test_the_last_step_of_a_run_that_owes_a_measurement_is_sent_with_it(folder: Path) -> None:
    whole = offline_run(folder, 5)
    lines = [line for line in whole["events.jsonl"].splitlines(keepends=True) if json.loads(line)["kind"] != "end"]
    end = {"step": 5, "time": 1.0, "kind": "end", "status": "stopped", "owes_validation": True}
    (folder / "events.jsonl").write_bytes(b"".join(lines) + json.dumps(end).encode() + b"\n")
    with WandbDouble() as server:
        (line,) = json.loads(sync(folder, "--json", url=server.url).stdout)
        (run,) = server.runs.values()
        assert (line["sent"], line["waiting"], steps(run.history)) == (4, 1, [1, 2, 3, 4])
        *before, last = read_jsonl(folder / "metrics.jsonl")
        text = "".join(json.dumps(record) + "\n" for record in [*before, last | {"validation/loss": 0.5}])
        (folder / "metrics.jsonl").write_text(text)
        (folder / "events.jsonl").write_bytes(whole["events.jsonl"])
        assert sync(folder, url=server.url).returncode == 0
        assert steps(run.history) == [1, 2, 3, 4, 5] and run.history[-1]["validation/loss"] == 0.5


def test_a_run_that_its_own_training_sends_is_left_alone(folder: Path) -> None:
    offline_run(folder, 3)
    (folder / "wandb").mkdir()
    with WandbDouble() as server, (folder / "wandb" / ".online.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = sync(folder, url=server.url)
    assert done.returncode == 0 and "already" in done.stdout and server.runs == {}


@pytest.mark.slow
def test_the_loop_goes_on_until_it_is_asked_to_end(folder: Path) -> None:
    whole = offline_run(folder, 6)
    with WandbDouble() as server:
        go_back(folder, whole, 3)
        loop = subprocess.Popen(
            [str(ROOT / "slurm" / "wandb-sync.sh"), str(folder.parent)],
            env=settings(folder, server.url) | {"BIGTX_SYNC_SECONDS": "0.1"},
        )

        def wait_for_steps(last: int) -> None:
            deadline = time.monotonic() + GUARD_SECONDS
            while time.monotonic() < deadline:
                runs: list[Any] = list(server.runs.values())
                if runs and steps(runs[0].history) == list(range(1, last + 1)):
                    return
                time.sleep(0.05)
            raise AssertionError([steps(run.history) for run in server.runs.values()])

        try:
            wait_for_steps(3)
            for name, text in whole.items():
                (folder / name).write_bytes(text)
            wait_for_steps(6)
            loop.send_signal(signal.SIGTERM)
            assert loop.wait(GUARD_SECONDS) == 0
        finally:
            loop.kill()
