"""What befalls a run: lost ranks, full and read-only disks, kills during a save, a loss that is not finite."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from doors import (
    BF16,
    TINY,
    Mount,
    has_saved,
    last_step,
    losses,
    pretrain,
    rank_pids,
    read_lines,
    start_pretrain,
    wait_for,
)

from bigtx.engine.checkpoint import Checkpoint, list_checkpoints, preferred, read_manifest, step_of

pytestmark = pytest.mark.dist

DIVERGING = "optimizer.learning_rate=1e30"


def run_of(corpus: Path, run_dir: Path, *changes: str) -> list[str]:
    return [*TINY, f"data.sources.a.path={corpus}", f"run_dir={run_dir}", *changes]


@contextmanager
def killed_afterwards(process: subprocess.Popen[str], run_dir: Path) -> Iterator[None]:
    """Leave nothing of a run behind."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in rank_pids(run_dir):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_run_of_another_launcher_with_one_message(
    corpus: Path, tmp_path: Path, victim: int
) -> None:
    run_dir = tmp_path / "run"
    arguments = run_of(corpus, run_dir, "train.checkpoint_every=5 steps", "engine.zero_stage=2")
    process = start_pretrain(*arguments, "train.max_steps=100000", ranks=2, launcher=True)
    with killed_afterwards(process, run_dir):
        wait_for(lambda: has_saved(run_dir, 6), process)
        os.kill(rank_pids(run_dir)[victim], signal.SIGKILL)
        out, err = process.communicate(timeout=30)
        assert process.returncode != 0
        assert rank_pids(run_dir) == []
    assert (out + err).count("LaunchError: lost the connection to another rank") == 1, out + err
    assert "Traceback" not in out + err
    saved = list_checkpoints(run_dir)[0]
    step = int(saved.name.removeprefix("step-"))
    done = pretrain(*arguments, f"train.max_steps={step + 2}", "allow_changes=[train.max_steps]", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from {saved}" in done.stdout
    assert sorted(losses(run_dir)) == list(range(1, step + 3))


def test_a_loss_that_is_never_finite_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = ["schedule.warmup=0 steps", "train.max_skipped_steps=3", "train.checkpoint_every=3 steps"]
    arguments = run_of(corpus, run_dir, "train.max_steps=50", *changes)
    done = pretrain(*arguments, DIVERGING)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "train.max_skipped_steps" in done.stderr and "learning rate" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    skipped = [event["step"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "skipped_step"]
    assert skipped == [2, 3, 4, 5]
    # There is no checkpoint but the one of step 3. Other settings have all the steps that may be skipped.
    done = pretrain(*arguments, "optimizer.learning_rate=1e-3", "allow_changes=[optimizer.learning_rate]")
    assert done.returncode == 2 and "there is no other one" in done.stdout, done.stdout + done.stderr
    assert "4 steps in a row (up to step 7)" in done.stderr


def test_a_streak_of_skipped_steps_costs_no_good_checkpoint(corpus: Path, tmp_path: Path) -> None:
    run_dir, rate = tmp_path / "run", "optimizer.learning_rate=1e-3"
    every = ["schedule.warmup=0 steps", "train.checkpoint_every=5 steps", "train.max_skipped_steps=100"]
    allowed = "allow_changes=[optimizer.learning_rate,train.max_steps]"
    arguments = run_of(corpus, run_dir, *every, allowed)
    assert pretrain(*arguments, "train.max_steps=20", rate).returncode == 0
    done = pretrain(*arguments, "train.max_steps=40", DIVERGING)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the run is not finished: its last 19 steps" in done.stderr and "Traceback" not in done.stderr
    saved = {path.name: read_manifest(path).get("suspect", False) for path in list_checkpoints(run_dir)}
    assert saved == {f"step-{step:08d}": step > 20 for step in (15, 20, 35, 40)}
    assert [event["status"] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "end"][-1] == "failed"
    assert preferred(run_dir).name == "step-00000020"
    done = pretrain(*arguments, "train.max_steps=25", rate)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout and "step-00000020 is used" in done.stdout
    assert [path.name for path in list_checkpoints(run_dir)] == ["step-00000025", "step-00000020"]
    assert sorted(losses(run_dir)) == list(range(1, 26))


@pytest.mark.parametrize("where", ["a file", "under a file", "read-only"])
def test_a_run_dir_that_cannot_be_written(corpus: Path, tmp_path: Path, where: str, mount: Mount) -> None:
    run_dir = tmp_path / "run"
    if where == "read-only":
        mount(run_dir, "ro")
    else:
        run_dir.write_text("not a folder")
    if where == "under a file":
        run_dir = run_dir / "run"
    done = pretrain(*run_of(corpus, run_dir, "train.max_steps=2"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("LaunchError: ") and str(run_dir) in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_run_folder_that_is_moved_while_the_run_trains(corpus: Path, tmp_path: Path) -> None:
    """The run ends at once; nothing is made at the old place, and the new one resumes without loss."""
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    # So that no checkpoint is being written when the folder is moved, which would be the error.
    arguments = run_of(corpus, run_dir, "train.checkpoint_every=40 steps", *BF16)
    process = start_pretrain(*arguments, "train.max_steps=100000", ranks=2)
    with killed_afterwards(process, run_dir):
        wait_for(lambda: list_checkpoints(run_dir), process)
        run_dir.rename(moved)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and (out + err).count("LaunchError") == 1, out + err
    assert f"{run_dir} was moved to {moved}" in err and f"bigtx pretrain {moved}" in err
    assert not run_dir.exists() and [e["kind"] for e in read_lines(moved / "events.jsonl")][-2:] == ["moved", "end"]
    step = last_step(moved)
    done = pretrain(str(moved), f"train.max_steps={step + 2}", "allow_changes=[train.max_steps]", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(moved)) == list(range(1, step + 3)) and not run_dir.exists()


def test_metrics_of_a_disk_that_stays_full(corpus: Path, tmp_path: Path, mount: Mount) -> None:
    """The run makes all its steps with one warning, its status says what is missing, and the next start writes it."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    mount(run_dir, "size=1m")
    elsewhere.mkdir()
    (run_dir / "checkpoints").symlink_to(elsewhere)
    arguments = run_of(corpus, run_dir, "train.max_steps=100", "train.checkpoint_every=100 steps")
    process = start_pretrain(*arguments, ranks=1)
    with killed_afterwards(process, run_dir):
        wait_for(lambda: last_step(run_dir) >= 3, process)
        (rank,) = rank_pids(run_dir)
        os.kill(rank, signal.SIGSTOP)
        with suppress(OSError), (run_dir / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.kill(rank, signal.SIGCONT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 2, out + err
    assert (out + err).count("warning: cannot write") == 1 and "Traceback" not in out + err
    assert "of metrics.jsonl" in err and "repeat the command" in err and len(losses(run_dir)) < 100
    (run_dir / "filler").unlink()
    done = pretrain(*arguments)
    assert done.returncode == 0 and "the run is finished" in done.stdout, done.stdout + done.stderr
    assert list(losses(run_dir)) == list(range(1, 101))


@pytest.mark.slow
def test_a_full_disk_spares_the_checkpoint_before(corpus: Path, tmp_path: Path, mount: Mount) -> None:
    run_dir = tmp_path / "run"
    mount(run_dir / "checkpoints", "size=3m")  # A checkpoint takes 2 MB.
    arguments = run_of(corpus, run_dir, "train.max_steps=12", "train.checkpoint_every=4 steps")
    done = pretrain(*arguments, ranks=2)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "warning: the checkpoint of step 8 was not written: a checkpoint needs" in done.stdout
    assert done.stderr.count("CheckpointError") == 1 and "the disk of" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert Checkpoint(run_dir / "checkpoints" / "step-00000004").verify() == []
    subprocess.run(["mount", "-o", "remount,size=20m", str(run_dir / "checkpoints")], check=True)
    done = pretrain(*arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    straight = tmp_path / "straight"
    assert pretrain(*run_of(corpus, straight, "train.max_steps=12"), ranks=2).returncode == 0
    assert losses(run_dir) == losses(straight)


def test_a_write_that_fails_in_the_background_ends_the_run_with_one_message(corpus: Path, tmp_path: Path) -> None:
    """After a stop request in the middle of another save, whose checkpoint and the next one are both whole."""
    run_dir = tmp_path / "run"
    arguments = run_of(corpus, run_dir, "train.checkpoint_every=2 steps", "train.max_steps=100000", *BF16)
    process = start_pretrain(*arguments, ranks=2)
    with killed_afterwards(process, run_dir):
        wait_for_save(run_dir, process)
        os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    saved = list_checkpoints(run_dir)
    assert saved[0].name == f"step-{last_step(run_dir):08d}" and not list((run_dir / "checkpoints").glob("*.partial"))
    assert all(Checkpoint(path).verify() == [] for path in saved)

    process = start_pretrain(*arguments, ranks=2)
    with killed_afterwards(process, run_dir):
        wait_for(lambda: last_step(run_dir) > step_of(saved[0]) + 2, process)
        for pid in rank_pids(run_dir):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.count("CheckpointError: the checkpoint was not written") == 1 and "File too large" in err, out + err
    assert "Traceback" not in out + err and rank_pids(run_dir) == []
    saved = list_checkpoints(run_dir)
    assert Checkpoint(saved[0]).verify() == [] and not list((run_dir / "checkpoints").glob("*.partial"))
    assert step_of(saved[0]) < last_step(run_dir) <= step_of(saved[0]) + 4, "at the latest before the save after it"


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(corpus: Path, tmp_path: Path) -> None:
    run_dir, straight = tmp_path / "run", tmp_path / "straight"
    changes = ["train.max_steps=60", "train.checkpoint_every=4 steps", "model.hidden_size=192", "model.num_layers=4"]
    assert pretrain(*run_of(corpus, straight, *changes), ranks=2).returncode == 0
    arguments, in_the_middle = run_of(corpus, run_dir, *changes), 0
    for _ in range(4):
        process = start_pretrain(*arguments, ranks=2)
        with killed_afterwards(process, run_dir):
            begin = last_step(run_dir)
            wait_for(lambda begin=begin: last_step(run_dir) > begin + 4, process)
            wait_for_save(run_dir, process)
            time.sleep(random.uniform(0, 0.05))
        in_the_middle += any((run_dir / "checkpoints").glob("*.partial"))
        for path in list_checkpoints(run_dir):
            assert Checkpoint(path).verify() == []
        assert last_step(run_dir) - int(list_checkpoints(run_dir)[0].name.removeprefix("step-")) <= 8
    assert in_the_middle, "no kill fell into a save: the test tests nothing"
    done = pretrain(*arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("resumed from .*step-", done.stdout)
    assert losses(run_dir) == losses(straight)
    assert len(list_checkpoints(run_dir)) == 2 and not list((run_dir / "checkpoints").glob("*.partial"))


def wait_for_save(run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Return as soon as a checkpoint is being written."""
    while process.poll() is None:
        if any((run_dir / "checkpoints").glob("*.partial")):
            return
        time.sleep(0.001)
    raise AssertionError("the run ended first")
