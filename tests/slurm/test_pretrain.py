"""Pretraining under SLURM: two nodes with two ranks each, on the real scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from clusters import Cluster
from doors import ROOT, TINY, last_step, losses, pretrain, read_lines, same_weights

pytestmark = pytest.mark.slurm
STEPS = 30
SCRIPT = str(ROOT / "slurm" / "pretrain.sbatch")


def settings(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    own = [f"data.sources.a.path={corpus}", "model.dropout=0.1", f"train.max_steps={STEPS}", f"run_dir={run_dir}"]
    return [*TINY, *own, "train.checkpoint_every=1000 steps", *more]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks of one machine that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = pretrain(*settings(corpus, run_dir), ranks=4)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_a_run_that_is_asked_to_stop_is_requeued_and_loses_nothing(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit("--nodes=2", SCRIPT, *settings(corpus, run_dir), "--ranks=2")
    cluster.wait_for(lambda: last_step(run_dir) >= 5, number=job)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), cluster.logs()
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)
