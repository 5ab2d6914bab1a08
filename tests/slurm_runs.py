"""Runs of the tests on a SLURM cluster: their settings, how they are started, and what must be true at their end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from clusters import Cluster
from doors import BF16, ROOT, TINY, all_pids, has_saved, losses, pretrain, read_lines, same_weights

STEPS = 30
SCRIPTS = ROOT / "slurm"


def settings(corpus: Path, run_dir: Path, *more: str, ranks: int = 2) -> list[str]:
    """What the command of a pretraining is given.

    Args:
        ranks: of each node.
    """
    own = [f"data.sources.a.path={corpus}", "model.dropout=0.1", f"train.max_steps={STEPS}", f"run_dir={run_dir}"]
    quiet = ["train.checkpoint_every=5 steps", *BF16]
    return [*TINY, *own, *quiet, *more, f"--ranks={ranks}"]


def run_straight(corpus: Path, run_dir: Path, *more: str, ranks: int = 4) -> Path:
    """The same run by ranks of one machine that nothing disturbs."""
    done = pretrain(*settings(corpus, run_dir, *more)[:-1], ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def submit_started(cluster: Cluster, words: Sequence[str], run_dir: Path, step: int = 7) -> int:
    """Submit a job whose run has made some steps."""
    job = cluster.submit(*words)
    cluster.wait_for(lambda: has_saved(run_dir, step), number=job)
    return job


def started(cluster: Cluster, corpus: Path, run_dir: Path, *more: str) -> int:
    """A job of two nodes with two ranks each that has made some steps."""
    words = ["--nodes=2", str(SCRIPTS / "pretrain.sbatch"), *settings(corpus, run_dir, *more)]
    return submit_started(cluster, words, run_dir)


def check_finished(cluster: Cluster, job: int, run_dir: Path, straight: Path) -> None:
    """The job has ended well, and the run is as if nothing had happened."""
    end = cluster.wait_for_end(job)
    assert end["JobState"] == "COMPLETED", cluster.logs()
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)
    assert all_pids(run_dir) == []


def events(run_dir: Path, kind: str, key: str) -> list[str]:
    """A field of all events of a kind."""
    return [event[key] for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]


def pids_with(word: str) -> list[int]:
    """The processes whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def name_of(pid: int) -> str:
    """A process's name; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def environment_of(pid: int) -> dict[str, str]:
    """What a process was given as its environment."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
