"""Ranks that are stopped, hang or die: who is named, what is written, and that a slow run is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import forks
import pytest
from doors import (
    BF16,
    ROOT,
    TINY,
    all_pids,
    environment,
    free_port,
    has_saved,
    losses,
    pretrain,
    rank_pids,
    read_lines,
    start_pretrain,
    wait_for,
)

pytestmark = pytest.mark.dist
SLOW = pytest.mark.slow
SCRIPT = str(ROOT / "tests" / "waiting_rank.py")
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run folder, none of whose processes is left."""
    yield tmp_path / "run"
    for pid in all_pids(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)


def arguments(corpus: Path, run_dir: Path, timeout: str, *changes: str) -> list[str]:
    own = [f"data.sources.a.path={corpus}", f"run_dir={run_dir}", f"engine.timeout={timeout}"]
    return [*TINY, *BF16, *own, "train.checkpoint_every=2 steps", *changes]


def waiting(place: str, rank: int, seconds: float, words: Sequence[str], ranks: int) -> subprocess.Popen[str]:
    """Start a training in which one rank waits."""
    return forks.start(
        [sys.executable, SCRIPT, place, str(rank), str(seconds), *words, f"--ranks={ranks}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(),
    )


def stacks(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / "stacks" / f"rank-{rank:05d}.txt").read_text()


def end_of(process: subprocess.Popen[str], run_dir: Path, status: int = 1) -> str:
    """Wait until it has ended with all its processes. Returns what it printed as errors."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert rank_pids(run_dir) == [] and "Traceback" not in out + err
    return err


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=SLOW)])
def test_a_stopped_rank_is_named_and_all_end(corpus: Path, run_dir: Path, victim: int) -> None:
    process = start_pretrain(*arguments(corpus, run_dir, "5 s"), "train.max_steps=100000", ranks=2)
    wait_for(lambda: has_saved(run_dir, 3), process)
    os.kill(rank_pids(run_dir)[victim], signal.SIGSTOP)
    err = end_of(process, run_dir)
    assert err.startswith(f"LaunchError: rank {victim} on ") and " is stopped in step " in err, err
    assert "no progress within 5 s (engine.timeout)" in err and "the state T" in err
    assert "\nThe same command resumes from the last checkpoint, step-0" in err and err.count("Error") == 1
    assert f"rank {1 - victim} waited for it" in err
    assert "State:\tT (stopped)" in stacks(run_dir, victim) and "loop.py" in stacks(run_dir, 1 - victim)


@SLOW
@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_of_another_launcher_is_named_and_all_end(corpus: Path, run_dir: Path, victim: int) -> None:
    words = [*arguments(corpus, run_dir, "10 s"), "train.max_steps=100000"]
    process = start_pretrain(*words, ranks=2, launcher=True)
    wait_for(lambda: has_saved(run_dir, 3), process)
    os.kill(rank_pids(run_dir)[victim], signal.SIGSTOP)
    out, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None) and rank_pids(run_dir) == []
    said = [line for line in (out + err).splitlines() if "did not answer within engine.timeout=10 s, in step" in line]
    assert len(said) == 1 and f"LaunchError: rank {victim} on " in said[0] and "(stopped: state T)" in said[0], (
        out + err
    )
    assert "The same command resumes from the last checkpoint, step-0" in said[0]
    assert "State:\tT (stopped)" in stacks(run_dir, victim) and "loop.py" in stacks(run_dir, 1 - victim)


def test_a_rank_whose_data_do_not_arrive_is_named(corpus: Path, run_dir: Path) -> None:
    words = arguments(corpus, run_dir, "4 s", "train.max_steps=1000")
    err = end_of(waiting("data", 1, 600, words, 2), run_dir)
    assert err.startswith("LaunchError: rank 1 on ") and "waiting for data" in err, err
    assert "its data do not arrive at tests/waiting_rank.py" in err and "rank 0 waited for it" in err
    assert "slow_rows" in stacks(run_dir, 1) and "wait_for_ranks" in stacks(run_dir, 0)


@SLOW
def test_a_rank_that_hangs_in_a_forward_pass_is_named(corpus: Path, run_dir: Path) -> None:
    words = arguments(corpus, run_dir, "4 s", "train.max_steps=1000")
    err = end_of(waiting("forward", 1, 600, words, 2), run_dir)
    assert err.startswith("LaunchError: rank 1 on ") and "in step 5, in the forward pass" in err, err
    assert " in slow_loss" in err and "slow_loss" in stacks(run_dir, 1), err


@pytest.mark.parametrize("is_launched", [False, pytest.param(True, marks=SLOW)])
def test_a_single_process_that_hangs_ends(corpus: Path, run_dir: Path, is_launched: bool) -> None:
    words = arguments(corpus, run_dir, "4 s", "train.max_steps=1000")
    if is_launched:
        launch = [*DEEPSPEED, str(free_port()), SCRIPT, "forward", "0", "600", *words, "train.global_batch_size=16"]
        launch[4] = "1"
        process = subprocess.Popen(
            launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment()
        )
        out, err = process.communicate(timeout=120)
        assert process.returncode not in (0, None) and rank_pids(run_dir) == []
    else:
        err = out = end_of(waiting("forward", 0, 600, words, 1), run_dir)
    assert "LaunchError: rank 0 on " in out + err and "in the forward pass: no progress within 4 s" in out + err
    assert "he same command" in out + err and "slow_loss" in stacks(run_dir, 0)


@pytest.mark.parametrize("place", [pytest.param("validation", marks=SLOW), "first forward"])
def test_what_takes_longer_than_the_time_out_is_no_hang(corpus: Path, run_dir: Path, place: str) -> None:
    changes = ["train.max_steps=3", "validation.every=3 steps", "validation.max_sequences=16"]
    seconds = 4.0 if place == "first forward" else 0.9  # For each of 8 batches.
    process = waiting(place, 0, seconds, arguments(corpus, run_dir, "2 s", *changes), 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "finished: 3 steps" in out, out + err
    assert not (run_dir / "logs" / "stacks").exists()


def test_a_killed_rank_ends_all_and_is_named_with_what_it_did(corpus: Path, run_dir: Path) -> None:
    process = start_pretrain(*arguments(corpus, run_dir, "2 min"), "train.max_steps=100000", ranks=2)
    wait_for(lambda: has_saved(run_dir, 3), process)
    os.kill(rank_pids(run_dir)[1], signal.SIGKILL)
    err = end_of(process, run_dir, 137)
    assert err.startswith("LaunchError: rank 1 on ") and "was ended after step " in err and " by SIGKILL" in err
    assert "resumes from the last checkpoint, step-0" in err


@SLOW
def test_a_slow_rank_is_named_and_the_results_are_unchanged(corpus: Path, tmp_path: Path, run_dir: Path) -> None:
    changes = ["train.max_steps=12", "train.log_every=2 steps"]
    process = waiting("each forward", 1, 0.1, arguments(corpus, run_dir, "2 min", *changes), 2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert out.count("is slow: it needs") == 1 and "warning: rank 1 on " in out, out
    (event,) = [line for line in read_lines(run_dir / "events.jsonl") if line["kind"] == "slow_rank"]
    assert event["rank"] == 1 and event["ratio"] > 1.5 and event["where"] == "computing"
    lines = read_lines(run_dir / "metrics.jsonl")
    slowest = [line["perf/slowest_rank"] for line in lines if "perf/slowest_rank" in line]
    assert len(slowest) == 6 and slowest[-1] == 1.0, slowest
    straight = tmp_path / "straight"
    assert pretrain(*arguments(corpus, straight, "2 min", *changes), ranks=2).returncode == 0
    assert losses(run_dir) == losses(straight)
