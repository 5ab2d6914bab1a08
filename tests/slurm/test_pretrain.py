"""Pretraining under SLURM: two nodes with two ranks each, on the real scheduler."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster
from doors import all_pids, last_step
from slurm_runs import SCRIPTS, check_finished, events, name_of, run_straight, settings, started

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks of one machine that nothing disturbed."""
    return run_straight(corpus, tmp_path_factory.mktemp("straight") / "run")


def test_a_run_that_is_asked_to_stop_is_requeued_and_loses_nothing(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path
) -> None:
    job = started(cluster, corpus, tmp_path / "run")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    check_finished(cluster, job, tmp_path / "run", straight)
    assert events(tmp_path / "run", "end", "status") == ["stopped", "finished"]
    assert events(tmp_path / "run", "start", "slurm_job") == [str(job)] * 2
    assert events(tmp_path / "run", "start", "slurm_restart") == ["0", "1"]
    logs = cluster.logs()
    assert "4 ranks on 2 machines, started by srun" in logs and "resumed from" in logs


@pytest.mark.slow
def test_all_is_sharded(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    straight = run_straight(corpus, tmp_path / "straight", "engine.zero_stage=3")
    job = started(cluster, corpus, tmp_path / "run", "engine.zero_stage=3")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    check_finished(cluster, job, tmp_path / "run", straight)


def srun_pid(run_dir: Path) -> int:
    """The srun that the batch script started; its helper process is younger."""
    return min(pid for pid in all_pids(run_dir) if name_of(pid) == "srun")


def batch_pid(run_dir: Path) -> int:
    return min(pid for pid in all_pids(run_dir) if name_of(pid) in ("bash", "slurm_script"))


def supervisor_pids(run_dir: Path) -> list[int]:
    return sorted(pid for pid in all_pids(run_dir) if name_of(pid) == "bigtx")


VICTIMS: dict[str, Callable[[Path], int]] = {
    "batch": batch_pid,
    "srun": srun_pid,
    "supervisor 0": lambda run_dir: supervisor_pids(run_dir)[0],
    "supervisor 1": lambda run_dir: supervisor_pids(run_dir)[1],
    "rank": lambda run_dir: max(pid for pid in all_pids(run_dir) if name_of(pid).startswith("bigtx rank")),
}


def check_survives(cluster: Cluster, corpus: Path, straight: Path, run_dir: Path, victim: str, number: str) -> None:
    """A run of which a process gets a signal ends as one that nobody disturbed."""
    job = started(cluster, corpus, run_dir)
    os.kill(VICTIMS[victim](run_dir), signal.Signals[number])
    check_finished(cluster, job, run_dir, straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    # SLURM's srun answers SIGTERM by killing its tasks: see below.
    [(name, number) for name in VICTIMS for number in ("SIGTERM", "SIGUSR1") if (name, number) != ("srun", "SIGTERM")],
)
def test_a_request_to_any_process_is_one_checkpoint(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path, victim: str, number: str
) -> None:
    check_survives(cluster, corpus, straight, tmp_path / "run", victim, number)
    assert events(tmp_path / "run", "end", "status") == ["stopped", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [*((name, "SIGKILL") for name in ("srun", "supervisor 0", "supervisor 1", "rank")), ("srun", "SIGTERM")],
)
def test_after_a_kill_the_job_is_requeued(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path, victim: str, number: str
) -> None:
    check_survives(cluster, corpus, straight, tmp_path / "run", victim, number)
    assert "crashed with status" in cluster.logs() and "Traceback" not in cluster.logs()


@pytest.mark.slow
def test_all_lives_are_one_run_of_wandb(cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = started(cluster, corpus, run_dir, "track.wandb=offline")
    os.kill(VICTIMS["rank"](run_dir), signal.SIGKILL)
    cluster.wait_for(lambda: len(events(run_dir, "start", "step")) == 2 and last_step(run_dir) >= 10, number=job)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    check_finished(cluster, job, run_dir, straight)
    lives = list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    assert len(lives) == 3 and {path.name for path in lives} == {f"run-{run_id}.wandb"}


@pytest.mark.slow
def test_the_clock_of_slurm_asks_for_a_requeue(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """A real time limit, in SLURM's unit, minutes; it looks at its clock every half of one."""
    run_dir = tmp_path / "run"
    words = ["--nodes=2", "--time=2", "--signal=B:USR1@20", str(SCRIPTS / "pretrain.sbatch")]
    job = cluster.submit(*words, *settings(corpus, run_dir, "train.max_steps=100000"))
    cluster.wait_for(lambda: events(run_dir, "end", "status"), timeout=180)
    cluster.wait_for(lambda: len(events(run_dir, "start", "step")) == 2, number=job)
    ended = events(run_dir, "end", "step")[0]
    cluster.wait_for(lambda: last_step(run_dir) > int(ended), number=job)
    assert events(run_dir, "end", "status") == ["stopped"] and int(ended) > 0
    assert events(run_dir, "start", "step") == [0, ended]
    assert cluster.job(job)["Restarts"] == "1" and "requeued" in cluster.logs()


@pytest.mark.slow
def test_after_a_kill_of_the_batch_shell_nothing_is_left_and_another_job_resumes(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path
) -> None:
    job = started(cluster, corpus, tmp_path / "run")
    os.kill(batch_pid(tmp_path / "run"), signal.SIGKILL)
    assert cluster.wait_for_end(job)["JobState"] == "FAILED"
    cluster.wait_for(lambda: all_pids(tmp_path / "run") == [], timeout=60)
    job = cluster.submit("--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *settings(corpus, tmp_path / "run"))
    check_finished(cluster, job, tmp_path / "run", straight)
