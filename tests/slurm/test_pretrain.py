"""Pretraining under SLURM: two nodes with two ranks each, on the real scheduler."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster
from doors import ROOT, TINY, all_pids, last_step, losses, pretrain, rank_pids, read_lines, same_weights

pytestmark = pytest.mark.slurm
STEPS = 30
SCRIPT = str(ROOT / "slurm" / "pretrain.sbatch")


def settings(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    own = [f"data.sources.a.path={corpus}", "model.dropout=0.1", f"train.max_steps={STEPS}", f"run_dir={run_dir}"]
    quiet = ["train.checkpoint_every=5 steps", "track.wandb=off"]
    return [*TINY, *own, *quiet, "--ranks=2", *more]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks of one machine that nothing disturbed."""
    return run_straight(corpus, tmp_path_factory.mktemp("straight") / "run")


def run_straight(corpus: Path, run_dir: Path, *more: str) -> Path:
    arguments = [each for each in settings(corpus, run_dir, *more) if each != "--ranks=2"]
    done = pretrain(*arguments, ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def events(run_dir: Path, kind: str, key: str) -> list[str]:
    return [event[key] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]


def started(cluster: Cluster, corpus: Path, run_dir: Path, *more: str) -> int:
    """A job of two nodes that has made some steps."""
    job = cluster.submit("--nodes=2", SCRIPT, *settings(corpus, run_dir, *more))
    cluster.wait_for(lambda: last_step(run_dir) >= 7, number=job)
    return job


def check_finished(cluster: Cluster, job: int, run_dir: Path, straight: Path) -> None:
    """The job has ended well, and the run is as if nothing had happened."""
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED", cluster.logs()
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)
    assert all_pids(run_dir) == []


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
    return min(pid for pid in all_pids(run_dir) if _name(pid) == "srun")


def batch_pid(run_dir: Path) -> int:
    return min(pid for pid in all_pids(run_dir) if _name(pid) in ("bash", "slurm_script"))


def supervisor_pids(run_dir: Path) -> list[int]:
    return sorted(pid for pid in all_pids(run_dir) if _name(pid) == "bigtx")


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


VICTIMS: dict[str, Callable[[Path], int]] = {
    "batch": batch_pid,
    "srun": srun_pid,
    "supervisor 0": lambda run_dir: supervisor_pids(run_dir)[0],
    "supervisor 1": lambda run_dir: supervisor_pids(run_dir)[1],
    "rank": lambda run_dir: rank_pids(run_dir)[-1],
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
def test_after_a_kill_of_the_batch_shell_nothing_is_left_and_another_job_resumes(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path
) -> None:
    job = started(cluster, corpus, tmp_path / "run")
    os.kill(batch_pid(tmp_path / "run"), signal.SIGKILL)
    assert cluster.wait_for_end(job)["JobState"] == "FAILED"
    cluster.wait_for(lambda: all_pids(tmp_path / "run") == [], timeout=60)
    job = cluster.submit("--nodes=2", SCRIPT, *settings(corpus, tmp_path / "run"))
    check_finished(cluster, job, tmp_path / "run", straight)
